"""The layers of an encoder as they are run: any stretch, or one apart, with patches leaving."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.compressors import Signals, Stage, VisualTokens
from efficient_vlm.compressors.in_encoder.ipcv import Absent
from efficient_vlm.compressors.tokens import arranged
from efficient_vlm.kernels.attention import Mask, key_mask
from efficient_vlm.nn.intermediates import INTERMEDIATES
from efficient_vlm.nn.stack import LayerStack

_MOST_CELLS = 1 << 12  # Windows along a side: what makes one number of a row and a column of them.


class EncoderStack:
    """All layers of an encoder, and the patches that are left so far.

    Args:
      layers: the parameters, see `stack.LayerStack`.
      tokens: the patches, or None where no layer must know which are left, and where.
      stages: where a compressor shortens the sequence, in order.
      compressors: the bound modules of the stages.
      extra: tokens in front of the patches (CLS).
      rotary: whether layers turn queries and keys by the places of patches.
      window: patches along a side of the windows, or None.
      full_layers: layers that attend to everything all the same.
      padded: whether some patches are padding.
      pixels: [B, N, C], of the patches, for stages that ask for them; None for others.
    """

    def __init__(
        self,
        layers: LayerStack,
        tokens: VisualTokens | None,
        stages: Sequence[Stage],
        compressors: Sequence[nn.Module],
        *,
        extra: int,
        rotary: bool,
        window: int | None,
        full_layers: Sequence[int],
        padded: bool,
        pixels: jax.Array | None,
    ):
        self.layers, self.tokens, self.bias = layers, tokens, None
        self.stages, self.compressors = stages, compressors
        self.extra, self.rotary, self.padded = extra, rotary, padded
        self.window, self.full_layers = window, frozenset(full_layers)
        self.pixels = pixels
        self.absent: Absent | None = None  # Patches that sit out, and are put back in the end.
        self.stabilised = range(0)  # Layers in which they still give keys and values.

    def encode(
        self,
        x: jax.Array,
        depth: int,
        wanted: Mapping[str, tuple[str, int]],
        kept: Sequence[int],
        scale: float,
    ) -> tuple[jax.Array, dict[int, jax.Array], dict[str, jax.Array]]:
        """All layers, with what is asked for on the way.

        Args:
          x: [B, extra + N, D].
          depth: layers to run.
          wanted: what to call it -> (intermediate, layer).
          kept: layers whose outputs are wanted.
          scale: of the attention logits.

        Returns:
          x behind the last layer, of the patches that are left if `kept` asks for layers; layer ->
          output; the intermediates.
        """
        depth = min([depth, *(s.layer for s in self.stages if s.module.ends_encoder)])
        kept = [(at, min(at + 1, depth)) for at in kept]  # With the layers that run up to there.
        inside = {stage.layer: i for i, stage in enumerate(self.stages) if stage.inside}
        before = [(stage.layer, i) for i, stage in enumerate(self.stages) if not stage.inside]
        # Of a layer in front of a cut: signal of the cut -> (intermediate, layer).
        observed = {
            (at, signal): (what, at - 1)
            for at, i in before
            for signal, what in self.compressors[i].observes.items()
        }
        looked_at = {layer for _, layer in (*wanted.values(), *observed.values())} | set(inside)
        outputs: dict[int, jax.Array] = {}
        intermediates: dict[Any, jax.Array] = {}
        done = 0
        stops = looked_at | {at for at, _ in before} | {behind for _, behind in kept}
        for layer in sorted(stops):
            x = self.run(x, done, layer)
            done = layer
            outputs |= {at: self.whole(x) for at, behind in kept if behind == layer}
            for index in (i for at, i in before if at == layer):
                told = {
                    signal: intermediates.pop((at, signal))[:, self.extra :]
                    for at, signal in observed
                    if at == layer
                }
                x = self._reduce(index, x, Signals(**told, pixels=self.pixels), outputs)
            if layer in looked_at:
                x, seen = self.one(layer, x, inside.get(layer), outputs)
                done = layer + 1
                for name, (what, at) in (*wanted.items(), *observed.items()):
                    if at == layer:
                        intermediates[name] = INTERMEDIATES[what](x, seen, scale)
        x = self.run(x, done, depth)
        return x if kept else self.whole(x), outputs, intermediates

    def whole(self, x: jax.Array) -> jax.Array:
        """x with the patches that sit out."""
        if self.absent is None:
            return x
        every = self.absent.whole(x[:, self.extra :])
        return jnp.concatenate([x[:, : self.extra], every], axis=1)

    def run(self, x: jax.Array, start: int, stop: int) -> jax.Array:
        """Layers `start` to `stop` (excluded), as loops over those that attend alike."""
        for first, last in self._stretches(start, stop):
            if first in self.stabilised:
                x = self.one(first, x)[0]
                continue
            where = self._places(first)

            def layer(block, x, _, where=where):
                return block(x, self.bias, **where)[0], None

            x = self.layers.run(layer, x, first, last)[0]
        return x

    def one(
        self,
        index: int,
        x: jax.Array,
        stage: int | None = None,
        outputs: dict[int, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """One layer apart, with the compressor of a stage between its halves: x and what its
        attention saw; the stage acts on earlier `outputs`, too."""
        merge = None
        if stage is not None:

            def merge(x, inner):
                signals = Signals(keys=inner["key"][:, self.extra :])
                return self._reduce(stage, x, signals, outputs)

        where, bias = self._places(index), self.bias
        if index in self.stabilised:
            where |= self._context(index, x)

        def layer(block, x):
            return block(x, bias, merge, **where)

        # Without a merge nothing escapes the layer, so it can be computed again.
        before = x
        x, seen = self.layers.one(index, layer, x, remat=merge is None)
        return x, {
            **seen,
            "live": self._live(self.tokens) if self.padded else None,
            "before": before,
        }

    def _reduce(
        self, index: int, x: jax.Array, signals: Signals, outputs: dict[int, jax.Array]
    ) -> jax.Array:
        """x with fewer patches; a cut takes those that leave out of earlier `outputs`, too."""
        patches = self.tokens.replace(embed=x[:, self.extra :])
        method = self.compressors[index]
        if method.ends_encoder:
            return x
        if method.whole_grid:
            layer, slots = self.stages[index].layer, method.slots(patches, signals)
            self.absent = method.absent(patches, slots)
            self.stabilised = range(layer, layer + method.stabilised)
            self.tokens = arranged(patches, slots)
        elif method.of_units:
            self.tokens, reduced = method.reduced(patches, signals)
            self.padded |= method.leaves_padding
            for layer, output in outputs.items():
                left = reduced(output[:, self.extra :])
                outputs[layer] = jnp.concatenate([output[:, : self.extra], left], axis=1)
        else:
            self.tokens = method(patches, signals)
        if getattr(self.compressors[index], "proportional", False):
            self.bias = jnp.pad(self.tokens.log_sizes(), ((0, 0), (self.extra, 0)))
        return jnp.concatenate([x[:, : self.extra], self.tokens.embed], axis=1)

    def _places(self, layer: int) -> dict[str, Any]:
        """Positions and mask of the tokens that are left, in this layer."""
        if not (self.rotary or self.window is not None or self.padded):
            return {}
        window = None if layer in self.full_layers else self.window
        return dict(
            positions=self.tokens.position if self.rotary else None, mask=self._mask(window)
        )

    def _context(self, layer: int, x: jax.Array) -> dict[str, Any]:
        """Keys and values of all patches in front of the cut, for those that are left."""
        window = None if layer in self.full_layers else self.window
        patches = self.absent.tokens
        return dict(
            context=self.whole(x),
            context_positions=patches.position if self.rotary else None,
            mask=self._mask(window, patches),
        )

    def _mask(self, window: int | None, keys: VisualTokens | None = None) -> Mask | None:
        """Which tokens see which; None if all see all. Windows are cells of the plane.

        Args:
          window: patches along a side, or None.
          keys: what the tokens look at; None for themselves.
        """
        if window is None and not self.padded:
            return None
        keys = self.tokens if keys is None else keys
        mask = key_mask(self._live(keys), self.extra + self.tokens.mask.shape[1])
        if window is None:
            return mask

        def cells(position):
            cell = jnp.floor(position / window).astype(jnp.int32)
            return cell[..., 0] * _MOST_CELLS + cell[..., 1]

        queries, keys = cells(self.tokens.position), cells(keys.position)
        return mask.replace(q_segment=queries, kv_segment=keys)

    def _live(self, tokens: VisualTokens) -> jax.Array:
        """bool [B, extra + N], which tokens are no padding."""
        return jnp.pad(tokens.mask, ((0, 0), (self.extra, 0)), constant_values=True)

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Layers that one loop can run: all in windows, or all with full attention."""
        first = start
        for index in range(start + 1, stop + 1):
            changes = index < stop and (index in self.full_layers) != (first in self.full_layers)
            apart = bool({first, index} & set(self.stabilised))
            if index == stop or apart or (self.window is not None and changes):
                yield first, index
                first = index
