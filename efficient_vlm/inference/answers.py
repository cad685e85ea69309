"""Answers as text: watched for stops while they grow, and returned with their tokens."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from efficient_vlm.inference.generate import Generated
from efficient_vlm.inference.options import SamplingOptions
from efficient_vlm.inference.stopping import Stopper
from efficient_vlm.processing.tokenizer import Tokenizer

__all__ = ["Answer", "TokenLogprob", "Watch", "answers", "texts"]


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer with its log-probability, by the model's own logits: before bias,
    penalties and temperature.

    Attributes:
      token, text: its id, and its text alone.
      logprob: natural logarithm of its probability.
      top: (id, text, logprob) of the most likely tokens there, the likeliest first.
    """

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...]


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer with its tokens.

    Attributes:
      text: without what ended it.
      tokens: ids without the end token; they include those of a stop string.
      finish: "stop" for an end token, a stop token or a stop string, else "length".
      logprobs: one per token, or None if not requested.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    logprobs: tuple[TokenLogprob, ...] | None


class Watch:
    """The `on_token` of `generate` that ends answers at stop strings and stop tokens.

    Args:
      tokenizer: of the model.
      options: of each row.
      stream: called with pieces of the text of the only row, never with part of a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        options: Sequence[SamplingOptions],
        stream: Callable[[str], None] | None = None,
    ):
        self._ends, self._stream = tokenizer.eos_ids, stream
        self._stoppers = [Stopper(o.stop, o.stop_token_ids) for o in options]
        self._decoders = [tokenizer.stream() for _ in options]
        # Text is decoded step by step only for rows that need it.
        self._reads = [bool(o.stop) or stream is not None for o in options]
        self._ended = np.zeros(len(options), bool)

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        for row, token in enumerate(map(int, tokens)):
            if self._ended[row] or token in self._ends:
                self._ended[row] = True
                continue
            stopper = self._stoppers[row]
            if not stopper.token(token) and self._reads[row]:
                self._show(stopper.feed(self._decoders[row].push(token)))
            self._ended[row] = stopper.stopped
        return self._ended.copy()

    def finish(self, out: Generated) -> Generated:
        """The result of `generate` with what ended each answer; streams the rest of the text."""
        for row, stopper in enumerate(self._stoppers):
            if self._reads[row]:
                self._show(stopper.feed(self._decoders[row].finish()) + stopper.finish())
        stopped = tuple(stopper.found for stopper in self._stoppers)
        # A stop token is not a part of the answer; the tokens of a stop string are.
        stop_tokens = np.array([[isinstance(stop, int)] for stop in stopped])
        return out.replace(lengths=out.lengths - stop_tokens, stopped=stopped)

    def _show(self, text: str) -> None:
        if self._stream is not None and text:
            self._stream(text)


def texts(tokenizer: Tokenizer, out: Generated) -> list[str]:
    """The text of each row's answer, up to its end."""
    return [_text(tokenizer, out, row) for row in range(len(out.tokens))]


def _tokens(out: Generated, row: int) -> list[int]:
    return out.tokens[row, 0, : out.lengths[row, 0]].tolist()


def _stop(out: Generated, row: int) -> str | int | None:
    return None if out.stopped is None else out.stopped[row]


def _text(tokenizer: Tokenizer, out: Generated, row: int) -> str:
    text, stop = tokenizer.decode(_tokens(out, row)), _stop(out, row)
    # At its first occurrence: the answer ended when that was complete.
    return text.partition(stop)[0] if isinstance(stop, str) else text


def answers(
    tokenizer: Tokenizer, out: Generated, options: Sequence[SamplingOptions]
) -> list[Answer]:
    """The answer of each row, with log-probabilities where its options ask for them."""
    rows = []
    for row, option in enumerate(options):
        tokens = _tokens(out, row)
        ended = len(tokens) < out.tokens.shape[-1] or _stop(out, row) is not None
        logprobs = None
        if option.logprobs is not None:
            # One entry per step, of which the answer has the first ones.
            steps = zip(tokens, *(part[row, 0] for part in out.logprobs), strict=False)
            logprobs = tuple(_logprob(tokenizer, option.logprobs, *step) for step in steps)
        text, finish = _text(tokenizer, out, row), "stop" if ended else "length"
        rows.append(Answer(text, tuple(tokens), finish, logprobs))
    return rows


def _logprob(tokenizer, count: int, token: int, chosen, ids, values) -> TokenLogprob:
    def text(one: int) -> str:
        return tokenizer.decode([one], skip_special=False)

    top = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
    top = tuple((one, text(one), value) for one, value in top)
    return TokenLogprob(token, text(token), float(chosen), top)
