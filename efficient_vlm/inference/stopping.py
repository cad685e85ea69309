"""Where an answer ends: stop tokens and stop strings of one row, on the host.

A stop string need not end where a token does: " end" may come as " e" and "nd.". So it is looked
for in the text, and text that may still become one is held back: what has been shown to a reader
is never taken back. What is found does not depend on how the text is cut into pieces.
"""

import numbers
from collections.abc import Sequence
from typing import Any

from efficient_vlm.errors import UserError

__all__ = ["MAX_STOPS", "MAX_STOP_LENGTH", "Stopper", "stop_strings", "stop_tokens"]

# Each piece of text is compared with every beginning of every stop string.
MAX_STOPS = 16
MAX_STOP_LENGTH = 256


class Stopper:
    """Tells of one answer when it ends, and which part of its text may be shown by then.

    For each token, first `token`, and if that does not end the answer `feed` with its text; when
    the answer has ended for any reason, `finish`.

        if not stopper.token(chosen):
            show(stopper.feed(text_of(chosen)))
        if stopper.stopped:
            show(stopper.finish())

    The stop string that is complete first ends the answer, of several that are complete with one
    character the longest: "b" in "abc", though "abc" begins in front of it, as a reader of a
    stream cannot wait for what comes behind. Characters are compared as they are: a letter and an
    accent are not the letter that has the accent.

    Args:
      stop: strings, see `stop_strings`.
      token_ids: tokens, see `stop_tokens`. Their own text is not part of the answer.

    Attributes:
      found: the stop string or the id of the token that ended the answer, None before.

    Raises:
      UserError: as `stop_strings` and `stop_tokens`.
    """

    def __init__(self, stop: str | Sequence[str] | None = (), token_ids: Sequence[int] | None = ()):
        self._strings = stop_strings(stop)
        self._tokens = frozenset(stop_tokens(token_ids))
        self._held = ""
        self.found: str | int | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop token or a stop string has come."""
        return self.found is not None

    def token(self, token: int) -> bool:
        """Whether the answer has ended, by this token or before it."""
        if not self.stopped and int(token) in self._tokens:
            self.found = int(token)
        return self.stopped

    def feed(self, text: str) -> str:
        """The text that may be shown now, of this piece and of what was held back before it.

        With a stop string, the text in front of it; behind the end of the answer nothing.
        """
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(text.find(s) + len(s), -len(s), s) for s in self._strings if s in text]
        if ends:
            end, _, self.found = min(ends)
            self._held = ""
            return text[: end - len(self.found)]
        shown = len(text) - self._unsure(text)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text that was held back, which no longer becomes a stop string."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """Characters at the end of a text with which a stop string may begin."""
        longest = max(map(len, self._strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(len(s) > length and s.startswith(tail) for s in self._strings):
                return length
        return 0


def stop_strings(value: Any, field: str = "stop") -> tuple[str, ...]:
    """Stop strings as a tuple, from one string, a sequence of them, or None.

    Raises:
      UserError: no string, an empty one, one of more than 256 characters, or more than 16.
    """
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or isinstance(strings, bytes | bytearray):
        raise _bad_stop(field, value)
    if len(strings) > MAX_STOPS:
        raise UserError(
            f"{field}: {len(strings)} strings",
            allowed=f"up to {MAX_STOPS}",
            fix="leave out those that contain another one of them",
        )
    for string in strings:
        if not isinstance(string, str) or not 0 < len(string) <= MAX_STOP_LENGTH:
            raise _bad_stop(field, string)
    return tuple(strings)


def stop_tokens(value: Any, field: str = "stop_token_ids") -> tuple[int, ...]:
    """Stop tokens as a tuple of ints, from a sequence of them or None.

    Raises:
      UserError: no sequence, or an entry that is no id.
    """
    ids = () if value is None else value
    iterable = hasattr(ids, "__iter__") and not isinstance(ids, str | bytes | bytearray)
    for token in ids if iterable else [ids]:
        whole = isinstance(token, numbers.Integral) and not isinstance(token, bool)
        if not iterable or not whole or not 0 <= token < 2**31:
            raise UserError(
                f"{field}: {token!r:.40}",
                allowed="a list of ids, whole numbers from 0",
                fix="look the ids up in the tokenizer, or give strings as stop",
            )
    return tuple(int(token) for token in ids)


def _bad_stop(field: str, value: Any) -> UserError:
    return UserError(
        f"{field}: {value!r:.40}",
        allowed=f"a string of 1 to {MAX_STOP_LENGTH} characters, or a list of such strings",
        fix=f"leave {field} out for none",
    )
