"""Tiny random models of the reference library, and batches made of rows of unlike length.

Every parameter is drawn anew: no bias stays 0 and no norm weight stays 1, so that a dropped bias, a
missed (1 + w) or two swapped norms change the outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

import torch

SEED = 1234
# Gemma 2 refuses other attention, and grouped experts want widths in multiples of 16 bytes.
EAGER = dict(attn_implementation="eager", experts_implementation="eager", dtype=torch.float32)
CASES: dict[str, Callable[[], "Case"]] = {}  # name -> builder, in the order of definition
GOLDEN: dict[str, Callable[[], "Case"]] = {}  # family -> builder of its committed case


@dataclass(frozen=True)
class Size:
    """Dimensions of a tiny model; ids from `special` on are kept free of text."""

    vocab: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    ff: int
    eps: float | None  # None: the family's own default
    experts: int
    top_k: int
    vision: dict  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    patch: int  # pixels along one side of a patch
    side: int  # patches along one side of a picture of an encoder without merging
    even_side: int  # the same where tokens are merged 2 x 2
    rows: tuple[str, ...] = ("...I......", "..I.I...", ".......")
    lengths: tuple[int, ...] = (12, 9, 5)

    @property
    def special(self) -> int:
        return self.vocab - 16

    @property
    def image_id(self) -> int:
        return self.special

    @property
    def vision_eps(self) -> dict:
        return {} if self.eps is None else dict(layer_norm_eps=self.eps)

    @property
    def rms_eps(self) -> dict:
        return {} if self.eps is None else dict(rms_norm_eps=self.eps)

    def text(self, **changes) -> dict:
        """Arguments that nearly every config of a decoder takes."""
        base = dict(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.ff,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return base | self.rms_eps | changes

    def with_(self, **changes) -> "Size":
        return replace(self, **changes)


def _vision(hidden, ff, layers, heads):
    return dict(
        hidden_size=hidden,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )


BASE = Size(160, 64, 4, 2, 24, 3, 96, None, 8, 2, _vision(48, 80, 3, 4), 8, side=4, even_side=4)
# Nothing is a multiple of what it could be mistaken for, and epsilon is large enough to be seen.
ODD = Size(97, 48, 6, 3, 12, 4, 70, 3e-3, 5, 3, _vision(36, 50, 4, 3), 6, side=5, even_side=6)
# What is committed.
SMALL = Size(64, 24, 4, 2, 10, 2, 36, 1e-3, 4, 2, _vision(16, 28, 2, 2), 4, side=3, even_side=4)


@dataclass
class Row:
    """One prompt: token ids, its pictures in reading order, and where a causal suffix begins."""

    ids: list[int]
    images: list = field(default_factory=list)
    prefix: int | None = None


@dataclass
class Case:
    """A model and its inputs: `collate(rows)` for generative models, `inputs` for encoders."""

    model: torch.nn.Module
    rows: list[Row] = field(default_factory=list)
    collate: Callable[[list[Row]], dict] | None = None
    inputs: dict | None = None
    extras: Callable[[dict], dict] = lambda inputs: {}
    bfloat16: bool = False  # weights rounded to bfloat16 and stored so
    shard_size: str | None = None  # several files and an index
    original_format: bool = True  # False: names as in memory, not as published
    version_4: bool = False  # config.json as version 4 of the library wrote it


def case(name: str):
    """Register a builder of a live case under `name` ("family" or "family__variant")."""

    def register(builder):
        CASES[name] = builder
        return builder

    return register


def family(builder):
    """Register `builder(size)` three times: base size, odd size, and the committed golden case."""
    name = builder.__name__
    CASES[name] = lambda: builder(BASE)
    CASES[f"{name}__odd"] = lambda: builder(ODD)
    GOLDEN[name] = lambda: builder(SMALL)
    return builder


def redraw(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter new random values of a sensible scale."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim <= 1:
                if torch.all(weight == 1):
                    weight.copy_(1 + 0.2 * noise)
                elif name.endswith("bias"):
                    weight.copy_(0.1 * noise)
                elif torch.all(weight == 0):
                    weight.copy_(0.2 * noise)  # a norm that multiplies by 1 + w
                else:
                    weight.copy_(0.3 * noise)
            elif "mm_input_projection_weight" in name:  # the one matrix stored as (in, out)
                weight.copy_(noise / weight.shape[0] ** 0.5)
            else:
                # Four and five axes are convolutions: all but the first are summed over.
                fan_in = prod(weight.shape[1:]) if weight.ndim > 3 else weight.shape[-1]
                weight.copy_(noise / fan_in**0.5)
    return model


def build(model_class, config) -> torch.nn.Module:
    """A float32 model with eager attention and random weights."""
    torch.manual_seed(SEED)
    model = model_class._from_config(config, **EAGER)
    return redraw(model.eval().float())


def noise(*shape: int, seed: int = SEED) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


def write_rows(size: Size, patterns=None, picture=None, low: int = 4) -> list[Row]:
    """Rows of random text in which "I" is a picture and "|" the beginning of a causal suffix.

    `picture(index)` gives (ids of its tokens, what the collate function needs of it).
    """
    generator = torch.Generator().manual_seed(SEED)
    rows, count = [], 0
    for pattern in patterns or size.rows:
        row = Row([])
        for letter in pattern:
            if letter == "I":
                ids, payload = picture(count)
                count += 1
                row.ids += ids
                row.images.append(payload)
            elif letter == "|":
                row.prefix = len(row.ids)
            else:
                row.ids += torch.randint(low, size.special, (1,), generator=generator).tolist()
        rows.append(row)
    return rows


def right_pad(values: list[list[int]], dtype=torch.long) -> torch.Tensor:
    length = max(map(len, values))
    return torch.tensor([row + [0] * (length - len(row)) for row in values], dtype=dtype)


def collate_text(rows: list[Row]) -> dict:
    return dict(
        input_ids=right_pad([row.ids for row in rows]),
        attention_mask=right_pad([[1] * len(row.ids) for row in rows]),
    )


def all_images(rows: list[Row]) -> list:
    return [image for row in rows for image in row.images]


def causal(model_class, config, size: Size, lengths=None, **storage) -> Case:
    """A text decoder with rows of `lengths` random tokens."""
    rows = write_rows(size, ["." * length for length in lengths or size.lengths])
    return Case(build(model_class, config), rows, collate_text, **storage)
