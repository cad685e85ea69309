"""Equal layers: parameters stacked for training, split for inference, run over any stretch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from efficient_vlm.errors import unknown

# Names of stacks among parameters: the encoder's, the decoder's, and those of its layers that are
# dense where the others are mixtures of experts.
STACKS = {"layers", "segment_0", "dense_layers"}


def stack_layers(block: type[nn.Module], length: int, inputs: int) -> type[nn.Module]:
    """`block` with the parameters of `length` layers, stacked on axis 0 (logical axis "layers").

    It is called once, to create them; `run_layers` runs any stretch of the layers.

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


# Products of one input that `fuse` joins: new name -> the old ones.
_FUSED = {"query_key_value": ("query", "key", "value"), "gate_up": ("gate", "up")}


def fuse(params: Any) -> Any:
    """`unstack`, and kernels that multiply the same input put side by side, for inference.

    One product with a few tokens is then fewer and larger reads of weights: a fifth faster on a
    CPU. Not undone: keep the original for export.

    Args:
      params: as `init` or `unstack` give them, without logical axes.
    """
    params = unstack(params)
    if not isinstance(params, Mapping):
        return params
    return {k: _fused(v) if k in STACKS else fuse(v) for k, v in params.items()}


def _fused(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    tree = {name: _fused(value) for name, value in tree.items()}
    for new, old in _FUSED.items():
        parts = [tree.get(name) for name in old]
        if all(isinstance(part, Mapping) and "kernel" in part for part in parts):
            width = parts[0]["kernel"].shape[0]
            joined = {"kernel": [p["kernel"].reshape(width, -1) for p in parts]}
            if "bias" in parts[0]:
                joined["bias"] = [p["bias"].reshape(-1) for p in parts]
            tree = {name: value for name, value in tree.items() if name not in old}
            tree[new] = {key: jnp.concatenate(value, axis=-1) for key, value in joined.items()}
    return tree


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


def run_layers(
    layer: Callable,
    layers: Any,
    x: jax.Array,
    start: int,
    stop: int,
    inputs: Any = None,
    *,
    remat: str = "none",
    unroll: int = 1,
    differentiated: bool = True,
) -> tuple[jax.Array, Any]:
    """Runs layers `start` to `stop` (excluded).

    Args:
      layer: (parameters of one layer, x, its input) -> (x, outputs).
      layers: parameters of all layers, stacked on a leading axis (a scan) or split by `unstack` (a
        loop that is written out).
      x: what goes from layer to layer.
      start, stop: static.
      inputs: a tree with a leading axis over these layers, a slice for each, or None; for split
        layers a list with one tree for each.
      remat: see `rematerialised`.
      unroll: layers per loop iteration; the number of layers removes the loop, which a CPU prefers.
      differentiated: False takes the layers of a stretch out of the whole stack one by one; else
        the stretch is copied first, for a gradient that is no larger than it.

    Returns:
      x behind the last of them, and the outputs with a leading axis over these layers; a list of
      outputs for split layers.
    """

    def body(x, item):
        return layer(item[0], x, item[1])

    body = rematerialised(body, remat)
    if is_split(layers):
        outputs, body = [], _traced_once(body)
        for i in range(start, stop):
            given = None if inputs is None else inputs[i - start]
            x, output = body(x, (layer_of(layers, i), given))
            outputs.append(output)
        return x, outputs
    whole = (start, stop) == (0, jax.tree.leaves(layers)[0].shape[0])
    if not whole and not differentiated:

        def of_number(x, item):
            params = jax.tree.map(
                lambda p: jax.lax.dynamic_index_in_dim(p, item[0], keepdims=False), layers
            )
            return body(x, (params, item[1]))

        numbers = jnp.arange(start, stop)
        return jax.lax.scan(
            of_number, x, (numbers, inputs), unroll=max(1, min(unroll, stop - start))
        )
    part = layers if whole else jax.tree.map(lambda p: p[start:stop], layers)
    return jax.lax.scan(body, x, (part, inputs), unroll=max(1, min(unroll, stop - start)))
