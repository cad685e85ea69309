"""Published models as configurations of ours: their exact geometry, no weights.

A preset is an entry of `families.published` read by its family: the fields that its weights load
into, how the default picture becomes images, and the published sizes.
`tests/families/test_presets.py` counts every model's parameters against them, to the unit.
"""

from collections.abc import Mapping
from typing import Any

from efficient_vlm.errors import unknown
from efficient_vlm.families import published
from efficient_vlm.families.base import Family
from efficient_vlm.families.table import family_of

# A typical prompt with its template; papers count 30 (M3) to 64 tokens.
TEXT_TOKENS = 64
# Height and width of the picture that presets see unless another is given.
PICTURE = (768, 1024)
# Sizes of a published model that a preset repeats.
_SIZES = ("params", "params_active", "params_vision")


def names() -> tuple[str, ...]:
    """The presets that `get` knows, sorted; `visual_names` are those with a vision encoder."""
    return published.names()


def visual_names() -> tuple[str, ...]:
    """The presets with a vision encoder."""
    return tuple(name for name in names() if published.get(name)["visual_tokens"] is not None)


def get(
    name: str,
    *,
    picture: tuple[int, int] = PICTURE,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One preset, as a new copy.

    Args:
      name: one of `names()`.
      picture: height and width in pixels of the picture that it sees.
      options: of its picture processor, those of `Family.picture_options`.

    Returns:
      model: fields of `VisionLanguageModel`, half precision, with the compressor "none". An encoder
        that takes pictures near their own size has the size of the resized picture.
      family: name of the family.
      text_tokens: of a prompt.
      images: tiles, crops and thumbnails of one picture; 0 for a language model.
      pooled: visual tokens of the picture where they read patches across crops, else None.
      picture: the picture, in words; None for a language model.
      notes: remarks on the numbers.
      source: the paper, and the weights' name on the hub.
      params, params_active, params_vision: see `published.get`.
      visual_tokens: of the picture; None for a language model.

    Raises:
      UserError: no such preset or option, with the nearest name, or a picture that the model cannot
        see.
    """
    if name not in names():
        raise unknown("--preset", str(name), names())
    entry = published.get(name)
    family = family_of(entry["config"])
    fields, notes = family.model(entry["config"]), list(entry["notes"])
    seen: dict[str, Any] = dict(images=0, pooled=None, picture=None, visual_tokens=None)
    if entry["image_processor"] is not None:
        processor = _processor(family, entry, options or {})
        images, *size = processor.views(*picture)
        tokens = processor.count(*picture)
        if _has_own_size(processor):
            fields["encoder"] = {**fields["encoder"], "image_size": tuple(size)}
        seen = dict(images=images, visual_tokens=tokens, picture=_words(entry, picture, processor))
        # Molmo2 pools patches across its crops.
        seen["pooled"] = tokens if family.name == "molmo2" else None
        notes += _notes(family, processor, picture)
    return {
        "model": {**fields, "dtype": "bfloat16"},
        "family": family.name,
        "text_tokens": TEXT_TOKENS,
        **seen,
        "notes": tuple(notes),
        "source": entry["source"],
        **{size: entry[size] for size in _SIZES},
    }


def _processor(family: Family, entry: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    family.check_pictures("--pictures", options)
    return family.processor(entry["image_processor"], entry["config"], **options)


def _notes(family: Family, processor: Any, picture: tuple[int, int]) -> list[str]:
    """What the number of visual tokens does not say."""
    notes, tokens = [], processor.count(*picture)
    if family.name == "molmo":
        notes.append(
            f"crops overlap: {tokens:,} of their tokens have a place in the prompt; all of each of "
            "--images are computed, and counted here"
        )
    sequence = getattr(processor, "sequence", None)
    if marks := sequence(*picture) - tokens if sequence else 0:
        notes.append(f"{marks} tokens that mark rows and crops are text: add them with --text")
    if getattr(processor, "skip_blank", None) is not None:
        notes.append("at most: without its blank tiles (skip_blank) a picture has fewer")
    return notes


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


def _words(entry: Mapping[str, Any], picture: tuple[int, int], processor: Any) -> str:
    """The picture, in words."""
    if entry["visual_tokens"]["picture"] == "any":
        return "any"
    images, height, width = processor.views(*picture)
    parts = [f"{picture[0]} x {picture[1]}"]
    if _has_own_size(processor):
        parts.append(f"resized to {height} x {width}")
    if images > 1:
        parts.append(f"{images} tiles or crops")
    return ", ".join(parts)


def _has_own_size(processor: Any) -> bool:
    """Whether the encoder takes pictures near their own size, without a fixed one."""
    return hasattr(processor, "min_pixels")
