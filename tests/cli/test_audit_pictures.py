"""Pictures in `audit`: what a family's options and other sizes make of them, down to the ledger."""

import json

import numpy as np
import pytest
from PIL import Image

from efficient_vlm.cli import methods
from efficient_vlm.costs.flops import model_cost
from efficient_vlm.errors import UserError
from efficient_vlm.families import presets, published
from efficient_vlm.families.table import family_of
from efficient_vlm.models.vlm import VisionLanguageModel


@pytest.fixture
def audited(command):
    """audited(*words) -> the parsed JSON of `efficient-vlm audit words`."""

    def run(*words):
        code, out, err = command("audit", *words, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def quick(monkeypatch):
    """Without the forward pass on shapes, which takes seconds for each model."""
    monkeypatch.setattr(methods, "dry_run", lambda *args: None)


# One of each processor; small pictures, of every shape.
PROCESSORS = (
    *("llava-1.5-7b", "tinyllava-phi-2-siglip-3.1b", "paligemma-3b-224", "smolvlm-256m"),
    *("internvl3-1b", "gemma-3-4b", "mobilevlm-v2-1.7b", "qwen2-vl-2b", "qwen3-vl-2b"),
    *("molmo-7b-d", "molmo2-4b"),
)


@pytest.mark.parametrize("name", PROCESSORS)
def test_views_are_what_the_processor_makes(name):
    entry = published.get(name)
    family = family_of(entry["config"])
    draws = np.random.default_rng(0)
    # Sizes cannot tell what is blank, see tests/processing/test_skip_blank.py.
    known = [option for option in family.picture_options if option != "skip_blank"]
    for options in ({}, *({option: OPTIONS[option]} for option in known)):
        processor = family.processor(entry["image_processor"], entry["config"], **options)
        for height, width in (*draws.integers(30, 900, (2, 2)), (100, 700)):
            made = processor(Image.new("RGB", (int(width), int(height))))
            assert processor.views(int(height), int(width)) == made.images.shape[:3]
        with pytest.raises(UserError, match="pixels"):
            processor.views(0, 5)


OPTIONS = dict(
    min_pixels=100_000,
    max_pixels=100_352,
    split=False,
    max_tiles=3,
    max_crops=3,
    pan_and_scan=True,
    max_visual_tokens=1000,
)


def test_fewer_pixels_are_fewer_patches(audited):
    """Qwen2-VL: 28 x 28 pixels for a visual token, four patches of 14."""
    full = audited("--preset=qwen2-vl-2b")
    small = audited("--preset=qwen2-vl-2b", "--pictures.max_pixels=200704")
    assert full["visual_tokens"]["entering"] == 999
    assert small["visual_tokens"]["entering"] == 13 * 18 and 13 * 18 * 28 * 28 <= 200704
    assert small["encoder_layers"] == [4 * 13 * 18] * 32
    assert small["flops"]["full"]["encoder"] < 0.25 * full["flops"]["full"]["encoder"]
    # A picture of its own that has as many pixels is as dear.
    other = audited("--preset=qwen2-vl-2b", "--picture=364x504")
    assert other["flops"] == small["flops"] and other["layers"] == small["layers"]


@pytest.mark.parametrize(
    ("name", "options", "images", "tokens"),
    [
        ("smolvlm-256m", {"split": False}, 1, 64),
        ("internvl3-1b", {"max_tiles": 4}, 5, 5 * 256),
        ("molmo-7b-d", {"max_crops": 4}, 5, 5 * 144),
        ("molmo2-4b", {"max_crops": 4}, 5, 725),
        ("smolvlm-256m", {"max_visual_tokens": 600}, 5, 5 * 64),
        ("internvl3-1b", {"max_visual_tokens": 1600}, 5, 5 * 256),
        ("molmo2-4b", {"max_visual_tokens": 800}, 5, 725),
    ],
)
def test_fewer_tiles_cost_less(quick, audited, name, options, images, tokens):
    words = [f"--pictures.{key}={str(value).lower()}" for key, value in options.items()]
    found, full = audited(f"--preset={name}", *words), audited(f"--preset={name}")
    assert found["images"] == images and found["visual_tokens"]["entering"] == tokens
    share = found["flops"]["full"]["encoder"] / full["flops"]["full"]["encoder"]
    assert share == pytest.approx(images / full["images"])
    # The same numbers as with the model's own fields.
    model = VisionLanguageModel(**presets.get(name)["model"])
    pooled = tokens if name == "molmo2-4b" else None
    cost = model_cost(model, text_tokens=64, images=images, pooled=pooled)
    assert cost.flops == found["flops"]["full"]


def test_a_smaller_picture_has_fewer_tiles(quick, audited, command):
    """InternVL takes the arrangement nearest to the aspect ratio; small and square is one tile."""
    assert audited("--preset=internvl3-1b", "--picture=400x400")["images"] == 1
    assert audited("--preset=internvl3-1b", "--picture=400x1300")["images"] == 4
    assert audited("--preset=llava-1.5-7b", "--picture=100x100")["images"] == 1
    out = command("audit", "--preset=smolvlm-256m", "--picture=500x1000")[1]
    assert "picture: 500 x 1000, 9 tiles or crops" in out


def test_downsample_counts_fewer_pixels(quick, audited):
    """The encoder runs on as many patches as an image of that size has."""
    words = ("--preset=qwen2-vl-2b", "--compressor=downsample", "--compressor.budget=234")
    found = audited(*words)
    # The largest grid of 27 : 37 that fits.
    assert found["encoder_layers"][0] == 4 * 13 * 18 and found["visual_tokens"]["entering"] == 234
    small = audited("--preset=qwen2-vl-2b", "--pictures.max_pixels=200704")
    assert found["flops"]["full"]["encoder"] == small["flops"]["full"]["encoder"]
    words = ("--preset=smolvlm-256m", "--compressor=downsample", "--compressor.budget=16")
    tiles = audited(*words)
    # Of each of 13 tiles: 4 x 4 tokens of 4 x 4 patches in place of 8 x 8.
    assert tiles["encoder_layers"] == [16 * 16] * 12 and tiles["visual_tokens"]["entering"] == 208
    one = audited(*words, "--pictures.split=false")
    assert 13 * one["flops"]["full"]["encoder"] == tiles["flops"]["full"]["encoder"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--preset=qwen2-vl-2b", "--pictures.max_pixel=5"), ["'max_pixel'", "max_pixels"]),
        (("--preset=llava-1.5-7b", "--pictures.split=false"), ["'split'", "max_visual_tokens"]),
        (
            ("--preset=llava-1.5-7b", "--pictures.max_visual_tokens=100"),
            ["max_visual_tokens: 100", "576 or more: every picture has as many"],
        ),
        (("--preset=molmo-7b-d", "--pictures.skip_blank=0"), ["skip_blank: 0", "all crops"]),
        (("--preset=qwen2-vl-2b", "--pictures.max_pixels=many"), ["'many'", "a whole number"]),
        (("--preset=qwen2-vl-2b", "--pictures.max_pixels=5"), ["max_pixels: 5", "min_pixels"]),
        (("--preset=qwen2-vl-2b", "--pictures.max_pixels"), ["no value"]),
        (("--preset=smolvlm-256m", "--pictures.split=false", "--images=2"), ["--images", "split"]),
        (("--preset=smolvlm-256m", "--picture=5x5", "--images=2"), ["--images", "--picture=5x5"]),
        (("--preset=smolvlm-256m", "--picture=big"), ["--picture=big", "HEIGHTxWIDTH"]),
        (("--preset=smolvlm-256m", "--picture=0x5"), ["--picture=0x5"]),
        (("--preset=qwen2-vl-2b", "--picture=5x5000"), ["5000 x 5", "200 times"]),
        (("--preset=qwen2-0.5b", "--picture=5x5"), ["a language model without images"]),
        (
            ("--config=configs/quickstart.py", "--pictures.split=false"),
            ["--pictures.split=false", "--config.data.image_size"],
        ),
        (("--config=configs/quickstart.py", "--picture=5x5"), ["--picture=5x5", "for presets"]),
    ],
)
def test_mistakes(command, request, monkeypatch, words, said):
    monkeypatch.chdir(request.config.rootpath)
    code, out, err = command("audit", *words)
    assert code == 2 and not out, out
    assert len(err.strip().splitlines()) <= 3 and "Traceback" not in err
    assert all(word in err for word in said), err
