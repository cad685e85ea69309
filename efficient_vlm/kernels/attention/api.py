"""`attention`: the one entry behind every attention layer, whichever implementation computes it.

  reference  the whole map, by definition and plain autodiff; float64 in float64. Small problems.
  xla        blocks of the map in plain XLA, O(N) memory: CPUs, and GPUs without a kernel.
  tpu        Pallas (Mosaic): blocks that hold nothing are neither fetched nor computed.
  gpu        Pallas (Mosaic GPU) for Hopper.
  cudnn      cuDNN's. Beside an explicit choice, on a Hopper where nothing is masked but the future,
             lengths are even and there are no bias, cap and weights: there it trains faster.

With `implementation=None` the choice is made when the program is lowered, not when it is traced, so
that a program compiled for a TPU on a CPU host gets the kernels of the TPU. Programs for a GPU get
`gpu` where this process, or the mesh that is set, has a Hopper and `xla` else: a program for CUDA
does not say for which it is.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Float, Int, Real

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.kernels.attention import checks, reference, xla
from efficient_vlm.kernels.attention.mask import Mask, check_mask, make_mask, mask_rows
from efficient_vlm.kernels.attention.parts import (
    devices_of,
    importance_on_mesh,
    is_explicit,
    on_mesh,
)
from efficient_vlm.kernels.attention.platforms import only_on
from efficient_vlm.kernels.manual import alike
from efficient_vlm.shapes import Array

__all__ = ["IMPLEMENTATIONS", "AttentionResult", "attention", "attention_importance"]

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu", "cudnn")

# Up to this many logits on a device, or of small heads, blocks cost more than they save.
_FEW_LOGITS, _FEW_LOGITS_OF_SMALL_HEADS = 2**20, 2**22
_SMALL_HEAD = 2**16
_HOPPERS = ("H100", "H200")


class AttentionResult(NamedTuple):
    """What `attention` gives.

    Attributes:
      out: [B, H, N, Dv] in the dtype of v; 0 in rows that see no key.
      lse: float32 [B, H, N], natural logarithm of the sum of exponentials of the logits; +inf in
        rows that see no key, so that exp(logit - lse) is 0 there. None with
        `implementation="cudnn"`.
      importance: float32 [B, M], or None where no weights were given.
    """

    out: Float[Array, "B H N Dv"]
    lse: Float[Array, "B H N"] | None
    importance: Float[Array, "B M"] | None


def attention(
    q: Float[Array, "B H N D"],
    k: Float[Array, "B Hk M D"],
    v: Float[Array, "B Hk M Dv"],
    *,
    scale: float | None = None,
    causal: bool = False,
    q_positions: Real[Array, "... N"] | None = None,
    kv_positions: Real[Array, "... M"] | None = None,
    q_segments: Int[Array, "... N"] | None = None,
    kv_segments: Int[Array, "... M"] | None = None,
    prefix_length: Int[Array, "..."] | int | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "#B M"] | None = None,
    q_lengths: Int[Array, " B"] | None = None,
    kv_lengths: Int[Array, " B"] | None = None,
    importance_weights: Float[Array, "B weighted"] | None = None,
    importance_rows: Int[Array, "B weighted"] | None = None,
    mask: Mask | None = None,
    implementation: str | None = None,
) -> AttentionResult:
    """Softmax attention with grouped keys over tokens of which some are merged and some are gone.

    Logits, in this order: s = scale q.k; s = c tanh(s / c) with `softcap` c; s += key_bias of the
    key; s = -inf where the mask hides the key. Logits, softmax and sums are float32 (float64 for
    float64). The backward pass computes the logits again: memory is O(N + M), beside a map of at
    most 16 MiB, or of one query, where that is faster (under `vmap` one for each call). Gradients
    flow through `out`, `lse` and `importance` to q, k, v, key_bias and the weights; second ones
    with "reference" only.

    Args:
      q: [B, H, N, D], bfloat16, float16, float32 or float64.
      k, v: [B, Hk, M, D] and [B, Hk, M, Dv] in the dtype of q; H a multiple of Hk. Absent keys may
        hold anything whose products with q and with the cotangent of `out` are finite.
      scale: multiplies the logits; None for D ** -0.5.
      causal, q_positions, kv_positions, q_segments, kv_segments, prefix_length, window, q_lengths,
        kv_lengths: what is seen, see `mask.make_mask`.
      softcap: see above (arXiv 2408.00118), above 0.
      key_bias: float [B, M], or [1, M]: log n makes a merged token count as its n (ToMe,
        arXiv 2210.09461, equation 1), exactly as n copies of the key and value would. Above -1e4:
        a row that sees keys of -1e9 alone has a float32 lse without the digits that gradients and
        importance need. What is not there (log 0) is hidden by the mask, `kv_live` of `make_mask`.
      importance_weights: float [B, N], not negative, one for each query row; asks for
        importance[b, j] = mean over heads of sum_i weights[b, i] P[b, h, i, j].
      importance_rows: int [B, R], the query rows that `importance_weights`, then [B, R], are for:
        O(R M) instead of a second pass over the map.
      mask: made before by `make_mask`, in place of its arguments.
      implementation: one of IMPLEMENTATIONS; None for the best one where the program runs.

    Raises:
      UserError: shapes that do not fit, an unknown implementation, or one that cannot serve this.
    """
    q, k, v = (checks.arrays(x)[0] if isinstance(x, list) else x for x in (q, k, v))
    told = (key_bias, importance_weights, importance_rows)
    key_bias, importance_weights, importance_rows = checks.arrays(*told)
    checks.attention(q, k, v, key_bias, importance_weights, importance_rows)
    shapes = dict(
        causal=causal,
        q_positions=q_positions,
        kv_positions=kv_positions,
        q_segments=q_segments,
        kv_segments=kv_segments,
        prefix_length=prefix_length,
        window=window,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
    )
    given = [name for name, x in shapes.items() if x is not None and x is not False]
    if mask is not None and given:
        raise UserError(f"attention: mask and {given[0]} are both given", fix="leave one out")
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    softcap = checks.cap(softcap)
    if key_bias is not None:
        key_bias = jnp.broadcast_to(key_bias, (q.shape[0], k.shape[2]))
    told = dict(softcap=softcap, key_bias=key_bias, weights=importance_weights)
    told["given"] = shapes if mask is None else {"mask": mask}
    implementation = _choice(implementation, q, k, v, **told)
    if implementation == "cudnn":
        names = ("causal", "window", "q_lengths", "kv_lengths")
        served = {name: shapes[name] for name in names}
        out = _module("cudnn").attend(only_on("cudnn", q), k, v, key_bias, scale=scale, **served)
        return AttentionResult(out, None, None)
    sparse = mask is not None or any(name != "causal" for name in given)
    told = (key_bias, softcap, importance_weights)
    dense = implementation is None and not sparse and all(x is None for x in told)
    # cuDNN through JAX has no gradients for odd lengths.
    dense = dense and q.shape[2] % 2 == 0 and k.shape[2] % 2 == 0
    mask = make_mask(q.shape[2], k.shape[2], **shapes) if mask is None else mask
    if mask is not None:
        check_mask(mask, q.shape[0], q.shape[2], k.shape[2])
    weights = _exact(importance_weights, q)
    q, k, v, key_bias, mask, weights = alike(q, k, v, key_bias, mask, weights)
    call = _Call(scale, softcap, implementation)
    every = weights if importance_rows is None else None
    function = functools.partial(_attend, call)
    if call.implementation == "reference":
        function = functools.partial(reference.attend, scale=scale, softcap=softcap)
    # The compiler cuts the whole map by itself, but not where axes are explicit.
    whole = call.implementation == "reference" and not is_explicit(q)
    given = (q, k, v, key_bias, mask, every)
    out, lse, importance = function(*given) if whole else on_mesh(function, *given)
    cudnn = dense and _on_hopper() and not _unserved("cudnn", q, k, v)
    if cudnn and _module("cudnn").available():
        # Where nothing is sparse cuDNN is about as fast forward and faster in training
        # (docs/kernels.md).
        # It has no lse in float32: that is ours, and no part of a program that does not use it.
        out = lax.platform_dependent(
            *(q, k, v),
            cuda=functools.partial(_module("cudnn").attend, scale=scale, causal=causal),
            default=lambda q, k, v: on_mesh(
                functools.partial(_attend, call), q, k, v, None, mask, None
            )[0],
        )
    if importance_rows is not None:
        importance = _of_rows(call, q, k, key_bias, mask, lse, weights, importance_rows)
    return AttentionResult(out, lse, importance)


def attention_importance(
    q: Float[Array, "B H N D"],
    k: Float[Array, "B Hk M D"],
    lse: Float[Array, "B H N"],
    weights: Float[Array, "B weighted"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    key_bias: Float[Array, "#B M"] | None = None,
    mask: Mask | None = None,
    rows: Int[Array, "B weighted"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B M"]:
    """The importance of keys from the lse of an attention computed before; no gradients.

    Args:
      q, k, scale, softcap, key_bias, mask, implementation: those of that call of `attention`.
      lse: what it gave, float32 [B, H, N].
      weights: float [B, N], or [B, R] with `rows`; see `attention`.
      rows: int [B, R], the query rows of the weights; None for all.

    Returns:
      float32 [B, M], mean over heads of sum_i weights[b, i] P[b, h, i, j].
    """
    if lse is None:
        raise UserError(
            "attention_importance: no lse", fix="that of `attention`, but not of cuDNN, has one"
        )
    given = checks.arrays(q, k, lse, weights, key_bias, rows)
    q, k, lse, weights, key_bias, rows = lax.stop_gradient(given)
    checks.attention(q, k, k, key_bias, weights, rows, lse=lse)
    if mask is not None:
        check_mask(mask, q.shape[0], q.shape[2], k.shape[2])
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    softcap = checks.cap(softcap)
    if key_bias is not None:
        key_bias = jnp.broadcast_to(key_bias, (q.shape[0], k.shape[2]))
    if implementation is not None:
        implementation = _choice(implementation, q, k, k, weights=weights)
    weights = _exact(weights, q)
    q, k, lse, weights, key_bias, mask = alike(q, k, lse, weights, key_bias, mask)
    call = _Call(scale, softcap, implementation)
    if rows is not None:
        return _of_rows(call, q, k, key_bias, mask, lse, weights, rows)
    function = call.importance
    if implementation == "reference":
        function = functools.partial(reference.rows, scale=scale, softcap=softcap)
        if not is_explicit(q):
            return function(q, k, key_bias, mask, lse, weights)
    return importance_on_mesh(function, q, k, key_bias, mask, lse, weights)


def _exact(weights, q):
    """Weights in the dtype of logits: their logarithms are added to it."""
    kind = jnp.promote_types(q.dtype, jnp.float32)
    return None if weights is None else jnp.asarray(weights).astype(kind)


@struct.dataclass
class _Call:
    """What is static of a call."""

    scale: float = struct.field(pytree_node=False)
    softcap: float | None = struct.field(pytree_node=False)
    implementation: str | None = struct.field(pytree_node=False)

    def run(self, pass_name: str, *args):
        """One pass, by the implementation chosen, or by that of the platform lowered for."""

        def of(name: str):
            return functools.partial(_pass(name, pass_name), scale=self.scale, softcap=self.softcap)

        if self.implementation not in (None, "xla"):
            q, *rest = args
            return of(self.implementation)(only_on(self.implementation, q), *rest)
        options = {"cpu": of("xla_looped"), "default": of("xla")}
        if self.implementation is None:
            q, k = args[:2]
            # Importance has no values: a bias, or nothing, stands in their place.
            v = args[2] if getattr(args[2], "ndim", 0) == 4 else k
            if not _unserved("tpu", q, k, v):
                options["tpu"] = of("tpu")
            if _on_hopper() and not _unserved("gpu", q, k, v):
                options["cuda"] = of("gpu")
        return lax.platform_dependent(*args, **options)

    def importance(self, q, k, key_bias, mask, lse, weights):
        """[B, M], from all rows."""
        # One number carries the normalisation of a row and its weight, and leaves out rows of
        # weight 0.
        share = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1)), -jnp.inf)
        lse = jnp.where(share[:, None] > -jnp.inf, lse - share[:, None], jnp.inf)
        return self.run("importance", q, k, key_bias, mask, lse, weights)


def _on_hopper() -> bool:
    """Whether the GPU of this process is one that the kernels are for, or where it has none, that
    of the mesh that is set: it may be described, not there."""
    if jax.default_backend() == "gpu":
        return str(getattr(jax.devices()[0], "compute_capability", "")) == "9.0"
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described is not None and any(name in described.device_kind for name in _HOPPERS)


def _pass(implementation: str, name: str):
    if implementation.startswith("xla"):
        looped = implementation == "xla_looped"
        return functools.partial(getattr(xla, name), looped=looped)
    return getattr(_module(implementation), name)


def _module(implementation: str):
    # Pallas is imported where it is used: it takes half a second.
    room = {"gpu": "hopper"}.get(implementation, implementation)
    return importlib.import_module(f"efficient_vlm.kernels.attention.{room}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call, q, k, v, key_bias, mask, weights):
    out, lse = call.run("forward", q, k, v, key_bias, mask)
    importance = None
    if weights is not None:
        importance = call.importance(q, k, key_bias, mask, lse, weights)
    return out, lse, importance


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _once(call, pass_name, *args):
    """A pass of the gradient, which has no gradient itself."""
    return call.run(pass_name, *args)


def _refuse(call, pass_name, saved, cotangents):
    raise UserError(
        "attention: a second derivative", fix="implementation='reference', which has them"
    )


_once.defvjp(lambda *args: (_once(*args), None), _refuse)


def _forward(call, *args):
    found = _attend(call, *args)
    return found, (args, found)


def _backward(call, saved, cotangents):
    (q, k, v, key_bias, mask, weights), (out, lse, _) = saved
    d_out, d_lse, d_importance = cotangents
    exact = lse.dtype
    delta = jnp.sum(d_out.astype(exact) * out.astype(exact), axis=-1)
    delta -= jnp.where(jnp.isfinite(lse), d_lse, 0)
    d_weights = gain = None
    if weights is not None:
        # Importance is attention to one more column of values, the gain, with the weights as its
        # cotangents: what a row receives of it is attention, too.
        gain = (d_importance / q.shape[1]).astype(exact)
        # Values of 16 bits: float16 has none below 6e-8, where gradients of means are.
        top = jnp.max(jnp.abs(gain), axis=-1, keepdims=True)
        top = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
        column = (gain / top)[:, None, :, None]
        column = jnp.broadcast_to(column, (*k.shape[:3], 1)).astype(v.dtype)
        received, _ = _once(call, "forward", q, k, column, key_bias, mask)
        received = received[..., 0].astype(exact) * top[..., None]
        delta += weights[:, None] * received
        d_weights = received.sum(axis=1).astype(weights.dtype)
        weights = weights.astype(exact)
    given = (q, k, v, key_bias, mask, lse, delta, d_out.astype(q.dtype), weights, gain)
    dq, dk, dv, d_bias = _once(call, "backward", *given)
    return dq, dk, dv, d_bias, None, d_weights


_attend.defvjp(_forward, _backward)


def _of_rows(call, q, k, key_bias, mask, lse, weights, rows):
    """Importance of R rows from their lse: no softmax is computed a second time."""
    some = jnp.take_along_axis(q, rows[:, None, :, None], axis=2)
    lse = jnp.take_along_axis(lse, rows[:, None], axis=2)
    mask = None if mask is None else mask_rows(mask, rows)
    function = functools.partial(reference.rows, scale=call.scale, softcap=call.softcap)
    given = (some, k, key_bias, mask, lse, weights)
    # The compiler cuts it by itself, but not where axes are explicit.
    return importance_on_mesh(function, *given) if is_explicit(q) else function(*given)


def _choice(implementation, q, k, v, **told) -> str | None:
    """The name of an implementation, or None for that of the platform."""
    if implementation is None:
        batch, heads, queries, _ = q.shape
        of_head = queries * k.shape[2]
        few = _FEW_LOGITS_OF_SMALL_HEADS if of_head < _SMALL_HEAD else _FEW_LOGITS
        few *= devices_of(q, k.shape[1])
        return "reference" if queries == 1 or batch * heads * of_head <= few else None
    if implementation not in IMPLEMENTATIONS:
        raise unknown("implementation", str(implementation), IMPLEMENTATIONS)
    if problem := _unserved(implementation, q, k, v, **told):
        able = [name for name in IMPLEMENTATIONS if not _unserved(name, q, k, v, **told)]
        raise UserError(
            f"attention: implementation {implementation!r} has no {problem}",
            allowed=", ".join(able),
            fix="implementation=None for the best one where the program runs",
        )
    return implementation


def _unserved(name: str, q, k, v, softcap=None, key_bias=None, weights=None, given=None):
    """The feature that an implementation lacks for this call, or None."""
    if name in ("reference", "xla"):
        return None
    if name == "cudnn":
        return _module(name).unserved(q, v, softcap, key_bias, weights, given or {})
    return _module(name).unserved(q, k, v)
