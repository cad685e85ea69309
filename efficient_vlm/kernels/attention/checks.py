"""Checks of the arguments of attention; errors name the argument."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.errors import UserError, short


def arrays(*values) -> tuple:
    """Lists and NumPy arrays as JAX arrays; None stays None."""
    return tuple(None if x is None else jnp.asarray(x) for x in values)


def cap(softcap, op: str = "attention") -> float | None:
    """A soft cap as a float, or None; UserError unless it is positive and finite."""
    if softcap is None:
        return None
    value = number("softcap", softcap, op)
    if not 0 < value < math.inf:
        raise UserError(f"{op}: softcap={short(softcap)}", allowed="above 0, or None for no cap")
    return value


_KINDS = ("bfloat16", "float16", "float32", "float64")


def number(name: str, x, op: str = "attention") -> float:
    """A static number as a float; UserError for a traced or another value."""
    try:
        return float(x + 0)  # + 0 refuses strings.
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise UserError(
            f"{op}: {name} is {x!r:.60}",
            allowed="a Python number",
            fix="multiply q by the traced value, and pass scale=1.0" if name == "scale" else None,
        ) from None


# Unlike in `jax.nn.dot_product_attention`. Shapes cannot always tell, so every error says it.
LAYOUT = (
    "q [B, H, N, D], k [B, Hk, M, D], v [B, Hk, M, Dv]: heads before tokens, H a multiple of Hk"
)
SWAP = "x.swapaxes(1, 2) if yours are [B, N, H, D], tokens before heads"
# More than any model has (128), and than it has tokens: heads and tokens have changed places.
MOST_HEADS = 256


def attention(q, k, v, key_bias, weights, rows, lse=None) -> None:
    """Checks the arrays of `attention` and `attention_importance`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if jnp.ndim(x) != 4 or 0 in x.shape:
            what = "four axes" if jnp.ndim(x) != 4 else "no empty axis"
            raise UserError(
                f"attention: {name} has shape {jnp.shape(x)}", allowed=f"{what}, {LAYOUT}"
            )
    batch, heads, queries, dim = q.shape
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != dim:
        raise _layout("attention", f"q {q.shape}, k {k.shape} and v {v.shape} do not fit")
    if heads % k.shape[1]:
        raise _layout("attention", f"{heads} heads of q over {k.shape[1]} of k, q {q.shape}")
    check_heads("attention", q, k)
    if not q.dtype == k.dtype == v.dtype:
        raise UserError(
            f"attention: dtypes {q.dtype}, {k.dtype} and {v.dtype} of q, k and v",
            allowed="the same for all three",
        )
    if q.dtype.name not in _KINDS:
        raise UserError(f"attention: q, k and v of {q.dtype}", allowed=", ".join(_KINDS))
    bias = None if key_bias is None else jnp.shape(key_bias)
    if bias not in (None, (batch, k.shape[2]), (1, k.shape[2])):
        raise UserError(
            f"attention: key_bias has shape {bias}",
            allowed=f"[{batch}, {k.shape[2]}], one for each token of k {k.shape}",
            fix=SWAP if bias in ((batch, k.shape[1]), (1, k.shape[1])) else None,
        )
    if rows is not None and weights is None:
        raise UserError("attention: importance_rows without importance_weights")
    if rows is not None:
        kind, shape = jnp.result_type(rows), jnp.shape(rows)
        if len(shape) != 2 or shape[0] != batch or not jnp.issubdtype(kind, jnp.integer):
            raise UserError(
                f"attention: importance_rows is {kind} of shape {shape}",
                allowed=f"integers [{batch}, R]",
            )
    asked = (batch, queries) if rows is None else jnp.shape(rows)
    if weights is not None and jnp.shape(weights) != asked:
        raise UserError(
            f"attention: importance_weights has shape {jnp.shape(weights)}",
            allowed=f"{list(asked)}, one for each " + ("row of q" if rows is None else "row asked"),
            fix=SWAP if rows is None and jnp.shape(weights) == (batch, heads) else None,
        )
    if lse is not None and jnp.shape(lse) != q.shape[:3]:
        raise UserError(
            f"attention: lse has shape {jnp.shape(lse)}",
            allowed=f"{list(q.shape[:3])}, float32, [B, H, N] of the q of that call",
        )


def check_heads(op: str, q, k) -> None:
    """UserError where a head count gives away that tokens stand before heads."""
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] > max(MOST_HEADS, x.shape[2]):
            raise _layout(op, f"{name} {x.shape} has {x.shape[1]} heads of {x.shape[2]} tokens")


