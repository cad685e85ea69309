"""Token maps in a workdir: what is written comes back, and what is damaged is named."""

import io
import json
import zipfile

import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation.token_maps import Cell, Example, read_maps, write_maps


def example(record=5):
    rng = np.random.default_rng(record)
    image = rng.integers(0, 255, (64, 96, 3), np.uint8)
    halves = np.repeat([0, 1, -1], 8)
    cells = [
        Cell("none", 24, np.arange(24), "Seven ", grid=(4, 6)),
        Cell("visionzip contextual=0", 2, halves, "1", grid=(4, 6), scores=rng.random(24)),
        Cell("random", 1, np.full(9, -1, np.int64), "", scores=np.full(9, np.nan), meaning="none"),
    ]
    return Example(image, "which digit is red", "seven", cells, "needle", record)


def test_what_is_written_comes_back(tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "stale.npz").write_bytes(b"")
    written = [example(), example(6)]
    path = write_maps(tmp_path, written)
    assert {each.name for each in path.parent.iterdir()} == {"maps.json", "00.npz", "01.npz"}
    found = read_maps(tmp_path)
    assert len(found) == 2
    for before, after in zip(written, found, strict=True):
        np.testing.assert_array_equal(before.image, after.image)
        for name in ("question", "answer", "task", "record"):
            assert getattr(before, name) == getattr(after, name)
        for old, new in zip(before.cells, after.cells, strict=True):
            for name in ("compressor", "budget", "prediction", "meaning"):
                assert getattr(old, name) == getattr(new, name)
            assert new.grid == (old.grid or (3, 3))
            np.testing.assert_array_equal(old.source, new.source)
            assert (old.scores is None) == (new.scores is None)
            if old.scores is not None:
                np.testing.assert_array_equal(old.scores, new.scores)
                assert old.scores.dtype == new.scores.dtype
    (first, _) = json.loads(path.read_text())
    assert [row["tokens"] for row in first["maps"]] == [24, 2, 0]
    assert [row["correct"] for row in first["maps"]] == [True, False, False]
    again = tmp_path / "again"
    write_maps(again, written)
    for name in ("00.npz", "01.npz", "maps.json"):  # The same arrays are the same files.
        assert (again / "maps" / name).read_bytes() == (path.parent / name).read_bytes()
    assert read_maps(tmp_path / "nowhere") == []


def archive(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def bomb():
    """A file that announces more than it should ever hold."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("image.npy", "w", force_zip64=True) as part,
    ):
        for _ in range(300):
            part.write(bytes(1 << 20))
    return buffer.getvalue()


IMAGE, SOURCE = np.zeros((8, 8, 3), np.uint8), np.arange(24, dtype=np.int32)
DAMAGE = {
    "no archive": b"no arrays",
    "half an archive": archive(image=IMAGE)[:60],
    "a bomb": bomb(),
    "objects": archive(image=np.array([{}], object)),
    "no image": archive(source_0=SOURCE),
    "an image of floats": archive(image=IMAGE / 2),
    "an image without colours": archive(image=IMAGE[..., 0]),
    "no source": archive(image=IMAGE),
    "sources of floats": archive(image=IMAGE, source_0=SOURCE / 2),
    "sources in a square": archive(image=IMAGE, source_0=SOURCE.reshape(4, 6)),
    "no patches": archive(image=IMAGE, source_0=SOURCE[:0]),
    "tokens below -1": archive(image=IMAGE, source_0=SOURCE - 2),
    "tokens without end": archive(image=IMAGE, source_0=SOURCE.astype(np.int64) << 40),
    "scores of other patches": archive(image=IMAGE, source_0=SOURCE, scores_0=np.zeros(3)),
    "scores that are words": archive(image=IMAGE, source_0=SOURCE, scores_0=np.array(["a"] * 24)),
}
ENTRIES = {
    "not a list": {"maps": []},
    "an entry that is a word": ["word"],
    "no maps": [{"arrays": "00.npz"}],
    "a map that is a word": [{"arrays": "00.npz", "maps": ["word"]}],
    "no budget": [{"arrays": "00.npz", "maps": [{"compressor": "none"}]}],
    "a budget in words": [{"arrays": "00.npz", "maps": [{"budget": "many"}]}],
    "a grid that does not fit": [{"arrays": "00.npz", "maps": [{"budget": 1, "grid": [5, 5]}]}],
    "no grid, and no square": [{"arrays": "00.npz", "maps": [{"budget": 1}]}],
    "a grid of one": [{"arrays": "00.npz", "maps": [{"budget": 1, "grid": [3]}]}],
    "a grid of words": [{"arrays": "00.npz", "maps": [{"budget": 1, "grid": "ab"}]}],
    "a folder above": [{"arrays": "../maps/00.npz", "maps": []}],
    "a number for a file": [{"arrays": 7, "maps": []}],
    "a file that is not there": [{"arrays": "07.npz", "maps": []}],
}


def refused(workdir):
    """The errors of a strict and of a lenient reading, which are the same."""
    problems = []
    assert read_maps(workdir, damaged=problems.append) == []
    with pytest.raises(UserError) as caught:
        read_maps(workdir)
    assert [str(problem) for problem in problems] == [str(caught.value)]
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_arrays_are_named(tmp_path, name):
    write_maps(tmp_path, [example()])
    (tmp_path / "maps" / "00.npz").write_bytes(DAMAGE[name])
    assert "00.npz" in refused(tmp_path)


@pytest.mark.parametrize("name", ENTRIES)
def test_damaged_listings_are_named(tmp_path, name):
    path = write_maps(tmp_path, [example()])
    path.write_text(json.dumps(ENTRIES[name]))
    assert "maps.json" in refused(tmp_path) or "07.npz" in refused(tmp_path)


def test_pictures_of_before_say_what_to_do(tmp_path):
    path = write_maps(tmp_path, [])
    entry = {"question": "?", "answer": "7", "image": "00_image.png", "maps": []}
    path.write_text(json.dumps([entry]))
    assert "earlier version" in refused(tmp_path) and "train again" in refused(tmp_path)
    path.write_text("{")
    assert "maps.json cannot be read" in refused(tmp_path)
