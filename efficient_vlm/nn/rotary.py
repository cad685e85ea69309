"""Rotary positions: frequencies and their published scalings, one axis or several."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Real

from efficient_vlm import checks
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.shapes import Array

_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_length"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_length"),
    "yarn": ("factor", "original_length"),
    "longrope": ("short_factor", "long_factor", "original_length", "attention_factor"),
}
_FIELDS = ("theta", "fraction", "scaling", "sections", "interleaved")


def rotate(
    x: Float[Array, "B S H Dh"],
    positions: Real[Array, "B S *axes"],
    spec: Mapping[str, Any],
    other: Mapping[str, Any] | None = None,
    use_other: Any = False,
) -> Float[Array, "B S H Dh"]:
    """Rotary position embedding (arXiv 2104.09864) of the two halves of Dh, as in Llama.

    Args:
      x: [B, S, H, Dh].
      positions: int or float [B, S] (merged tokens have fractional positions), or [B, S, A] with
        one position per axis (`sections`); with sections, [B, S] gives all axes the same position,
        as text has it.
      spec: theta; fraction (1.0), the fraction of Dh that is rotated; scaling (None), see
        `frequencies`; sections (None), the number of frequencies of each axis (M-RoPE, arXiv
        2409.12191, section 2.1): in chunks, or `interleaved` (time, height, width, time, ... with
        time at the end).
      other: a second spec, for layers of another type.
      use_other: bool, static or traced; whether to use `other`.
    """
    rotated = int(x.shape[-1] * spec.get("fraction", 1.0)) // 2 * 2
    if rotated == 0:
        return x
    frequency, factor = frequencies(rotated, positions, spec)
    if other is not None:
        one, by = frequencies(rotated, positions, other)
        frequency = jnp.where(use_other, one, frequency)
        factor = jnp.where(use_other, by, factor)
    positions = positions.astype(jnp.float32)
    if positions.ndim == 3:
        axes = _axis_of_frequency(tuple(spec["sections"]), spec.get("interleaved", False))
        positions = positions[..., axes][:, :, None]
    else:
        positions = positions[..., None, None]
    angle = positions * frequency
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    if other is not None or not (isinstance(factor, float) and factor == 1.0):
        sin, cos = sin * factor, cos * factor
    first, second, rest = jnp.split(x.astype(jnp.float32), [rotated // 2, rotated], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _axis_of_frequency(sections: tuple[int, ...], interleaved: bool) -> np.ndarray:
    """The axis of each frequency."""
    if not interleaved:
        return np.repeat(np.arange(len(sections)), sections)
    axes = np.zeros(sum(sections), np.int64)
    for axis in range(1, len(sections)):
        axes[axis : sections[axis] * len(sections) : len(sections)] = axis
    return axes


def frequencies(
    dim: int, positions: Real[Array, "B S *axes"], spec: Mapping[str, Any]
) -> tuple[Float[Array, " F"], float | Float[Array, ""]]:
    """Frequencies [dim / 2] and the factor of sine and cosine.

    `spec["scaling"]` is None or {"type": ...} with
      linear: factor (arXiv 2306.15595);
      dynamic: factor, original_length; theta grows once positions exceed the original length;
      llama3: factor, low_freq_factor, high_freq_factor, original_length (arXiv 2407.21783);
      yarn: factor, original_length, beta_fast (32), beta_slow (1), truncate (True),
        attention_factor or mscale and mscale_all_dim (arXiv 2309.00071);
      longrope: short_factor, long_factor (one number per frequency), original_length and
        attention_factor (arXiv 2402.13753).
    """
    theta, scaling = spec["theta"], spec.get("scaling")
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    plain = theta**-exponent
    if scaling is None:
        return plain, 1.0
    kind, factor = scaling["type"], scaling.get("factor", 1.0)
    original = scaling.get("original_length")
    if kind == "linear":
        return plain / factor, 1.0
    if kind == "dynamic":
        length = jnp.maximum(jnp.max(positions) + 1.0, original)
        base = theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
        return base**-exponent, 1.0
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = original * plain / (2 * math.pi)
        smooth = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return plain * (smooth + (1 - smooth) / factor), 1.0
    if kind == "yarn":
        return _yarn(dim, theta, scaling, plain)
    short, long = (
        jnp.asarray(scaling[f"{name}_factor"], jnp.float32) for name in ("short", "long")
    )
    stretch = jnp.where(jnp.max(positions) + 1 > original, long, short)
    return plain / stretch, scaling["attention_factor"]


def _yarn(dim: int, theta: float, scaling: Mapping[str, Any], plain: jax.Array):
    factor, original = scaling["factor"], scaling["original_length"]

    def frequency_with(turns: float) -> float:
        """The index of the frequency with `turns` rotations within the original length."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = frequency_with(scaling.get("beta_fast") or 32)
    high = frequency_with(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (jnp.arange(dim // 2, dtype=jnp.float32) - low) / max(high - low, 1e-3)
    stretched = jnp.clip(ramp, 0.0, 1.0)
    attention = scaling.get("attention_factor")
    if attention is None:

        def correction(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

        mscale, every = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = correction(mscale) / correction(every) if mscale and every else correction(1.0)
    return plain * (1 - stretched) + plain / factor * stretched, float(attention)


def check_rope(where: str, spec: Mapping[str, Any] | None, dim: int) -> None:
    """Raises UserError for a spec that does not fit heads of width `dim`."""
    if spec is None:
        return
    checks.known_fields(where, spec, _FIELDS)
    scaling = spec.get("scaling")
    if scaling is not None and scaling.get("type") not in _NEEDED:
        raise unknown(f"{where}.scaling.type", str(scaling.get("type")), _NEEDED)
    for name in () if scaling is None else _NEEDED[scaling["type"]]:
        if scaling.get(name) is None:
            raise UserError(
                f"{where}.scaling.{name}: missing", fix=f"{scaling['type']} scaling has one"
            )
    sections = spec.get("sections")
    rotated = int(dim * spec.get("fraction", 1.0)) // 2
    if sections is not None and sum(sections) != rotated:
        raise UserError(
            f"{where}.sections: {tuple(sections)} add up to {sum(sections)}",
            allowed=f"numbers that add up to {rotated}, half of what is rotated of a head",
        )


def axial(
    x: Float[Array, "B N H Dh"], position: Real[Array, "B N 2"], theta: float
) -> Float[Array, "B N H Dh"]:
    """Rotary positions in two axes, as in the encoders of Qwen2-VL (arXiv 2409.12191).

    The first half of the frequencies rotates by the row, the second by the column.

    Args:
      x: [B, N, H, Dh], Dh a multiple of 4.
      position: [B, N, 2], row and column.
      theta: base of the frequencies.
    """
    quarter = x.shape[-1] // 4
    frequency = theta ** -(jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angle = position.astype(jnp.float32)[..., None] * frequency
    angle = angle.reshape(*position.shape[:-1], 1, 2 * quarter)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
