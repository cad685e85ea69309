"""Rows of preferences: two answers to one question about the same pictures.

In the layouts that people have (the first four are TRL's):

    prompt        chosen, rejected
    text          texts
    turns         turns of the assistant
    (none)        whole conversations, which differ in the last answer alone
    text          whole conversations, which hold the prompt
    messages, conversations or question in place of prompt, one turn in place of a list of turns

with the pictures of any other row (`llava_rows`). Turns have role (from) and content (value).
"""

from collections.abc import Mapping
from typing import Any

from efficient_vlm.data.llava_rows import Row, read_turns
from efficient_vlm.data.records import Conversation
from efficient_vlm.data.row_pictures import absent
from efficient_vlm.data.row_source import RowSource
from efficient_vlm.errors import short
from efficient_vlm.processing.decode_image import BadRecord

__all__ = ["PairSource", "pair_of"]

_PROMPTS = ("prompt", "messages", "conversations", "question")
_ANSWERS = ("chosen", "rejected")
# Fields of a row that stand for turns; what there is beside them stays.
_TURNS = frozenset((*_PROMPTS, *_ANSWERS, "texts", "answer", "answers"))
_ASSISTANT = ("assistant", "gpt", "model")


def pair_of(row: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows of the chosen and of the rejected answer, which `llava_rows.read_row` reads.

    Raises:
      BadRecord: "no_pair" for a row without two answers, or "malformed" for one without a question.
    """
    if not isinstance(row, Mapping):
        raise BadRecord("malformed", "no JSON object")
    answers = [_turns(name, row.get(name)) for name in _ANSWERS]
    whole = [_role(turns[0]) not in _ASSISTANT for turns in answers]
    if whole[0] != whole[1]:
        raise BadRecord("no_pair", "one of chosen and rejected has the question, the other not")
    name = next((name for name in _PROMPTS if not absent(row.get(name))), None)
    asked = [] if name is None else row[name]
    if isinstance(asked, str):  # A text beside whole conversations is in them.
        asked = [] if whole[0] else [{"role": "user", "content": asked}]
    if not isinstance(asked, list):
        raise BadRecord("malformed", f"{name} is {short(asked)}")
    if whole[0] and all(turns[: len(asked)] == asked for turns in answers):
        asked = []
    if not (asked or whole[0]):
        raise BadRecord("malformed", "no prompt")
    rest = {key: value for key, value in row.items() if key not in _TURNS}
    chosen, rejected = ({**rest, "messages": [*asked, *turns]} for turns in answers)
    return chosen, rejected


def _turns(name: str, value: Any) -> list[Any]:
    """The turns of an answer."""
    if absent(value):
        raise BadRecord("no_pair", f"no {name} answer")
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not isinstance(turns[0], Mapping):
        raise BadRecord("malformed", f"{name} is {short(value)}")
    return turns


def _role(turn: Mapping[str, Any]) -> Any:
    role = turn.get("role", turn.get("from"))
    return role.strip().lower() if isinstance(role, str) else role


class PairSource(RowSource):
    """Random access to rows of preferences; a `sources.Source`, see `RowSource`.

    Records for training have two conversations, the chosen one first. Those for testing have the
    chosen one, as a question and the answer that is wanted.
    """

    def __init__(self, table: Any, reading: Any):
        super().__init__(table, reading)
        self.fingerprint["pairs"] = "1"

    def _strictly(self, raw: Any) -> Any:
        chosen, rejected = pair_of(super()._strictly(raw))
        return {**chosen, "rejected": rejected["messages"]}

    def _conversations(self, row: Any, found: Row) -> tuple[Conversation, ...]:
        (chosen,) = super()._conversations(row, found)
        rest = {key: value for key, value in row.items() if key != "rejected"}
        other = read_turns({**rest, "messages": row["rejected"]})
        rejected = Conversation(other.turns, chosen.task, other.places, other.system)
        if _asked(chosen) != _asked(rejected):
            raise BadRecord("no_pair", "chosen and rejected differ in front of the last answer")
        if chosen.turns == rejected.turns:
            raise BadRecord("no_pair", "chosen and rejected are the same")
        return (chosen,) if self._reading.split == "test" else (chosen, rejected)


def _asked(conversation: Conversation) -> tuple:
    """Everything but the last answer."""
    *turns, (question, _) = conversation.turns
    return turns, question, conversation.places, conversation.system
