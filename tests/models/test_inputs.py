"""`ModelInputs`: what each conversation of a row sees, rows apart and back, and shapes refused."""

import jax
import numpy as np
import pytest
from shape_checks import check_fields

from efficient_vlm.errors import UserError
from efficient_vlm.models.inputs import Layout, ModelInputs, Pictures
from efficient_vlm.models.prompt_layout import Placement

QUESTIONS, ROWS, SIZE, SLOTS = 3, 4, 12, 5


def placement(rng, rows=ROWS, size=SIZE, slots=SLOTS, axes=(2,)):
    def draw(*shape):
        return rng.integers(0, 50, shape).astype(np.int32)

    return Placement(
        visual_index=draw(rows, slots),
        text_index=draw(rows, size),
        visual_position=draw(rows, slots, *axes),
        text_position=draw(rows, size, *axes),
        visual_block=draw(rows, slots),
        text_block=draw(rows, size),
        next_index=draw(rows),
        next_position=draw(rows),
    )


@pytest.fixture(scope="module")
def packed():
    """Rows of shared text and up to three conversations, in any order but within each its own."""
    rng = np.random.default_rng(0)
    segments = rng.integers(-1, QUESTIONS + 1, (ROWS, SIZE)).astype(np.int32)
    segments[3, :] = -1  # An empty row.
    own = [[sum(s in (0, q + 1) for s in row) for q in range(QUESTIONS)] for row in segments]
    return ModelInputs(
        text=rng.integers(1, 90, (ROWS, SIZE)).astype(np.int32),
        segments=segments,
        placement=placement(rng),
        prompt=rng.random((ROWS, SIZE)) < 0.5,
        labels=rng.integers(0, 90, (ROWS, SIZE)).astype(np.int32),
        questions=QUESTIONS,
        longest=max(map(max, own)),
    )


def conversations(packed):
    """(row of the result, its places in the packed row), one conversation after the other."""
    for row, question in np.ndindex(ROWS, QUESTIONS):
        segments = packed.segments[row]
        at = [i for i in range(SIZE) if segments[i] in (0, question + 1)]
        yield row * QUESTIONS + question, row, at


def test_conversations_get_rows_of_their_own(packed):
    alone = jax.jit(lambda x: x.unpacked())(packed)
    assert alone.questions == 1 and alone.text.shape == (ROWS * QUESTIONS, packed.longest)
    alone.check()
    for number, row, at in conversations(packed):
        count = len(at)
        for name in ("text", "segments", "prompt", "labels"):
            ours, theirs = getattr(alone, name)[number], getattr(packed, name)[row]
            np.testing.assert_array_equal(ours[:count], theirs[at], name)
        assert (np.asarray(alone.segments)[number, count:] == -1).all()
        assert (np.asarray(alone.labels)[number, count:] == -1).all()
        assert not np.asarray(alone.prompt)[number, count:].any()
        given = {k: v for k, v in vars(alone.placement).items() if v is not None}
        assert "visual_segment" not in given
        for name, values in given.items():
            theirs = getattr(packed.placement, name)[row]
            if name.startswith("text"):
                np.testing.assert_array_equal(values[number, :count], theirs[at], name)
            else:
                np.testing.assert_array_equal(values[number], theirs, name)


def test_what_was_apart_comes_back_to_its_places(packed):
    alone = packed.unpacked()
    x = np.random.default_rng(1).random((ROWS * QUESTIONS, packed.longest, 2))
    back = np.asarray(packed.packed_again(x))
    for row, place in np.ndindex(ROWS, SIZE):
        segment = packed.segments[row, place]
        if segment < 0:
            continue
        number = row * QUESTIONS + max(segment - 1, 0)
        at = sum(packed.segments[row, i] in (0, max(segment, 1)) for i in range(place))
        np.testing.assert_allclose(back[row, place], x[number, at])
        assert packed.places()[row, place] == at
        assert alone.text[number, at] == packed.text[row, place]


def test_prompts_and_which_were_asked(packed):
    prompts, asked = np.asarray(packed.prompts()), np.asarray(packed.asked())
    for row, question in np.ndindex(ROWS, QUESTIONS):
        own = [
            i
            for i in range(SIZE)
            if packed.segments[row, i] in (0, question + 1) and packed.prompt[row, i]
        ]
        assert np.flatnonzero(prompts[row, question]).tolist() == own
        assert asked[row, question] == any(packed.segments[row, i] == question + 1 for i in own)


