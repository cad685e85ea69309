"""From the arrays of our data, and from token ids with slots, to `ModelInputs`."""

import jax
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.processing.batch import one_question, question_inputs, training_inputs
from efficient_vlm.processing.placing import Prompt, place

IMAGE = 9


# --- our own benchmark ----------------------------------------------------------------------------


def test_training_inputs_by_hand(make_batch):
    batch = make_batch(3, 2, 6)
    inputs = training_inputs(batch)
    inputs.check()
    assert inputs.text.shape == (3, 10) and (inputs.questions, inputs.longest) == (2, 5)
    for b, q in np.ndindex(3, 2):
        length, asked = batch["lengths"][b, q], batch["prompt_lengths"][b, q]
        for t in range(5):
            at = q * 5 + t
            assert inputs.text[b, at] == batch["tokens"][b, q, t]
            assert inputs.segments[b, at] == (q + 1 if t < length else -1)
            assert inputs.prompt[b, at] == (t < asked)
            target = batch["loss_mask"][b, q, t + 1]
            assert inputs.labels[b, at] == (batch["tokens"][b, q, t + 1] if target else -1)
    assert (inputs.labels >= 0).sum() == batch["loss_mask"].sum()


def test_questions_without_their_answers(make_batch):
    batch = make_batch(3, 2, 6)
    batch["lengths"][1, 1] = 0
    inputs = question_inputs(batch)
    inputs.check()
    assert inputs.questions == 1 and inputs.labels is None
    for b, q in np.ndindex(3, 2):
        asked = 0 if batch["lengths"][b, q] == 0 else batch["prompt_lengths"][b, q]
        row = inputs.row(b * 2 + q)
        assert row.lengths == [asked]
        np.testing.assert_array_equal(row.text[0, :asked], batch["tokens"][b, q, :asked])
        assert not row.text[0, asked:].any()
        np.testing.assert_array_equal(row.pictures.pixels[0], batch["images"][b])


def test_one_question():
    inputs = one_question(np.zeros((1, 4, 4, 3), np.uint8), [5, 6], 4)
    inputs.check()
    assert inputs.text.tolist() == [[5, 6, 0, 0]] and inputs.lengths.tolist() == [2]


# --- published families ---------------------------------------------------------------------------


def prompt(text, slots=2, targets=None):
    """Ids of words, "#" for a slot."""
    ids = [IMAGE if word == "#" else int(word) for word in text.split()]
    return Prompt(np.array(ids), np.arange(slots), np.array([[1, slots]]), targets=targets)


def answered(text, count, slots=2):
    found = prompt(text, slots)
    return found._replace(targets=[False] * (len(found.ids) - count) + [True] * count)


def test_one_prompt_a_row():
    """1 # # 2 3, and 4 # # in a longer text: slots are no text, places are those of the prompt."""
    inputs = place([[prompt("1 # # 2 3")], [prompt("4 # # 5")]], IMAGE, 3)
    assert inputs.questions == 1 and inputs.labels is None and inputs.prompt is None
    assert inputs.text.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert inputs.segments.tolist() == [[0, 0, 0], [0, 0, -1]]
    assert inputs.placement.text_index.tolist() == [[0, 3, 4], [0, 3, 0]]
    assert inputs.placement.visual_index.tolist() == [[1, 2, 0], [1, 2, 0]]
    assert inputs.placement.next_index.tolist() == [5, 4]


def test_two_prompts_behind_one_picture():
    """What stands in front of the picture is read once; both go on from behind it."""
    rows = [[answered("1 # # 2 3 4", 1), answered("1 # # 5 6", 1)], [answered("1 # # 7 8", 1)]]
    inputs = place(rows, IMAGE, 2, multiple=4)
    assert (inputs.questions, inputs.longest) == (2, 4)
    assert inputs.text.tolist() == [[1, 2, 3, 4, 5, 6, 0, 0], [1, 7, 8, 0, 0, 0, 0, 0]]
    assert inputs.segments.tolist() == [[0, 1, 1, 1, 2, 2, -1, -1], [0, 1, 1, *[-1] * 5]]
    assert inputs.labels.tolist() == [[-1, -1, 4, -1, 6, -1, -1, -1], [-1, 8, *[-1] * 6]]
    assert inputs.prompt[0].tolist() == [True, True, True, False, True, False, False, False]
    assert inputs.placement.text_index[0].tolist() == [0, 3, 4, 5, 3, 4, 0, 0]
    assert inputs.placement.text_block.any() is np.False_


def test_positions_of_several_axes_go_on_from_the_picture_in_each():
    rows = [[prompt("1 # # 2"), prompt("1 # # 5 6")]]
    inputs = place(rows, IMAGE, 2, positions="mrope")
    # One word, a picture of 1 x 2 from 1 on, text from 3 on.
    expected = [[0] * 3, [3] * 3, [3] * 3, [4] * 3]
    assert inputs.placement.text_position[0].tolist() == expected
    assert inputs.placement.visual_position[0].tolist() == [[1, 1, 1], [1, 1, 2]]


@pytest.mark.parametrize("blocks", ["prefix", None])
def test_pictures_that_see_the_question_are_not_shared(blocks):
    rows = [[answered("1 # # 2 3", 1), answered("1 # # 4 3", 1)], [answered("1 # # 7 8", 1)]]
    inputs = place(rows, IMAGE, 2, blocks=blocks)
    if blocks is None:
        assert inputs.questions == 2 and len(inputs.text) == 2
        return
    assert inputs.questions == 1
    assert inputs.text.tolist() == [[1, 2, 3], [1, 4, 3], [1, 7, 8], [0, 0, 0]]
    assert inputs.placement.text_block.tolist() == [[1, 1, 0]] * 3 + [[0, 0, 0]]
    assert inputs.labels.tolist() == [[-1, 3, -1], [-1, 3, -1], [-1, 8, -1], [-1] * 3]


