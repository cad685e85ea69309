"""Where the time of a run goes, over all the processes that it took."""

import json

import pytest

from efficient_vlm.train.goodput import BUCKETS, Goodput


def test_what_was_not_saved_is_lost(tmp_path):
    lines = []
    first = Goodput(tmp_path, warn=lines.append)
    first.resume(None)
    first.add("start", 2)
    first.add("productive", 10)
    saved = first.state()
    first.add("checkpoint", 1)
    first.add("productive", 4)
    first.write()  # And then it is killed.
    second = Goodput(tmp_path, warn=lines.append)
    second.resume(json.loads(json.dumps(saved)))
    second.add("productive", 6)
    found = second.summary()
    assert (found["productive"], found["lost"], found["start"]) == (16, 4, 2)
    assert found["total"] == 23 and found["goodput"] == pytest.approx(16 / 23, abs=1e-4)
    third = Goodput(tmp_path, warn=lines.append)
    third.resume(None)  # No checkpoint was left: all of it is lost.
    assert third.summary()["productive"] == 0 and third.summary()["lost"] == 14
    assert not lines


def test_neither_a_broken_file_nor_a_full_disk_stops_a_run(tmp_path):
    for text in ("", "[]", '{"productive": "much"}', '{"productive": null}'):
        (tmp_path / "goodput.json").write_text(text)
        assert Goodput(tmp_path, warn=print).total == 0
    lines = []
    gone = Goodput(tmp_path / "none" / "such", warn=lines.append)
    gone.add("eval", 1)
    gone.write()
    gone.write()
    assert len(lines) == 1 and "training goes on" in lines[0]


def test_every_bucket_is_explained():
    assert set(Goodput(__import__("pathlib").Path("nowhere"), warn=print).seconds) == set(BUCKETS)
