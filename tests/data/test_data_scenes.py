"""Scenes and questions, checked against the pixels and cells by other code than made them."""

import dataclasses
import gzip
import hashlib

import numpy as np
import pytest

from efficient_vlm.data import glyphs, questions, scenes
from efficient_vlm.errors import UserError

ALL = ("needle", "count", "point", "relation", "absent", "dense", "global")
CLEAN = scenes.SceneConfig(noise=0.0)


def many(config, number, split="train"):
    for index in range(number):
        scene, rng = scenes.compose(config, split, index)
        yield scene, questions.draw(scene, config, rng)


def colour_of(patch, background):
    """Colour name of the digit in a noise-free patch, or None, from its pixels alone."""
    excess = patch.reshape(-1, 3).astype(float) / 255 - 0.15 * scenes.RGB[background]
    brightest = excess[np.argmax(excess.max(1))]
    if brightest.max() < 0.2:
        return None
    distance = np.abs(scenes.RGB - brightest / brightest.max() * scenes.RGB.max(1)[:, None]).sum(1)
    return int(np.argmin(distance))


def test_glyphs_are_those_of_scikit_learn():
    """By the digest of the table inside its wheels (read in 1.5.0 and in 1.9.1)."""
    table = gzip.decompress(glyphs.DIGITS.read_bytes())
    digest = "6ebb3d2fee246a4e99363262ddf8a00a3c41bee6014c373ed9d9216ba7f651b8"
    assert hashlib.sha256(table).hexdigest() == digest
    pixels, labels = glyphs.glyph_table(8)
    rows = [[int(number) for number in line.split(b",")] for line in table.splitlines()]
    assert [row[64] for row in rows] == labels.tolist()
    assert [row[:64] for row in rows] == (16 * pixels).reshape(-1, 64).tolist()
    assert "CC BY 4.0" in glyphs.DIGITS.with_name("LICENSE.txt").read_text()


def test_answers_follow_from_the_pixels():
    pixels, labels = glyphs.glyph_table(8)
    seen = set()
    for scene, asked in many(CLEAN, 60):
        image = scene.image
        assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
        # The background: the colour of the tint, from the most frequent pixel.
        values, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
        tint = values[counts.argmax()] / 255 / 0.15
        background = int(np.abs(scenes.RGB[:8] - tint).sum(1).argmin())
        grid = {}
        for row in range(8):
            for column in range(8):
                patch = image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                colour = colour_of(patch, background)
                if colour is not None:
                    grid.setdefault(scenes.COLOURS[colour], []).append((row, column, patch))
        for task, prompt, answer in asked:
            seen.add(task)
            words = prompt.split()
            if task == "global":
                assert answer == scenes.COLOURS[background]
            elif task == "count":
                assert answer == str(len(grid.get(words[-1], [])))
            else:
                ((row, column, patch),) = grid[words[-1]]
                if task == "point":
                    assert answer == str(row if words[1] == "row" else column)
                else:
                    # The digit: the nearest training glyph of scikit-learn has that label.
                    colour = scenes.RGB[scenes.COLOURS.index(words[-1])]
                    shape = patch / 255 - 0.15 * scenes.RGB[background]
                    channel = int(colour.argmax())
                    known = pixels[:1400] * colour[channel]
                    known = np.minimum(known, 1 - 0.15 * scenes.RGB[background][channel])
                    nearest = np.abs(known - shape[..., channel]).sum((1, 2)).argmin()
                    assert answer == str(labels[nearest])
    assert seen == {"needle", "count", "point", "global"}


def test_relation_absent_and_dense_follow_from_the_cells():
    config = scenes.SceneConfig(tasks=ALL, canvas=128, grid=10, jitter=2, clutter=4)
    scenes.check(config)
    for scene, asked in many(config, 80):
        place = {scenes.COLOURS[g[4]]: g[:2] for g in scene.glyphs[: scenes.NEEDLES]}
        present = {scenes.COLOURS[g[4]] for g in scene.glyphs if g[4] != scenes.WHITE}
        assert len(present) < 8
        for task, prompt, answer in asked:
            words = prompt.split()
            if task == "absent":
                assert answer == ("yes" if words[3] in present else "no")
            elif task == "dense":
                assert answer.replace(" ", "") == scene.text and len(scene.text) == 4
            elif task == "relation":
                axis = 0 if "above" in words else 1
                first, second = place[words[1]][axis], place[words[-1]][axis]
                assert first != second
                assert answer == ("yes" if first < second else "no")


def test_yes_and_no_are_balanced_also_for_every_colour():
    config = scenes.SceneConfig(tasks=("relation", "absent"), noise=0, question_pool=32)
    tally = {}
    for _, asked in many(config, 250):
        for task, prompt, answer in asked:
            words = prompt.split()
            named = words[1] if task == "relation" else words[3]
            tally.setdefault((task, named), []).append(answer == "yes")
            tally.setdefault((task, "all"), []).append(answer == "yes")
    assert len(tally) == 2 * 9
    for (task, named), answers in tally.items():
        # Five standard deviations of a fair coin; questions of one image are not independent,
        # so a factor of two on top.
        slack = 5 * 2 * 0.5 / len(answers) ** 0.5
        assert abs(np.mean(answers) - 0.5) < slack, (task, named, np.mean(answers))
    for task in ("relation", "absent"):
        assert abs(np.mean(tally[task, "all"]) - 0.5) < 0.05