def test_text_in_front_of_a_picture_is_no_judge():
    """Unless there is none behind it: place 6 is behind the last slot, row 1 has nothing there."""
    rng = np.random.default_rng(0)
    place = placement(rng, 2, 4, 2, ())
    place = place.replace(
        visual_index=np.array([[1, 5], [1, 5]]), text_index=np.array([[0, 2, 6, 7], [0, 2, 3, 4]])
    )
    inputs = ModelInputs.of_rows(np.ones((2, 4)), [4, 3], placement=place)
    np.testing.assert_array_equal(
        inputs.judges(), [[False, False, True, True], [True, True, True, False]]
    )
    prompt = np.array([[True, True, True, False]] * 2)
    np.testing.assert_array_equal(
        inputs.replace(prompt=prompt).judges(), [[False, False, True, False], [True] * 3 + [False]]
    )


def test_a_row_alone():
    """Rows 2 and 3 are about the second row of pictures."""
    pictures = Pictures(np.arange(2 * 12).reshape(2, 1, 2, 2, 3), np.ones((2, 1), bool))
    inputs = ModelInputs.of_rows(np.arange(8).reshape(4, 2), [2, 1, 2, 0], pictures=pictures)
    row = inputs.row(2)
    row.check()
    np.testing.assert_array_equal(row.text, [[4, 5]])
    np.testing.assert_array_equal(row.pictures.pixels, pictures.pixels[1:])
    assert inputs.lengths.tolist() == [2, 1, 2, 0] and inputs.picture_rows == 2


def good():
    rng = np.random.default_rng(0)
    pictures = Pictures(np.zeros((2, 1, 8, 8, 3), np.uint8), np.ones((2, 1), bool))
    place = placement(rng, 2, 6, 4, ())
    return ModelInputs.of_rows(np.ones((2, 6)), [6, 3], pictures=pictures, placement=place)


def wrong(name):
    inputs = good()
    pictures, place = inputs.pictures, inputs.placement
    return {
        "text": inputs.replace(text=np.ones(6)),
        "segments": inputs.replace(segments=np.ones((2, 5))),
        "labels": inputs.replace(labels=np.ones((1, 6))),
        "prompt": inputs.replace(prompt=np.ones((2, 6, 1))),
        "longest": inputs.replace(questions=2),
        "rows of text": inputs.replace(pictures=jax.tree.map(lambda x: x[[0, 1, 1]], pictures)),
        "pixels": inputs.replace(pictures=pictures.replace(pixels=np.zeros((2, 8, 8, 3)))),
        "mask": inputs.replace(pictures=pictures.replace(mask=np.ones((2, 2), bool))),
        "valid": inputs.replace(pictures=pictures.replace(valid=np.ones((2, 1), int))),
        "pool_index": inputs.replace(pictures=pictures.replace(pool_index=np.ones((1, 3, 4)))),
        "text_index": inputs.replace(placement=place.replace(text_index=np.ones((2, 7)))),
        "visual_block": inputs.replace(placement=place.replace(visual_block=np.ones((2, 3)))),
        "next_position": inputs.replace(placement=place.replace(next_position=np.ones(3))),
    }[name]


WRONG = (
    *("text", "segments", "labels", "prompt", "longest", "rows of text", "pixels", "mask", "valid"),
    *("pool_index", "text_index", "visual_block", "next_position"),
)


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_belong_together_are_told(name):
    with pytest.raises(UserError, match=name) as caught:
        wrong(name).check(Layout(1, 2, 2))
    assert len(str(caught.value).splitlines()) <= 3


def test_slots_are_counted_against_the_model(make_model, init):
    good().check(Layout(1, 2, 2))
    check_fields(good().pictures)
    check_fields(good())
    with pytest.raises(UserError, match="4 slots, the model makes 1 x 3 x 3"):
        good().check(Layout(1, 3, 3))
    model = make_model()
    pictures = Pictures(np.zeros((2, 1, 32, 32, 3), np.uint8), np.ones((2, 1), bool))
    with pytest.raises(UserError, match="4 slots, the model makes 1 x 4 x 4"):
        model.apply({"params": init(model)}, good().replace(pictures=pictures))
