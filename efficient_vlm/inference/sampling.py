"""How a token is drawn from logits: penalties, temperature, top-k, top-p, min-p, seeds.

Settings are arrays over the rows of a batch, so that requests with different settings share one
program, and a setting that no row uses is None and has no part in the program.

The steps come in this order: logit bias; repetition, then frequency, then presence penalty;
temperature; top-k; top-p, of what top-k has left; min-p. transformers has the same order (of bias,
repetition penalty, temperature, top-k, top-p and min-p, the ones it has). vLLM differs in that
min-p comes in front of top-k and top-p: its top-p is of what min-p has left, and keeps fewer tokens
where both are in use. Log-probabilities are those of the raw logits, as vLLM's are by default.

NaN counts as -inf: such tokens are never drawn. Where nothing else is left in a row, its token is
0. What is -inf, before or after a step, is never drawn while anything else is left.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from efficient_vlm.inference.options import SamplingOptions, columns

__all__ = [
    "History",
    "Sampling",
    "SamplingOptions",
    "biased",
    "cleaned",
    "draw",
    "history",
    "keep_min_p",
    "keep_most_likely",
    "keep_top_k",
    "keep_top_p",
    "log_probabilities",
    "penalised",
    "tempered",
]

# A row this cold is greedy: that is the limit, and quotients would leave float32.
_COLDEST = 1e-30
_NOTHING = -jnp.inf


@struct.dataclass
class History:
    """Which tokens came before, for penalties.

    Attributes:
      prompt: bool [B, V], tokens of the prompt.
      generated: int32 [B, V], how often each token was generated.
    """

    prompt: jax.Array
    generated: jax.Array

    def add(self, tokens: jax.Array, live: jax.Array) -> "History":
        """With one more generated token [B] in each row that is live (bool [B])."""
        rows, columns = jnp.arange(tokens.shape[0]), _inside(tokens, self.generated.shape[1])
        more = self.generated.at[rows, columns].add(live.astype(jnp.int32), mode="drop")
        return self.replace(generated=more)


def history(prompt_ids: jax.Array, vocabulary: int) -> History:
    """The history of prompts, int32 [B, S]; ids outside [0, vocabulary), such as -1, are none."""
    prompt_ids = jnp.asarray(prompt_ids)
    shape = (prompt_ids.shape[0], vocabulary)
    rows, columns = jnp.arange(shape[0])[:, None], _inside(prompt_ids, vocabulary)
    prompt = jnp.zeros(shape, bool).at[rows, columns].set(True, mode="drop")
    return History(prompt, jnp.zeros(shape, jnp.int32))


@struct.dataclass
class Sampling:
    """Settings of B rows, each an array or None for a step that no row takes.

    Without a temperature all rows are greedy, and the steps behind it are left out as well.

    Attributes:
      temperature: float32 [B]; 0 for a greedy row.
      top_k: int32 [B]; 0 for off.
      top_p: float32 [B]; 1 for off.
      min_p: float32 [B]; 0 for off.
      repetition_penalty: float32 [B]; 1 for off.
      frequency_penalty, presence_penalty: float32 [B]; 0 for off.
      bias_ids: int32 [B, L]; -1 for none.
      bias_values: float32 [B, L].
      seed: uint32 [B], needed with a temperature.
    """

    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    repetition_penalty: jax.Array | None = None
    frequency_penalty: jax.Array | None = None
    presence_penalty: jax.Array | None = None
    bias_ids: jax.Array | None = None
    bias_values: jax.Array | None = None
    seed: jax.Array | None = None

    @property
    def needs_history(self) -> bool:
        """Whether a penalty is in use, for which `draw` has to know what came before."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return any(penalty is not None for penalty in penalties)

    @classmethod
    def of(cls, options: Sequence[SamplingOptions], vocab_size: int) -> "Sampling":
        """The settings (NumPy arrays) of a batch of requests, one row each, in their order.

        A row that draws and has no seed gets one from the operating system.

        Raises:
          UserError: a bias for, or a stop at, a token that the vocabulary does not have.
        """
        return cls(**columns(options, vocab_size))


