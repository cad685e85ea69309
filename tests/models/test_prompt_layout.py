"""Where tokens stand when some are dropped or merged, by hand."""

import numpy as np
import pytest

from efficient_vlm.compressors import VisualTokens
from efficient_vlm.models.prompt_layout import Placement, place_tokens


def placed(slots, text, kept, policy, *, blocks=None):
    """Positions after keeping slots: `kept` lists the slots of each token of one row."""
    slots, text = np.float32(slots), np.float32(text)
    count, axes = len(slots), slots.shape[1:]
    source = np.full((1, count), -1, np.int32)
    for token, members in enumerate(kept):
        source[0, list(members)] = token
    tokens = len(kept)
    visual = VisualTokens(
        embed=np.zeros((1, tokens, 2), np.float32),
        position=np.zeros((1, tokens, 2), np.float32),
        size=np.ones((1, tokens), np.float32),
        mask=np.ones((1, tokens), bool),
        source=source,
    )
    blocks = np.zeros(count, np.int32) if blocks is None else np.int32(blocks)
    last = max(slots.max(), text.max())
    placement = Placement(
        visual_index=np.int32(np.arange(count) + 1)[None],
        text_index=np.int32(np.r_[0, np.arange(len(text) - 1) + count + 1])[None],
        visual_position=np.int32(slots)[None],
        text_position=np.int32(text)[None],
        visual_block=blocks[None],
        text_block=np.zeros((1, len(text)), np.int32),
        next_index=np.int32([count + len(text)]),
        next_position=np.int32([last + 1]),
    )
    assert text.shape[1:] == axes
    return place_tokens(placement, visual, np.ones((1, len(text)), bool), policy)


def check(found, visual, text, after):
    np.testing.assert_array_equal(found.visual_position[0], visual)
    np.testing.assert_array_equal(found.text_position[0], text)
    np.testing.assert_array_equal(found.next_position, [after])


LINE = ([1, 2, 3, 4], [0, 5, 6])


def test_retain_keeps_the_first_and_the_last_where_they_were():
    check(placed(*LINE, [[0], [3]], "retain"), [1, 4], [0, 5, 6], 7)


def test_reindex_closes_the_gap():
    check(placed(*LINE, [[0], [3]], "reindex"), [1, 2], [0, 3, 4], 5)


@pytest.mark.parametrize("policy", ["retain", "reindex"])
def test_all_tokens_stay_where_they_were(policy):
    check(placed(*LINE, [[0], [1], [2], [3]], policy), [1, 2, 3, 4], [0, 5, 6], 7)


def test_a_merged_token_stands_between_its_parts():
    check(placed(*LINE, [[0, 1], [3]], "retain"), [1.5, 4], [0, 5, 6], 7)
    check(placed(*LINE, [[0, 1], [3]], "reindex"), [1, 2], [0, 3, 4], 5)


def test_a_merged_token_may_come_first():
    """Numbers start where the prompt does, whole: generated tokens go on from them."""
    check(placed([0, 1, 2, 3], [4, 5], [[0, 1], [3]], "reindex"), [0, 1], [2, 3], 4)


# A picture of 3 x 3 tokens behind one word, as M-RoPE counts (time, row, column), and two words.
SQUARE = [(1, 1 + row, 1 + column) for row in range(3) for column in range(3)]
WORDS = [(0, 0, 0), (4, 4, 4), (5, 5, 5)]


def test_three_axes_share_one_line_of_numbers():
    """What is left uses 0, 1, 3, 4, 5: everything above the gap moves down by one, on all axes."""
    corner = placed(SQUARE, WORDS, [[0], [8]], "reindex")
    check(corner, [(1, 1, 1), (1, 2, 2)], [(0, 0, 0), (3, 3, 3), (4, 4, 4)], 5)
    kept = placed(SQUARE, WORDS, [[0], [8]], "retain")
    check(kept, [(1, 1, 1), (1, 3, 3)], WORDS, 6)


def test_three_axes_without_a_gap():
    """The middle of the picture still uses 2, so only 3 is free."""
    found = placed(SQUARE, WORDS, [[0], [4]], "reindex")
    check(found, [(1, 1, 1), (1, 2, 2)], [(0, 0, 0), (3, 3, 3), (4, 4, 4)], 5)
    whole = [[i] for i in range(9)]
    check(placed(SQUARE, WORDS, whole, "reindex"), SQUARE, WORDS, 6)


def test_a_token_of_two_blocks_is_of_neither():
    found = placed(*LINE, [[0, 1], [2, 3]], "retain", blocks=[1, 1, 1, 2])
    np.testing.assert_array_equal(found.visual_block[0], [1, 0])
