"""Reading the settings of picture processors: `preprocessor_config.json`, `processor_config.json`.

A setting is read by its keys, as the published processors do, or refused: nothing is guessed.
"""

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from efficient_vlm import checks
from efficient_vlm.errors import UserError
from efficient_vlm.processing.pictures.base import Triple

# Settings come from untrusted files; no released processor has an edge near this limit.
MAX_EDGE = 16384
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop")
# Sets of keys of a size.
_KEYS = (
    {"height", "width"},
    {"shortest_edge"},
    {"longest_edge"},
    {"shortest_edge", "longest_edge"},
)


def image_settings(preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The image settings of a `preprocessor_config.json` or a `processor_config.json`.

    A null counts as absent, but switches a step of `_STEPS` off, as in transformers 5.24.
    `do_convert_rgb` is not read: every picture is RGB here.

    Raises:
      UserError: not a mapping, another pixel scale than 1/255, resizing switched off, or padding to
        a fixed size.
    """
    if not isinstance(preprocessor, Mapping):
        raise UserError(f"preprocessor: got {type(preprocessor).__name__}", allowed="a mapping")
    nested = preprocessor.get("image_processor")
    settings = nested if isinstance(nested, Mapping) else preprocessor
    settings = {n: value for n, value in settings.items() if value is not None or n in _STEPS}
    factor = settings.get("rescale_factor")
    usual = factor is None or (isinstance(factor, float) and abs(factor * 255 - 1) < 1e-6)
    if not usual or not settings.get("do_rescale", True):
        raise UserError(
            f"preprocessor: rescale_factor {factor!r:.40}, do_rescale "
            f"{settings.get('do_rescale')!r:.40}",
            allowed="pixels scaled by 1/255",
        )
    if not settings.get("do_resize", True):
        raise UserError(
            f"preprocessor: do_resize {settings['do_resize']!r:.40}",
            allowed="True: encoders have fixed sizes",
        )
    if "pad_size" in settings:
        raise UserError(
            f"preprocessor: pad_size {settings['pad_size']!r:.60}", allowed="none: not supported"
        )
    return settings


def resample_of(settings: Mapping[str, Any], default: int) -> int:
    """The Pillow filter code under "resample".

    Raises:
      UserError: a code that is not one of Pillow's.
    """
    code = settings.get("resample", default)
    if isinstance(code, bool) or not isinstance(code, int) or code not in list(Image.Resampling):
        raise UserError(
            f"preprocessor: resample {code!r:.60}",
            allowed=", ".join(f"{filter.value} ({filter.name})" for filter in Image.Resampling),
        )
    return int(code)


def mean_std(settings: Mapping[str, Any], mean: Triple, std: Triple) -> tuple[Triple, Triple]:
    """`image_mean` and `image_std`, or the family's; (0, 1) when normalisation is switched off.

    Raises:
      UserError: not three finite numbers each, or a standard deviation of zero or below.
    """
    if not settings.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean = _triple("image_mean", settings.get("image_mean", mean))
    std = _triple("image_std", settings.get("image_std", std))
    if min(std) <= 0:
        raise UserError(f"preprocessor: image_std {std}", allowed="numbers above 0")
    return mean, std


def _triple(field: str, value: Any) -> Triple:
    if type(value) in (int, float):
        value = [value] * 3
    if (
        not isinstance(value, list | tuple)
        or len(value) != 3
        or not all(type(x) in (int, float) and math.isfinite(x) for x in value)
    ):
        raise UserError(f"preprocessor: {field} {value!r:.60}", allowed="three numbers")
    return tuple(float(x) for x in value)


def whole(field: str, value: Any, low: int = 1, high: int = MAX_EDGE) -> int:
    """A whole number of a settings file.

    Raises:
      UserError: not an integer, or outside low..high.
    """
    return checks.whole(f"config: {field}", value, low, high)


def lengths(field: str, value: Any, *, square: bool = True) -> dict[str, int]:
    """A size by its keys, as transformers' processors write them.

    Args:
      field: name of the setting, for errors.
      value: a mapping with one of the sets of keys of `_KEYS`; [height, width]; or an integer.
      square: what an integer means: height and width, or else the shortest edge (the processor's
        `default_to_square`).

    Returns:
      One of those sets of keys, with whole numbers.

    Raises:
      UserError: any other value.
    """
    if isinstance(value, list | tuple) and len(value) == 2:
        value = dict(zip(("height", "width"), value, strict=True))
    elif not isinstance(value, Mapping):
        whole(field, value)
        value = dict.fromkeys(("height", "width") if square else ("shortest_edge",), value)
    found = {name: length for name, length in value.items() if length is not None}
    if set(found) not in _KEYS:
        raise UserError(
            f"config: {field} {dict(value)!r:.80}",
            allowed="; ".join(" and ".join(sorted(keys)) for keys in _KEYS),
        )
    return {name: whole(f"{field}.{name}", length) for name, length in found.items()}


def edge(field: str, value: Any, *, square: bool = True) -> int:
    """The edge of the square that pictures are stretched to; arguments as of `lengths`.

    Raises:
      UserError: no square, or a size that keeps the aspect ratio.
    """
    found = lengths(field, value, square=square)
    if len({*found.values()}) != 1 or set(found) != {"height", "width"}:
        raise UserError(
            f"config: {field} {found}",
            allowed="equal height and width: pictures are stretched to a square",
        )
    return found["height"]


def refuse_crop(settings: Mapping[str, Any], size: int) -> None:
    """Raises UserError for a centre crop that would cut something off, or surround, this square."""
    if settings.get("do_center_crop") and edge("crop_size", settings.get("crop_size", 0)) != size:
        raise UserError(
            f"preprocessor: crop_size {settings.get('crop_size')!r:.60}, do_center_crop True",
            allowed=f"no centre crop, or one of {size} pixels",
        )


def config_setting(config: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number (or edge) of a `config.json`, or the default.

    Args:
      config: content of the file.
      name: its key; "vision_config.patch_size" is a key of the nested mapping.
      default: for an absent or null value.

    Raises:
      UserError: not a whole number of 1 or more.
    """
    value: Any = config
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return default if value is None else edge(name, value)  # InternVL writes [448, 448].


def patches_along(size: int, patch: int, *, multiple: int = 1) -> int:
    """Whole patches of `patch` pixels along an edge of `size` pixels.

    Args:
      size: edge of what the encoder sees, in pixels.
      patch: edge of a patch in pixels.
      multiple: edge of a visual token in patches; the result must be a multiple of it.

    Raises:
      UserError: no whole patch, or no whole visual tokens.
    """
    patches = size // patch
    if patches == 0 or patches % multiple:
        raise UserError(
            f"config: {patches} patches of {patch} pixels along {size} pixels",
            allowed=f"a multiple of {multiple} patches, at least one",
            fix="use the preprocessor and model configuration of the same checkpoint",
        )
    return patches


def stretched(
    family: Any,
    preprocessor: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    square: bool = False,
) -> dict[str, Any]:
    """Fields of a family that stretches the whole picture to one square.

    Args:
      family: the class of its pictures, with the defaults of size, patch, resample, mean and std.
      preprocessor, config: contents of `preprocessor_config.json` and `config.json`.
      square: what an integer size means, see `lengths`: where it is the shortest edge, the picture
        would keep its aspect ratio, which is refused, as is a centre crop, which only such
        processors have.

    Raises:
      UserError: a setting out of range.
    """
    settings = image_settings(preprocessor)
    mean, std = mean_std(settings, family.mean, family.std)
    default = config_setting(config, "vision_config.image_size", family.size)
    size = edge("size", settings.get("size", dict(height=default, width=default)), square=square)
    if not square:
        refuse_crop(settings, size)
    patch = config_setting(config, "vision_config.patch_size", family.patch)
    patches_along(size, patch)
    resample = resample_of(settings, family.resample)
    return dict(size=size, patch=patch, resample=resample, mean=mean, std=std)
