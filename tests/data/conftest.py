"""Small data that several tests share."""

import io
import json

import numpy as np
import pytest
from PIL import Image

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


def image_bytes(seed=0, size=(20, 12), format="PNG", **options):
    """An encoded picture of random pixels; size is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def row(number, image=None, question="What is it?", answer="Noise."):
    """One LLaVA row."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    made = {"id": f"r{number}", "conversations": turns}
    return made if image is None else made | {"image": image}


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
