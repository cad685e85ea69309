"""What every tokenizer does: text to token ids and back, whole or as it is generated."""

import abc
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from efficient_vlm.errors import UserError

_REPLACEMENT = "\ufffd"


class Tokenizer(abc.ABC):
    """Text to ids and back.

    What text means differs: for `plain_tokenizer.PlainTokenizer` it is always ordinary text; for
    `hub_tokenizer.HubTokenizer` special tokens that are spelled out in it become their ids.

    Attributes:
      vocab_size: ids are below this.
      special: role ("bos_token", "eos_token", ...) to token.
      bos_id: first id of a prompt, or None where there is no such token.
      eos_ids: every id that ends an answer; may be empty.
      pad_id: fills rows; it is masked everywhere.
    """

    vocab_size: int
    special: Mapping[str, str]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int

    def __init__(self, backend: Any):
        """Takes a `tokenizers.Tokenizer`, which from now on neither pads nor cuts."""
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_id(self) -> int:
        """The id behind an answer in training, the first of `eos_ids`; UserError without any."""
        if not self.eos_ids:
            raise UserError(
                "tokenizer: it has no token that ends an answer",
                fix="name one as eos_token in tokenizer_config.json",
            )
        return self.eos_ids[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the definition."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    @abc.abstractmethod
    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of a text; lone surrogates, which are legal in JSON, become "?".

        Args:
          text: anything.
          bos: None: what the tokenizer itself puts around a text. True: exactly one beginning
            token, also when the text starts with one. False: nothing is added.

        Raises:
          UserError: `bos` is True and there is no such token.
        """

    @abc.abstractmethod
    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a question up to where the answer begins; never empty."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of ids; ids outside the vocabulary are left out."""

    @abc.abstractmethod
    def knows(self, token: str) -> bool:
        """Whether a text is a token by itself."""

    def answer(self, ids: Iterable[int]) -> str:
        """Text of a generated answer: up to the first id that ends it."""
        kept = []
        for token in map(int, ids):
            if token in self.eos_ids:
                break
            kept.append(token)
        return self.decode(kept)

    def stream(self, skip_special: bool = True) -> "Stream":
        """A decoder that takes one id at a time."""
        return Stream(self, skip_special)


class Stream:
    """Text from ids as they are generated, never half of a UTF-8 character.

    What `push` and `finish` return, joined, is `Tokenizer.decode` of all ids, as long as the bytes
    are valid UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special)
        # The last piece that was given out stays in front: decoders treat the first token of a
        # text differently (no space before it).
        self._shown: list[int] = []
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that this id completes, "" while a character is incomplete."""
        self._waiting.append(int(token))
        return self._take(partly=True)

    def finish(self) -> str:
        """What is left; an incomplete character becomes U+FFFD."""
        return self._take(partly=False)

    def _take(self, partly: bool) -> str:
        before = self._decode(self._shown)
        text = self._decode(self._shown + self._waiting)
        if len(text) <= len(before) or (partly and text.endswith(_REPLACEMENT)):
            return ""
        self._shown, self._waiting = self._waiting, []
        return text[len(before) :]


def utf8(text: str) -> str:
    """Text that can be encoded: lone surrogates become "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")
