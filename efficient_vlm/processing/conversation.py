"""What a user asks -> token ids of a prompt, by the template and the tokenizer of a model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from efficient_vlm.errors import UserError
from efficient_vlm.processing import chat_template as prompts
from efficient_vlm.processing.messages import Message, parts_of, read_messages
from efficient_vlm.processing.pictures.base import Pictured
from efficient_vlm.processing.tokenizer import Tokenizer

Conversation = str | Sequence[Message]


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """How the prompts of one model are written; `families.base.Family` says what the fields mean.

    Attributes:
      family: its name, for messages.
      pictures: whether it takes pictures; without them a template gets plain texts.
      options: of the prompt function that stands in for a chat template.
      placeholder, begin: see `Family`.
      image_token: gives the id of a visual token.
    """

    family: str
    pictures: bool
    options: Mapping[str, Any]
    placeholder: str
    begin: str
    image_token: Callable[[], int] | None = None


def is_one(prompt: Any) -> bool:
    """Whether a prompt is one conversation, not a list of them; UserError if it is neither."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, list | tuple) or not prompt:
        raise UserError(
            f"prompt: {prompt!r:.80}",
            allowed='a question, messages [{"role": ..., "content": ...}, ...], or a list of these',
        )
    if all(isinstance(part, Mapping) for part in prompt):
        return True
    several = [part for part in prompt if not isinstance(part, str)]
    if not all(isinstance(part, list | tuple) and is_one(part) for part in several):
        raise UserError(
            f"prompt: a list with {[type(part).__name__ for part in prompt][:6]}",
            allowed='questions, or conversations [{"role": ..., "content": ...}, ...]',
        )
    return False


def prompt_ids(
    style: PromptStyle,
    template: prompts.Template | str,
    tokenizer: Tokenizer,
    asked: Conversation,
    pictured: Sequence[Pictured],
) -> list[int]:
    """Ids of a prompt, with one id for each visual token.

    Args:
      style: of the model.
      template: of the checkpoint, or the name of a function of `prompts`.
      tokenizer: of the checkpoint.
      asked: a question, which comes behind all pictures; or messages, see `read_messages`, which
        say with parts of type "image" where each picture stands. Messages that end with the
        assistant's turn end with its text: an answer goes on from there.
      pictured: the pictures.

    Raises:
      UserError: a conversation that the template refuses, or that has other pictures.
    """
    if isinstance(asked, str):
        content: Any = asked  # What templates of language models expect.
        if style.pictures:
            content = [{"type": "image"}] * len(pictured) + [{"type": "text", "text": asked}]
        asked = [{"role": "user", "content": content}]
    asked, _ = read_messages(asked)
    options = prompt_options(style, template)
    text = prompts.render(expected_form(asked, template, style, options), template, **options)
    text = prompts.expand(text, [p.text for p in pictured], style.placeholder)
    return _encode(style, template, tokenizer, text)


def prompt_options(style: PromptStyle, template: prompts.Template | str) -> dict[str, Any]:
    """Options of the function that stands in for a chat template; none of a template."""
    if not isinstance(template, str):
        return {}
    plain = {"placeholder": style.placeholder} if template == "plain" else {}
    return {**style.options, **plain}


def expected_form(asked, template, style, options) -> list[Any]:
    """Messages as a template writes them, which it might leave out without a word: what is no text
    and no picture, and the form of text that it does not expect."""
    if isinstance(template, str):
        return asked
    for number, message in enumerate(asked):
        if message["content"] is None:  # Calls of tools.
            continue
        parts = parts_of(message, number)
        if not style.pictures and None in parts:
            raise UserError(f"messages: a picture, but {style.family} is a language model")
        if not style.pictures:
            asked[number] = {**message, "content": "".join(filter(None, parts))}
    texts = [i for i, m in enumerate(asked) if isinstance(m.get("content"), str)]
    return _as_expected(asked, texts, template, options) if style.pictures and texts else asked


def _as_expected(asked, texts, template, options) -> list[Any]:
    """Messages, of whose texts those are put in parts that the template would not write.

    Many templates of models that see go through the parts of a message and find none in a text;
    others take nothing but a text, some of it by role. Which is found out with texts that occur
    nowhere else.
    """
    marks = {i: f"text-{i}-of-message-{id(asked)}" for i in texts}

    def formed(contents: Mapping[int, str], in_parts: set[int]) -> list[Any]:
        found = list(asked)
        for i, text in contents.items():
            content = [{"type": "text", "text": text}] if i in in_parts else text
            found[i] = {**asked[i], "content": content}
        return found

    def lost(in_parts: set[int]) -> set[int]:
        given = formed(marks, in_parts)
        prompt = template.render(given, add_generation_prompt=False, **options)
        return {i for i in texts if marks[i] not in prompt.lower()}

    in_parts: set[int] = set()
    try:
        missing = lost(in_parts)
        if missing:
            in_parts = missing
            missing = lost(in_parts)
    except UserError as error:
        in_parts = set(texts)
        try:
            missing = lost(in_parts)
        except UserError:
            raise error from None
    if missing:
        raise UserError(
            f"messages: the chat template leaves out number {min(missing)}",
            fix="leave it out, or say it in a message of the user",
        )
    return formed({i: asked[i]["content"] for i in texts}, in_parts)


def beginning(style, template, tokenizer, text: str) -> tuple[str, bool | None]:
    """What comes in front of a prompt's text, and `bos` of `Tokenizer.encode` for both."""
    first = tokenizer.special.get("bos_token", "")
    added = ""
    if style.begin == "bos_or_eos":
        first = first or tokenizer.special.get("eos_token", "")
        added = "" if text.startswith(first) else first
    written = {
        "tokenizer": bool(first) and text.startswith(first),
        "template": isinstance(template, prompts.Template),
    }
    return added, False if written.get(style.begin, True) else None


def _encode(style, template, tokenizer, text: str) -> list[int]:
    added, bos = beginning(style, template, tokenizer, text)
    text = added + text
    if tokenizer.knows(style.placeholder) or style.placeholder not in text:
        return tokenizer.encode(text, bos=bos)
    # A placeholder that is no token (LLaVA's and MobileVLM's own code): the parts between are
    # tokenised one by one.
    start, *parts = text.split(style.placeholder)
    ids = tokenizer.encode(start, bos=bos)
    for part in parts:
        ids.append(style.image_token())
        ids += tokenizer.encode(part, bos=False) if part else []
    return ids
