"""Which parameters are trained, and which products get an adapter: by patterns and presets."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from efficient_vlm.errors import UserError, closest, short

__all__ = ["TARGETS", "TRAINED", "Patterns", "as_patterns", "selected"]

# A regular expression found in the path of a parameter, the name of a preset, or several of them.
Patterns = str | Sequence[str]

_CONNECTOR = r"^(connect|project|reduce|start|padding_embedding)\b"
_ATTENTION = r"attention/(query|key|value|out)/kernel$"

# What is trained. "connector" is the first stage of LLaVA (arXiv 2304.08485, section 4.2), "bias"
# is BitFit (arXiv 2106.10199).
TRAINED: Mapping[str, str] = {
    "all": r"",
    "bias": r"(^|[/_])bias$",
    "connector": _CONNECTOR,
    "connector+decoder": rf"{_CONNECTOR}|^language/",
    "decoder": r"^language/",
    "encoder": r"^vit/",
    "norms": r"norm[/_](scale|bias)$",
}
# Which products get an adapter.
TARGETS: Mapping[str, str] = {
    "all-linear": r"^(?!vit/embed/)(?!language/head/)(?!.*/router/)",
    "attention": rf"^language/.*{_ATTENTION}",
    "connector": _CONNECTOR,
    "decoder": rf"^language/.*({_ATTENTION}|(mlp|shared)/(gate|up|down)/kernel$)",
    "encoder": r"^vit/.*layers/",
    "experts": r"^language/.*/moe/(gate|up|down)$",
}


def as_patterns(patterns: Patterns) -> tuple[str, ...]:
    """One pattern or several as a tuple."""
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def selected(
    field: str, patterns: Patterns, paths: Iterable[str], presets: Mapping[str, str]
) -> set[str]:
    """The paths that a preset or a regular expression of several matches.

    Args:
      field: its name in the config, for messages.
      patterns: presets, or regular expressions that are found in a path.
      paths: of parameters.
      presets: name -> regular expression.

    Raises:
      UserError: no regular expression, or one that matches nothing, with the nearest paths.
    """
    paths, found = sorted(paths), set()
    for pattern in as_patterns(patterns):
        expression = _compiled(field, pattern, presets)
        matched = {path for path in paths if expression.search(path)}
        if not matched:
            guess = closest(pattern, presets)
            raise UserError(
                f"{field}: {short(pattern)} matches no parameter",
                allowed=f"{', '.join(sorted(presets))}, or a regular expression for a path",
                fix=f"did you mean {guess}?"
                if guess
                else f"the nearest paths are {', '.join(_nearest(pattern, paths))}",
            )
        found |= matched
    return found


def _compiled(field: str, pattern: str, presets: Mapping[str, str]) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise UserError(f"{field}: {short(pattern)}", allowed="a text, or several")
    try:
        return re.compile(presets.get(pattern, pattern))
    except re.error as error:
        raise UserError(
            f"{field}: {short(pattern)}: {error}",
            allowed=f"{', '.join(sorted(presets))}, or a regular expression for a path",
            fix="write special characters as \\(, \\* and so on",
        ) from None


def _nearest(pattern: str, paths: Sequence[str]) -> Sequence[str]:
    """Three paths, those most like the pattern if it is no longer than a path may be."""
    # Comparing takes the square of the length.
    if len(pattern) > 80:
        return paths[:3]
    return difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
