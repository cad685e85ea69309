"""Small data that several tests share."""

import json

import pytest
from data_samples import image_bytes

from efficient_vlm.data import DataConfig


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("builds")


@pytest.fixture(scope="session")
def small(data_root):
    """A token_bench of 40 + 12 images with every task."""
    return DataConfig(
        dir=str(data_root),
        train_images=40,
        test_images=12,
        batch_size=8,
        tasks=("needle", "count", "point", "relation", "absent", "dense", "global"),
        num_threads=2,
        prefetch=2,
    )


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as JSON (or JSON lines) beside the images good0.png ... good9.png."""
    for number in range(10):
        (tmp_path / f"good{number}.png").write_bytes(image_bytes(number))

    def write(rows, lines=False):
        path = tmp_path / ("data.jsonl" if lines else "data.json")
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write
