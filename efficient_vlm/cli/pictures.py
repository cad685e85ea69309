"""`--pictures.OPTION=VALUE`: how a published model's pictures are cut or resized."""

from collections.abc import Sequence

from efficient_vlm.errors import UserError, short

_WORDS = {"true": True, "false": False}


def picture_options(texts: Sequence[str]) -> dict[str, int | bool]:
    """Options of a picture processor from "option=value".

    Raises:
      UserError: a value that is neither a whole number nor true or false.
    """
    parts = (text.partition("=") for text in texts)
    return {name: _literal(f"--pictures.{name}", value) for name, _, value in parts}


def _literal(option: str, text: str) -> int | bool:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    raise UserError(f"{option}: {short(text)}", allowed="a whole number, true or false")
