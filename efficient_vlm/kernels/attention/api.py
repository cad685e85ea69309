"""`attention`: the one entry point of every attention layer, for all implementations.

Which ones there are, and which is taken: `dispatch`. Gradients: `gradients`.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int, Real

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import checks, dispatch, gradients, reference
from efficient_vlm.kernels.attention.dispatch import (
    IMPLEMENTATIONS,
    Call,
    choose,
    module_of,
    unserved,
)
from efficient_vlm.kernels.attention.mask import Mask, check_mask, make_mask, mask_rows
from efficient_vlm.kernels.attention.parts import (
    importance_on_mesh,
    is_explicit,
    on_mesh,
)
from efficient_vlm.kernels.attention.platforms import only_on
from efficient_vlm.kernels.manual import alike
from efficient_vlm.shapes import Array

__all__ = ["IMPLEMENTATIONS", "AttentionResult", "attention", "attention_importance"]


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
    implementation = choose(implementation, q, k, v, **features)
    if implementation == "cudnn":
        names = ("causal", "window", "q_lengths", "kv_lengths")
        served = {name: shapes[name] for name in names}
        out = module_of("cudnn").attend(only_on("cudnn", q), k, v, key_bias, scale=scale, **served)
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
    call = Call(scale, softcap, implementation)
    every = weights if importance_rows is None else None
    function = functools.partial(gradients.attend, call)
    if call.implementation == "reference":
        function = functools.partial(reference.attend, scale=scale, softcap=softcap)
        if not by_name:
            function = functools.partial(gradients.attend_whole, call)
    # The compiler partitions the whole map by itself, unless axes are explicit.
    whole = call.implementation == "reference" and not is_explicit(q)
    args = (q, k, v, key_bias, mask, every)
    out, lse, importance = function(*args) if whole else on_mesh(function, *args)
    cudnn = dense and dispatch.on_hopper() and not unserved("cudnn", q, k, v)
    if cudnn and module_of("cudnn").available():
        # Without sparsity cuDNN is about as fast forward and faster in training (docs/kernels.md).
        # It returns no float32 lse: ours is used, and removed from programs that do not use it.
        out = lax.platform_dependent(
            *(q, k, v),
            cuda=functools.partial(module_of("cudnn").attend, scale=scale, causal=causal),
            default=lambda q, k, v: on_mesh(
                functools.partial(gradients.attend, call), q, k, v, None, mask, None
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
        implementation = choose(implementation, q, k, k, weights=weights)
    weights = _exact(weights, q)
    q, k, lse, weights, key_bias, mask = alike(q, k, lse, weights, key_bias, mask)
    call = Call(scale, softcap, implementation)
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


def _of_rows(call, q, k, key_bias, mask, lse, weights, rows):
    """Importance from R rows and their lse, without computing the softmax again."""
    some = jnp.take_along_axis(q, rows[:, None, :, None], axis=2)
    lse = jnp.take_along_axis(lse, rows[:, None], axis=2)
    mask = None if mask is None else mask_rows(mask, rows)
    function = functools.partial(reference.rows, scale=call.scale, softcap=call.softcap)
    args = (some, k, key_bias, mask, lse, weights)
    # The compiler partitions this by itself, unless axes are explicit.
    return importance_on_mesh(function, *args) if is_explicit(q) else function(*args)
