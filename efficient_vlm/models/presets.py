"""Published models as configurations of ours: their geometry, no weights.

A preset fixes what decides tokens, FLOPs and bytes: patches, widths, layers, heads (with grouped
keys), feed-forward widths, experts, vocabulary, and how a picture becomes images. Ours differ from
the originals in what costs next to nothing: no biases, RMSNorm instead of LayerNorm, GELU for each
of its variants. Where more than that differs, `notes` of the preset says so.

Sizes: transformers 5.23 and allenai/molmo configurations and their parameter counts.
`tests/models/test_presets.py` lists what ours leave out, part by part: with that the counts are
equal.
"""

import copy
from collections.abc import Mapping
from typing import Any

from efficient_vlm.errors import unknown

# Prompt with its template, about; papers count 30 (M3) to 64 tokens. The same for every preset.
TEXT_TOKENS = 64

# 23 of the 24 layers of CLIP ViT-L/14-336: LLaVA and Molmo take features in front of the last.
_CLIP = dict(
    image_size=336,
    patch_size=14,
    width=1024,
    depth=23,
    num_heads=16,
    mlp_dim=4096,
    position="learned",
    class_token=True,
)
_SIGLIP = dict(
    patch_size=14, width=1152, depth=27, num_heads=16, mlp_dim=4304, position="learned"
)  # so400m


def _decoder(width: int, layers: int, **fields: Any) -> dict[str, Any]:
    causal = dict(bidirectional_visual=False)
    return {"width": width, "segments": [{"layers": layers}], **causal, **fields}


def _llava(width: int, layers: int, heads: int, mlp_dim: int) -> dict[str, Any]:
    return dict(
        model=dict(
            vocab_size=32_064,
            encoder=_CLIP,
            compressor=dict(name="none", budget=576),
            connector=dict(hidden_dim=width),
            decoder=_decoder(width, layers, num_heads=heads, mlp_dim=mlp_dim),
        ),
        picture="any, resized to 336 x 336",
        source="arXiv 2310.03744",
    )


def _paligemma(size: int) -> dict[str, Any]:
    return dict(
        model=dict(
            vocab_size=257_216,
            encoder={**_SIGLIP, "image_size": size},
            compressor=dict(name="none", budget=(size // 14) ** 2),
            connector={},
            decoder=_decoder(
                2048,
                18,
                num_heads=8,
                num_kv_heads=1,
                head_dim=256,
                mlp_dim=16_384,
                tie_embeddings=True,
                bidirectional_visual=True,  # A prefix-LM.
            ),
        ),
        picture=f"any, resized to {size} x {size}",
        source="arXiv 2407.07726",
    )


def _molmo(hidden_dim: int, vocab_size: int, decoder: dict[str, Any]) -> dict[str, Any]:
    pool = dict(num_heads=16, head_dim=64, hidden_dim=hidden_dim, features=decoder["width"])
    return dict(
        model=dict(
            vocab_size=vocab_size,
            encoder=_CLIP,
            compressor=dict(name="molmo_pool", budget=144, **pool),
            connector=dict(identity=True),
            decoder=decoder,
        ),
        images=2,
        picture="336 x 336: one crop and the whole picture",
        source="arXiv 2409.17146",
        notes=(
            "the pooling reads one encoder layer of width 1024, the original two side by side",
            "crops of larger pictures overlap and share tokens; here each of --images has all 144",
            "the 28 tokens that mark rows and crops are text here: add them with --text",
        ),
    )


_PRESETS: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava(4096, 32, 32, 11_008),
    "llava-1.5-13b": _llava(5120, 40, 40, 13_824),
    "smolvlm-256m": dict(
        model=dict(
            vocab_size=49_280,
            encoder=dict(
                image_size=512,
                patch_size=16,
                width=768,
                depth=12,
                num_heads=12,
                mlp_dim=3072,
                position="learned",
            ),
            compressor=dict(name="pixel_shuffle", budget=64, features=576),
            connector=dict(identity=True),
            decoder=_decoder(576, 30, num_heads=9, num_kv_heads=3, mlp_dim=1536),
        ),
        images=13,
        picture="768 x 1024: 3 x 4 tiles of 512 and the whole picture",
        source="arXiv 2504.05299",
    ),
    "paligemma-3b-224": _paligemma(224),
    "paligemma-3b-448": _paligemma(448),
    "paligemma-3b-896": _paligemma(896),
    "qwen2-vl-2b": dict(
        model=dict(
            vocab_size=151_936,
            encoder=dict(
                image_size=(756, 1036),
                patch_size=14,
                width=1280,
                depth=32,
                num_heads=16,
                mlp_dim=5120,
            ),
            # The merger: 2 x 2 neighbours side by side, 5120 -> 5120 -> decoder.
            compressor=dict(name="pixel_shuffle", budget=999, features=5120),
            connector={},
            decoder=_decoder(
                1536, 28, num_heads=12, num_kv_heads=2, mlp_dim=8960, tie_embeddings=True
            ),
        ),
        picture="768 x 1024, resized to 756 x 1036",
        source="arXiv 2409.12191",
        notes=(
            "the patch embedding sees each picture once, the original twice (as two frames)",
            "position tables stand for the axial rotary positions",
        ),
    ),
    "molmo-7b-d": _molmo(
        18_944,
        152_064,
        _decoder(3584, 28, num_heads=28, num_kv_heads=4, mlp_dim=18_944),
    ),
    "molmoe-1b": _molmo(
        1024,
        50_304,
        _decoder(
            2048,
            16,
            num_heads=16,
            qk_norm=True,
            moe=dict(num_experts=64, top_k=8, expert_dim=1024, normalize=False),
        ),
    ),
}


def names() -> tuple[str, ...]:
    """The presets that `get` knows."""
    return tuple(_PRESETS)


def get(name: str) -> dict[str, Any]:
    """One preset, a copy to change at will.

    Args:
      name: one of `names()`.

    Returns:
      model: fields of `VisionLanguageModel`, half precision; its `compressor` is the model's own
        projector (Molmo's pooling, SmolVLM's and Qwen's space-to-depth), "none" where it has none.
      text_tokens: of a prompt.
      images: tiles, crops and thumbnails that one picture becomes.
      picture: the picture that this is for, in words.
      notes: what differs from the original beside biases and norms.
      source: the paper.

    Raises:
      UserError: no such preset, with the nearest name.
    """
    if not isinstance(name, str) or name not in _PRESETS:
        raise unknown("--preset", str(name), _PRESETS)
    preset: Mapping[str, Any] = copy.deepcopy(_PRESETS[name])
    filled = {"text_tokens": TEXT_TOKENS, "images": 1, "notes": (), **preset}
    return {**filled, "model": {**filled["model"], "dtype": "bfloat16"}}
