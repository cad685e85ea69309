"""Which ids mean the same to two tokenizers."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from efficient_vlm.errors import UserError
from efficient_vlm.processing.hub_tokenizer import HubTokenizer
from efficient_vlm.processing.vocabularies import same_ids


def tokenizer_of(words, added=()):
    """Words by id, with added ones behind them."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    backend.add_special_tokens(list(added))
    return HubTokenizer(backend, {})


OWN = tokenizer_of(["?", "a", "b"], ["<end>", "<image>"])


def test_added_tokens_may_differ():
    """Those that do are left out, as is what one of both has no logits for."""
    other = tokenizer_of(["?", "a", "b"], ["<end>", "<box>", "<more>"])
    found = same_ids(OWN, other, (7, 9), "teacher")
    np.testing.assert_array_equal(found, [1, 1, 1, 1, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(same_ids(OWN, OWN, (5, 4), "teacher"), np.ones(4))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["?", "b", "a"], "token 1 is 'b', 'a' to the student; 2 tokens differ"),
        (["?", "a"], "token 2 is '<end>', 'b' to the student; 1 tokens differ"),
        (["?", "a", "b", "c"], "token 3 is 'c', '<end>' to the student; 1 tokens differ"),
    ],
)
def test_ordinary_tokens_may_not(words, said):
    with pytest.raises(UserError) as error:
        same_ids(OWN, tokenizer_of(words, ["<end>", "<image>"]), (9, 9), "distil.teacher")
    first, *rest = str(error.value).splitlines()
    assert first == f"distil.teacher: {said}" and len(rest) == 2
