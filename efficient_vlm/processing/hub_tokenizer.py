"""The tokenizer of a published model, from its directory.

Unlike in `processing.plain_tokenizer`, special tokens that are spelled out in the text are
recognised: prompts of published models are made of them. Text of strangers belongs into a prompt
only when it is meant to be able to hold them.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError, closest, short
from efficient_vlm.processing.tokenizer import Tokenizer, utf8

# Roles whose tokens every file may name; further roles end in "_token".
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file.

    Raises:
      UserError: the file is damaged or holds anything but an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name}: cannot be read ({error})", fix="download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: holds a {type(content).__name__}", allowed="an object")
    return content


def special_tokens(directory: str | os.PathLike) -> dict[str, str]:
    """Role ("bos_token", "image_token", ...) to token, as chat templates name them.

    `special_tokens_map.json` gives way to `tokenizer_config.json`; null roles are left out.
    """
    directory = Path(directory)
    named: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(directory / name)
        extra = content.get("extra_special_tokens")
        for source in (content, extra if isinstance(extra, dict) else {}):
            for role, token in source.items():
                token = token.get("content") if isinstance(token, dict) else token
                if role.endswith("_token") and isinstance(token, str):
                    named[role] = token
                elif role in _ROLES and token is None:
                    named.pop(role, None)
    return named


def special_id(directory: str | os.PathLike, token: str) -> int | None:
    """Id of a special token by the files of a tokenizer, without building it; None for none."""
    directory = Path(directory)
    found = None
    try:
        for entry in read_json(directory / "tokenizer.json").get("added_tokens") or ():
            found = int(entry["id"]) if entry["content"] == token else found
        decoder = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder") or {}
        for number, entry in decoder.items():
            found = int(number) if entry["content"] == token else found
        found = read_json(directory / "added_tokens.json").get(token, found)
        return None if found is None else int(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory}: the added tokens of its tokenizer are damaged ({short(error)})",
            fix="download its files again",
        ) from None


class HubTokenizer(Tokenizer):
    """Text to ids and back as the published model means it."""

    def __init__(
        self, backend: Any, special: Mapping[str, str], eos_ids: Iterable[int] | None = None
    ):
        """`eos_ids`: all ids that end an answer; None for the tokenizer's own end token."""
        super().__init__(backend)
        backend.encode_special_tokens = False
        self.special = dict(special)
        self.bos_id = self._role("bos_token")
        eos = self._role("eos_token")
        own = [] if eos is None else [eos]
        ends = own if eos_ids is None else list(map(int, eos_ids))
        # The tokenizer's own first, if it is one of them: `eos_id`, which training writes.
        self.eos_ids = tuple(dict.fromkeys([*(e for e in own if e in ends), *ends]))
        pad = self._role("pad_token")
        self.pad_id = next(iter(self.eos_ids), 0) if pad is None else pad

    @classmethod
    def from_hf(cls, directory: str | os.PathLike) -> "HubTokenizer":
        """From `tokenizer.json` and, where present, `tokenizer_config.json`,
        `special_tokens_map.json`, `added_tokens.json`. Ids that end an answer are those of
        `generation_config.json` alone; else those of `config.json` and the tokenizer's own.

        Raises:
          UserError: `tokenizer.json` is missing or damaged, an added token does not get the id that
            the files give it, or another file is damaged.
        """
        from tokenizers import Tokenizer as Backend

        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise _no_tokenizer(directory)
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # The library raises plain Exception.
            raise UserError(
                f"tokenizer.json: not readable ({error})", fix="download it again"
            ) from error
        special = special_tokens(directory)
        _add_tokens(backend, directory, special)
        made = cls(backend, special)
        return cls(backend, special, _ends(directory, made.eos_ids))

    def encode(self, text: str, bos: bool | None = None) -> list[int]:
        if bos and self.bos_id is None:
            raise UserError("bos: the tokenizer has no beginning token", fix="pass bos=False")
        ids = self._backend.encode(utf8(text), add_special_tokens=bos is None).ids
        return [self.bos_id, *ids] if bos and ids[:1] != [self.bos_id] else ids

    def encode_with_offsets(
        self, text: str, bos: bool | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode` for None and False, with the characters (first, behind the last) of each id.

        What the tokenizer adds by itself has (0, 0). Some tokenizers leave white space out of the
        characters of a token (`trim_offsets`).
        """
        encoded = self._backend.encode(utf8(text), add_special_tokens=bos is None)
        return encoded.ids, encoded.offsets

    def renamed(self, names: Mapping[str, str]) -> "HubTokenizer":
        """This tokenizer with other texts for some of its tokens: the old ones are ordinary text.

        Raises:
          UserError: a token that cannot be renamed, as the vocabulary builds others from it.
        """
        from tokenizers import Tokenizer as Backend

        definition = json.loads(self._backend.to_str())
        for entry in definition["added_tokens"]:
            entry["content"] = names.get(entry["content"], entry["content"])
        vocab = definition["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab = {names.get(piece, piece): number for piece, number in vocab.items()}
        else:  # Unigram: pieces with scores.
            vocab = [[names.get(piece, piece), score] for piece, score in vocab]
        definition["model"]["vocab"] = vocab
        try:
            backend = Backend.from_str(json.dumps(definition))
            same = {old: backend.token_to_id(new) for old, new in names.items()}
        except Exception:  # The library raises plain Exception.
            same = {}
        if any(same.get(old) != self._backend.token_to_id(old) for old in names):
            raise UserError(f"tokenizer: {short(' '.join(names))} cannot be read as ordinary text")
        return HubTokenizer(backend, self.special, self.eos_ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt that a chat template has written; an end token for no text."""
        return self.encode(text) or [self.pad_id]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return self._backend.decode(list(map(int, ids)), skip_special_tokens=skip_special)

    @property
    def vocabulary(self) -> dict[int, str]:
        """Id -> token, of all tokens."""
        return {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()}

    @property
    def added(self) -> set[int]:
        """Ids of tokens that stand beside the vocabulary: special ones, and words added to it."""
        return set(self._backend.get_added_tokens_decoder())

    def knows(self, token: str) -> bool:
        return self._backend.token_to_id(token) is not None

    def id_of(self, token: str) -> int:
        """Id of a token by its text ("<im_patch>") or by its role ("eos_token").

        Raises:
          UserError: there is no such token.
        """
        found = self._backend.token_to_id(self.special.get(token, token))
        if found is None:
            added = self._backend.get_added_tokens_decoder().values()
            guess = closest(token, [*self.special, *(str(t.content) for t in added)])
            raise UserError(
                f"special token: the tokenizer has no {short(token)}",
                allowed=f"{len(added)} added tokens, or {', '.join(self.special) or 'no role'}",
                fix=f"did you mean {guess!r}?" if guess else "check that it is this model's own",
            )
        return found

    def _role(self, role: str) -> int | None:
        token = self.special.get(role)
        return None if token is None else self._backend.token_to_id(token)


def _ends(directory: Path, own: tuple[int, ...]) -> list[int]:
    """Ids that end an answer, by the first file that names any; `own` of the tokenizer."""

    def named(found: Any, file: str = "config.json") -> list[int]:
        eos = found.get("eos_token_id") if isinstance(found, dict) else None
        ids = [i for i in (eos if isinstance(eos, list) else [eos]) if i is not None]
        if not all(type(i) in (int, float) and i == int(i) for i in ids):
            raise UserError(
                f"{directory / file}: eos_token_id {short(eos)}",
                allowed="an id, a list of ids, null",
                fix="correct it there",
            )
        return list(map(int, ids))

    # transformers goes on at an end token of the tokenizer that this file does not name.
    file = "generation_config.json"
    ids = named(read_json(directory / file), file)
    if not ids:
        config = read_json(directory / "config.json")
        ids = [*own, *(named(config) or named(config.get("text_config")))]
    return [i for i in ids if 0 <= i < 2**31]  # Others are the ids of no token.


def _add_tokens(backend: Any, directory: Path, special: Mapping[str, str]) -> None:
    """Adds what the files beside `tokenizer.json` name and it does not hold, by ascending id."""
    from tokenizers import AddedToken

    wanted: dict[str, tuple[int, AddedToken]] = {}
    for token, number in read_json(directory / "added_tokens.json").items():
        wanted[token] = (number, AddedToken(token, special=token in special.values()))
    added = read_json(directory / "tokenizer_config.json").get("added_tokens_decoder")
    for number, entry in (added if isinstance(added, dict) else {}).items():
        try:
            flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
            given = {flag: bool(entry[flag]) for flag in flags if flag in entry}
            wanted[entry["content"]] = (int(number), AddedToken(entry["content"], **given))
        except (TypeError, KeyError, ValueError):
            raise UserError(
                f"tokenizer_config.json: added token {short(number)} is {short(entry)}",
                allowed='{"content": TEXT, "special": true or false, ...}',
            ) from None
    for token, (number, entry) in sorted(wanted.items(), key=lambda item: str(item[1][0]).zfill(9)):
        if backend.token_to_id(token) is None:
            (backend.add_special_tokens if entry.special else backend.add_tokens)([entry])
        if backend.token_to_id(token) != number:
            raise UserError(
                f"tokenizer: {short(token)} has id {backend.token_to_id(token)} in tokenizer.json, "
                f"{number} beside it",
                fix="take all tokenizer files from one revision of the model",
            )
    # A role makes a token special, also one that is so far an ordinary word of the vocabulary.
    known = {str(token.content) for token in backend.get_added_tokens_decoder().values()}
    missing = [token for token in dict.fromkeys(special.values()) if token not in known]
    backend.add_special_tokens([AddedToken(token, special=True) for token in missing])


def _no_tokenizer(directory: Path) -> UserError:
    if not directory.is_dir():
        return UserError(f"tokenizer: no directory {directory}", fix="give a model's directory")
    models = sorted(path.name for path in directory.glob("*.model"))
    if models:
        return UserError(
            f"tokenizer: {directory} has {models[0]} (sentencepiece) but no tokenizer.json",
            fix=f"convert it once, with transformers and sentencepiece installed: "
            f"AutoTokenizer.from_pretrained({str(directory)!r}, use_fast=True)"
            f".save_pretrained({str(directory)!r})",
        )
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return UserError(
            f"tokenizer: {directory} has vocab.json and merges.txt but no tokenizer.json",
            fix=f"convert it once, with transformers: AutoTokenizer.from_pretrained("
            f"{str(directory)!r}).save_pretrained({str(directory)!r})",
        )
    return UserError(f"tokenizer: no tokenizer.json in {directory}", fix="download it as well")
