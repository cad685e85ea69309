"""The layers of a decoder as functions of their parameters: any stretch, or one apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.nn.decoder_block import DecoderBlock, LayerInputs
from efficient_vlm.nn.stack import LayerStack

# Names of the stack of layers, and of that of dense layers among mixtures of experts.
LAYERS, DENSE = "layers", "dense_layers"


class DecoderStack:
    """All layers of a decoder.

    Args:
      blocks: stack name -> fields of `DecoderBlock`.
      params: stack name -> parameters of its layers, stacked or split (`stack.unstack`).
      path: of the decoder in the tree of modules.
      dense: for each layer whether it belongs to the stack DENSE.
      local: for each layer whether it is local; None if none is.
      remat, unroll: see `stack.LayerStack`.
      deepstack: [B, T, n, D], what is added to the visual tokens behind each of the first n layers
        (arXiv 2406.04334), or None.
    """

    def __init__(
        self,
        blocks: Mapping[str, Mapping[str, Any]],
        params: Mapping[str, Any],
        path: Sequence[str],
        dense: Sequence[bool],
        local: Sequence[bool] | None,
        *,
        remat: str = "none",
        unroll: int = 1,
        deepstack: jax.Array | None = None,
    ):
        self.stacks = {
            name: LayerStack(
                DecoderBlock(**fields, parent=None),
                params[name],
                (*path, name),
                remat=remat,
                unroll=unroll,
            )
            for name, fields in blocks.items()
        }
        self.dense, self.deepstack = dense, deepstack
        self.local = None if local is None else np.asarray(local)
        self.split = all(stack.split for stack in self.stacks.values())

    def run(
        self, x: jax.Array, start: int, stop: int, inputs: LayerInputs, cache: Any
    ) -> tuple[jax.Array, tuple]:
        """Layers `start` to `stop` (excluded).

        Returns:
          x, and (caches, statistics, attention) with a leading axis over the layers; caches of
          split layers are tuples.
        """
        parts = []
        for first, last in self._stretches(start, stop):
            stack, begin = self._find(first)

            def layer(block, x, item):
                cache, local = (item, False) if self.local is None else item
                x, (outputs, _) = block(x, inputs, cache, local)
                return x, outputs

            own = cache
            if cache is not None:
                own = tuple(part[first - start : last - start] for part in cache)
            local = None if self.local is None else self.local[first:last]
            each = own if local is None else (own, local)
            if stack.split:
                each = [_item(own, local, i) for i in range(last - first)]
            end = begin + last - first
            # With a cache it is inference.
            x, outputs = stack.run(layer, x, begin, end, each, differentiated=cache is None)
            outputs = _together(outputs) if stack.split else outputs
            x = self._deepened(last - 1, x)
            parts.append(outputs)
        return x, joined(parts)

    def one(self, index: int, x: jax.Array, inputs: LayerInputs, cache: Any):
        """One layer apart: x, its outputs with a leading axis of 1, what its attention saw."""
        stack, at = self._find(index)
        local = self._is_local(index)

        def layer(block, x):
            return block(x, inputs, cache, local)

        x, (outputs, seen) = stack.one(at, layer, x)
        if stack.split:
            outputs = _together([outputs])
        else:
            outputs = jax.tree.map(lambda value: value[None], outputs)
        return self._deepened(index, x), outputs, seen

    def look(self, index: int, x: jax.Array, inputs: LayerInputs, last: jax.Array):
        """Queries, keys and mask that a layer would have; see `DecoderBlock.look`."""
        stack, at = self._find(index)
        local = self._is_local(index)

        def layer(block, x):
            return block.look(x, inputs.positions, last, local)

        seen = stack.one(at, layer, x, remat=False)
        return {**seen, "mask": inputs.mask_of(local)}

    def _is_local(self, index: int) -> bool:
        return False if self.local is None else bool(self.local[index])

    def _find(self, index: int) -> tuple[LayerStack, int]:
        """Stack and place in it of a layer."""
        dense = self.dense[index]
        place = sum(d == dense for d in self.dense[:index])
        return self.stacks[DENSE if dense else LAYERS], place

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Layers that one loop can run: of one stack, with nothing to do between them."""
        deep = 0 if self.deepstack is None else self.deepstack.shape[2]
        first = start
        for index in range(start + 1, stop + 1):
            if index == stop or index <= deep or self.dense[index] != self.dense[first]:
                yield first, index
                first = index

    def _deepened(self, index: int, x: jax.Array) -> jax.Array:
        if self.deepstack is None or index >= self.deepstack.shape[2]:
            return x
        more = self.deepstack[:, :, index].astype(x.dtype)
        return x.at[:, : more.shape[1]].add(more)


def _item(cache: Any, local: Any, index: int) -> Any:
    """What one layer gets of caches and flags of several."""
    own = None if cache is None else tuple(part[index] for part in cache)
    return own if local is None else (own, local[index])


def _together(outputs: Sequence[tuple]) -> tuple:
    """Outputs of split layers: statistics stacked, caches as tuples, which costs no copy."""
    caches, stats, looks = zip(*outputs, strict=True)
    cache = None if caches[0] is None else tuple(zip(*caches, strict=True))
    stats, looks = (jax.tree.map(lambda *each: jnp.stack(each), *part) for part in (stats, looks))
    return cache, stats, looks


def joined(parts: Sequence[tuple]) -> tuple:
    """Outputs of stretches, one behind the other; dense layers have no statistics."""
    if len(parts) == 1:
        return parts[0]
    caches, stats, looks = zip(*parts, strict=True)

    def concatenate(trees):
        return jax.tree.map(lambda *each: jnp.concatenate(each), *trees)

    def behind(each):
        return sum(each, ()) if isinstance(each[0], tuple) else jnp.concatenate(each)

    cache = None if caches[0] is None else tuple(map(behind, zip(*caches, strict=True)))
    counted = [part for part in stats if part]
    return cache, concatenate(counted) if counted else {}, concatenate(looks)
