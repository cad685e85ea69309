"""VQA accuracy: agreement with ten people, after answers were brought into one form.

An answer that k people gave scores min(1, k / 3). The official script takes the mean of that over
the subsets that leave one person out (Antol et al., arXiv 1505.00468; visualqa.org/evaluation), so
that three of ten give 0.9. Answers are compared without punctuation and articles, with number words
as digits and contractions with their apostrophes.
"""

import re
import string
from collections.abc import Callable, Sequence

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation.metrics.base import Measured, mean

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED = re.compile(r"(?<=\d),+(?=\d)")
_DOT = re.compile(r"\.(?!\d)")
DOT_APART = re.compile(r"(?<!\d)\.(?!\d)")
# The published scripts pass a flag where `re.sub` takes a number: at most so many dots go.
_DOTS = 32
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = {"a", "an", "the"}
# Contractions of the official list; there each is also known with one apostrophe left out.
_CONTRACTED = re.findall(
    r"\S+",
    """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""",
)
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # The other way round, in the official list.


def without_marks(text: str, dot: re.Pattern[str] = _DOT) -> str:
    """The official treatment of punctuation.

    A mark becomes a space, or nothing if it stands beside a space anywhere in the text, or if the
    text has a comma between digits. Dots go unless a digit follows.
    """
    grouped, out = _GROUPED.search(text), text
    for mark in _MARKS:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or grouped else " ")
    return dot.sub("", out, count=_DOTS)


def in_one_form(text: str, dot: re.Pattern[str] = _DOT) -> str:
    """An answer as the official script compares it."""
    text = without_marks(text.replace("\n", " ").replace("\t", " ").strip(), dot)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> Measured:
    """The mean over the subsets that leave one person out of min(1, people who agree / 3).

    All answers are first brought into one form, as lmms-eval does for VQAv2: without punctuation
    and articles, number words as digits, contractions with their apostrophes.
    """
    return _left_out(prediction, references, in_one_form)


def vqa_accuracy_script(prediction: str, references: Sequence[str]) -> Measured:
    """As `vqa_accuracy`, but answers stay as they are where all people gave the same.

    So does the script that visualqa.org published, and copies of it.
    """
    same = len(set(_lines_joined(references))) == 1
    return _left_out(prediction, references, _stripped if same else in_one_form)


def vqa_accuracy_plain(prediction: str, references: Sequence[str]) -> Measured:
    """min(1, k / 3) of all answers in one form, nobody left out, as Molmo's code has it."""
    _several("vqa_accuracy_plain", references)
    parsed = in_one_form(prediction)
    same = sum(in_one_form(reference) == parsed for reference in references)
    return Measured(min(1.0, same / 3), parsed)


def vqa_accuracy_textvqa_lmms_eval(prediction: str, references: Sequence[str]) -> Measured:
    """As `vqa_accuracy`, after commas and question marks went and "'s" became a word.

    So lmms-eval does for TextVQA and VizWiz.
    """
    return _left_out(prediction, references, _words)


def vqa_accuracy_vlmevalkit(prediction: str, references: Sequence[str]) -> Measured:
    """As `vqa_accuracy`, but a dot behind a digit stays: "3." is not "3"."""
    return _left_out(prediction, references, lambda text: in_one_form(text, DOT_APART))


def vqa_accuracy_evalscope(prediction: str, references: Sequence[str]) -> Measured:
    """All punctuation but ":" becomes a space, contractions stay, empty answers are wrong.

    What follows the last "ANSWER:" is the answer. One reference alone gives a third.
    """
    given = _ANSWER.findall(prediction)
    parsed = _spaced((given[-1] if given else prediction).strip().strip("\"'"))
    same = [_spaced(reference) == parsed for reference in references]
    if not parsed:
        return Measured(0.0, parsed)
    if len(same) == 1:
        return Measured(same[0] / 3, parsed)
    return Measured(mean([min(1.0, (sum(same) - own) / 3) for own in same]), parsed)


_ANSWER = re.compile(r"ANSWER:\s*(.*)", re.IGNORECASE)
_SPACED = str.maketrans(dict.fromkeys(string.punctuation.replace(":", ""), " "))


def _left_out(prediction: str, references: Sequence[str], form: Callable[[str], str]) -> Measured:
    """The mean of min(1, matches / 3) over subsets that leave one reference out."""
    _several("vqa_accuracy", references)
    parsed = form(prediction)
    same = [form(reference) == parsed for reference in references]
    return Measured(mean([min(1.0, (sum(same) - own) / 3) for own in same]), parsed)


def _several(name: str, references: Sequence[str]) -> None:
    if len(references) < 2:
        raise UserError(
            f"{name}: one reference, where the answers of several people are compared",
            allowed="a list of answers for each question, usually ten",
            fix="exact_match, anls and relaxed_accuracy take one",
        )


def _stripped(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _lines_joined(references: Sequence[str]) -> list[str]:
    return [_stripped(reference) for reference in references]


def _words(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return in_one_form(text)


def _spaced(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().strip()).translate(_SPACED)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(word for word in words if word not in _ARTICLES)
