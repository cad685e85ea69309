"""Distillation of what is inside: hidden states, attention, relations between visual tokens.

All are (sum, denominator), like those of `train.losses`; a teacher gives no gradients. A student
with fewer visual tokens is compared with the teacher's tokens that each of its own stands for, see
`for_student`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.shapes import Array
from efficient_vlm.train.distil import Pair, live_positions, total

HIDDEN = ("mse", "cosine")
ATTENTION = ("kl", "mse")
_TINY = 1e-12


def hidden_states(
    student: Float[Array, "*rows D"],
    teacher: Float[Array, "*rows E"],
    labels: Int[Array, "*rows"] | Bool[Array, "*rows"],
    *,
    kind: str = "mse",
    projection: Float[Array, "D E"] | None = None,
) -> Pair:
    """Distance of hidden states, a position at a time.

    Args:
      student, teacher: [..., D] and [..., E].
      labels: the token to predict, -1 for none; or bool, where to compare (visual tokens).
      kind: "mse", mean over channels of the squared difference (arXiv 1909.10351, equation 8), or
        "cosine", 1 - cosine.
      projection: [D, E], trained with the student; needed where D and E differ.

    Returns:
      Sum over targets, number of targets.

    Raises:
      UserError: widths differ and there is no projection.
    """
    if kind not in HIDDEN:
        raise unknown("kind", str(kind), HIDDEN)
    live = live_positions(labels)
    student, teacher = _clean(student, live), jax.lax.stop_gradient(_clean(teacher, live))
    if projection is not None:
        student = jnp.einsum("...d,de->...e", student, projection.astype(jnp.float32))
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"distillation: hidden states of {student.shape[-1]} and {teacher.shape[-1]} channels",
            fix="give a projection between them",
        )
    if kind == "mse":
        return total(jnp.square(student - teacher).mean(-1), live)
    return total(1 - (_unit(student) * _unit(teacher)).sum(-1), live)


def attention(
    student: Float[Array, "B H R T"],
    teacher: Float[Array, "B G R T"],
    labels: Int[Array, "B R"] | Bool[Array, "B R"],
    *,
    kind: str = "kl",
) -> Pair:
    """Distance of attention maps, a query at a time.

    Args:
      student, teacher: probabilities, of any numbers of heads: the mean over heads is compared
        where these differ, else each head with its own.
      labels: the token to predict of R queries, -1 for none; or bool.
      kind: "kl", KL(teacher || student) (arXiv 2002.10957, equation 4), of rows made to sum to 1,
        or "mse", mean over keys (arXiv 1909.10351, equation 7).

    Returns:
      Sum over targets of the mean over heads, number of targets.
    """
    if kind not in ATTENTION:
        raise unknown("kind", str(kind), ATTENTION)
    live = live_positions(labels)
    student, teacher = (_clean(a, live[:, None]) for a in (student, teacher))
    if student.shape[1] != teacher.shape[1]:
        student, teacher = (a.mean(1, keepdims=True) for a in (student, teacher))
    teacher = jax.lax.stop_gradient(teacher)
    if kind == "mse":
        return total(jnp.square(student - teacher).mean((1, 3)), live)
    p, q = (a / jnp.maximum(a.sum(-1, keepdims=True), _TINY) for a in (teacher, student))
    losses = p * (jnp.log(jnp.maximum(p, _TINY)) - jnp.log(jnp.maximum(q, _TINY)))
    return total(losses.sum(-1).mean(1), live)


def relations(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B T E"],
    mask: Bool[Array, "B T"],
) -> Pair:
    """Difference of how visual tokens relate to each other (LLaVA-KD, arXiv 2410.16236, RDist).

    1 - cosine of the two matrices of relations, [T, T], as vectors. Relations here are cosines
    between tokens, where the paper has plain products: the widths and scales of two models differ,
    and a few tokens of huge norm, which decoders have, would be all that counts.

    Args:
      student, teacher: hidden states of visual tokens.
      mask: real tokens.

    Returns:
      Sum over rows with at least one real token, number of these rows.
    """
    pairs = mask[:, :, None] & mask[:, None]

    def matrix(tokens):
        tokens = _unit(_clean(tokens, mask))
        products = jnp.einsum("btd,bsd->bts", tokens, tokens)
        return jnp.where(pairs, products, 0).reshape(len(tokens), -1)

    ours, theirs = matrix(student), jax.lax.stop_gradient(matrix(teacher))
    return total(1 - (_unit(ours) * _unit(theirs)).sum(-1), mask.any(-1))


def for_student(
    values: Float[Array, "B N *D"],
    source: Int[Array, "B N"],
    count: int,
    *,
    mean: bool = True,
) -> Float32[Array, "B T *D"]:
    """The teacher's tokens as the student's T: each the mean of those that it stands for.

    Args:
      values: of the teacher's N tokens.
      source: `VisualTokens.source` of the student: which token holds each of the N, -1 for none.
      count: T.
      mean: False for the sum, as attention to several tokens is attention to the one in their
        place.
    """
    held = source[:, None] == jnp.arange(count)[:, None]
    values = values.astype(jnp.float32)
    sums = jnp.einsum("btn,bn...->bt...", held.astype(jnp.float32), values)
    if not mean:
        return sums
    sizes = jnp.maximum(held.sum(-1), 1)
    return sums / sizes.reshape(*sizes.shape, *[1] * (values.ndim - 2))


def _clean(values: jax.Array, live: jax.Array) -> jax.Array:
    """In float32, and 0 where nothing is compared, so that padding leaves no gradient."""
    return jnp.where(live[..., None], values.astype(jnp.float32), 0)


def _unit(values: jax.Array) -> jax.Array:
    """Vectors of length 1; those of length 0 stay, and get no gradient."""
    square = jnp.square(values).sum(-1, keepdims=True)
    zero = square == 0
    return jnp.where(zero, 0, values * jax.lax.rsqrt(jnp.where(zero, 1, square)))
