"""Checkpoints with tokenizers, rows to learn from and configs, for tests of fine-tuning."""

import io
import json
import shutil
from pathlib import Path

import jax
import ml_collections
import numpy as np
from chat_templates import QWEN_VL
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from efficient_vlm.families.architecture import build_model
from efficient_vlm.families.processor import Processor
from efficient_vlm.families.save import export
from efficient_vlm.families.table import family_of
from efficient_vlm.models.init import abstract_parameters
from efficient_vlm.sharding import path_of
from efficient_vlm.train.base import open_base
from efficient_vlm.train.pretrained_fields import PretrainedFields

TESTS = Path(__file__).parent
SMOLVLM = TESTS / "samples" / "smolvlm"
WORDS = ("what", "is", "this", "it", "number", "and", "?", ".", *map(str, range(20)))
# Golden checkpoint -> special tokens by id, what its tokenizer_config.json says beside them, and
# its preprocessor_config.json.
_GOLDEN = {
    "qwen2_5_vl": (
        {"<|im_start|>": 1, "<|im_end|>": 2, "<|image_pad|>": 48, "<|vision_start|>": 50}
        | {"<|vision_end|>": 51},
        dict(eos_token="<|im_end|>", chat_template=QWEN_VL),
        dict(min_pixels=64, max_pixels=1600),
    ),
    "molmo_olmoe": (
        {"<|endoftext|>": 2, "<im_start>": 128, "<im_end>": 129, "<im_patch>": 130}
        | {"<im_col>": 131, "<|image|>": 132},
        dict(eos_token="<|endoftext|>"),
        dict(max_crops=3, overlap_margins=[2, 2], base_image_input_size=[48, 48])
        | dict(image_patch_size=8, image_token_length_h=3, image_token_length_w=3),
    ),
}


def golden_with_words(name: str, folder: Path) -> Path:
    """A checkpoint of tests/golden with a tokenizer of WORDS and its special tokens."""
    special, settings, pictures = _GOLDEN[name]
    shutil.copytree(TESTS / "golden" / name, folder, ignore=shutil.ignore_patterns("io.npz"))
    free = (i for i in range(3, 200) if i not in special.values())
    vocabulary = dict(zip(WORDS, free, strict=False)) | {"<unk>": 0} | special
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(special))
    words.save(str(folder / "tokenizer.json"))
    for file, content in (("tokenizer", settings), ("preprocessor", pictures)):
        (folder / f"{file}_config.json").write_text(json.dumps(content))
    return folder


def png(seed: int, height: int, width: int) -> bytes:
    """A picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def row(images, *turns) -> dict:
    """A row of messages: questions and answers in turn."""
    roles = ("user", "assistant")
    messages = [dict(role=roles[n % 2], content=text) for n, text in enumerate(turns)]
    return dict(images=list(images), messages=messages)


def mixed_rows(folder: Path, count: int) -> list[dict]:
    """Rows with one, two and no picture, of several sizes; the pictures are in `folder`."""
    rows = []
    for number in range(count):
        names = [f"{number}-{n}.png" for n in range((1, 0, 1, 2)[number % 4])]
        for n, name in enumerate(names):
            height, width = ((24, 40), (40, 24), (32, 32))[(number + n) % 3]
            (folder / name).write_bytes(png(10 * number + n, height, width))
        marks = "<image> " * len(names)
        turns = [f"{marks}what is this ?", f"it is number {number % 20} ."]
        if number % 3 == 0:
            turns += ["and this ?"] + ["it is . "[: 2 + number % 5]]
        rows.append(row(names, *turns))
    return rows


def write_rows(path: Path, rows) -> Path:
    """JSON lines."""
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def opened(directory: Path, **fields):
    """(model, processor) of a directory."""
    base = open_base(PretrainedFields(str(directory), **fields))
    processor: Processor = base.processor
    return processor.seeing(base.model), processor


def tuning_config(pretrained, path, *, adapt=None, **sections) -> ml_collections.ConfigDict:
    """The config of a run of six steps on a file of rows."""
    config = ml_collections.ConfigDict(
        dict(
            model=dict(pretrained=str(pretrained), compressor=dict(name="none")),
            data=dict(
                source="auto",
                path=str(path),
                test_fraction=0.0,
                batch_size=2,
                pack_tokens=96,
                max_length=512,
                max_images=4,
                num_threads=0,
                max_skip_fraction=0.0,
            ),
            train=dict(
                steps=6,
                optimizer=dict(name="adamw", learning_rate=1e-2, warmup_steps=1),
                checkpoint_every=3,
                log_every=1,
            ),
            eval=dict(images=2),
        )
    )
    if adapt is not None:
        config.adapt = adapt
    for name, fields in sections.items():
        config[name].update(fields)
    return config


class Stop:
    """A signal that comes while step `after` + 1 is about to begin; never without a number."""

    exit_code = 143

    def __init__(self, after=None):
        self._after, self._asked = after, -1

    @property
    def requested(self):
        self._asked += 1
        return self._asked == self._after


def wide_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A Qwen2.5-VL of random weights, wide enough to learn 16 rows by heart in any way.

    The parts that are adapted are 64 wide; there are biases in encoder and decoder.
    """
    golden_with_words("qwen2_5_vl", folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= dict(
        hidden_size=64, intermediate_size=128, rope_parameters=dict(
            mrope_section=[2, 3, 3], rope_theta=10000.0, rope_type="default"
        ), max_position_embeddings=1024,
    )  # fmt: skip
    config["vision_config"] |= dict(
        hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=2
    )
    (folder / "model.safetensors").unlink()
    model, rng = build_model(config), np.random.default_rng(seed)

    def drawn(leaf):
        if len(leaf.shape) == 1:
            return np.zeros(leaf.shape, np.float32)
        fan_in = np.prod(leaf.shape[:-1])
        return (rng.standard_normal(leaf.shape) / np.sqrt(min(fan_in, 256))).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.ones(leaf.shape, np.float32) if path_of(path).endswith("scale") else drawn(leaf)
        ),
        abstract_parameters(model),
    )
    export(folder, family_of(config), config, model, params)
    return folder
