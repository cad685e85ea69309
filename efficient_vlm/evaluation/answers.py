"""What counts as the right answer: exact match, spaces and case aside."""


def normalise(text: str) -> str:
    """What exact match compares: stripped, single spaces, lower case."""
    return " ".join(text.lower().split())


def is_right(prediction: str, answer: str) -> bool:
    """Whether a generated text is the expected one."""
    return normalise(prediction) == normalise(answer)
