"""The training state, and one jitted step around a readable loss."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from efficient_vlm import sharding
from efficient_vlm.errors import UserError
from efficient_vlm.models import init as initial
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import Output, VisionLanguageModel
from efficient_vlm.train.losses import ratio, token_cross_entropy
from efficient_vlm.train.state_layout import StateLayout

State = dict[str, Any]  # params, opt, step, skipped, and ema if it is on


def init_params(models: Sequence[VisionLanguageModel], seed: int) -> Any:
    """Parameters, with logical axes, that serve every one of `models`; see `make_init`."""
    return make_init(models)(jax.random.key(seed))


def make_init(models: Sequence[VisionLanguageModel]) -> Callable[[jax.Array], Any]:
    """From a key to parameters, with logical axes, that serve every one of `models`; jitted.

    Args:
      models: one model at several budgets or compressors.
    """

    @jax.jit
    def init(key):
        params = {}
        for model in models:
            params = _union(params, initial.init_params(model, key))
        return params

    return init


def _union(first: Any, second: Any) -> Any:
    if not isinstance(first, dict) or not isinstance(second, dict):
        return first
    return {
        key: _union(first[key], second[key])
        if key in first and key in second
        else first.get(key, second.get(key))
        for key in [*first, *(k for k in second if k not in first)]
    }


def init_state(params: Any, tx: optax.GradientTransformation, *, ema: bool = False) -> State:
    """A fresh state from parameters (with or without their logical axes)."""
    params = nn.unbox(params)
    state = {
        "params": params,
        "opt": jax.jit(tx.init)(params),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }
    if ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def loss_fn(
    model: VisionLanguageModel,
    params: Any,
    inputs: ModelInputs,
    rng: jax.Array,
    aux: Mapping[str, float],
) -> tuple[jax.Array, dict[str, Any]]:
    """The sum of token losses, plus router losses weighted so that their mean is what counts.

    Args:
      model: the model at one budget.
      params: its parameters.
      inputs: with labels.
      rng: key for random compressors.
      aux: weights of "load_balance", "router_z", "selector" and "penalty".

    Returns:
      A scalar to divide by the number of targets, and metrics as (sum, denominator).

    Raises:
      UserError: inputs without labels.
    """
    if inputs.labels is None:
        raise UserError("inputs.labels: None", fix="give the token that each place is to predict")
    return losses_of(model.apply({"params": params}, inputs, rng=rng), inputs, aux)


def losses_of(
    out: Output, inputs: ModelInputs, aux: Mapping[str, float]
) -> tuple[jax.Array, dict[str, Any]]:
    """The losses of a forward pass; see `loss_fn`."""
    metrics = token_cross_entropy(out.logits, inputs.labels)
    total, targets = metrics["loss"]
    for name, weight in aux.items():
        if name in out.stats:
            if name == "penalty" and inputs.penalty_scale is not None:
                weight = weight * inputs.penalty_scale
            # Routing is balanced per micro-batch: a ratio of its own, weighted by its targets.
            total += weight * targets * ratio(out.stats[name]).mean()
    return total, {**metrics, **out.stats}


def make_train_step(
    model: VisionLanguageModel,
    tx: optax.GradientTransformation,
    *,
    seed: int = 0,
    accumulate: int = 1,
    aux: Mapping[str, float] | None = None,
    ema: float | None = None,
    layout: StateLayout | None = None,
    objective: Callable | None = None,
    frozen: Any = None,
    penalty_ramp: float = 0,
) -> Callable[[State, ModelInputs], tuple[State, dict[str, jax.Array]]]:
    """A jitted step(state, inputs) -> (state, metrics) for one budget; the state is donated.

    A step whose loss or gradient norm is not finite leaves parameters, optimizer and average as
    they were, and counts in `skipped`.

    Args:
      model: the model at one budget.
      tx: the optimizer.
      seed: of random compressors.
      accumulate: micro-batches per step; they divide the rows of text and of pictures. The gradient
        is that of the mean over all targets of the step, however they are spread over the
        micro-batches.
      aux: weights of router losses.
      ema: decay of an average of the parameters kept in state["ema"]; None for none.
      layout: where the state lies; batches are then those of all devices. None for one device.
      objective: (parameters, frozen, inputs, rng) -> what `loss_fn` returns, in its place.
      frozen: what it reads beside the state: parameters that are not trained.
      penalty_ramp: steps over which the weight of "penalty" grows to that in `aux`.

    Returns:
      The step. Like a jitted function it has `lower(state, inputs)`, of shapes with their
      shardings.
    """
    aux = dict(aux or {})

    def of_labels(params, frozen, inputs, rng):
        return loss_fn(model, params, inputs, rng, aux)

    loss = objective or of_labels

    def accumulated(params, frozen, inputs, rng, scale):
        def gradient(params, inputs, rng):
            if scale is not None:
                inputs = inputs.replace(penalty_scale=scale)
            return jax.value_and_grad(loss, has_aux=True)(params, frozen, inputs, rng)

        if accumulate == 1:
            return gradient(params, inputs, rng)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), inputs)
        keys = jax.random.split(rng, accumulate)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, part[0], part[1])), None

        first = jax.tree.map(lambda x: x[0], (parts, keys))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype),
            jax.eval_shape(gradient, params, first[0], first[1]),
        )
        return jax.lax.scan(add, zeros, (parts, keys))[0]

    def step(state, inputs, frozen):
        rng = jax.random.fold_in(jax.random.key(seed), state["step"])
        scale = jnp.minimum((state["step"] + 1) / penalty_ramp, 1) if penalty_ramp else None
        (_, metrics), grads = accumulated(state["params"], frozen, inputs, rng, scale)
        targets = jnp.maximum(metrics["loss"][1], 1)
        grads = jax.tree.map(lambda g: g / targets, grads)
        norm = optax.tree.norm(grads)
        ok = jnp.isfinite(norm) & jnp.isfinite(ratio(metrics["loss"]))

        # A branch, not a select: XLA would copy all moments before it overwrites them.
        def updated(held, grads):
            updates, opt = tx.update(grads, held["opt"], held["params"])
            new = {"params": optax.apply_updates(held["params"], updates), "opt": opt}
            if ema is not None:
                new["ema"] = optax.incremental_update(new["params"], held["ema"], 1 - ema)
            return new

        held = {k: state[k] for k in ("params", "opt", "ema") if k in state}
        new = jax.lax.cond(ok, updated, lambda held, grads: held, held, grads)
        new["step"] = state["step"] + 1
        new["skipped"] = state["skipped"] + jnp.where(ok, 0, 1)
        load = metrics.pop("expert_load", None)
        scalars = {name: ratio(pair).mean() for name, pair in metrics.items()}
        if load is not None:
            scalars["expert_load"] = load[0] / jnp.maximum(load[1], 1)[:, None]
        return new, {**scalars, "grad_norm": norm, "ok": ok}

    if layout is None and frozen is None:
        return jax.jit(lambda state, inputs: step(state, inputs, None), donate_argnums=0)
    if layout is None:
        compiled = jax.jit(step, donate_argnums=0)
        return _Bound(compiled, frozen, contextlib.nullcontext, lambda inputs: inputs)
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    # Without them the state of the second step would lie elsewhere, and be compiled for again.
    shardings = (layout.state, everywhere)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return _Bound(
        compiled,
        frozen,
        functools.partial(sharding.active, layout.mesh),
        functools.partial(sharding.global_batch, mesh=layout.mesh),
    )


class _Bound:
    """A jitted step(state, inputs, frozen) as one of (state, inputs), on the devices of a mesh."""

    def __init__(self, compiled: Any, frozen: Any, active: Callable, placed: Callable):
        self._compiled, self._frozen, self._active, self._placed = compiled, frozen, active, placed
        self._cache_size = compiled._cache_size

    def __call__(self, state: State, inputs: ModelInputs) -> tuple:
        with self._active():
            return self._compiled(state, self._placed(inputs), self._frozen)

    def lower(self, state: State, inputs: ModelInputs) -> Any:
        """As of a jitted function."""
        with self._active():
            return self._compiled.lower(state, inputs, self._frozen)
