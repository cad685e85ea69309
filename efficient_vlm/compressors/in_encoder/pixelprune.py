"""pixelprune: units whose pixels repeat their neighbours never enter the encoder."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from efficient_vlm import checks
from efficient_vlm.compressors import grids, select
from efficient_vlm.compressors.base import Stage, as_tuple
from efficient_vlm.compressors.in_encoder.unit_cut import UnitCut
from efficient_vlm.compressors.units import Units, units_of_grid
from efficient_vlm.errors import UserError
from efficient_vlm.shapes import Array

# In place of patches that are padding, or that a unit at the border lacks: far from every pixel.
_ABSENT = 1e9
# The difference of the first unit, which nothing predicts.
_UNKNOWN = 1e30


class PixelPrune(UnitCut):
    """`pixelprune`: predictive coding in pixels (arXiv 2604.00886, section 3).

    Units are visited in raster order. With A the unit to the left, B the one above and C the one
    above A, the prediction of X is B if C is like A and not like B, else A (the rule of JPEG-LS);
    of the first row A, of the first column B. X and Y are alike if no normalised pixel differs by
    more than `tau`. A unit stays if it is not like its prediction; the first one stays. With tau
    above 0 predictions read what a decoder would have: the prediction in place of a unit that left,
    so that errors do not add up.

    The number of units that stay depends on the picture, so a static `budget` gives them room; a
    picture that has fewer is padded. Without a budget each request gets the smallest room of
    `rooms` that holds all of them (`room_for`), and inputs whose number nobody counts, such as
    those of an own jitted function, room for every unit. Where a budget is too small for a request,
    that is an error; under `jit`, where nothing can be raised, the units that differ most from
    their predictions stay.

    Attributes:
      budget: room for units; None for the smallest that is enough.
      tau: largest difference of alike pixels, in normalised units: 0 (default) drops exact
        repetitions only.
      rooms: shares of all units, the sizes that programs are compiled for; fewer mean fewer
        compilations, and more padding.
    """

    tau: float = 0.0
    rooms: tuple[float, ...] = tuple(sixteenths / 16 for sixteenths in range(1, 16))

    label = "pixelprune"
    needs = frozenset({"pixels"})
    keeps_all = False

    def __post_init__(self):
        object.__setattr__(self, "rooms", as_tuple("compressor.rooms", self.rooms))
        super().__post_init__()

    @nn.nowrap
    def check_options(self):
        checks.number("compressor.tau", self.tau, 0)
        for room in self.rooms:
            if not 0 < room < 1:
                raise UserError(
                    f"compressor.rooms: {room}", allowed="shares of all units between 0 and 1"
                )

    @nn.nowrap
    def stages(self, num_layers, num_tokens, *, class_token=False, patches=None, side=1):
        patches = patches or grids.resolve(self.grid, num_tokens)
        units = len(units_of_grid(patches, side).places)
        if self.budget is not None and self.budget > units:
            raise UserError(
                f"compressor.budget: room for {self.budget} of {units} units",
                allowed=f"1 to {units}, the tokens that a picture has without a cut",
            )
        step = dict(side=side, patches=tuple(patches), budget=(self.budget or units) * side**2)
        return (Stage(0, self.clone(parent=None, **step)),)

    @nn.nowrap
    def room_for(self, pixels: np.ndarray, valid: np.ndarray | None, side: int) -> int:
        """The budget for these pictures.

        Args:
          pixels: float32 [B, h, w, C], normalised pixels of each patch.
          valid: int32 [B, 2], rows and columns of real patches; None for all.
          side: of a unit.

        Raises:
          UserError: a budget of the config that is too small.
        """
        rows, columns = pixels.shape[1:3]
        units = units_of_grid((rows, columns), side)
        cells = -(-rows // side), -(-columns // side)
        flat = pixels.reshape(len(pixels), rows * columns, -1)
        mask = np.ones(flat.shape[:2], bool)
        if valid is not None:
            inside = (np.arange(rows) < valid[:, :1])[..., None]
            mask = (inside & (np.arange(columns) < valid[:, 1:])[:, None]).reshape(mask.shape)
        real = units.real(mask)
        stays = np.asarray(self._stays(flat, units, cells, real)[0] & real.any(axis=2))
        most = int(stays.sum(axis=1).max(initial=1))
        total = cells[0] * cells[1]
        if self.budget is None:
            rooms = sorted(math.ceil(share * total) for share in self.rooms)
            return next((room for room in rooms if room >= most), total)
        if most > self.budget:
            raise UserError(
                f"compressor.budget: room for {self.budget} units, but a picture keeps {most}",
                allowed=f"{most} to {total}, or None for as many as each request needs",
                fix=f"compressor.budget={most}",
            )
        return self.budget

    @property
    def leaves_padding(self) -> bool:
        """True: pictures leave room."""
        return True

    @nn.nowrap
    def choose(self, seen, kept):
        grid = self.patches or grids.resolve(self.grid, seen.tokens.mask.shape[1])
        cells = tuple(-(-length // self.side) for length in grid)
        real = seen.units.real(seen.tokens.mask)
        stays, difference = self._stays(seen.signals.pixels, seen.units, cells, real)
        return select.top_k(difference, stays & seen.live, kept)

    @nn.nowrap
    def _stays(
        self,
        pixels: Float[Array, "B N C"],
        units: Units,
        cells: grids.Grid,
        real: Bool[Array, "B U P"],
    ) -> tuple[Bool[Array, "B U"], Float[Array, "B U"]]:
        """Which units stay, and how far each is from its prediction."""
        x = units.gather(jnp.asarray(pixels, jnp.float32))
        x = jnp.where(real[..., None], x, _ABSENT).reshape(len(x), *cells, -1)
        return _coded(x, float(self.tau))

    @nn.nowrap
    def alone(self, num_tokens):
        return dict(budget=num_tokens)


def _coded(x: jax.Array, tau: float) -> tuple[jax.Array, jax.Array]:
    """See `PixelPrune._stays`; x [B, rows, columns, F]."""
    cells = x.shape[1:3]

    def apart(a, b):
        return jnp.abs(a - b).max(axis=-1)

    if tau == 0:  # Predictions are the pixels themselves: all at once.
        left, above, corner = jnp.roll(x, 1, 2), jnp.roll(x, 1, 1), jnp.roll(x, 1, (1, 2))
        takes_above = (apart(corner, left) <= 0) & (apart(corner, above) > 0)
        row, column = jnp.arange(cells[0])[:, None], jnp.arange(cells[1])
        takes_above = ((row > 0) & (column == 0)) | ((row > 0) & takes_above)
        difference = jnp.where(takes_above, apart(x, above), apart(x, left))
        difference = difference.at[:, 0, 0].set(_UNKNOWN).reshape(len(x), -1)
        return difference > 0, difference

    def step(known, item):
        """`known`: what a decoder has of the row above and of this one, [B, w + 1 + w, F]."""
        unit, number = item
        row, column = number // cells[1], number % cells[1]
        # The newest is last: the unit to the left; the one above is a row of units before.
        left, above, corner = known[:, -1], known[:, -cells[1]], known[:, -cells[1] - 1]
        takes = (apart(corner, left) <= tau) & (apart(corner, above) > tau)
        takes = jnp.where(column == 0, True, takes) & (row > 0)
        guess = jnp.where(takes[:, None], above, left)
        difference = jnp.where(number == 0, _UNKNOWN, apart(unit, guess))
        stays = difference > tau
        new = jnp.where(stays[:, None], unit, guess)
        return jnp.concatenate([known[:, 1:], new[:, None]], axis=1), (stays, difference)

    batch, size = len(x), x.shape[-1]
    start = jnp.zeros((batch, cells[1] + 1, size))
    order = x.reshape(batch, -1, size).swapaxes(0, 1)
    _, found = jax.lax.scan(step, start, (order, jnp.arange(len(order))))
    return tuple(part.swapaxes(0, 1) for part in found)
