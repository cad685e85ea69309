"""Published models as configurations of ours: their exact geometry, no weights.

A preset is an entry of `families.published` read by its family: the fields that its weights load
into, how the default picture becomes images, and the published sizes.
`tests/families/test_presets.py` counts every model's parameters against them, to the unit.
"""

from collections.abc import Mapping
from typing import Any

from efficient_vlm.errors import unknown
from efficient_vlm.families import published
from efficient_vlm.families.table import family_of
from efficient_vlm.processing.pictures.native import smart_resize

# Prompt with its template, about; papers count 30 (M3) to 64 tokens. The same for every preset.
TEXT_TOKENS = 64
# Sizes of a published model that a preset repeats.
_SIZES = ("params", "params_active", "params_vision")


def names() -> tuple[str, ...]:
    """The presets that `get` knows, sorted; `visual_names` are those with a vision encoder."""
    return published.names()


def visual_names() -> tuple[str, ...]:
    """The presets that see pictures."""
    return tuple(name for name in names() if published.get(name)["visual_tokens"] is not None)


def get(name: str) -> dict[str, Any]:
    """One preset, a copy to change at will.

    Args:
      name: one of `names()`.

    Returns:
      model: fields of `VisionLanguageModel`, half precision, with the compressor "none"; an encoder
        for pictures near their own size is set to what the default picture is resized to.
      family: of `families`.
      text_tokens: of a prompt.
      images: tiles, crops and thumbnails that one picture becomes; 0 for a language model.
      pooled: visual tokens of the picture where they read patches across crops, else None.
      picture: the picture that this is for, in words; None for a language model.
      notes: what the numbers do not say.
      source: the paper, and the weights' name on the hub.
      params, params_active, params_vision: see `published.get`.
      visual_tokens: that the default picture becomes; None for a language model.

    Raises:
      UserError: no such preset, with the nearest name.
    """
    if name not in names():
        raise unknown("--preset", str(name), names())
    entry = published.get(name)
    config, visual = entry["config"], entry["visual_tokens"] or {}
    family = family_of(config)
    fields = family.model(config)
    size = _native_size(entry)
    if size is not None:
        fields["encoder"] = {**fields["encoder"], "image_size": size}
    notes = list(entry["notes"])
    images, tokens = visual.get("images", 0), visual.get("tokens")
    # Molmo2 pools patches across its crops.
    pooled = tokens if family.name == "molmo2" else None
    if family.name == "molmo":
        notes.append(
            f"crops overlap: {tokens:,} of their tokens have a place in the prompt; all of each of "
            "--images are computed, and counted here"
        )
    if marks := visual.get("sequence", tokens or 0) - (tokens or 0):
        notes.append(f"{marks} tokens that mark rows and crops are text: add them with --text")
    return {
        "model": {**fields, "dtype": "bfloat16"},
        "family": family.name,
        "text_tokens": TEXT_TOKENS,
        "images": images,
        "pooled": pooled,
        "picture": _picture(entry, size),
        "notes": tuple(notes),
        "source": entry["source"],
        "visual_tokens": tokens,
        **{size: entry[size] for size in _SIZES},
    }


def table() -> list[dict[str, Any]]:
    """All presets, one row each, from the published table alone.

    Returns:
      Rows with name, family, the sizes of `published.get`, visual_tokens and images of the default
      picture (None for a language model), context (positions that the language model was made for)
      and source.
    """
    rows = []
    for name in names():
        entry = published.get(name)
        text = entry["config"].get("text_config") or entry["config"]
        visual = entry["visual_tokens"] or {}
        rows.append(
            {
                "name": name,
                "family": family_of(entry["config"]).name,
                **{size: entry[size] for size in _SIZES},
                "visual_tokens": visual.get("tokens"),
                "images": visual.get("images"),
                "picture": visual.get("picture"),
                "context": text.get("max_position_embeddings") or text.get("max_sequence_length"),
                "source": entry["source"],
            }
        )
    return rows


def _native_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Pixels that the default picture is resized to, for encoders without a size of their own."""
    settings = entry["image_processor"]
    if settings is None or "merge_size" not in settings:
        return None
    height, width = map(int, entry["visual_tokens"]["picture"].split(" x "))
    size = settings["size"]
    return smart_resize(
        height,
        width,
        factor=settings["patch_size"] * settings["merge_size"],
        min_pixels=size["shortest_edge"],
        max_pixels=size["longest_edge"],
    )


def _picture(entry: Mapping[str, Any], size: tuple[int, int] | None) -> str | None:
    """What the visual tokens are of."""
    visual = entry["visual_tokens"]
    if visual is None:
        return None
    resized = f", resized to {size[0]} x {size[1]}" if size else ""
    crops = f", {visual['images']} tiles or crops" if visual["images"] > 1 else ""
    return f"{visual['picture']}{resized}{crops}"
