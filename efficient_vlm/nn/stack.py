"""Stacks of identical layers: parameters stacked for training or split for inference."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import Scope
from jax import lax
from jaxtyping import Float

from efficient_vlm.errors import unknown
from efficient_vlm.nn.linear import intercepted
from efficient_vlm.shapes import Array

# Names of stacks among parameters: of encoders and decoders, and of those layers of a decoder that
# are dense where the others are mixtures of experts.
STACKS = {"layers", "dense_layers"}


def stack_layers(block: type[nn.Module], length: int, inputs: int) -> type[nn.Module]:
    """`block` with the parameters of `length` layers, stacked on axis 0 (logical axis "layers").

    It is called once to create them; `LayerStack` runs any range of the layers.

    Args:
      block: a module whose call is (x, *inputs) -> (x, anything).
      length: number of layers.
      inputs: number of inputs besides x, which all layers share.
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
    """Layers whose parameters are created split, in the form of `unstack`.

    For libraries that must visit each layer at initialisation: qwix quantises these, not stacks.

    Attributes:
      block: the class of a layer, called (x, *inputs) -> (x, anything).
      length: number of layers.
      fields: of the block.
    """

    block: type[nn.Module]
    length: int
    fields: Mapping[str, Any]

    @nn.compact
    def __call__(
        self, x: Float[Array, "*tokens D"], *inputs: Any
    ) -> tuple[Float[Array, "*tokens D"], None]:
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
    """The module that creates the parameters of identical layers."""
    if stacked:
        return stack_layers(block, length, inputs)(**fields, name=name)
    return SplitLayers(block, length, fields, name=name)


def unstack(params: Any) -> Any:
    """Parameters with every stack of layers split into one tree per layer, for inference.

    A loop over a stack copies each layer's weights out of it, which takes a CPU as long as the
    products of a few tokens. With split weights, prefill of 128 tokens is a fifth faster and
    decoding twice as fast. Programs grow (the loop is unrolled), so training keeps the stacks.

    Args:
      params: as from `init`, without logical axes; split parameters are returned unchanged.
    """
    if not isinstance(params, Mapping):
        return params
    split = {name: unstack(value) for name, value in params.items()}
    for name in STACKS & set(split):
        if not is_split(split[name]):
            count = jax.tree.leaves(split[name])[0].shape[0]
            split[name] = {str(i): layer_of(split[name], i) for i in range(count)}
    return split


def restack(params: Any) -> Any:
    """The inverse of `unstack`; stacked parameters are returned unchanged."""
    if not isinstance(params, Mapping):
        return params
    whole = {name: restack(value) for name, value in params.items()}
    for name in STACKS & set(whole):
        if is_split(whole[name]):
            layers = [whole[name][str(i)] for i in range(len(whole[name]))]
            whole[name] = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    return whole


def is_split(layers: Any) -> bool:
    """Whether parameters of layers are split (`unstack`), not stacked."""
    return "0" in layers


def layer_of(layers: Any, index: int) -> Any:
    """The parameters of one layer of stacked or split parameters."""
    return layers[str(index)] if is_split(layers) else jax.tree.map(lambda p: p[index], layers)


def rematerialised(function: Callable, remat: str) -> Callable:
    """`function`, whose backward pass recomputes "none", "full" (everything) or "dots" (everything
    but matrix products)."""
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
    """Identical layers with their parameters, bound at their paths in the module tree.

    A layer is a module bound to a scope with the path of its parameters. Interceptors of module
    calls (`flax.linen.intercept_methods`, qwix) therefore see `language/layers/query` for stacked
    layers and `language/layers/3/query` for split ones.

    Args:
      block: a module without a parent.
      params: of all layers, stacked on a leading axis (run by a scan) or split by `unstack` (run by
        an unrolled loop).
      path: of `params` in the tree.
      remat: see `rematerialised`.
      unroll: layers per loop iteration; the number of layers removes the loop, best on CPUs.
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

    def one(
        self, index: int, layer: Callable, x: Float[Array, "*tokens D"], *, remat: bool = True
    ) -> Any:
        """`layer(block, x)` of one layer; `remat` requires that only its result leaves it."""

        def run(params, x):
            return layer(self._bound(params, index), x)

        run = rematerialised(run, self.remat) if remat else run
        return run(layer_of(self.params, index), x)

    def run(
        self,
        layer: Callable,
        x: Float[Array, "*tokens D"],
        start: int,
        stop: int,
        inputs: Any = None,
        *,
        differentiated: bool = True,
    ) -> tuple[Float[Array, "*tokens D"], Any]:
        """Runs layers `start` to `stop` (excluded).

        Args:
          layer: (block, x, its input) -> (x, outputs).
          x: the hidden states.
          start, stop: static.
          inputs: a tree with a leading axis over these layers, or None; for split layers a list
            with one tree per layer.
          differentiated: False slices the layers out of the whole stack one by one; True copies the
            range first, so that the gradient is no larger than the range.

        Returns:
          x after the last layer, and the outputs with a leading axis over these layers; a list of
          outputs for split layers.
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
        # With interceptors each layer is traced at its own path; otherwise once for all.
        once = None if intercepted() else _traced_once(at(start))
        outputs = []
        for index in range(start, stop):
            own = None if inputs is None else inputs[index - start]
            x, output = (once or at(index))(x, (layer_of(self.params, index), own))
            outputs.append(output)
        return x, outputs

    def _bound(self, params: Any, index: int) -> nn.Module:
        path = (*self.path, str(index)) if self.split else self.path
        return self.block.clone(parent=Scope({"params": params}, name=path[-1], path=path))


def _traced_once(body: Callable) -> Callable:
    """`body` of (x, item), traced and lowered once for all layers.

    Tracing and lowering dominate the start-up of cached programs. Leaves of the item that are not
    arrays stay static, as they would be in `body`.
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
