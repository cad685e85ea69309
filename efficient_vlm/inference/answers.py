"""Answers as text: watched while they grow, and as they are given back."""

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
    """One token of an answer and how likely it was, by the model's own logits: in front of bias,
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
      text: in front of what ended it.
      tokens: ids without the end token; with a stop string those that complete it as well.
      finish: "stop" where an end token, a stop token or a stop string came, else "length".
      logprobs: one for each token, or None if not asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    logprobs: tuple[TokenLogprob, ...] | None


class Watch:
    """Reads the answers of a batch as their tokens come, and says which end with a stop string or
    a stop token: `on_token` of `generate`.

    Args:
      tokenizer: gives their text.
      options: of each row.
      stream: called with pieces of the only row's text; they never hold a part of a stop string.
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
        # What nobody asks for is not decoded, step by step.
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
        """Shows what was held back, and adds what ended each answer to what `generate` gave."""
        for row, stopper in enumerate(self._stoppers):
            if self._reads[row]:
                self._show(stopper.feed(self._decoders[row].finish()) + stopper.finish())
        stopped = tuple(stopper.found for stopper in self._stoppers)
        # A stop token is no part of the answer; what completes a stop string is.
        tokens = np.array([[isinstance(found, int)] for found in stopped])
        return out.replace(lengths=out.lengths - tokens, stopped=stopped)

    def _show(self, text: str) -> None:
        if self._stream is not None and text:
            self._stream(text)


def texts(tokenizer: Tokenizer, out: Generated) -> list[str]:
    """The text of each row's answer, up to its end."""
    return [_text(tokenizer, out, row) for row in range(len(out.tokens))]


def _tokens(out: Generated, row: int) -> list[int]:
    return out.tokens[row, 0, : out.lengths[row, 0]].tolist()


def _found(out: Generated, row: int) -> str | int | None:
    return None if out.stopped is None else out.stopped[row]


def _text(tokenizer: Tokenizer, out: Generated, row: int) -> str:
    text, found = tokenizer.decode(_tokens(out, row)), _found(out, row)
    # The first one: the answer ended where it was complete.
    return text.partition(found)[0] if isinstance(found, str) else text


def answers(
    tokenizer: Tokenizer, out: Generated, options: Sequence[SamplingOptions]
) -> list[Answer]:
    """Each row's answer with its tokens, and with as many alternatives as its options ask for."""
    found = []
    for row, option in enumerate(options):
        tokens = _tokens(out, row)
        ended = len(tokens) < out.tokens.shape[-1] or _found(out, row) is not None
        logprobs = None
        if option.logprobs is not None:
            own = [part[row, 0] for part in out.logprobs]
            each = zip(tokens, *own, strict=False)
            logprobs = tuple(_logprob(tokenizer, option.logprobs, *one) for one in each)
        text, finish = _text(tokenizer, out, row), "stop" if ended else "length"
        found.append(Answer(text, tuple(tokens), finish, logprobs))
    return found


def _logprob(tokenizer, count: int, token: int, chosen, ids, values) -> TokenLogprob:
    def text(one: int) -> str:
        return tokenizer.decode([one], skip_special=False)

    top = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
    top = tuple((one, text(one), value) for one, value in top)
    return TokenLogprob(token, text(token), float(chosen), top)
