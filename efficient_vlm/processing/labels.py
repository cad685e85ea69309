"""Conversations with answers -> token ids, and which of them a model is to learn to write.

These are the assistant's turns as the model's own chat template writes them: everything behind what
a prompt ends with, up to the end of the turn. So the header is no target, and the end token and a
line break behind it are, as in the templates that TRL trains with and in LLaMA-Factory's.

The text is tokenised as one, so that tokens are those of a prompt. A token of which one character
belongs to an answer is a target, as for `return_assistant_tokens_mask` of transformers 5.24.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from efficient_vlm.errors import UserError
from efficient_vlm.processing import chat_template as prompts
from efficient_vlm.processing.answer_spans import answer_pieces, has_marks, unused
from efficient_vlm.processing.conversation import (
    PromptStyle,
    beginning,
    expected_form,
    prompt_options,
)
from efficient_vlm.processing.hub_tokenizer import HubTokenizer
from efficient_vlm.processing.messages import ANSWERING, Message, read_messages
from efficient_vlm.processing.pictures.base import Pictured
from efficient_vlm.processing.prompt_families import Pieces, answered


def labelled(
    style: PromptStyle,
    template: prompts.Template | str,
    tokenizer: HubTokenizer,
    messages: Sequence[Message],
    pictured: Sequence[Pictured],
    *,
    end: bool = False,
    last: bool = False,
) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation, with one id for each visual token, and which are targets.

    Targets of chat templates are those of `answer_spans.answer_pieces`. What a template leaves out,
    such as thinking parts of earlier turns, is in neither.

    Families without a template write an end token behind every answer ("llava": "</s>"), see
    `prompt_families.answered`.

    Args:
      style: of the model.
      template: of the checkpoint, or the name of a function of `chat_template`.
      tokenizer: of the checkpoint.
      messages: see `messages.read_messages`; the assistant's hold no pictures. The placeholder of
        pictures is ordinary text in them, and stands for a picture in other texts.
      pictured: the pictures.
      end: whether an end token becomes a target where the last message is an answer and none of
        `tokenizer.eos_ids` is one: that behind its text, or an added one where the template writes
        none (that of LLaVA-1.5). Without it a model does not learn to stop.
      last: whether the last answer alone is a target.

    Returns:
      Ids and targets, of one length.

    Raises:
      UserError: no answers, or a conversation that the template refuses, or of which it does not
        show where answers stand.
    """
    messages, _ = read_messages(messages)
    _check(messages)
    options = prompt_options(style, template)
    messages, tokenizer, names = _plain_answers(style, tokenizer, messages)
    if isinstance(template, str):
        mark = tokenizer.special.get("eos_token", "")
        parts: Sequence[Pieces] = answered(template, messages, mark, **options)
    else:
        formed = expected_form(messages, template, style, options)
        parts = [answer_pieces(template, formed, tokenizer)]
    parts = _last_alone(parts) if last else parts
    if style.pictures:
        parts = _expanded(parts, [p.text for p in pictured], style.placeholder)
    parts = [[(_swapped(text, names), target) for text, target in part] for part in parts]
    exact = isinstance(template, str) or not has_marks(template)
    ids, targets = _encoded(style, template, tokenizer, parts, names, exact)
    if end and messages[-1]["role"] in ANSWERING:
        _end(ids, targets, tokenizer)
    return ids, targets


def _last_alone(parts: Sequence[Pieces]) -> list[Pieces]:
    """Pieces of which the last that is a target remains one."""
    places = [(p, n) for p, part in enumerate(parts) for n, piece in enumerate(part) if piece[1]]
    return [
        [(text, (p, n) == places[-1]) for n, (text, _) in enumerate(part)]
        for p, part in enumerate(parts)
    ]


def _check(messages: Sequence[Message]) -> None:
    turns = [(n, m) for n, m in enumerate(messages) if m["role"] in ANSWERING]
    if not turns:
        raise UserError(
            "messages: none is the assistant's, so there is nothing to learn",
            allowed=f"role {' or '.join(map(repr, ANSWERING))} for answers",
        )
    for number, message in turns:
        content = message["content"]
        if isinstance(content, list) and any(part["type"] == "image" for part in content):
            raise UserError(
                f"messages: number {number}: a picture in an answer, which no model here writes",
                fix="move it into a message of the user",
            )


