"""Where the assistant's turns stand in a conversation, as a chat template writes it.

The template's own `{% generation %}` marks say it; of a template without any it is found out by
what it writes up to a turn, and with it.
"""

import itertools
import re
from collections.abc import Sequence

from efficient_vlm.errors import UserError
from efficient_vlm.processing.chat_template import Template
from efficient_vlm.processing.hub_tokenizer import HubTokenizer
from efficient_vlm.processing.messages import ANSWERING, GENERATION_MARKS, Message, with_mark
from efficient_vlm.processing.prompt_families import Pieces

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def has_marks(template: Template) -> bool:
    """Whether a template says itself what the assistant has written."""
    return bool(_MARK.search(template.source))


def answer_pieces(
    template: Template, messages: Sequence[Message], tokenizer: HubTokenizer
) -> Pieces:
    """The text of a conversation in pieces: (text, whether it is of an answer).

    Args:
      template: where it has marks, they decide. Else answers are what it writes behind the prompt
        (`add_generation_prompt`) that asked for a turn, up to the end of the turn; of a prompt that
        the conversation does not go on from (one that opens a thinking part, which the turn lacks),
        behind the tokens that both have in common.
      messages: in a form that the template writes.
      tokenizer: where texts differ, it says with which token.

    Raises:
      UserError: the template refuses the conversation, its marks mark nothing of it, or it writes
        other text in front of an answer when more follows.
    """
    if has_marks(template):
        pieces = _by_marks(template, messages)
    else:
        pieces = _behind_prompts(template, messages, tokenizer)
    if not any(text for text, target in pieces if target):
        raise UserError(
            "chat template: it marks no turn of the assistant",
            fix="put {% generation %} and {% endgeneration %} around what it writes for answers",
        )
    return pieces


def _by_marks(template: Template, messages: Sequence[Message]) -> Pieces:
    """By the template's own marks."""
    text = template.render(messages, add_generation_prompt=False)
    begin, end = marks = unused(text, 2)
    given = dict(zip(GENERATION_MARKS, marks, strict=True))
    marked = template.render(messages, add_generation_prompt=False, **given)
    pieces, depth = [], 0
    for piece in re.split(f"([{begin}{end}])", marked):
        if piece in marks:
            depth += 1 if piece == begin else -1
        elif piece:
            pieces.append((piece, depth > 0))
    if "".join(piece for piece, _ in pieces) != text:
        raise UserError(
            "chat template: it changes the text that its {% generation %} marks",
            fix="put the marks around where that text is written",
        )
    return pieces


def _behind_prompts(
    template: Template, messages: Sequence[Message], tokenizer: HubTokenizer
) -> Pieces:
    """By what the template writes up to each answer, and with it."""
    text = template.render(messages, add_generation_prompt=False)
    pieces, at = [], 0
    for number, message in enumerate(messages):
        if message["role"] not in ANSWERING:
            continue
        start = _start(template, messages, number, text, tokenizer)
        stop = _stop(template, messages, number, text, tokenizer)
        if not at <= start <= stop:
            raise _disagree(number)
        pieces += [(text[at:start], False), (text[start:stop], True)]
        at = stop
    return [*pieces, (text[at:], False)]


def _start(template, messages, number, text, tokenizer) -> int:
    """Where an answer begins in the text of the conversation."""
    try:
        prompt = template.render(messages[:number], add_generation_prompt=True)
    except UserError:
        if number:
            raise
        raise UserError(
            "messages: the first one is the assistant's, which the chat template refuses",
            fix="begin with a message of the user",
        ) from None
    if text.startswith(prompt):
        return len(prompt)
    before = template.render(messages[:number], add_generation_prompt=False)
    if not (text.startswith(before) and prompt.startswith(before)):
        raise _disagree(number)
    at = len(before)
    return at + _common(prompt[at:], text[at:], tokenizer)


def _stop(template, messages, number, text, tokenizer) -> int:
    """Where the turn of an answer ends in the text of the conversation."""
    if number == len(messages) - 1:
        return len(text)
    answered_text = template.render(messages[: number + 1], add_generation_prompt=False)
    if text.startswith(answered_text):
        return len(answered_text)
    # Written differently once others follow. What stands behind its own text then is the end of
    # the turn as far as its tokens are the same with and without the others.
    (mark,) = unused(text, 1)
    marked = with_mark(messages[number], mark)
    if marked is None:
        raise _disagree(number)
    behind = []
    for others in ((), messages[number + 1 :]):
        turns = [*messages[:number], marked, *others]
        front, _, rest = template.render(turns, add_generation_prompt=False).partition(mark)
        if not front or mark in rest:
            raise _disagree(number)
        behind.append(rest)
    if not text.endswith(behind[1]):
        raise _disagree(number)
    return len(text) - len(behind[1]) + _common(*behind, tokenizer)


def _disagree(number: int) -> UserError:
    return UserError(
        f"messages: number {number}: the chat template writes other text in front of or in this "
        "answer when more follows",
        fix="put {% generation %} marks into the template, or train on one answer at a time",
    )


def _common(first: str, second: str, tokenizer: HubTokenizer) -> int:
    """Characters of the tokens with which both texts begin."""
    ids, offsets = tokenizer.encode_with_offsets(first, bos=False)
    others, _ = tokenizer.encode_with_offsets(second, bos=False)
    equal = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, others))))
    return max((stop for _, stop in offsets[:equal]), default=0)


def unused(text: str, count: int) -> list[str]:
    """Characters for private use that do not occur in a text."""
    codes = itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))
    free = (chr(code) for code in codes if chr(code) not in text)
    return [next(free) for _ in range(count)]
