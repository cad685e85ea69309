"""`attention`: the one entry point of every attention layer, for all implementations.

  reference  the whole map, by definition and with plain autodiff; float64 stays. Small problems.
  xla        blocks of the map in plain XLA, O(N) memory: CPUs, and GPUs without a kernel.
  tpu        Pallas (Mosaic): empty blocks are neither fetched nor computed.
  gpu        Pallas (Mosaic GPU) for Hopper.
  cudnn      cuDNN's. By explicit choice, and by default on Hopper with at most a causal mask, even
             lengths and no bias, cap or weights, because training is faster there.

With `implementation=None` the choice is made when the program is lowered, not when it is traced, so
that a program compiled for a TPU on a CPU host gets the TPU kernels. A program for CUDA does not
say for which GPU it is: it gets `gpu` if this process, or the current mesh, has a Hopper GPU, else
`xla`.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Float, Int, Real

from efficient_vlm.errors import UserError, short, unknown
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

# Up to this many logits on a device (the second number for small heads) blocks cost more than they
# save.
_FEW_LOGITS, _FEW_LOGITS_OF_SMALL_HEADS = 2**20, 2**22
_SMALL_HEAD = 2**16
_HOPPERS = ("H100", "H200")


class AttentionResult(NamedTuple):
    """Result of `attention`.

    Attributes:
      out: [B, H, N, Dv] in the dtype of v; 0 in rows that see no key.
      lse: float32 [B, H, N], natural logarithm of the sum of exponentials of the logits; +inf in
        rows that see no key, so that exp(logit - lse) is 0. None with `implementation="cudnn"`.
      importance: float32 [B, M]; None without weights.
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
    """Softmax attention with grouped keys over tokens of which some are merged or dropped.

    Logits, in this order: s = scale q.k; s = c tanh(s / c) with `softcap` c; s += key_bias of the
    key; s = -inf where the mask hides the key. Logits, softmax and sums are float32 (float64 for
    float64). The backward pass recomputes the logits: memory is O(N + M), plus a map of at most
    16 MiB, or of one query, where that is faster (under `vmap` one for each call). Gradients flow
    through `out`, `lse` and `importance` to q, k, v, key_bias and the weights, in reverse mode.
    Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.linearize`) and second derivatives need
    implementation="reference", whatever the number of tokens: JAX refuses them for the others with
    a TypeError or this package with a UserError.

    Args:
      q: [B, H, N, D], heads before tokens (unlike `jax.nn.dot_product_attention`); bfloat16,
        float16, float32 or float64.
      k, v: [B, Hk, M, D] and [B, Hk, M, Dv] in the dtype of q; H a multiple of Hk. Padding keys may
        hold any values whose products with q and the cotangent of `out` are finite.
      scale: multiplies the logits; None for D ** -0.5.
      causal, q_positions, kv_positions, q_segments, kv_segments, prefix_length, window, q_lengths,
        kv_lengths: the mask, see `mask.make_mask`.
      softcap: see above (arXiv 2408.00118), above 0.
      key_bias: float [B, M], or [1, M], finite. log n lets a merged token count as n tokens (ToMe,
        arXiv 2210.09461, equation 1), exactly like n copies of its key and value. Must be above
        -1e4: in a row that sees only keys of bias -1e9, a float32 lse lacks the digits that
        gradients and importance need. Hide dropped tokens by `kv_live` of `make_mask`, and give
        them the bias 0: log 0 is hidden as well, but its gradient is NaN (`tokens.log_sizes`).
      importance_weights: float [B, N], not negative, one per query row; requests
        importance[b, j] = mean over heads of sum_i weights[b, i] P[b, h, i, j].
      importance_rows: int [B, R], the query rows of `importance_weights`, which is [B, R] then:
        O(R M) instead of a second pass over the map.
      mask: from `make_mask`, instead of its arguments.
      implementation: one of IMPLEMENTATIONS; None for the best one where the program runs.

    Raises:
      UserError: shapes that do not fit, or give away [B, N, H, D] (more heads than any model has
        and fewer tokens), lengths beyond the tokens, an unknown implementation, or one that cannot
        serve this.
    """
    q, k, v = (checks.arrays(x)[0] if isinstance(x, list) else x for x in (q, k, v))
    key_bias, importance_weights, importance_rows = checks.arrays(
        key_bias, importance_weights, importance_rows
    )
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
    checks.check_tokens("attention", "q_lengths", q_lengths, q.shape[2])
    checks.check_tokens("attention", "kv_lengths", kv_lengths, k.shape[2])
    mask_args = [name for name, x in shapes.items() if x is not None and x is not False]
    if mask is not None and mask_args:
        raise UserError(f"attention: mask together with {mask_args[0]}", fix="leave one out")
    scale = q.shape[-1] ** -0.5 if scale is None else checks.number("scale", scale)
    softcap = checks.cap(softcap)
    if key_bias is not None:
        key_bias = jnp.broadcast_to(key_bias, (q.shape[0], k.shape[2]))
    features = dict(softcap=softcap, key_bias=key_bias, weights=importance_weights)
    features["given"] = shapes if mask is None else {"mask": mask}
    by_name = implementation is not None
    implementation = _choice(implementation, q, k, v, **features)
    if implementation == "cudnn":
        names = ("causal", "window", "q_lengths", "kv_lengths")
        served = {name: shapes[name] for name in names}
        out = _module("cudnn").attend(only_on("cudnn", q), k, v, key_bias, scale=scale, **served)
        return AttentionResult(out, None, None)
    sparse = mask is not None or any(name != "causal" for name in mask_args)
    plain = key_bias is None and softcap is None and importance_weights is None
    dense = implementation is None and not sparse and plain
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
        if not by_name:
            function = functools.partial(_attend_whole, call)
    # The compiler partitions the whole map by itself, unless axes are explicit.
    whole = call.implementation == "reference" and not is_explicit(q)
    args = (q, k, v, key_bias, mask, every)
    out, lse, importance = function(*args) if whole else on_mesh(function, *args)
    cudnn = dense and _on_hopper() and not _unserved("cudnn", q, k, v)
    if cudnn and _module("cudnn").available():
        # Without sparsity cuDNN is about as fast forward and faster in training (docs/kernels.md).
        # It returns no float32 lse: ours is used, and removed from programs that do not use it.
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
    """The importance of keys from the lse of an earlier call of `attention`; no gradients.

    Args:
      q, k, scale, softcap, key_bias, mask, implementation: of that call.
      lse: of its result, float32 [B, H, N].
      weights: float [B, N], or [B, R] with `rows`; see `attention`.
      rows: int [B, R], the query rows of the weights; None for all.

    Returns:
      float32 [B, M], mean over heads of sum_i weights[b, i] P[b, h, i, j].
    """
    if lse is None:
        raise UserError(
            "attention_importance: no lse",
            fix="pass the lse of `attention` with any implementation but cudnn",
        )
    args = checks.arrays(q, k, lse, weights, key_bias, rows)
    q, k, lse, weights, key_bias, rows = lax.stop_gradient(args)
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
    """Weights in the dtype of the logits, to which their logarithms are added."""
    kind = jnp.promote_types(q.dtype, jnp.float32)
    return None if weights is None else jnp.asarray(weights).astype(kind)