def check_tokens(op: str, name: str, lengths, tokens: int) -> None:
    """UserError for lengths beyond the tokens that there are, where that costs no transfer."""
    if not isinstance(lengths, np.ndarray | list | tuple):
        return
    longest = np.max(lengths, initial=0)
    if longest > tokens:
        raise _layout(op, f"{name} up to {longest}, but there are {tokens} tokens")


def _layout(op: str, problem: str) -> UserError:
    return UserError(f"{op}: {problem}", allowed=LAYOUT, fix=SWAP)


def decode(q, k, v, lengths, pages, k_scale, v_scale) -> None:
    """Checks the arrays of `attention_decode`, except those of `columns`."""
    if jnp.ndim(q) != 4 or 0 in q.shape:
        raise UserError(
            f"attention_decode: q has shape {jnp.shape(q)}",
            allowed="[B, H, R, D], heads before tokens, no empty axis",
        )
    batch, heads, _, dim = q.shape
    if (
        k.ndim != 4
        or v.ndim != 4
        or k.shape[:3] != v.shape[:3]
        or k.shape[3] != dim
        or heads % k.shape[1]
    ):
        raise UserError(
            f"attention_decode: q {q.shape}, k {k.shape} and v {v.shape} do not fit",
            allowed="q [B, H, R, D], k and v [B, Hk, M, D], or pages [P, Hk, S, D]: heads before "
            "tokens, H a multiple of Hk",
            fix=SWAP,
        )
    check_heads("attention_decode", q, q)
    if pages is None:
        check_heads("attention_decode", q, k)
    for name, x in (("k", k), ("v", v)):
        if 0 in x.shape:
            raise UserError(
                f"attention_decode: {name} has shape {x.shape}", allowed="no empty axis"
            )
    if pages is None and len(k) != batch:
        raise UserError(f"attention_decode: k has {len(k)} rows", allowed=f"{batch}, those of q")
    if q.dtype.name not in _KINDS:
        raise UserError(f"attention_decode: q is {q.dtype}", allowed=", ".join(_KINDS))
    if lengths is None:
        raise UserError("attention_decode: no lengths", allowed=f"integers [{batch}]")
    _integers("pages", pages, batch, 2)
    _integers("lengths", lengths, batch, 2 if jnp.ndim(lengths) == 2 else 1)
    if jnp.ndim(lengths) == 2 and lengths.shape[1] != q.shape[2]:
        raise UserError(
            f"attention_decode: lengths has shape {lengths.shape}",
            allowed=f"integers [{batch}], or [{batch}, {q.shape[2]}] for each query",
        )
    for name, x, scale in (("k", k, k_scale), ("v", v, v_scale)):
        if (x.dtype == jnp.int8) != (scale is not None):
            raise UserError(
                f"attention_decode: {name} is {x.dtype} and {name}_scale "
                + ("missing" if scale is None else "given"),
                allowed="int8 with a scale for each token and head, or neither",
            )
        if scale is None and x.dtype != q.dtype:
            raise UserError(f"attention_decode: {name} is {x.dtype}", allowed=f"{q.dtype}, as q")
        if scale is not None and jnp.shape(scale) != k.shape[:3]:
            raise UserError(
                f"attention_decode: {name}_scale has shape {jnp.shape(scale)}",
                allowed=str(list(k.shape[:3])),
            )


def columns(batch: int, keys: int, *, kept, **arrays) -> None:
    """Checks the arguments of `attention_decode` that have one value per key."""
    for name, x in arrays.items():
        if x is not None and jnp.shape(x) not in ((batch, keys), (1, keys)):
            raise UserError(
                f"attention_decode: {name} has shape {jnp.shape(x)}", allowed=f"[{batch}, {keys}]"
            )
    _integers("kept", kept, batch, 2)


def windows(q, places, after) -> None:
    """Of the windows of `attention_decode`."""
    if (places is None) != (after is None):
        raise UserError("attention_decode: places and after are given together or not at all")
    shape = (len(q), q.shape[2])
    if after is not None and jnp.shape(after) != shape:
        raise UserError(
            f"attention_decode: after has shape {jnp.shape(after)}", allowed=str(list(shape))
        )


def _integers(name: str, x, batch: int, axes: int) -> None:
    if x is None:
        return
    kind, shape = jnp.result_type(x), jnp.shape(x)
    good = len(shape) == axes and shape[0] == batch and 0 not in shape
    if not good or not jnp.issubdtype(kind, jnp.integer):
        more = {"pages": ", T", "kept": ", K"}.get(name, "")
        raise UserError(
            f"attention_decode: {name} is {kind} of shape {shape}",
            allowed=f"integers [{batch}{more}]",
        )
