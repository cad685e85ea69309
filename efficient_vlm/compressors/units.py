"""Units: blocks of patches that a projector makes one token of, and that a cut keeps or drops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from efficient_vlm.compressors import grids
from efficient_vlm.compressors.projectors.gather_pool import windows
from efficient_vlm.compressors.tokens import VisualTokens
from efficient_vlm.shapes import Array


@dataclasses.dataclass(frozen=True)
class Units:
    """The units among T places of a sequence: static.

    Attributes:
      places: int32 [U, P], the P = side**2 patches of each; -1 where one at the border has none.
    """

    places: np.ndarray

    @property
    def complete(self) -> bool:
        """Whether every unit has all of its patches."""
        return bool((self.places >= 0).all())

    def gather(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [B, U, P, ...], any value where there is no patch."""
        return x[:, np.maximum(self.places, 0)]

    def real(self, mask: Bool[Array, "B T"]) -> Bool[Array, "B U P"]:
        """Which patches of each unit are there and real."""
        return self.gather(mask) & jnp.asarray(self.places >= 0)

    def mean(self, x: Float[Array, "B T C"], mask: Bool[Array, "B T"]) -> Float[Array, "B U C"]:
        """Mean over the real patches of each unit, float32; 0 where it has none."""
        real = self.real(mask)[..., None]
        total = jnp.where(real, self.gather(x).astype(jnp.float32), 0).sum(axis=2)
        return total / jnp.maximum(real.sum(axis=2), 1)


def units_of_grid(grid: grids.Grid, side: int) -> Units:
    """Blocks of side x side patches of a grid in raster order."""
    return Units(windows(grid, side))


def units_in_order(count: int, side: int) -> Units:
    """Units whose patches lie behind each other, as a cut leaves them."""
    return Units(np.arange(count * side**2, dtype=np.int32).reshape(count, side**2))


def kept_units(
    tokens: VisualTokens, cells: grids.Grid, patches: grids.Grid, side: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is left of a picture, as tokens of the projector's grid without their embeddings.

    Args:
      tokens: of the last cut: unit behind unit, over the grid `patches`.
      cells: rows and columns of units.
      patches: of the picture.
      side: of a unit.

    Returns:
      position [B, K, 2] in units, mask [B, K] and source [B, U].
    """
    first = units_of_grid(patches, side).places[:, 0]
    source = tokens.source[:, first]
    source = jnp.where(source >= 0, source // side**2, -1)
    mask = tokens.mask.reshape(len(tokens.mask), -1, side**2).any(axis=2)
    places = np.stack(np.meshgrid(*map(np.arange, cells), indexing="ij"), axis=-1).reshape(-1, 2)
    holds = jax.nn.one_hot(source, mask.shape[1], dtype=jnp.float32)
    # The mean of what was merged.
    position = (holds[..., None] * places.astype(np.float32)[:, None]).sum(axis=1)
    position = position / jnp.maximum(holds.sum(axis=1), 1)[..., None]
    return position, mask, source
