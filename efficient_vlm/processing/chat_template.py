"""Prompts of published models: their chat templates, and the families that have none.

A prompt is made in three steps: `render` writes the conversation with one placeholder per picture,
`expand` puts the text of each picture in place of its placeholder, and `HubTokenizer` gives ids.

Templates come from strangers. They run in jinja2's sandbox, see no files and no network, and have
limits on steps and on what they write. See docs/prompts.md.
"""

import contextlib
import dataclasses
import datetime
import functools
import itertools
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.processing.hub_tokenizer import HubTokenizer, read_json, special_tokens
from efficient_vlm.processing.messages import (
    Message,
    ends_with_answer,
    with_mark,
    without_nulls,
)
from efficient_vlm.processing.prompt_families import PROMPT_FAMILIES

__all__ = ["HubTokenizer", "Template", "expand", "render"]

MAX_SOURCE = 2**20  # Characters of a template; the longest released ones have some 20,000.
MAX_OUTPUT = 2**22  # Characters of a prompt, and of any value repeated by a template.
MAX_STEPS = 200_000  # Passes of loops and calls of one rendering.

# The order of the processors of transformers 5.24 (4.57 takes processor_config.json third); a
# template of the tokenizer alone is used by no processor, but better than none.
TEMPLATE_FILES = (
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer_config.json",
)


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template in jinja2.

    Attributes:
      source: the template.
      tokens: role to special token ("bos_token": "<s>"), variables of the template.
    """

    source: str
    tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_hf(cls, directory: str | os.PathLike, name: str = "default") -> "Template":
        """The template in a model's directory.

        The first of `TEMPLATE_FILES` that holds one; a warning names it where others differ.

        Args:
          directory: of the model.
          name: which, where the file holds several.

        Raises:
          UserError: none of the files holds a template of this name, or one is damaged.
        """
        found = cls.find(directory, name)
        if found is None:
            raise UserError(
                f"chat template: none in {directory}",
                allowed=f"{', '.join(TEMPLATE_FILES)}",
                fix=f"name a family instead: {', '.join(PROMPT_FAMILIES)}",
            )
        return found

    @classmethod
    def find(cls, directory: str | os.PathLike, name: str = "default") -> "Template | None":
        """As `from_hf`, but None where no file holds a template."""
        directory = Path(directory)
        contents = {file: _content(directory / file, name) for file in TEMPLATE_FILES}
        held = {file: content for file, content in contents.items() if content}
        if not held:
            return None
        (used, content), *rest = held.items()
        source, others = _named(content, name, used), []
        for file, content in rest:
            with contextlib.suppress(UserError):  # It is not the one that is used.
                others += [file] * (_named(content, name, file).strip() != source.strip())
        if others:
            warnings.warn(
                f"{directory}: the chat template is that of {used}; {', '.join(others)} "
                f"{'hold' if len(others) > 1 else 'holds'} another",
                stacklevel=2,
            )
        return cls(source, special_tokens(directory))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation.

        Args:
          messages: {"role": ..., "content": text, or a list of {"type": "text", "text": ...} and
            {"type": "image"}}, in the order of the conversation. Fields that are null are left out.
          add_generation_prompt: True ends with the beginning of an answer, False with the end of
            the last message. None is True, but a conversation that ends with the assistant's turn
            ends with its text, for the answer to go on from there (`continue_final_message` of
            transformers).
          tools: JSON schemas of functions, for templates that know them.
          **variables: further ones; `strftime_now` replaces the clock.

        Raises:
          UserError: the template is damaged, refuses the conversation, does what the sandbox
            forbids, or exceeds a limit.
        """
        messages = [without_nulls(message) for message in messages]
        if add_generation_prompt is None and messages and ends_with_answer(messages):
            return self._continued(messages, tools=tools, **variables)
        return self._written(messages, add_generation_prompt is not False, tools, variables)

    def _continued(self, messages: list[Message], **options: Any) -> str:
        """The prompt up to the end of the last message's text."""
        # What a template writes behind the text, or trims from it, is found by a mark at its end.
        mark = f"end-of-text-{id(messages)}"
        last = with_mark(messages[-1], mark)
        if last is None:
            raise UserError(
                "messages: the last one is the assistant's and has no text to go on from",
                fix="end with a message of the user",
            )
        prompt = self.render([*messages[:-1], last], add_generation_prompt=False, **options)
        if prompt.count(mark) != 1:
            raise UserError(
                "messages: the last one is the assistant's, and the chat template changes its text",
                fix="end with a message of the user",
            )
        prompt = prompt[: prompt.index(mark)]
        # The mark has kept the white space in front of it, which many templates trim.
        if prompt[-1:].isspace():
            ended = self.render(messages, add_generation_prompt=False, **options)
            prompt = prompt if ended.startswith(prompt) else prompt.rstrip()
        return prompt

    def _written(self, messages, add_generation_prompt, tools, variables) -> str:
        import jinja2

        given = {**self.tokens, **variables}
        given |= {"messages": messages, "tools": tools, "documents": None}
        try:
            compiled = _compile(self.source)
            compiled.environment.begin()
            pieces, length = [], 0
            for piece in compiled.generate(add_generation_prompt=add_generation_prompt, **given):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_OUTPUT:
                    raise UserError(
                        f"chat template: writes more than {MAX_OUTPUT:,} characters",
                        fix="shorten the conversation, or take another template",
                    )
            return "".join(pieces)
        except UserError:
            raise
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"chat template: line {error.lineno}: {error.message}") from error
        except (MemoryError, RecursionError) as error:
            raise UserError(f"chat template: exceeds a limit ({type(error).__name__})") from error
        # A template is a program: type errors, missing keys and its own complaints end up here.
        except Exception as error:
            raise UserError(
                f"chat template: {str(error) or type(error).__name__}",
                fix="check roles and contents of the messages against the model's documentation",
            ) from error


