"""Prompts of published models without a chat template, by the name of their family."""

from collections.abc import Iterable, Sequence

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.processing.messages import ANSWERING, Message, ends_with_answer, parts_of

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)


def plain(messages: Sequence[Message], placeholder: str = "<image>") -> str:
    """Placeholders and texts of all messages, nothing added."""
    return "".join(
        part if part is not None else placeholder for _, parts in _turns(messages) for part in parts
    )


def llava(messages: Sequence[Message], system: str = "") -> str:
    """LLaVA-1.5: "USER: <image>\\n{question} ASSISTANT:", for several turns too.

    Args:
      messages: user and assistant in turn; a system message takes precedence over `system`. One
        that ends with the assistant's turn ends with its text, for the answer to go on from there.
      system: sentence in front, such as `VICUNA_SYSTEM`, which training used; the released
        processor's template has none.
    """
    prompt = ""
    for role, parts in _turns(messages, ("system", "user", "assistant")):
        text = _text(parts)
        if role == "system":
            system = text
        elif role == "user":
            prompt += "USER: " + "<image>\n" * parts.count(None) + text + " "
        else:
            prompt += f"ASSISTANT: {text}</s>"
    answered = bool(messages) and ends_with_answer(messages)
    prompt = prompt.removesuffix("</s>") if answered else prompt + "ASSISTANT:"
    return (system + " " if system else "") + prompt


def paligemma(messages: Sequence[Message], bos: str = "<bos>") -> str:
    """PaliGemma 1 and 2: the pictures, <bos>, the question and a line break; one question."""
    images, text = _question("paligemma", messages)
    return "<image>" * images + bos + text + "\n"


def molmo(messages: Sequence[Message], bos: str = "<|endoftext|>", style: str = "") -> str:
    """Molmo: the pictures right behind the beginning token, " User: {question} Assistant:".

    Args:
      messages: one question. The placeholder of its pictures is <|image|>.
      bos: the beginning token; Qwen2 and OLMo have none, and Molmo takes their <|endoftext|>.
      style: answer style of training, such as "vqa2:"; "" for free answers.
    """
    images, text = _question("molmo", messages)
    question = " ".join(filter(None, (style, text)))
    return f"{bos}{'<|image|>' * images} User: {question} Assistant:"


PROMPT_FAMILIES = {"llava": llava, "molmo": molmo, "paligemma": paligemma, "plain": plain}


Pieces = list[tuple[str, bool]]


def answered(
    family: str, messages: Sequence[Message], end: str, **options: str
) -> tuple[Pieces, ...]:
    """A conversation with its answers, in pieces: (text, whether the model is to write it).

    Args:
      family: of `PROMPT_FAMILIES`.
      messages: with answers of the assistant; one question and one answer for "paligemma" and
        "molmo".
      end: end token of the tokenizer; "" for none. It follows on every answer ("<STOP>" in the
        loss of LLaVA, arXiv 2304.08485, table 2), in LLaVA as "</s>".
      **options: of the family's function.

    Returns:
      Texts that are tokenised by themselves: PaliGemma (arXiv 2407.07726, section 3.2.2: prefix and
      suffix) and Molmo (question and answer, which begins with a space) tokenise answers apart.

    Raises:
      UserError: unknown family, or a conversation that it cannot express.
    """
    if family not in PROMPT_FAMILIES:
        raise unknown("prompt family", family, PROMPT_FAMILIES)
    write, turns = PROMPT_FAMILIES[family], _turns(messages)
    if family in ("paligemma", "molmo"):
        if [role in ANSWERING for role, _ in turns] != [False, True]:
            raise UserError(
                f"{family}: {len(turns)} messages", allowed="one question, and one answer to it"
            )
        answer = (" " if family == "molmo" else "") + _text(turns[1][1])
        return [(write(messages[:1], **options), False)], [(answer + end, True)]
    front, back = (" ", "</s>") if family == "llava" else ("", "")
    pieces: Pieces = []
    at = 0
    for number, (role, parts) in enumerate(turns):
        if role not in ANSWERING:
            continue
        if family == "llava" and number and turns[number - 1][0] in ANSWERING:
            raise UserError(
                f"llava: messages {number - 1} and {number} are both the assistant's",
                fix="join them to one",
            )
        # With the header of the turn; earlier answers stand in it as they were written.
        begun = write(messages[:number], **options)
        answer = front + _text(parts) + back
        pieces += [(begun[at:], False), (answer + ("" if back else end), True)]
        at = len(begun) + len(answer)
    pieces.append((write(messages, **options)[at:], False))
    return (pieces,)


def _turns(
    messages: Sequence[Message], roles: Iterable[str] | None = None
) -> list[tuple[str, list[str | None]]]:
    """(role, parts) of each message; a part is a text, or None for a picture.

    Raises:
      UserError: a message of another form or role.
    """
    turns = []
    for number, message in enumerate(messages):
        parts = parts_of(message, number)
        role = message["role"]
        if roles is not None and role not in roles:
            raise unknown(f"messages: role of number {number}", str(role), roles)
        turns.append((role, parts))
    return turns


def _text(parts: Sequence[str | None]) -> str:
    return "".join(part for part in parts if part is not None)


def _question(family: str, messages: Sequence[Message]) -> tuple[int, str]:
    """Pictures and text of a conversation of one question."""
    turns = _turns(messages, ("user",))
    if len(turns) != 1:
        raise UserError(f"{family}: {len(turns)} messages", allowed="one question of the user")
    ((_, parts),) = turns
    return parts.count(None), _text(parts)
