"""cuDNN's attention through JAX, with a bias per key folded into its operands.

cuDNN takes a bias only as a whole map. A bias per key equals one more column of q (ones) and of k
(the bias over the scale). In 16 bits the bias takes two columns, its rounded value and the rounding
error, or log 9 would be off by 4e-3. cuDNN returns no float32 logarithm of the sum of exponentials,
so `AttentionResult.lse` is None.
"""

import functools

import jax
import jax.numpy as jnp

from efficient_vlm.errors import UserError, first_line

__all__ = ["attend", "available", "folded", "unserved"]

_MOST_DIM = 256
_SERVED = ("causal", "q_lengths", "kv_lengths", "window")


def unserved(q, v, softcap, key_bias, weights, given) -> str | None:
    """The feature that cuDNN lacks for a call, or None; `given`: arguments of the mask by name."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{q.dtype} (bfloat16 and float16 only)"
    dim = q.shape[-1] + (2 if key_bias is not None else 0)
    if -(-dim // 8) * 8 > _MOST_DIM:
        return f"head dim {q.shape[-1]} (at most {_MOST_DIM}, less 2 with key_bias)"
    if v.shape[-1] > q.shape[-1]:
        return "values wider than keys"
    if softcap is not None:
        return "softcap"
    if weights is not None:
        return "importance"
    for name, value in given.items():
        if value is not None and value is not False and name not in _SERVED:
            return name
    window = given.get("window")
    if window is not None and not (isinstance(window, int) and given.get("causal")):
        return "window other than a number of keys with causal"
    return None


@functools.cache
def available() -> bool:
    """Whether this process has a GPU and a cuDNN that JAX can use."""
    if jax.default_backend() != "gpu":
        return False
    x = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(attend, scale=1.0, causal=False), x, x, x)
    except UserError:
        return False
    return True


def attend(q, k, v, key_bias=None, *, scale, causal, window=None, q_lengths=None, kv_lengths=None):
    """out [B, H, N, Dv]; arguments as in `attention`, gradients by JAX.

    Raises:
      UserError: JAX finds no cuDNN that it can use.
    """
    width = v.shape[-1]
    if key_bias is not None:
        q, k = folded(q, k, key_bias, scale)
    wide = -(-q.shape[-1] // 8) * 8
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, wide - x.shape[-1]))).swapaxes(1, 2)
        for x in (q, k, v)
    )
    lengths = (None if x is None else jnp.asarray(x, jnp.int32) for x in (q_lengths, kv_lengths))
    q_lengths, kv_lengths = lengths
    try:
        out = jax.nn.dot_product_attention(
            *(q, k, v),
            scale=scale,
            is_causal=causal,
            query_seq_lengths=q_lengths,
            key_value_seq_lengths=kv_lengths,
            # JAX counts the keys before the query's own position.
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:
        if isinstance(error, jax.errors.JaxRuntimeError):  # While running, such as out of memory.
            raise
        # No cuDNN, or too old a version.
        raise UserError(
            f"attention: implementation 'cudnn': {first_line(error)}",
            allowed="reference, xla",
            fix="implementation=None for the best one where the program runs",
        ) from error
    out = out.swapaxes(1, 2)[..., :width]
    if q_lengths is None:
        return out
    real = jnp.arange(out.shape[2]) < q_lengths[:, None]
    return jnp.where(real[:, None, :, None], out, 0)


def folded(q, k, key_bias, scale):
    """q and k with the bias in two more columns: their products are q.k + bias / scale."""
    bias = (key_bias / scale)[:, None, :, None].astype(jnp.float32)
    rounded = bias.astype(k.dtype)
    rest = (bias - rounded.astype(jnp.float32)).astype(k.dtype)
    columns = jnp.concatenate([rounded, rest], axis=-1)
    columns = jnp.broadcast_to(columns, (*k.shape[:3], 2))
    ones = jnp.ones((*q.shape[:3], 2), q.dtype)
    return jnp.concatenate([q, ones], axis=-1), jnp.concatenate([k, columns], axis=-1)
