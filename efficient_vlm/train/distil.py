"""Distillation losses on logits, as (sum, denominator) like those of `train.losses`.

A teacher gives no gradients. Positions that are no targets count nothing, whatever they hold.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.kernels import ordering
from efficient_vlm.models.inputs import NO_LABEL
from efficient_vlm.models.taught import TopTokens
from efficient_vlm.shapes import Array

Pair = tuple[jax.Array, jax.Array]
KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
RESTS = ("bucket", "renormalised")


def divergence(
    student: Float[Array, "*rows V"],
    teacher: Float[Array, "*rows V"],
    labels: Int[Array, "*rows"] | Bool[Array, "*rows"],
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Pair:
    """Divergence of the distributions of the next token, in nats.

    With the teacher's p and the student's q, both softmax of logits / T (arXiv 2306.13649,
    section 2):
      forward_kl      KL(p || q) = sum p (log p - log q)
      reverse_kl      KL(q || p)
      jensen_shannon  beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q
    times T^2, with which gradients keep their size as T grows (arXiv 1503.02531, section 2.1).

    Differences of log-probabilities are taken, never logarithms of probabilities, so float32 serves
    for finite logits of any size. It needs a few arrays of the size of the logits; see
    `over_chunks` for fewer.

    Args:
      student, teacher: logits, float32 or narrower.
      labels: the token to predict, -1 for none; or bool, where to compare.
      kind: of `KINDS`.
      temperature: T > 0.
      beta: weight of the teacher in the mixture, 0 < beta < 1.

    Returns:
      Sum over targets, number of targets.

    Raises:
      UserError: vocabularies of two sizes, or an option outside of its range.
    """
    _check(kind, temperature, beta)
    if student.shape[-1] != teacher.shape[-1]:
        raise UserError(
            f"distillation: {student.shape[-1]:,} tokens of the student, "
            f"{teacher.shape[-1]:,} of the teacher",
            fix="take two models with one tokenizer, and cut padded rows from the logits",
        )
    live = live_positions(labels)
    teacher = jax.lax.stop_gradient(_log_softmax(teacher, live, temperature))
    student = _log_softmax(student, live, temperature)
    losses = _divergence(teacher, student, kind, beta)
    return total(losses * temperature**2, live)


def top_tokens(
    teacher: Float[Array, "*rows V"],
    k: int,
    *,
    temperature: float = 1.0,
    among: Bool[Array, " V"] | None = None,
) -> TopTokens:
    """The k most likely tokens of a teacher, and what is left for all others.

    Args:
      teacher: logits.
      k: at most V, or the tokens of `among`.
      temperature: T > 0.
      among: tokens that may be of the k; None for all.
    """
    log_probs = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    largest, tokens = ordering.top_k(log_probs, k, among)
    return TopTokens(largest, tokens, _others(log_probs, tokens))


def divergence_of_top(
    student: Float[Array, "*rows V"],
    teacher: TopTokens,
    labels: Int[Array, "*rows"] | Bool[Array, "*rows"],
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    rest: str = "bucket",
) -> Pair:
    """As `divergence`, from a teacher's k most likely tokens.

    Args:
      student, labels, kind, beta: see `divergence`.
      teacher: from `top_tokens` at the same temperature.
      temperature: T > 0.
      rest: "bucket" takes all other tokens as one, so that the student is told how much is left
        for them: a lower bound of the whole divergence (the data processing inequality). With
        "renormalised" both sides are made to sum to 1 over the k tokens: what the student gives to
        others then counts nothing.

    Returns:
      Sum over targets, number of targets.
    """
    _check(kind, temperature, beta)
    if rest not in RESTS:
        raise unknown("rest", str(rest), RESTS)
    live = live_positions(labels)
    student = _log_softmax(student, live, temperature)
    own = jnp.take_along_axis(student, teacher.tokens, axis=-1)
    log_probs = jax.lax.stop_gradient(teacher.log_probs.astype(jnp.float32))
    # Of the whole vocabulary nothing is left, and the logarithm of nothing has no gradient.
    whole = teacher.tokens.shape[-1] == student.shape[-1]
    if rest == "renormalised" or whole:
        log_probs, own = jax.nn.log_softmax(log_probs), jax.nn.log_softmax(own)
    else:
        left = jax.lax.stop_gradient(teacher.rest.astype(jnp.float32))
        log_probs = jnp.concatenate([log_probs, left[..., None]], -1)
        own = jnp.concatenate([own, _others(student, teacher.tokens)[..., None]], -1)
    log_probs = jnp.where(live[..., None], log_probs, own)
    return total(_divergence(log_probs, own, kind, beta) * temperature**2, live)


def over_chunks(
    loss: Callable[..., Pair],
    size: int,
    labels: Int[Array, "*rows"],
    *arrays: Float[Array, "*rows D"],
) -> Pair:
    """A loss of positions, a few of them at a time, in the backward pass as well.

    With hidden states as `arrays` and a `loss` that applies the heads, logits are never whole:
    `size` x V x 4 bytes for each array of the loss, in place of B x S x V x 4; each chunk's logits
    are computed twice. That is for 2,048 positions and 151,936 tokens 1.2 GB an array, or 78 MB in
    chunks of 128.

    Args:
      loss: (labels [size], *arrays [size, D]) -> (sum, denominator).
      size: positions of a chunk.
      labels: int, -1 for none, or bool.
      *arrays: their rows belong to those of the labels.

    Returns:
      The sums over all chunks.
    """
    count = labels.size
    none = False if labels.dtype == bool else NO_LABEL
    chunks = -(-count // size)

    def split(values, filler):
        values = values.reshape(count, *values.shape[labels.ndim :])
        padding = [(0, chunks * size - count)] + [(0, 0)] * (values.ndim - 1)
        values = jnp.pad(values, padding, constant_values=filler)
        return values.reshape(chunks, size, *values.shape[1:])

    def add(totals, chunk):
        return jax.tree.map(jnp.add, totals, loss(*chunk)), None

    rows = (split(labels, none), *(split(array, 0) for array in arrays))
    zero = jnp.zeros((), jnp.float32)
    totals, _ = jax.lax.scan(jax.checkpoint(add), (zero, zero), rows)
    return totals


def live_positions(labels: Array) -> jax.Array:
    """Where something is compared: where there is a label (not -1), or bool as it is."""
    labels = jnp.asarray(labels)
    return labels if labels.dtype == bool else labels >= 0


def total(losses: jax.Array, live: jax.Array) -> Pair:
    """Sum of losses where something is compared, and number of these places."""
    return jnp.where(live, losses, 0).sum(), live.sum(dtype=jnp.float32)


def _check(kind: str, temperature: float, beta: float) -> None:
    if kind not in KINDS:
        raise unknown("divergence", str(kind), KINDS)
    if not temperature > 0:
        raise UserError(f"temperature: {temperature}", allowed="above 0")
    if kind == "jensen_shannon" and not 0 < beta < 1:
        raise UserError(
            f"beta: {beta}", allowed="above 0, below 1", fix="take forward_kl or reverse_kl"
        )


def _log_softmax(logits, live, temperature) -> jax.Array:
    # Also padding that is not finite must leave no gradient.
    logits = jnp.where(live[..., None], logits.astype(jnp.float32), 0)
    return jax.nn.log_softmax(logits / temperature)


def _others(log_probs: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probability of all but some tokens: summed, as 1 - p has no digits where p is near 1."""
    rows = jnp.indices(tokens.shape, sparse=True)[:-1]
    return jax.nn.logsumexp(log_probs.at[(*rows, tokens)].set(-jnp.inf), axis=-1)


def _divergence(teacher: jax.Array, student: jax.Array, kind: str, beta: float) -> jax.Array:
    """Of log-probabilities."""
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    mixture = jnp.logaddexp(teacher + jnp.log(beta), student + jnp.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)
