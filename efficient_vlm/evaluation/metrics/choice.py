"""Multiple choice: the letter that an answer names; MMMU, some of whose questions are open."""

import random
import re
import string
from collections.abc import Sequence

from efficient_vlm.errors import UserError, short
from efficient_vlm.evaluation.answers import normalise
from efficient_vlm.evaluation.metrics.base import Measured, Row, mean

LETTERS = string.ascii_uppercase
# Forms of an answer in which a letter is named, strictest first.
_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:)]?")
_IN_FRONT = re.compile(r"\(?([A-Z])(?:\)|[.:](?!\w)|\s*\n)")
_NAMED = re.compile(
    r"\b(?:answer|option|choice)\b(?:\s+is)?\s*:?\s*(?:option\s+)?\(?([A-Z])\b(?!['’])",
    re.IGNORECASE,
)
_BRACKETS = re.compile(r"\(([A-Z])\)")


def multiple_choice(
    prediction: str, references: Sequence[str], *, options: Sequence[str] = ()
) -> Measured:
    """1 if the answer names the right option, by its letter or in its words.

    Read in this order: a letter alone ("b", "(B)", "**B**"), the words of an option, a letter in
    front ("B. because", "B) cat"), "the answer is B", the only letter in brackets. An answer that
    names none is wrong; nothing is drawn.

    Args:
      references: letters of the right options, or their words.
      options: what the letters from A on stand for; () where the question says it.
    """
    letters = _letters(options)
    right = {_letter_of(reference, letters, options) for reference in references}
    parsed = read_letter(prediction, letters, options)
    return Measured(float(parsed in right), parsed)


def read_letter(text: str, letters: str, options: Sequence[str]) -> str | None:
    """The letter that an answer names; None for none."""
    text = text.strip().strip("*_`\"'").strip()
    if (alone := _ALONE.fullmatch(text)) and alone[1].upper() in letters:
        return alone[1].upper()
    words = normalise(text).rstrip(".")
    same = [k for k, option in enumerate(options) if normalise(option).rstrip(".") == words]
    if same:
        return letters[same[0]]
    if (front := _IN_FRONT.match(text)) and front[1] in letters:
        return front[1]
    named = [letter for letter in _NAMED.findall(text) if letter.isupper() and letter in letters]
    if named:
        return named[-1]
    bracketed = set(_BRACKETS.findall(text)) & set(letters)
    return bracketed.pop() if len(bracketed) == 1 else None


def _letters(options: Sequence[str]) -> str:
    if len(options) > len(LETTERS):
        raise UserError(f"options: {len(options)}", allowed=f"up to {len(LETTERS)}, A to Z")
    return LETTERS[: len(options)] if options else LETTERS


def _letter_of(reference: str, letters: str, options: Sequence[str]) -> str:
    """The letter of a reference, which may be the words of an option."""
    text = reference.strip()
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    for letter, option in zip(letters, options, strict=False):
        if normalise(option) == normalise(text):
            return letter
    raise UserError(
        f"references: {short(reference)} is no option",
        allowed=f"letters from A to {letters[-1]}, or the words of an option",
        fix="name the columns: --columns=references=NAME,options=NAME",
    )


# ---- MMMU ----------------------------------------------------------------------------------------


def mmmu(prediction: str, references: Sequence[str], *, options: Sequence[str] = ()) -> Measured:
    """MMMU's own reading of answers (arXiv 2311.16502), but one that names nothing is wrong.

    A letter in brackets, else one before a space, else one before a dot, else the words of an
    option in an answer of more than five words; the last of several. Without options a question is
    open: right if a reference is part of the answer's last statement, or equals a number in it.
    """
    if not options:
        return _open(prediction, references)
    letters = _letters(options)
    right = {_letter_of(reference, letters, options) for reference in references}
    parsed = _mmmu_letter(prediction, letters, options)
    return Measured(float(parsed in right), parsed)


def mmmu_lmms_eval(
    prediction: str,
    references: Sequence[str],
    *,
    options: Sequence[str] = (),
    id: str = "",
    seed: int = 0,
) -> Measured:
    """As `mmmu`, but for an answer that names nothing a letter is drawn, as MMMU and lmms-eval do.

    Args:
      id: of the question: its draw depends on this and the seed alone.
      seed: of the draws.
    """
    measured = mmmu(prediction, references, options=options)
    if not options or measured.parsed is not None:
        return measured
    letters = _letters(options)
    drawn = random.Random(f"{seed} {id}").choice(letters)  # noqa: S311
    right = {_letter_of(reference, letters, options) for reference in references}
    return Measured(float(drawn in right), drawn, {"drawn": 1.0})


def _mmmu_letter(text: str, letters: str, options: Sequence[str]) -> str | None:
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        named = [letter for letter in letters if form.format(letter) in text]
        if named:
            # `max` takes the first of equals, as where no letter stands between spaces.
            return max(named, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    places = {
        letter: lower.rfind(option.lower())
        for letter, option in zip(letters, options, strict=True)
        if option.lower() in lower
    }
    return max(places, key=places.__getitem__) if places else None


_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def _open(prediction: str, references: Sequence[str]) -> Measured:
    """An open question of MMMU."""
    statements = _statements(prediction.strip().strip(".").lower())
    numbers = [n for text in statements for kind in _NUMBERS for n in kind.findall(text)]
    parsed = [form for text in (*statements, *numbers) for form in _forms(text)]
    wanted = [form for reference in references for form in _forms(reference)]
    right = any(
        given in wanted
        if isinstance(given, float)
        else any(isinstance(want, str) and want in given for want in wanted)
        for given in parsed
    )
    return Measured(float(right), statements)


def _statements(text: str) -> list[str]:
    """The ends of the lines that state something; all of the text where none does."""
    lines, found = text.split("\n"), []
    for number, line in enumerate(lines):
        keys = (*_KEYS, "=") if number == len(lines) - 1 else _KEYS
        end = ""
        for key in (key for key in keys if key in line):
            other = line.rsplit(key, 1)[-1].strip()
            # An empty end takes the place of any, and any other that of an empty one.
            end = other if not end or len(other) < len(end) else end
        if end and end not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(end)
    return found or [text]


def _forms(text: str) -> list[str | float]:
    """A number rounded to two decimals, or a text in small letters; a single letter with a space,
    so that it is not found inside words."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def by_subject(rows: Sequence[Row]) -> dict[str, float]:
    """The mean over subjects of their means, for rows that name one."""
    subjects: dict[str, list[float]] = {}
    for row in rows:
        if row.get("category") is not None:
            subjects.setdefault(str(row["category"]), []).append(row["score"])
    return (
        {"mean_of_subjects": mean([mean(each) for each in subjects.values()])} if subjects else {}
    )