def test_counts_are_uniform_also_with_absent():
    for tasks in (("count",), ("count", "absent")):
        config = scenes.SceneConfig(tasks=tasks, noise=0, max_count=4)
        # One answer per image: the first count question.
        answers = [next(a for t, _, a in q if t == "count") for _, q in many(config, 500)]
        shares = np.bincount(np.array(answers, int), minlength=5) / 500
        assert len(shares) == 5 and abs(shares - 0.2).max() < 0.09


def test_no_glyph_is_in_train_and_test():
    sources = {s: set() for s in scenes.SPLITS}
    for split in scenes.SPLITS:
        for scene, _ in many(CLEAN, 150, split):
            sources[split] |= set(scene.glyphs[:, 6].tolist())
    assert len(sources["train"]) > 500 and len(sources["test"]) > 200
    assert not sources["train"] & sources["test"]
    assert max(sources["train"]) < 1400 <= min(sources["test"])


@pytest.mark.parametrize("canvas", [64, 128, 256, 512])
def test_needle_hr_keeps_the_size_of_glyphs(canvas):
    config = scenes.SceneConfig(tasks=("needle_hr",), canvas=canvas, noise=0.0)
    scenes.check(config)
    scene, rng = scenes.compose(config, "train", 3)
    assert scene.image.shape == (canvas, canvas, 3) and config.cells == canvas // 8
    (tint,) = np.unique(np.concatenate([scene.image[0, :1], scene.image[-1, -1:]]), axis=0)[:1]
    pixels, _ = glyphs.glyph_table(8)
    changed = (scene.image != tint).any(-1)
    for glyph in scene.glyphs:
        top, left, source = glyph[2], glyph[3], glyph[6]
        # Exactly the strong pixels of the 8 x 8 source are on the canvas, none was resampled.
        box = changed[top : top + 8, left : left + 8]
        assert (box >= (pixels[source] > 0.1)).all() and not (box & (pixels[source] == 0)).any()
        changed[top : top + 8, left : left + 8] = False
    assert not changed.any()
    asked = questions.draw(scene, config, rng)
    assert {q.task for q in asked} == {"needle_hr"}


def test_jitter_stays_inside_the_cell_and_leaves_the_grid():
    config = scenes.SceneConfig(canvas=100, grid=8, jitter=2, glyph=8)
    offsets = []
    for scene, _ in many(config, 20):
        row, column, top, left = scene.glyphs[:, :4].T
        margin = (100 - 8 * 12) // 2
        offsets += [top - margin - 12 * row, left - margin - 12 * column]
    assert set(np.concatenate(offsets).tolist()) == {0, 1, 2, 3, 4}


def test_glyph_scale_enlarges():
    config = dataclasses.replace(CLEAN, canvas=256, glyph=32)
    scene, _ = scenes.compose(config, "train", 0)
    assert scene.glyphs[:, 3].max() <= 224 and (scene.glyphs[:, 2:4] % 32 == 0).all()


def test_every_word_is_in_the_vocabulary():
    words = questions.vocabulary()
    assert len(words) == len(set(words))
    for tasks in (ALL, ("needle_hr",)):
        config = scenes.SceneConfig(tasks=tasks, canvas=256, max_count=20, grid=16)
        for _, asked in many(config, 20):
            for _, prompt, answer in asked:
                assert set(f"{prompt} {answer}".split()) <= set(words)
                assert len(f"{prompt} {answer}".split()) <= questions.longest(config)


def test_same_seed_same_scene_other_seed_other_scene():
    one, _ = scenes.compose(CLEAN, "train", 5)
    same, _ = scenes.compose(CLEAN, "train", 5)
    np.testing.assert_array_equal(one.image, same.image)
    for other in (
        scenes.compose(CLEAN, "train", 6),
        scenes.compose(CLEAN, "test", 5),
        scenes.compose(dataclasses.replace(CLEAN, seed=1), "train", 5),
    ):
        assert (other[0].image != one.image).any()


def test_noise_is_normal():
    values = scenes._quantiles()
    assert abs(values.mean()) < 1e-6 and abs(values.std() - 1) < 1e-3
    assert abs(np.mean(np.abs(values) < 1) - 0.6827) < 1e-3


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("tasks", ("needel",), "needle"),
        ("tasks", (), "data.tasks"),
        ("canvas", 1000, "data.canvas"),
        ("grid", 9, "data.grid"),
        ("jitter", 1, "data.grid"),
        ("max_count", 20, "data.max_count"),
        ("clutter", 60, "data.clutter"),
        ("dense_px", (3, 20), "data.dense_px"),
        ("question_pool", 0, "data.question_pool"),
    ],
)
def test_impossible_knobs(field, value, named):
    with pytest.raises(UserError, match=named) as caught:
        scenes.check(dataclasses.replace(CLEAN, **{field: value}))
    assert len(str(caught.value).splitlines()) <= 3
