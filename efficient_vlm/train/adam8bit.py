"""Adam whose moments take one byte each (arXiv 2110.02861)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

__all__ = ["BLOCK", "SMALLEST", "Adam8bitState", "Codes", "code_book", "scale_by_adam8bit"]

BLOCK = 256
# Smaller arrays keep moments in float32 (section 2.3 of the paper has embeddings do so; here norms
# and biases, which save nothing).
SMALLEST = 4096


def code_book(signed: bool) -> np.ndarray:
    """float32 [256], sorted: dynamic tree quantisation (section 1.3 and appendix F.1).

    A code has a sign, n zeros (6 at most), a one, and linear fractions in the bits that are left:
    the middles of equal parts of [0.1, 1], times 10^-n. Without a sign there is a bit more for the
    fractions. Zero and one are codes of their own.
    """
    positive = []
    for zeros in range(7):
        ends = np.linspace(0.1, 1, 2 ** (7 - zeros - signed) + 1)
        positive += list(10.0**-zeros * (ends[:-1] + ends[1:]) / 2)
    values = [0.0, 1.0, *positive]
    values += [-value for value in positive] if signed else []
    return np.sort(np.array(values, np.float32))


@struct.dataclass
class Codes:
    """Numbers as codes, in blocks along the last axis.

    The codes have the shape of the numbers, and so the sharding of the parameter that these are
    moments of; the paper's blocks are of the flat array.

    Attributes:
      codes: uint8, in the shape of the numbers.
      largest: float32 [..., blocks], the largest absolute value of each block.
      signed: which code book.
    """

    codes: jax.Array
    largest: jax.Array
    signed: bool = struct.field(pytree_node=False)

    @classmethod
    def of(cls, values: jax.Array, signed: bool) -> "Codes":
        """The nearest code of each value over the largest of its block.

        Without a sign, only zero becomes zero: a second moment that is rounded to nothing would
        make the next step too long.
        """
        size, book = values.shape[-1], code_book(signed)
        padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -size % _block(size))])
        blocks = padded.reshape(*values.shape[:-1], -1, _block(size))
        largest = jnp.max(jnp.abs(blocks), axis=-1)
        unit = blocks / jnp.where(largest > 0, largest, 1)[..., None]
        middles = jnp.asarray((book[1:] + book[:-1]) / 2)
        codes = jnp.searchsorted(middles, unit).astype(jnp.uint8)
        codes = codes if signed else jnp.maximum(codes, (unit > 0).astype(jnp.uint8))
        return cls(codes.reshape(padded.shape)[..., :size], largest, signed)

    def values(self) -> jax.Array:
        """float32 numbers again."""
        size = self.codes.shape[-1]
        scale = jnp.repeat(self.largest, _block(size), axis=-1)[..., :size]
        return jnp.asarray(code_book(self.signed))[self.codes] * scale


def _block(size: int) -> int:
    return min(size, BLOCK)


class Adam8bitState(NamedTuple):
    """Moments of Adam.

    Attributes:
      count: int32, steps so far.
      mu, nu: trees like the parameters, of `Codes`, or float32 arrays for small parameters.
    """

    count: jax.Array
    mu: Any
    nu: Any


def scale_by_adam8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, smallest: int = SMALLEST
) -> optax.GradientTransformation:
    """Adam's direction, as `optax.scale_by_adam`, from moments of 8 bits (section 2).

    In each step the moments become float32, are updated, give the direction, and become codes
    again: the direction is that of the moments before rounding. About 2 bytes of state for each
    parameter instead of 8.

    Args:
      b1, b2, eps: of Adam.
      smallest: arrays with fewer elements keep moments in float32.
    """

    def stored(values: jax.Array, signed: bool) -> Any:
        if values.ndim == 0 or values.size < smallest:
            return values
        return Codes.of(values, signed)

    def init(params: Any) -> Adam8bitState:
        def zeros(signed: bool) -> Any:
            empty = lambda p: stored(jnp.zeros(p.shape, jnp.float32), signed)  # noqa: E731
            return jax.tree.map(empty, params)

        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(True), zeros(False))

    def update(updates: Any, state: Adam8bitState, params: Any = None) -> tuple[Any, Adam8bitState]:
        del params
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        mu = optax.tree.update_moment(gradients, _values(state.mu), b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(gradients, _values(state.nu), b2, 2)
        count = optax.safe_increment(state.count)
        first = optax.tree.bias_correction(mu, b1, count)
        second = optax.tree.bias_correction(nu, b2, count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second)
        kept = [
            jax.tree.map(lambda m, signed=signed: stored(m, signed), moment)
            for moment, signed in ((mu, True), (nu, False))
        ]
        return direction, Adam8bitState(count, *kept)

    return optax.GradientTransformation(init, update)


def _is_codes(leaf: Any) -> bool:
    return isinstance(leaf, Codes)


def _values(moments: Any) -> Any:
    """float32 moments."""
    return jax.tree.map(lambda m: m.values() if _is_codes(m) else m, moments, is_leaf=_is_codes)
