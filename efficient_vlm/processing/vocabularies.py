"""Two tokenizers side by side: which ids mean the same in both."""

import numpy as np

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.hub_tokenizer import HubTokenizer

__all__ = ["same_ids"]


def same_ids(
    student: HubTokenizer, teacher: HubTokenizer, sizes: tuple[int, int], field: str
) -> np.ndarray:
    """Where an id means one token to both: bool [teacher's logits].

    Ordinary tokens must be the same. Added ones (ends of turns, places of pictures) may differ:
    families use them in their own ways. Padding of both, which is no token, is the same.

    Args:
      student, teacher: their tokenizers.
      sizes: logits of the student and of the teacher.
      field: of the config that named the teacher, for messages.

    Raises:
      UserError: an ordinary token of one is another token of the other, or none.
    """
    own, other = student.vocabulary, teacher.vocabulary
    words = (own.keys() - student.added) | (other.keys() - teacher.added)
    different = {i for i in own.keys() | other.keys() if own.get(i) != other.get(i)}
    ordinary = different & words
    if ordinary:
        first = min(ordinary)
        theirs, ours = (short(each.get(first, "no token")) for each in (other, own))
        raise UserError(
            f"{field}: token {first} is {theirs}, {ours} to the student; "
            f"{len(ordinary):,} tokens differ",
            allowed="a teacher with the student's tokenizer (added special tokens may differ)",
            fix="take a larger model of the student's family, or of one with its language model",
        )
    same = np.zeros(sizes[1], bool)
    same[: min(sizes)] = True
    same[[i for i in different if i < len(same)]] = False
    return same
