"""Every file of a checkpoint flipped, cut, gone: seen, set aside, and an older step used."""

import os
import shutil

import numpy as np
import pytest
from states import abstract, assert_equal, harm_flip, make_state

from efficient_vlm import files as manifest
from efficient_vlm.checkpoints.run import Checkpoints
from efficient_vlm.errors import UserError


def harm_truncate(path, rng):
    with open(path, "r+b") as file:
        file.truncate(int(rng.integers(path.stat().st_size)))


def harm_grow(path, rng):
    with open(path, "ab") as file:
        file.write(b"\0")


def harm_delete(path, rng):
    path.unlink()


def test_damage_to_every_file_is_seen_and_the_older_step_used(two_steps, tmp_path):
    want, target = make_state(10), abstract(make_state(10))
    names, cases = manifest.list_files(two_steps / "20"), 0
    assert len(names) >= 8
    assert {"manifest.json", "checkpoint.json"} <= set(names)
    for name in names:
        size = (two_steps / "20" / name).stat().st_size
        harms = [harm_delete, harm_flip, harm_truncate] if size else [harm_delete, harm_grow]
        for harm in harms:
            directory = tmp_path / str(cases)
            shutil.copytree(two_steps, directory)
            harm(directory / "20" / name, np.random.default_rng(cases))
            lines = []
            found = Checkpoints(directory, warn=lines.append).restore_latest(target)
            assert found[0] == 10, (name, harm)
            assert found[2] == {"note": "ten"}
            assert len(lines) == 1
            assert "\n" not in lines[0]
            assert name in lines[0]
            assert "falling back to step 10" in lines[0]
            assert sorted(os.listdir(directory)) == ["10", "20.damaged-1", "index.json"]
            cases += 1
            shutil.rmtree(directory)
    assert_equal(found[1], want)


def test_extra_and_linked_files_are_damage(two_steps, tmp_path):
    for number, spoil in enumerate(
        (
            lambda folder: (folder / "state" / "more").write_text("x"),
            lambda folder: (
                (folder / "checkpoint.json").rename(folder.parent / "moved"),
                (folder / "checkpoint.json").symlink_to(folder.parent / "moved"),
            ),
            lambda folder: shutil.copy(folder.parent / "10" / "manifest.json", folder),
            shutil.rmtree,
        )
    ):
        directory = tmp_path / str(number)
        shutil.copytree(two_steps, directory)
        spoil(directory / "20")
        lines = []
        assert (
            Checkpoints(directory, warn=lines.append).restore_latest(abstract(make_state()))[0]
            == 10
        )
        assert len(lines) == 1


def test_every_byte_of_a_sealed_file_counts(two_steps):
    raw = (two_steps / "20" / "manifest.json").read_bytes()
    manifest.unseal(raw, "m")
    rng = np.random.default_rng(0)
    for position in range(len(raw)):
        harmed = bytearray(raw)
        harmed[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(manifest.Damaged):
            manifest.unseal(bytes(harmed), "m")
    for length in range(0, len(raw), 7):
        with pytest.raises(manifest.Damaged):
            manifest.unseal(raw[:length], "m")


@pytest.mark.parametrize("harm", [harm_delete, harm_flip, harm_truncate])
def test_a_lost_index_is_rebuilt(two_steps, tmp_path, harm):
    shutil.copytree(two_steps, tmp_path / "c")
    harm(tmp_path / "c" / "index.json", np.random.default_rng(1))
    lines = []
    checkpoints = Checkpoints(tmp_path / "c", warn=lines.append)
    assert checkpoints.committed() == [10, 20]
    assert "index" in lines[0]
    assert checkpoints.restore_latest(abstract(make_state()))[0] == 20
    lines.clear()
    assert Checkpoints(tmp_path / "c", warn=lines.append).committed() == [10, 20]
    assert not lines


def test_no_good_step_left_is_an_error_and_stays_one(two_steps, tmp_path):
    directory = tmp_path / "c"
    shutil.copytree(two_steps, directory)
    for step in ("10", "20"):
        harm_flip(directory / step / "checkpoint.json", np.random.default_rng(2))
    for lines in ([], []):
        with pytest.raises(UserError, match="no usable checkpoint") as caught:
            Checkpoints(directory, warn=lines.append).restore_latest(abstract(make_state()))
        assert len(str(caught.value).splitlines()) <= 3
    assert {"10.damaged-1", "20.damaged-1"} <= set(os.listdir(directory))
    # Even with the quarantined folders gone, silence would mean a restart from scratch.
    shutil.rmtree(directory / "10.damaged-1")
    shutil.rmtree(directory / "20.damaged-1")
    with pytest.raises(UserError):
        Checkpoints(directory).restore_latest(abstract(make_state()))


def test_a_reader_touches_nothing(two_steps, tmp_path):
    directory = tmp_path / "c"
    shutil.copytree(two_steps, directory)
    harm_flip(directory / "20" / "manifest.json", np.random.default_rng(3))
    (directory / ".tmp-30").mkdir()
    before = sorted(os.listdir(directory))
    lines = []
    reader = Checkpoints(directory, read_only=True, warn=lines.append)
    assert reader.restore_latest(abstract(make_state()))[0] == 10
    assert sorted(os.listdir(directory)) == before
    assert len(lines) == 1
    with pytest.raises(ValueError, match="read_only"):
        reader.save(30, make_state())
    assert Checkpoints(tmp_path / "none", read_only=True).committed() == []
    assert not (tmp_path / "none").exists()


def test_uncommitted_steps_are_not_used_and_leftovers_go(two_steps, tmp_path):
    directory = tmp_path / "c"
    shutil.copytree(two_steps, directory)
    shutil.copytree(directory / "20", directory / "30")
    (directory / ".tmp-40" / "state").mkdir(parents=True)
    (directory / ".index.json.1.2.tmp").write_text("half")
    lines = []
    checkpoints = Checkpoints(directory, warn=lines.append)
    assert checkpoints.committed() == [10, 20]
    assert checkpoints.restore_latest(abstract(make_state()))[0] == 20
    assert sorted(os.listdir(directory)) == ["10", "20", "30.uncommitted-1", "index.json"]
    assert len(lines) == 1
    assert "30" in lines[0]
    checkpoints.save(30, make_state(), wait=True)
    assert checkpoints.committed() == [10, 20, 30]
