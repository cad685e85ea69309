"""Text to token ids and back, through the `tokenizers` library.

Special tokens are never made from text: what a user types is always ordinary text, whatever it
looks like. Ids of our own tokenizers: 0 padding, 1 end of answer.
"""

import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
# Names by which published tokenizers know the two tokens that we need.
_EOS_NAMES = (EOS, "</s>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "[SEP]")
_PAD_NAMES = (PAD, "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>")
_CACHE = 2**16


class Tokenizer:
    """Encodes text without ever producing a special token.

    Attributes:
      vocab_size: ids are below this.
      pad_id: fills the end of a row.
      eos_id: ends every answer.
      separator: text between a question and its answer.
      fingerprint: SHA-256 of the definition.
    """

    def __init__(self, backend: Any, separator: str):
        self._backend = backend
        # Special tokens that appear in text are split up like any other word.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self.separator = separator
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id = _find(backend, _EOS_NAMES)
        if self.eos_id is None:
            raise UserError(
                "data.tokenizer: it has no token that ends an answer",
                allowed=", ".join(_EOS_NAMES),
                fix="add one of these as a special token",
            )
        pad = _find(backend, _PAD_NAMES)
        # Padding is masked everywhere, so any id serves where there is none of its own.
        self.pad_id = self.eos_id if pad is None else pad
        added = backend.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special}
        self._special |= {self.eos_id, self.pad_id}
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()
        self._encode = functools.lru_cache(maxsize=_CACHE)(self._encode_uncached)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no special token, neither from its content nor added at its ends."""
        return list(self._encode(text))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a question up to where the answer begins; never empty."""
        return self.encode(text + self.separator) or [self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of an answer: up to the first end token, without special tokens."""
        kept = []
        for i in ids:
            if int(i) == self.eos_id:
                break
            if int(i) not in self._special:
                kept.append(int(i))
        return self._backend.decode(kept, skip_special_tokens=True).strip()

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `tokenizer.json`, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=".tokenizer-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._backend.to_str())
        os.replace(scratch, path)

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        # Lone surrogates (legal in JSON) cannot become UTF-8.
        text = text.encode("utf-8", "replace").decode("utf-8")
        ids = self._backend.encode(text, add_special_tokens=False).ids
        # A loaded tokenizer may have rules of its own; what is left of special ids goes here.
        return tuple(i for i in ids if i not in self._special)


def word_level(words: Sequence[str]) -> Tokenizer:
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
    return Tokenizer(backend, separator="")


_LONG = re.compile(r"(\S{256})\S+")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
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
    return Tokenizer(backend, separator="\n")


def load(path: str | os.PathLike) -> Tokenizer:
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
    return Tokenizer(backend, separator="" if isinstance(backend.model, models.WordLevel) else "\n")


def _find(backend: Any, names: Iterable[str]) -> int | None:
    return next((i for i in map(backend.token_to_id, names) if i is not None), None)
