"""The vision encoder: one configurable vision transformer (arXiv 2010.11929)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.errors import UserError, unknown
from efficient_vlm.models.layers import Attention, Dtype, Linear, RMSNorm, logical, scan_layers

POSITIONS = ("factorised", "learned")
INTERMEDIATES = ("features", "keys", "attention_row")


class EncoderBlock(nn.Module):
    """Pre-norm attention and GELU MLP, bidirectional."""

    num_heads: int
    mlp_dim: int
    qk_norm: bool
    qk_scale: float
    dtype: Dtype
    wanted: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None):
        width = x.shape[-1]
        norm = functools.partial(RMSNorm, dtype=self.dtype)
        y, inner = Attention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=width // self.num_heads,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            out_scale=0.5,
            dtype=self.dtype,
            name="attention",
        )(norm(name="attention_norm")(x), mask=mask)
        x = x + y
        y = Linear(("embed",), (self.mlp_dim,), ("mlp",), dtype=self.dtype, name="up")(
            norm(name="mlp_norm")(x)
        )
        y = nn.with_logical_constraint(nn.gelu(y), ("batch", None, "mlp"))
        y = Linear(("mlp",), (width,), ("embed",), scale=0.5, dtype=self.dtype, name="down")(y)
        x = x + y

        wanted = {}
        if "features" in self.wanted:
            wanted["features"] = x
        if "keys" in self.wanted:
            wanted["keys"] = inner["key"].mean(axis=2)
        if "attention_row" in self.wanted:
            # One row beside the attention, never a matrix: what the mean query looks at.
            q = inner["query"].mean(axis=1).astype(jnp.float32)
            logits = jnp.einsum("bhd,bkhd->bhk", q, inner["key"].astype(jnp.float32))
            logits *= self.qk_scale * (width // self.num_heads) ** -0.5
            wanted["attention_row"] = jax.nn.softmax(logits, axis=-1).mean(axis=1)
        return x, wanted


class ViT(nn.Module):
    """Images to patch features.

    Attributes:
      image_size: pixels, one side or (height, width), multiples of `patch_size`. The position
        tables have this size; another size at call time interpolates them.
      patch_size: pixels.
      stem_dim: hidden width of a two-layer patch embedding (GELU between); None for one product.
      pixel_mean, pixel_std: images in [0, 1] are shifted and scaled by these (one number, or one
        per channel), so that content is not small beside the position embedding.
      position: "factorised" (a row table plus a column table) or "learned" (a table of the grid).
      position_scale: standard deviation of the initial position tables.
      qk_norm, qk_scale: see `layers.Attention`.
      remat, scan_unroll: see `layers.scan_layers`.
    """

    image_size: int | Sequence[int]
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    stem_dim: int | None = None
    pixel_mean: float | Sequence[float] = 0.5
    pixel_std: float | Sequence[float] = 0.5
    position: str = "factorised"
    position_scale: float = 0.5
    qk_norm: bool = False
    qk_scale: float = 1.0
    remat: str = "none"
    scan_unroll: int = 1
    dtype: Dtype = jnp.float32

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row of an image of `image_size`."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        if height % self.patch_size or width % self.patch_size:
            raise UserError(
                f"model.encoder.image_size: {size} is not a multiple of the patch size",
                allowed=f"multiples of model.encoder.patch_size={self.patch_size}",
            )
        return height // self.patch_size, width // self.patch_size

    @nn.compact
    def __call__(
        self, images: jax.Array, *, intermediates: Sequence[str] = ()
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encodes images.

        Args:
          images: uint8 [B, H, W, 3], or float in [0, 1].
          intermediates: "name/layer" with name one of features, keys, attention_row; a negative
            layer counts from the last.

        Returns:
          features [B, h*w, width] after the final norm, and the intermediates by the name asked
          for: features [B, N, width]; keys, mean over heads, [B, N, width/heads]; attention_row,
          attention of the mean query to each patch, mean over heads, [B, N].
        """
        wanted = [self._parse_intermediate(name) for name in intermediates]
        x = self._patches(images)
        x = x + self._positions(images.shape[1:3])
        block = scan_layers(
            EncoderBlock,
            self.depth,
            (nn.broadcast,),
            remat=self.remat,
            unroll=self.scan_unroll,
        )
        x, stacked = block(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            dtype=self.dtype,
            wanted=tuple(sorted({name for name, _ in wanted})),
            name="layers",
        )(x, None)
        x = RMSNorm(dtype=self.dtype, name="norm")(x)
        found = {
            asked: stacked[name][layer]
            for asked, (name, layer) in zip(intermediates, wanted, strict=True)
        }
        return x, found

    def _parse_intermediate(self, asked: str) -> tuple[str, int]:
        name, _, layer = asked.partition("/")
        if name not in INTERMEDIATES:
            raise unknown("encoder intermediate", name, INTERMEDIATES)
        if not layer.lstrip("-").isdigit() or not -self.depth <= int(layer) < self.depth:
            raise UserError(
                f"encoder intermediate {asked!r}: no such layer",
                allowed=f"{name}/LAYER with LAYER from {-self.depth} to {self.depth - 1}",
            )
        return name, int(layer)

    def _patches(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        p = self.patch_size
        if jnp.issubdtype(images.dtype, jnp.integer):
            images = images.astype(jnp.float32) / 255
        images = (images - jnp.asarray(self.pixel_mean)) / jnp.asarray(self.pixel_std)
        x = images.astype(self.dtype).reshape(batch, height // p, p, width // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)
        if self.stem_dim is not None:
            x = Linear(("patch",), (self.stem_dim,), ("mlp",), dtype=self.dtype, name="stem")(x)
            x = nn.gelu(x)
        axis = "patch" if self.stem_dim is None else "mlp"
        return Linear((axis,), (self.width,), ("embed",), dtype=self.dtype, name="embed")(x)

    def _positions(self, pixels: tuple[int, int]) -> jax.Array:
        """[h*w, width] for an image of `pixels`; tables are resampled to its grid."""
        rows, columns = self.grid
        h, w = pixels[0] // self.patch_size, pixels[1] // self.patch_size
        init = nn.initializers.normal(self.position_scale)

        def table(name: str, *axes: tuple[str, int]):
            names, sizes = zip(*axes, strict=True)
            return self.param(name, logical(init, *names, "embed"), (*sizes, self.width))

        if self.position == "factorised":
            row = _resample(table("row_position", ("rows", rows)), 0, h)
            column = _resample(table("column_position", ("columns", columns)), 0, w)
            grid = row[:, None] + column[None]
        elif self.position == "learned":
            grid = table("position", ("rows", rows), ("columns", columns))
            grid = _resample(_resample(grid, 0, h), 1, w)
        else:
            raise unknown("model.encoder.position", self.position, POSITIONS)
        return grid.reshape(h * w, self.width).astype(self.dtype)


def _resample(table: jax.Array, axis: int, size: int) -> jax.Array:
    """A table over `axis` at `size` evenly spaced cells: the mean of what each cell covers, or,
    where cells are smaller than the table's, linear interpolation between their centres."""
    if table.shape[axis] == size:
        return table
    shape = list(table.shape)
    shape[axis] = size
    return jax.image.resize(table, shape, "linear", antialias=True)
