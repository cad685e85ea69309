"""Records to arrays: shapes, masks, and nothing ever cut."""

import numpy as np
import pytest
from data_samples import image_bytes

from efficient_vlm.data import questions, transforms
from efficient_vlm.data.records import Conversation, Record
from efficient_vlm.processing import plain_tokenizer
from efficient_vlm.processing.decode_image import BadRecord

WORDS = plain_tokenizer.word_level(questions.vocabulary())
SPEC = transforms.Spec((8, 6), "stretch", 2, 3, 9, 10**6, 10**6, ("needle", "count"))


def record(*conversations, images=1):
    data = tuple(image_bytes(i) for i in range(images))
    return Record("x", data, tuple(conversations))


def single(prompt="which digit is red", answer="7", task="needle"):
    return Conversation.single(prompt, answer, task)


def test_masks_of_one_question():
    arrays = transforms.text_arrays(record(single()), SPEC, WORDS)
    (tokens,), (mask,) = arrays["tokens"], arrays["loss_mask"]
    assert arrays["lengths"] == [6] and arrays["prompt_lengths"] == [4] and arrays["task"] == [0]
    assert WORDS.decode(tokens[:4]) == "which digit is red"
    assert WORDS.decode(tokens[4:]) == "7" and tokens[5] == WORDS.eos_id
    assert (tokens[6:] == WORDS.pad_id).all()
    assert np.flatnonzero(mask).tolist() == [4, 5]


def test_every_assistant_turn_is_a_target():
    talk = Conversation(
        (("how many red", "2"), ("which digit", ""), ("how many blue", "3")), "count"
    )
    spec = SPEC._replace(max_length=10)
    arrays = transforms.text_arrays(record(talk), spec, WORDS)
    assert arrays["lengths"] == [10] and arrays["prompt_lengths"] == [3]
    targets = arrays["tokens"][0][arrays["loss_mask"][0]]
    assert targets.tolist() == [*WORDS.encode("2"), 1, *WORDS.encode("3"), 1]


def test_first_token_is_never_a_target():
    arrays = transforms.text_arrays(record(single(prompt="")), SPEC, WORDS)
    assert arrays["prompt_lengths"] == [1] and not arrays["loss_mask"][0, 0]


def test_choice_and_empty_slots():
    arrays = transforms.text_arrays(
        record(single(), single("how many blue", "3", "count")), SPEC, WORDS
    )
    chosen = transforms.choose(arrays, [1], SPEC, WORDS.pad_id)
    assert chosen["lengths"].tolist() == [5, 0, 0] and chosen["task"].tolist() == [1, -1, -1]
    assert not chosen["loss_mask"][1:].any() and (chosen["tokens"][1:] == 0).all()
    assert chosen["tokens"].shape == (3, 9) and chosen["tokens"].dtype == np.int32


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(single(answer="")), "no_label"),
        (record(single(answer="  ")), "no_label"),
        (record(), "no_label"),
        (record(single(), single(prompt="red " * 8)), "too_long"),
    ],
)
def test_unusable_text(bad, reason):
    with pytest.raises(BadRecord) as caught:
        transforms.text_arrays(bad, SPEC, WORDS)
    assert caught.value.reason == reason


def test_the_longest_that_fits_is_kept_whole():
    arrays = transforms.text_arrays(record(single(prompt="red " * 7)), SPEC, WORDS)
    assert arrays["lengths"] == [9] and arrays["loss_mask"][0].tolist() == [False] * 7 + [True] * 2


def test_images():
    arrays = transforms.image_arrays(record(images=1), SPEC)
    assert arrays["images"].shape == (2, 8, 6, 3) and arrays["images"].dtype == np.uint8
    assert arrays["image_mask"].tolist() == [True, False] and not arrays["images"][1].any()
    assert not transforms.image_arrays(record(images=0), SPEC)["image_mask"].any()
    with pytest.raises(BadRecord) as caught:
        transforms.image_arrays(record(images=3), SPEC)
    assert caught.value.reason == "too_many_images"


def test_empty_example_has_the_same_shapes():
    arrays = transforms.text_arrays(record(single()), SPEC, WORDS)
    full = transforms.choose(arrays, [0], SPEC, 0) | transforms.image_arrays(record(), SPEC)
    full["index"] = np.int64(4)
    empty = transforms.empty(SPEC, 0)
    assert {k: (np.shape(v), np.asarray(v).dtype) for k, v in full.items()} == {
        k: (np.shape(v), np.asarray(v).dtype) for k, v in empty.items()
    }