@struct.dataclass
class _Call:
    """The static arguments of a call."""

    scale: float = struct.field(pytree_node=False)
    softcap: float | None = struct.field(pytree_node=False)
    implementation: str | None = struct.field(pytree_node=False)

    def run(self, pass_name: str, *args):
        """One pass by the chosen implementation, or by that of the platform it is lowered for."""

        def of(name: str):
            return functools.partial(_pass(name, pass_name), scale=self.scale, softcap=self.softcap)

        if self.implementation not in (None, "xla"):
            q, *rest = args
            return of(self.implementation)(only_on(self.implementation, q), *rest)
        options = {"cpu": of("xla_looped"), "default": of("xla")}
        if self.implementation is None:
            q, k = args[:2]
            # Importance has no values: its third argument is the bias, or None.
            v = args[2] if getattr(args[2], "ndim", 0) == 4 else k
            if not _unserved("tpu", q, k, v):
                options["tpu"] = of("tpu")
            if _on_hopper() and not _unserved("gpu", q, k, v):
                options["cuda"] = of("gpu")
        return lax.platform_dependent(*args, **options)

    def importance(self, q, k, key_bias, mask, lse, weights):
        """Importance [B, M] from all rows."""
        # The weight of a row is folded into its lse; an lse of +inf leaves out rows of weight 0.
        share = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1)), -jnp.inf)
        lse = jnp.where(share[:, None] > -jnp.inf, lse - share[:, None], jnp.inf)
        return self.run("importance", q, k, key_bias, mask, lse, weights)


