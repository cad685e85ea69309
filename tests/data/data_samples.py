"""Samples that tests write to disk."""

import io

import numpy as np
from PIL import Image


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
