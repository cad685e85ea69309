"""The tokenizers of our own data, through the `tokenizers` library.

Special tokens are never made from text: what a user types is always ordinary text, whatever it
looks like. Ids of our own tokenizers: 0 padding, 1 end of answer.
"""

import functools
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError
from efficient_vlm.processing.tokenizer import Tokenizer, utf8

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
# Names by which published tokenizers know the two tokens that we need.
_EOS_NAMES = (EOS, "</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "[SEP]")
_PAD_NAMES = (PAD, "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_CACHE = 2**16


class PlainTokenizer(Tokenizer):
    """Encodes text without ever producing a special token.

    Attributes:
      separator: text between a question and its answer.
    """

    def __init__(self, backend: Any, separator: str):
        super().__init__(backend)
        # Special tokens that appear in text are split up like any other word.
        backend.encode_special_tokens = True
        self.separator = separator
        roles = {"eos_token": _find(backend, _EOS_NAMES), "pad_token": _find(backend, _PAD_NAMES)}
        if roles["eos_token"] is None:
            raise UserError(
                "data.tokenizer: it has no token that ends an answer",
                allowed=", ".join(_EOS_NAMES),
                fix="add one of these as a special token",
            )
        self.special = {role: token for role, token in roles.items() if token is not None}
        self.bos_id, self.eos_ids = None, (backend.token_to_id(self.special["eos_token"]),)
        # Padding is masked everywhere, so any id serves where there is none of its own.
        self.pad_id = backend.token_to_id(self.special.get("pad_token", self.special["eos_token"]))
        added = backend.get_added_tokens_decoder()
        self._hidden = {i for i, token in added.items() if token.special}
        self._hidden |= {*self.eos_ids, self.pad_id}
        self._encode = functools.lru_cache(maxsize=_CACHE)(self._encode_uncached)

    @functools.cached_property
    def fingerprint(self) -> str:
        return super().fingerprint

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        """Ids of `text`; no special token, neither from its content nor added at its ends."""
        if bos:
            raise UserError("bos: the tokenizer has no beginning token", fix="pass bos=False")
        return list(self._encode(text))

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text + self.separator) or [self.eos_id]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        hidden = self._hidden if skip_special else ()
        kept = [i for i in map(int, ids) if i not in hidden]
        return self._backend.decode(kept, skip_special_tokens=skip_special)

    def knows(self, token: str) -> bool:
        """Never of a special token, which no text can hold."""
        number = self._backend.token_to_id(token)
        return number is not None and number not in self._hidden

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `tokenizer.json`, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".tokenizer-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._backend.to_str())
        os.replace(scratch, path)

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        ids = self._backend.encode(utf8(text), add_special_tokens=False).ids
        # A loaded tokenizer may have rules of its own; what is left of special ids goes here.
        return tuple(i for i in ids if i not in self._hidden)


def word_level(words: Sequence[str]) -> PlainTokenizer:
    """One id per known word, in the order given, after <pad>, <eos> and <unk>.

    Punctuation is split from words, so no text can spell a special token.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    names = [PAD, EOS, UNKNOWN, *words]
    model = models.WordLevel({w: i for i, w in enumerate(names)}, unk_token=UNKNOWN)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([PAD, EOS])
    return PlainTokenizer(backend, separator="")


_LONG = re.compile(r"(\S{256})\S+")


def train(texts: Iterable[str], vocab_size: int) -> PlainTokenizer:
    """Byte-level BPE (no unknown text) trained on `texts`; the same texts give the same ids.

    Args:
      texts: what to learn from.
      vocab_size: at least 258 (256 bytes and two special tokens); fewer ids result when the texts
        hold fewer pairs.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 258:
        raise UserError(
            f"data.vocab_size: {vocab_size}", allowed="258 or more", fix="data.vocab_size=4096"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A word of a million letters would take minutes: the time grows with its length squared.
    clean = (_LONG.sub(r"\1", text.encode("utf-8", "replace").decode("utf-8")) for text in texts)
    backend.train_from_iterator(clean, trainer)
    return PlainTokenizer(backend, separator="\n")


def load(path: str | os.PathLike) -> PlainTokenizer:
    """Reads a `tokenizer.json` (ours, or one of a published model).

    Raises:
      UserError: no such file, not a tokenizer, or no token that ends an answer.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    path = Path(path)
    if not path.is_file():
        raise UserError(f"data.tokenizer: no file {path}", fix="give the path of a tokenizer.json")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # The library raises plain Exception.
        raise UserError(
            f"data.tokenizer: {path} is not a tokenizer.json ({error})",
            fix="give a file saved by the tokenizers library",
        ) from error
    words = isinstance(backend.model, models.WordLevel)
    return PlainTokenizer(backend, separator="" if words else "\n")


def _find(backend: Any, names: Iterable[str]) -> str | None:
    return next((name for name in names if backend.token_to_id(name) is not None), None)