def draw(
    logits: jax.Array,
    sampling: Sampling,
    counts: History | None = None,
    step: jax.Array | None = None,
) -> jax.Array:
    """The next token of each row.

    A row's draw depends on its seed, its step, its settings and its logits alone: not on the size
    of the batch, its place in it or its neighbours.

    Args:
      logits: [B, V] of any float type.
      sampling: settings of B rows.
      counts: what came before, where `sampling.needs_history`.
      step: int32 [B], how many tokens each row has drawn, where there is a temperature.

    Returns:
      int32 [B].

    Raises:
      ValueError: no counts, step or seed where one is needed.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if sampling.bias_ids is not None:
        logits = biased(logits, sampling.bias_ids, sampling.bias_values)
    if sampling.needs_history:
        if counts is None:
            raise ValueError("counts: penalties need a history of the rows")
        penalties = ("repetition_penalty", "frequency_penalty", "presence_penalty")
        logits = penalised(logits, counts, *(getattr(sampling, name) for name in penalties))
    # Only here: NaN and infinities pass through the steps above to the tokens they belong to.
    logits = cleaned(logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if sampling.temperature is None:
        return greedy
    if sampling.seed is None or step is None:
        raise ValueError("seed, step: drawing with a temperature needs both")
    logits = tempered(logits, sampling.temperature)
    if sampling.top_k is not None or sampling.top_p is not None:
        logits = keep_most_likely(logits, sampling.top_k, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    # Of logits plus Gumbel noise, the largest is a draw from their softmax (Gumbel 1954; arXiv
    # 1611.01144, equation 1). Each token has noise of its own, so nothing is summed up: a running
    # sum of 150,000 float32 probabilities, compared with one number of 23 bits, would draw tokens
    # less likely than about 1e-6 at wrong rates or never.
    noise = jax.vmap(lambda *row: _noise(*row, logits.shape[-1]))(sampling.seed, step)
    drawn = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    return jnp.where(sampling.temperature > _COLDEST, drawn, greedy)


def biased(logits: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """Float32 logits [B, V] plus values [B, L] at ids [B, L]; ids that are -1 are none."""
    rows, columns = jnp.arange(logits.shape[0])[:, None], _inside(ids, logits.shape[1])
    return logits.at[rows, columns].add(values, mode="drop")


def penalised(
    logits: jax.Array,
    counts: History,
    repetition: jax.Array | None = None,
    frequency: jax.Array | None = None,
    presence: jax.Array | None = None,
) -> jax.Array:
    """Float32 logits [B, V] less what penalties [B] take from tokens that came before.

    Repetition divides logits above 0, and multiplies others, of tokens in the prompt or the answer
    (arXiv 1909.05858, section 4.1, with the sign taken care of). The other two are OpenAI's, of
    generated tokens only: less frequency * count, less presence * (count > 0).
    """
    if repetition is not None:
        penalty = repetition[:, None]
        less = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(counts.prompt | (counts.generated > 0), less, logits)
    if frequency is not None:
        logits = logits - frequency[:, None] * counts.generated
    if presence is not None:
        logits = logits - presence[:, None] * (counts.generated > 0)
    return logits


def cleaned(logits: jax.Array) -> jax.Array:
    """Float32 logits [B, V] with -inf for NaN, and the largest number for inf.

    The steps behind it take differences to the largest logit, which for inf would be NaN.
    """
    largest = jnp.finfo(jnp.float32).max
    return jnp.where(jnp.isnan(logits), _NOTHING, jnp.minimum(logits, largest))


def tempered(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """Float32 logits [B, V], less the largest, divided by temperatures [B]; 0 divides by 1.

    A softmax does not see what is subtracted. Subtracting first keeps float32 numbers small where
    they matter: 50.0 and 50.1 divided by 1e-4 would have steps of 0.03, and no quotient can be inf.
    """
    top = logits.max(axis=-1, keepdims=True)
    above = logits - jnp.where(jnp.isfinite(top), top, 0.0)
    return above / jnp.where(temperature > _COLDEST, temperature, 1.0)[:, None]


def keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """The top_k [B] largest of float32 logits [B, V], others -inf; 0 keeps all.

    Exactly so many where there are so many; of equal ones those with the lowest ids.
    """
    return keep_most_likely(logits, top_k=top_k)


def keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The nucleus of float32 logits [B, V], others -inf (arXiv 1904.09751, section 3.1).

    That is the smallest set of most likely tokens whose probabilities sum up to top_p [B] or more:
    always at least one; of equal ones those with the lowest ids. 1 keeps all.
    """
    return keep_most_likely(logits, top_p=top_p)