def _plain_answers(style, tokenizer, messages):
    """Messages whose answers hold no placeholder, a tokenizer that reads them, and the names.

    In the messages a character stands for each placeholder in an answer; it is the name of the
    placeholder's token in the tokenizer, and `_swapped` exchanges the two.
    """
    answers = [message for message in messages if message["role"] in ANSWERING]
    written = "\n".join(_texts(answers))
    words = [style.placeholder] if style.pictures else []
    if words and style.image_token and (token := style.image_token()) >= 0:
        words.append(tokenizer.decode([token], skip_special=False))
    words = [word for word in dict.fromkeys(words) if word and word in written]
    if not words:
        return messages, tokenizer, {}
    names = dict(zip(words, unused("\n".join(_texts(messages)), len(words)), strict=True))
    known = tuple((word, name) for word, name in names.items() if tokenizer.knows(word))
    plain = [
        _replaced(message, names) if message["role"] in ANSWERING else message
        for message in messages
    ]
    return plain, _renamed(tokenizer, known) if known else tokenizer, names


@functools.lru_cache(maxsize=4)
def _renamed(tokenizer: HubTokenizer, names: tuple[tuple[str, str], ...]) -> HubTokenizer:
    return tokenizer.renamed(dict(names))


def _texts(messages: Iterable[Message]) -> list[str]:
    contents = [message["content"] or "" for message in messages]
    return [
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        for content in contents
    ]


def _replaced(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    def replaced(text: str) -> str:
        for word, name in names.items():
            text = text.replace(word, name)
        return text

    content = message["content"]
    if isinstance(content, list):
        content = [{**part, "text": replaced(part["text"])} for part in content]
    return {**message, "content": replaced(content) if isinstance(content, str) else content}


def _swapped(text: str, names: Mapping[str, str]) -> str:
    if not names:
        return text
    other = {**names, **{name: word for word, name in names.items()}}
    return re.sub("|".join(map(re.escape, other)), lambda found: other[found[0]], text)


def _expanded(parts: Sequence[Pieces], texts: Sequence[str], placeholder: str) -> list[Pieces]:
    """Pieces with the texts of pictures in place of placeholders, as `chat_template.expand`."""
    prompts.expand("".join(text for part in parts for text, _ in part), texts, placeholder)
    rest = iter(texts)

    def expanded(text: str) -> str:
        own = [next(rest) for _ in range(text.count(placeholder))]
        return prompts.expand(text, own, placeholder)

    return [[(expanded(text), target) for text, target in part] for part in parts]


def _encoded(style, template, tokenizer, parts, names, exact):
    """Ids and targets of parts that are tokenised by themselves."""
    placeholder = names.get(style.placeholder, style.placeholder)
    apart = style.pictures and not tokenizer.knows(placeholder)
    whole = "".join(text for part in parts for text, _ in part)
    added, bos = beginning(style, template, tokenizer, whole)
    ids, targets = [], []
    for number, part in enumerate(parts):
        part = part if number else [(added, False), *part]
        pieces = _around(part, placeholder) if apart else [part]
        for place, piece in enumerate(pieces):
            if place:  # A placeholder that is no token.
                ids.append(style.image_token())
                targets.append(False)
            first = not number and not place
            if first or any(text for text, _ in piece):
                own = _targets(tokenizer, piece, bos if first else False, exact)
                ids += own[0]
                targets += own[1]
    return ids, targets


def _around(pieces: Pieces, placeholder: str) -> list[Pieces]:
    """What stands between placeholders."""
    found: list[Pieces] = [[]]
    for text, target in pieces:
        first, *others = text.split(placeholder)
        found[-1].append((first, target))
        found += [[(other, target)] for other in others]
    return found


def _targets(
    tokenizer: HubTokenizer, pieces: Pieces, bos: bool | None, exact: bool
) -> tuple[list[int], list[bool]]:
    """Ids of a text, and which of them share a character with a target.

    Args:
      exact: counts white space that the tokenizer leaves out of a token's characters; transformers
        does not, where templates have marks.
    """
    ids, offsets = tokenizer.encode_with_offsets("".join(text for text, _ in pieces), bos)
    spans, at = [], 0
    for text, target in pieces:
        spans += [(at, at + len(text))] * target
        at += len(text)
    targets, at = [], 0
    for start, stop in offsets:
        if exact and start > at:  # Never more than white space lies between tokens.
            start = at
        at = max(at, stop)
        targets.append(any(start < behind and stop > first for first, behind in spans))
    return ids, targets


def _end(ids: list[int], targets: list[bool], tokenizer: HubTokenizer) -> None:
    """Makes an end token a target behind the last answer, if none is."""
    last = max((place for place, target in enumerate(targets) if target), default=-1)
    start = last
    while start > 0 and targets[start - 1]:
        start -= 1
    ends = [place for place in range(max(start, 0), len(ids)) if ids[place] in tokenizer.eos_ids]
    if not ends:
        ids.append(tokenizer.eos_id)
        targets.append(True)
    elif ends[0] > last:
        targets[ends[0]] = True
