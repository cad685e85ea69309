"""Equal layers: parameters stacked for training, split for inference, run over any stretch."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import Scope
from jax import lax

from efficient_vlm.errors import unknown
from efficient_vlm.nn.linear import intercepted

# Names of stacks among parameters: the encoder's, the decoder's, and those of its layers that are
# dense where the others are mixtures of experts.
STACKS = {"layers", "segment_0", "dense_layers"}


def stack_layers(block: type[nn.Module], length: int, inputs: int) -> type[nn.Module]:
    """`block` with the parameters of `length` layers, stacked on axis 0 (logical axis "layers").

    It is called once, to create them; `LayerStack` runs any stretch of the layers.

    Args:
      block: a module whose call is (x, *inputs) -> (x, anything).
      length: number of layers.
      inputs: how many inputs beside x, the same for every layer.
    """
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * inputs,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class SplitLayers(nn.Module):
    """Layers whose parameters are split, as `unstack` would split them, from the beginning.

    For what must see each layer when parameters are created: qwix quantises these, no stacks.

    Attributes:
      block: the class of a layer, called (x, *inputs) -> (x, anything).
      length: number of layers.
      fields: of the block.
    """

    block: type[nn.Module]
    length: int
    fields: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, *inputs: Any) -> tuple[jax.Array, None]:
        for index in range(self.length):
            x, _ = self.block(**self.fields, name=str(index))(x, *inputs)
        return x, None


def make_layers(
    block: type[nn.Module],
    length: int,
    inputs: int,
    fields: Mapping[str, Any],
    name: str,
    stacked: bool = True,
) -> nn.Module:
    """The module that creates the parameters of equal layers: `stack_layers` or `SplitLayers`."""
    if stacked:
        return stack_layers(block, length, inputs)(**fields, name=name)
    return SplitLayers(block, length, fields, name=name)


def unstack(params: Any) -> Any:
    """Parameters with every stack of layers split into one tree per layer, for inference.

    A loop over a stack copies each layer's weights out of it, on a CPU as slow as multiplying a few
    tokens with them. Split once, prefill of 128 tokens is a fifth faster and decoding twice. The
    programs get longer (the loop is written out), so training keeps its stacks.

    Args:
      params: as `init` gives them, without logical axes; already split ones come back unchanged.
    """
    if not isinstance(params, Mapping):
        return params
    split = {name: unstack(value) for name, value in params.items()}
    for name in STACKS & set(split):
        if not is_split(split[name]):
            count = jax.tree.leaves(split[name])[0].shape[0]
            split[name] = {str(i): layer_of(split[name], i) for i in range(count)}
    return split


def is_split(layers: Any) -> bool:
    """Whether parameters of layers are split (`unstack`), not stacked."""
    return "0" in layers


def layer_of(layers: Any, index: int) -> Any:
    """The parameters of one layer, from a stack or from what `unstack` made of it."""
    return layers[str(index)] if is_split(layers) else jax.tree.map(lambda p: p[index], layers)


def rematerialised(function: Callable, remat: str) -> Callable:
    """`function`, of which the backward pass computes "none", "full" (everything) or "dots" (all
    but matrix products) again."""
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    if remat not in ("none", *policies):
        raise unknown("remat", remat, ["none", *policies])
    if remat == "none":
        return function
    return jax.checkpoint(function, prevent_cse=False, policy=policies[remat])


class LayerStack:
    """Equal layers with their parameters, each at its place in the tree of modules.

    A layer is a module bound to a scope with the path that its parameters have: whoever looks at
    modules while they run (`flax.linen.intercept_methods`, qwix) is told `language/layers/query` of
    stacked layers and `language/layers/3/query` of split ones.

    Args:
      block: a module without a parent.
      params: of all layers, stacked on a leading axis (run by a scan) or split by `unstack` (a loop
        that is written out).
      path: of `params` in the tree.
      remat: see `rematerialised`.
      unroll: layers per loop iteration; the number of layers removes the loop, which a CPU prefers.
    """

    def __init__(
        self,
        block: nn.Module,
        params: Any,
        path: Sequence[str],
        *,
        remat: str = "none",
        unroll: int = 1,
    ):
        self.block, self.params, self.path = block, params, tuple(path)
        self.remat, self.unroll, self.split = remat, unroll, is_split(params)

    def one(self, index: int, layer: Callable, x: jax.Array, *, remat: bool = True) -> Any:
        """`layer(block, x)` of one layer; `remat` only where nothing escapes it but its result."""

        def run(params, x):
            return layer(self._bound(params, index), x)

        run = rematerialised(run, self.remat) if remat else run
        return run(layer_of(self.params, index), x)

    def run(
        self,
        layer: Callable,
        x: jax.Array,
        start: int,
        stop: int,
        inputs: Any = None,
        *,
        differentiated: bool = True,
    ) -> tuple[jax.Array, Any]:
        """Runs layers `start` to `stop` (excluded).

        Args:
          layer: (block, x, its input) -> (x, outputs).
          x: what goes from layer to layer.
          start, stop: static.
          inputs: a tree with a leading axis over these layers, a slice for each, or None; for split
            layers a list with one tree for each.
          differentiated: False takes the layers of a stretch out of the whole stack one by one;
            else the stretch is copied first, for a gradient that is no larger than it.

        Returns:
          x behind the last of them, and the outputs with a leading axis over these layers; a list
          of outputs for split layers.
        """

        def at(index: int) -> Callable:
            def body(x, item):
                return layer(self._bound(item[0], index), x, item[1])

            return rematerialised(body, self.remat)

        if self.split:
            return self._run_split(at, x, start, stop, inputs)
        body, unroll = at(start), max(1, min(self.unroll, stop - start))
        whole = (start, stop) == (0, jax.tree.leaves(self.params)[0].shape[0])
        if not whole and not differentiated:

            def of_number(x, item):
                params = jax.tree.map(
                    lambda p: lax.dynamic_index_in_dim(p, item[0], keepdims=False), self.params
                )
                return body(x, (params, item[1]))

            return lax.scan(of_number, x, (jnp.arange(start, stop), inputs), unroll=unroll)
        part = self.params if whole else jax.tree.map(lambda p: p[start:stop], self.params)
        return lax.scan(body, x, (part, inputs), unroll=unroll)

    def _run_split(self, at, x, start, stop, inputs):
        # Where somebody looks, each layer is traced at its own path; else once for all.
        once = None if intercepted() else _traced_once(at(start))
        outputs = []
        for index in range(start, stop):
            given = None if inputs is None else inputs[index - start]
            x, output = (once or at(index))(x, (layer_of(self.params, index), given))
            outputs.append(output)
        return x, outputs

    def _bound(self, params: Any, index: int) -> nn.Module:
        path = (*self.path, str(index)) if self.split else self.path
        return self.block.clone(parent=Scope({"params": params}, name=path[-1], path=path))


def _traced_once(body: Callable) -> Callable:
    """`body` of (x, item), traced and lowered once for all layers alike.

    That is most of what a program that is in the compilation cache costs. What is no array in the
    item stays static, as it would be without.
    """

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def run(x, arrays, static, tree):
        leaves = [a if s is None else s for a, s in zip(arrays, static, strict=True)]
        return body(x, jax.tree.unflatten(tree, leaves))

    def call(x, item):
        leaves, tree = jax.tree.flatten(item)
        moves = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        arrays = [leaf if moved else None for leaf, moved in zip(leaves, moves, strict=True)]
        static = tuple(None if moved else leaf for leaf, moved in zip(leaves, moves, strict=True))
        return run(x, arrays, static, tree)

    return call
