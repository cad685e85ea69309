"""From the columns of a table to the row that `llava_rows.read_row` reads."""

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from efficient_vlm.data.row_pictures import absent
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.processing.decode_image import BadRecord

# What a column may be, and the names under which it is looked for, the first that there is.
ROLES: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "img", "picture", "file_name", "image_path"),
    "question": ("question", "query", "prompt", "instruction"),
    "answer": ("answer", "answers", "response", "output", "caption", "text", "label", "txt", "cls"),
    "messages": ("messages", "conversations", "texts"),
    "system": ("system", "system_prompt", "system_message"),
    "task": ("task",),
    "id": ("id", "__key__"),
}
_CHOICES = ("choices", "options", "A")


class Columns:
    """Which columns of a table are read, and as what.

    Args:
      names: of the columns of the table, those inside others as "outer/inner".
      chosen: role (a key of `ROLES`) -> name of a column; {} finds them by their names.
      template: a question with "{column}" where the text of a column goes; "" takes the question
        column.
      labels: column -> names of its classes, which stand for the numbers in it.

    Attributes:
      question, answer: the columns of these roles, "" for none.
      used: all columns that are read.

    Raises:
      UserError: an unknown role or column, or columns that make no question and answer.
    """

    def __init__(
        self,
        names: Iterable[str],
        chosen: Mapping[str, str] | None = None,
        template: str = "",
        labels: Mapping[str, Sequence[str]] | None = None,
    ):
        names = list(names)
        self._template, self._labels = template, dict(labels or {})
        self._in_template = _fields(template, names)
        self._strict = not chosen  # Whatever a person did not name is looked at as well.
        for role, name in (chosen or {}).items():
            if role not in ROLES:
                raise unknown("data.columns", str(role), ROLES)
            if name not in names:
                raise unknown(f"data.columns.{role}", str(name), names)
        self._columns = dict(chosen) if chosen else _found(names)
        self.question = self._columns.get("question", "")
        self.answer = self._columns.get("answer", "")
        self.used = [*dict.fromkeys([*self._columns.values(), *self._in_template])]
        if "messages" not in self._columns:
            self._check(names)
        elif template:
            raise UserError(
                f"data.template: {short(template)}, but rows have turns under "
                f"{short(self._columns['messages'])}",
                fix="take the template away, or name columns: question and answer, not messages",
            )

    def _check(self, names: Sequence[str]) -> None:
        if not self.answer:
            raise UserError(
                f"data.columns: no answer among {short(names)}",
                allowed="messages, or an answer and a question (or data.template)",
                fix="name it: --config.data.columns=image=FILE,question=Q,answer=A",
            )
        if not (self.question or self._template):
            raise UserError(
                f"data.columns: no question among {short(names)}",
                fix="ask one: --config.data.template='What is shown?', or name its column",
            )
        missed = [name for name in _CHOICES if name in names]
        if self._strict and missed and not self._template:
            raise UserError(
                f"data.columns: {missed[0]!r} holds choices, which no question spells out",
                fix="write them into data.template: '{question}\\nA. {A}\\nB. {B}'",
            )

    @property
    def meaning(self) -> dict[str, Any]:
        """Roles and template, as plain JSON values."""
        return {**self._columns, "template": self._template, "strict": self._strict}

    def row(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The canonical row of a raw one.

        Raises:
          BadRecord: "malformed" for a class without a name, or a column of the template that is
            empty.
        """
        values = {name: self._value(raw, name) for name in self.used}
        row = {}
        if self._strict:
            row = {key: value for key, value in raw.items() if key not in self.used}
        for role, name in self._columns.items():
            value = values[name]
            row["texts" if role == "messages" and _in_pairs(value) else role] = value
        if self._template:
            row["question"] = self._asked(values)
            row = {key: value for key, value in row.items() if key not in _CHOICES}
        return row

    def _value(self, raw: Mapping[str, Any], name: str) -> Any:
        value = raw.get(name)
        if name not in raw and "/" in name:
            value = raw
            for part in name.split("/"):
                value = _inside(value, part)
        return self._named(name, value)

    def _named(self, name: str, value: Any) -> Any:
        """The name of a class instead of its number, or of each in a list."""
        classes = self._labels.get(name)
        if classes is None or absent(value) or isinstance(value, str):
            return value
        if isinstance(value, list):
            return [self._named(name, one) for one in value]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(classes):
            raise BadRecord("malformed", f"{name}: no class {short(value)}")
        return classes[value]

    def _asked(self, values: Mapping[str, Any]) -> str:
        texts = {}
        for name in self._in_template:
            if absent(values[name]):
                raise BadRecord("malformed", f"{name} is empty, and data.template asks for it")
            texts[name] = str(values[name])
        # One pass, so that braces in the texts stay as they are.
        return re.sub(
            r"\{\{|\}\}|\{([^{}]*)\}",
            lambda found: found[0][0] if found[1] is None else texts[found[1]],
            self._template,
        )


def _found(names: Sequence[str]) -> dict[str, str]:
    """Role -> the column that has one of its names."""
    by_word = {name.lower(): name for name in reversed(names)}
    found = {}
    for role, words in ROLES.items():
        name = next((by_word[word] for word in words if word in by_word), None)
        if name is not None:
            found[role] = name
    if "messages" in found:  # The turns are all that is said.
        found = {role: name for role, name in found.items() if role not in ("question", "answer")}
    return found


def _fields(template: str, names: Sequence[str]) -> list[str]:
    """The columns that a template names."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise UserError(
            f"data.template: {short(template)}: {error}",
            fix="write {column} for the text of a column, {{ and }} for braces",
        ) from None
    fields = list(dict.fromkeys(field for field in fields if field is not None))
    for field in fields:
        if field not in names:
            raise unknown("data.template", field, names)
    return fields


def _in_pairs(turns: Any) -> bool:
    """Whether turns are written as the_cauldron does, {"user", "assistant"} at once."""
    return isinstance(turns, list) and any(
        isinstance(turn, Mapping) and "user" in turn and "role" not in turn for turn in turns
    )


def _inside(value: Any, part: str) -> Any:
    """A field of a mapping, or of each mapping in a list."""
    if isinstance(value, list):
        return [_inside(one, part) for one in value]
    return value.get(part) if isinstance(value, Mapping) else None