@pytest.mark.parametrize(
    "rows",
    [
        [[prompt("1 # # 2"), prompt("5 # # 2")]],  # Another text in front of the picture.
        [[answered("1 # # 8 3", 1), prompt("1 # 8 # 3")]],  # The picture in another place.
    ],
)
def test_prompts_that_differ_in_front_of_the_picture_are_not_packed(rows):
    inputs = place(rows, IMAGE, 2)
    assert inputs.questions == 1 and len(inputs.text) == 2


def test_text_of_blocks_that_predicts_answers_is_not_shared():
    """8 belongs to the picture, which sees it; it would have to predict both answers."""
    rows = [[answered("1 # # 8 3", 1), answered("1 # # 8 4", 1)]]
    inputs = place(rows, IMAGE, 2, blocks="images", block_ids=(8,))
    assert inputs.questions == 1 and inputs.labels.tolist() == [[-1, 3, -1], [-1, 4, -1]]
    rows = [[answered("1 # # 8 2 3", 1), answered("1 # # 8 2 4", 1)]]
    inputs = place(rows, IMAGE, 2, blocks="images", block_ids=(8,))
    assert inputs.segments.tolist() == [[0, 0, 1, 1, 2, 2]]
    assert inputs.placement.text_block.tolist() == [[0, 1, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (prompt("1 # 2"), "prompt 1: 1 visual slots for 2"),
        (answered("1 # # 2", 1), "prompt 1: an answer follows on an image"),
        (answered("2 3", 2, 0), "prompt 1: an answer follows .* nothing"),
    ],
)
def test_prompts_that_cannot_be_placed(row, words):
    with pytest.raises(UserError, match=words) as caught:
        place([[prompt("1 # # 2")], [row]], IMAGE, 2)
    assert len(str(caught.value).splitlines()) <= 3


# --- pictures among the text of our own data ------------------------------------------------------


def placed_batch(make_batch, places, masks, length=6):
    """Rows of one conversation with pictures [2, 2] patches each."""
    batch = make_batch(len(places), 1, length, images=2, side=16)
    batch["image_places"] = np.array(places, np.int32)[:, None]
    batch["image_mask"] = np.array(masks, bool)
    return batch


def test_places_of_pictures_by_a_loop(make_batch, make_model):
    """Every token in sequence, as written; missing pictures have no place."""
    model, patches = make_model(encoder=dict(image_size=16)), 4
    batch = placed_batch(
        make_batch,
        [[0, 0], [0, 2], [1, 1], [2, 0], [1, 3]],
        [[1, 1], [1, 1], [1, 1], [1, 0], [1, 1]],
    )
    batch["lengths"][:], batch["prompt_lengths"][:] = 6, 3
    inputs = training_inputs(batch, model)
    inputs.check(model.layout(inputs.pictures))
    for row in range(5):
        at, place = 0, inputs.placement
        for token in range(6):
            for k in range(2):
                if batch["image_mask"][row, k] and batch["image_places"][row, 0, k] == token:
                    slots = place.visual_index[row, k * patches : (k + 1) * patches]
                    assert slots.tolist() == list(range(at, at + patches))
                    at += patches
            if token < 5:  # The last is only ever predicted.
                assert place.text_index[row, token] == at
                at += 1
        assert place.next_index[row] == at
    asked = question_inputs(batch, model)
    asked.check(model.layout(asked.pictures))
    # The second picture of the last row belongs to a later turn.
    assert asked.pictures.mask.tolist() == [[1, 1], [1, 1], [1, 1], [1, 0], [1, 0]]
    assert asked.placement.next_index.tolist() == [11, 11, 11, 7, 7]
    # A row is what it is beside any other: alone, its arrays are the same.
    for row in range(5):
        alone = training_inputs({name: x[row : row + 1] for name, x in batch.items()}, model)
        for mine, of_all in zip(*map(jax.tree.leaves, (alone, inputs)), strict=True):
            np.testing.assert_array_equal(mine[0], of_all[row])


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_place_in_front_is_what_pictures_have_without_a_place(
    bidirectional, make_batch, make_model, init
):
    """And text in front of a picture does not see it, while text behind it does."""
    decoder = dict(bidirectional_visual=bidirectional, segments=[dict(layers=1)])
    model = make_model(budget=None, decoder=decoder, encoder=dict(image_size=16, depth=1))
    batch = placed_batch(make_batch, [[0, 0], [0, 3]], [[1, 1], [1, 1]], length=7)
    batch["lengths"][:], batch["prompt_lengths"][:] = 7, 5
    params = init(model)
    apply = jax.jit(lambda inputs: model.apply({"params": params}, inputs).logits)
    usual = {name: x for name, x in batch.items() if name != "image_places"}
    found, plain = apply(training_inputs(batch, model)), apply(training_inputs(usual))
    np.testing.assert_allclose(found[0], plain[0], atol=1e-5)
    other = {**batch, "images": batch["images"].copy()}
    other["images"][:, 1] = 255 - other["images"][:, 1]
    changed = np.abs(np.asarray(apply(training_inputs(other, model)) - found)).max(axis=-1)
    assert (changed[0] > 1e-6).all()
    assert (changed[1, :3] == 0).all() and (changed[1, 3:] > 1e-6).all()