def _content(path: Path, name: str) -> Any:
    """What a file says of chat templates; the one of a .jinja file has no name."""
    if path.suffix == ".json":
        return read_json(path).get("chat_template")
    if name != "default" or not path.is_file():
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _named(found: Any, name: str, file: str) -> str:
    """One template out of a string, {name: source} or [{"name": ..., "template": ...}]."""
    if isinstance(found, str):
        found = {"default": found}
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}
    if not isinstance(found, dict) or not all(
        isinstance(part, str) for part in itertools.chain(found, found.values())
    ):
        raise UserError(f"{file}: chat_template", allowed="a string, or names with strings")
    if name not in found:
        raise unknown("chat template", name, found)
    return found[name]


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> Any:
    """A jinja2 template in an environment of its own."""
    if len(source) > MAX_SOURCE:
        raise UserError(f"chat template: {len(source):,} characters", allowed=f"{MAX_SOURCE:,}")
    from efficient_vlm.processing import sandbox

    environment = sandbox.Sandbox(MAX_STEPS, MAX_OUTPUT)
    environment.filters["tojson"] = _tojson
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.compiled(source)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """jinja2's own filter escapes HTML, which no model has seen in training."""
    if isinstance(indent, int) and indent > 100:
        raise UserError(
            f"chat template: tojson with an indent of {indent:.3g}", allowed="up to 100"
        )
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def render(messages: Sequence[Message], template: Template | str, **options: Any) -> str:
    """The prompt of a conversation by a template or by the name of a family.

    Args:
      messages: see `Template.render`.
      template: a `Template`, or a name in `PROMPT_FAMILIES`.
      **options: of `Template.render` or of the family's function.

    Raises:
      UserError: unknown family, or a conversation that it cannot express.
    """
    if isinstance(template, Template):
        return template.render(messages, **options)
    if template not in PROMPT_FAMILIES:
        raise unknown("prompt family", template, PROMPT_FAMILIES)
    return PROMPT_FAMILIES[template](messages, **options)


def expand(prompt: str, image_texts: Sequence[str], placeholder: str = "<image>") -> str:
    """Replaces the k-th placeholder by the k-th text.

    Args:
      prompt: a rendered conversation.
      image_texts: `Pictured.text` of each picture; may contain the placeholder itself.
      placeholder: how the prompt names a picture.

    Raises:
      UserError: the numbers of placeholders and texts differ.
    """
    parts = prompt.split(placeholder)
    if len(parts) - 1 != len(image_texts):
        pictures = f"{len(image_texts)} picture" + "s" * (len(image_texts) != 1)
        raise UserError(
            f"prompt: {len(parts) - 1} {placeholder} in the prompt, {pictures}",
            fix=f"write {placeholder} once for every picture, and nowhere else",
        )
    return "".join(itertools.chain(*zip(parts, [*image_texts, ""], strict=True)))