def _on_hopper() -> bool:
    """Whether the kernels are for the GPU of this process, or without one, for the GPU of the
    current mesh, which may be a description without a device."""
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
    # Imported on first use: Pallas takes half a second.
    name = {"gpu": "hopper"}.get(implementation, implementation)
    return importlib.import_module(f"efficient_vlm.kernels.attention.{name}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call, q, k, v, key_bias, mask, weights):
    out, lse = call.run("forward", q, k, v, key_bias, mask)
    importance = None
    if weights is not None:
        importance = call.importance(q, k, key_bias, mask, lse, weights)
    return out, lse, importance


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _once(call, pass_name, *args):
    """A pass of the gradient, which has no gradients itself."""
    return call.run(pass_name, *args)


def _refuse(call, pass_name, saved, cotangents):
    raise UserError(
        "attention: a second derivative", fix="implementation='reference', which has them"
    )


_once.defvjp(lambda *args: (_once(*args), None), _refuse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_whole(call, *args):
    """The reference where nobody asked for it: its gradients, but no derivatives that the other
    implementations lack, or whether a program can be differentiated would depend on its lengths."""
    return reference.attend(*args, scale=call.scale, softcap=call.softcap)


def _forward_whole(call, q, k, v, key_bias, mask, weights):
    def function(*args):
        return reference.attend(*args[:4], mask, args[4], scale=call.scale, softcap=call.softcap)

    return jax.vjp(function, q, k, v, key_bias, weights)


def _backward_whole(call, pull, cotangents):
    dq, dk, dv, d_bias, d_weights = _pulled(pull, cotangents)
    return dq, dk, dv, d_bias, None, d_weights


@jax.custom_vjp
def _pulled(pull, cotangents):
    return pull(cotangents)


_pulled.defvjp(lambda *args: (_pulled(*args), None), lambda *_: _refuse(None, None, None, None))
_attend_whole.defvjp(_forward_whole, _backward_whole)


def _forward(call, *args):
    results = _attend(call, *args)
    return results, (args, results)


def _backward(call, saved, cotangents):
    (q, k, v, key_bias, mask, weights), (out, lse, _) = saved
    d_out, d_lse, d_importance = cotangents
    exact = lse.dtype
    delta = jnp.sum(d_out.astype(exact) * out.astype(exact), axis=-1)
    delta -= jnp.where(jnp.isfinite(lse), d_lse, 0)
    d_weights = gain = None
    if weights is not None:
        # Importance equals attention to one more column of values, the gain, with the weights as
        # its cotangents; so the sum over keys that a row needs is one more forward pass.
        gain = (d_importance / q.shape[1]).astype(exact)
        # Scaled because gradients of means may lie below 6e-8, the least number of float16.
        top = jnp.max(jnp.abs(gain), axis=-1, keepdims=True)
        top = jnp.where((top > 0) & jnp.isfinite(top), top, 1)
        column = (gain / top)[:, None, :, None]
        column = jnp.broadcast_to(column, (*k.shape[:3], 1)).astype(v.dtype)
        received, _ = _once(call, "forward", q, k, column, key_bias, mask)
        received = received[..., 0].astype(exact) * top[..., None]
        delta += weights[:, None] * received
        d_weights = received.sum(axis=1).astype(weights.dtype)
        weights = weights.astype(exact)
    args = (q, k, v, key_bias, mask, lse, delta, d_out.astype(q.dtype), weights, gain)
    dq, dk, dv, d_bias = _once(call, "backward", *args)
    return dq, dk, dv, d_bias, None, d_weights


_attend.defvjp(_forward, _backward)


def _of_rows(call, q, k, key_bias, mask, lse, weights, rows):
    """Importance from R rows and their lse, without computing the softmax again."""
    some = jnp.take_along_axis(q, rows[:, None, :, None], axis=2)
    lse = jnp.take_along_axis(lse, rows[:, None], axis=2)
    mask = None if mask is None else mask_rows(mask, rows)
    function = functools.partial(reference.rows, scale=call.scale, softcap=call.softcap)
    args = (some, k, key_bias, mask, lse, weights)
    # The compiler partitions this by itself, unless axes are explicit.
    return importance_on_mesh(function, *args) if is_explicit(q) else function(*args)


def _choice(implementation, q, k, v, **features) -> str | None:
    """The name of an implementation, or None for the best one of the platform."""
    if implementation is None:
        batch, heads, queries, _ = q.shape
        of_head = queries * k.shape[2]
        few = _FEW_LOGITS_OF_SMALL_HEADS if of_head < _SMALL_HEAD else _FEW_LOGITS
        few *= devices_of(q, k.shape[1])
        return "reference" if queries == 1 or batch * heads * of_head <= few else None
    if implementation not in IMPLEMENTATIONS:
        raise unknown("implementation", str(implementation), IMPLEMENTATIONS)
    if problem := _unserved(implementation, q, k, v, **features):
        able = [name for name in IMPLEMENTATIONS if not _unserved(name, q, k, v, **features)]
        raise UserError(
            f"attention: implementation {short(implementation)} has no {problem}",
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