def keep_most_likely(
    logits: jax.Array, top_k: jax.Array | None = None, top_p: jax.Array | None = None
) -> jax.Array:
    """`keep_top_k`, and `keep_top_p` of what that leaves, with one sort for both."""
    vocabulary = logits.shape[-1]
    # Both keep a beginning of the sorted logits: its length says all. Values without ids sort
    # faster; equal ones are told apart below.
    ordered = -jnp.sort(-logits, axis=-1, stable=False)
    count = jnp.full(logits.shape[0], vocabulary)
    if top_k is not None:
        count = jnp.where(top_k > 0, jnp.minimum(top_k, vocabulary), vocabulary)
    if top_p is not None:
        inside = jnp.arange(vocabulary) < count[:, None]
        total = jnp.cumsum(jax.nn.softmax(jnp.where(inside, ordered, _NOTHING)), axis=-1)
        nucleus = 1 + (total < top_p[:, None]).sum(axis=-1)
        # A rounded sum reaches 1 before its end; top_p = 1 has to keep all.
        count = jnp.where(top_p < 1, jnp.minimum(nucleus, count), count)
    last = jnp.take_along_axis(ordered, count[:, None] - 1, axis=-1)
    above, equal = logits > last, logits == last
    room = count[:, None] - above.sum(axis=-1, keepdims=True)
    return jnp.where(above | (equal & (jnp.cumsum(equal, axis=-1) <= room)), logits, _NOTHING)


def keep_min_p(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Float32 logits [B, V] of tokens at least min_p [B] times as likely as the most likely one.

    Others are -inf (arXiv 2407.01082, section 3). 0 keeps all, 1 the most likely and its equals.
    """
    # The sum of exponentials is in both probabilities, so it need not be known.
    least = logits.max(axis=-1, keepdims=True) + jnp.log(min_p)[:, None]
    return jnp.where(logits >= least, logits, _NOTHING)


def log_probabilities(
    logits: jax.Array, tokens: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of tokens [B], and of the `count` most likely ones, of raw logits [B, V].

    Returns:
      chosen float32 [B], ids int32 [B, count], values float32 [B, count], the likeliest first, of
      equal ones the lowest id; no more of them than V.
    """
    values = jax.nn.log_softmax(cleaned(jnp.asarray(logits, jnp.float32)), axis=-1)
    chosen = jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]
    top, ids = jax.lax.top_k(values, min(count, values.shape[-1]))
    return chosen, ids.astype(jnp.int32), top


def _noise(seed: jax.Array, step: jax.Array, vocabulary: int) -> jax.Array:
    """Gumbel noise of one row, float32 [V]."""
    # Named, as what a user may set as the default (rbg) draws by the whole batch under vmap. High:
    # noise from 23 bits ends at 16, and tokens 1e-7 as likely as others would never be drawn.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
    return jax.random.gumbel(key, (vocabulary,), jnp.float32, mode="high")


def _inside(ids: jax.Array, vocabulary: int) -> jax.Array:
    """Ids with negative ones, which would count from the end, moved to where they are dropped."""
    return jnp.where(ids < 0, vocabulary, ids)
