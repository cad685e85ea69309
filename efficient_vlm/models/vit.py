"""The vision encoder: one configurable vision transformer (arXiv 2010.11929)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.compressors import Signals, Stage, VisualTokens
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.models.attention import Attention, attention_received
from efficient_vlm.models.layers import Dtype, Linear, RMSNorm, logical
from efficient_vlm.models.stack import layer_of, rematerialised, run_layers, stack_layers

POSITIONS = ("factorised", "learned")


class EncoderBlock(nn.Module):
    """Pre-norm attention and GELU MLP, bidirectional."""

    width: int
    num_heads: int
    mlp_dim: int
    qk_norm: bool
    qk_scale: float
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        key_bias: jax.Array | None = None,
        merge: Callable[[jax.Array, dict], jax.Array] | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """[B, S, D] -> [B, S', D] and what attention saw; `merge` acts between the two halves."""
        norm = functools.partial(RMSNorm, dtype=self.dtype)
        y, inner = Attention(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.width // self.num_heads,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            out_scale=0.5,
            dtype=self.dtype,
            name="attention",
        )(norm(name="attention_norm")(x), key_bias=key_bias)
        x = x + y
        if merge is not None:
            x = merge(x, inner)
        y = Linear(("embed",), (self.mlp_dim,), ("mlp",), dtype=self.dtype, name="up")(
            norm(name="mlp_norm")(x)
        )
        y = nn.with_logical_constraint(nn.gelu(y), ("batch", None, "mlp"))
        down = Linear(("mlp",), (self.width,), ("embed",), 0.5, self.dtype, name="down")
        return x + down(y), inner


def _row(query: jax.Array, keys: jax.Array, scale: float) -> jax.Array:
    """Attention of one query [B, H, Dh] to keys [B, S, H, Dh], mean over heads: float32 [B, S]."""
    logits = jnp.einsum("bhd,bkhd->bhk", query.astype(jnp.float32), keys.astype(jnp.float32))
    return jax.nn.softmax(scale * logits, axis=-1).mean(axis=1)


def _all_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], 1, -1)


# What can be asked of a layer: (states behind it, queries, keys, scale of the logits) -> array.
# One-row signals are computed beside the attention from one query, never from a whole matrix.
INTERMEDIATES: dict[str, Callable[[jax.Array, jax.Array, jax.Array, float], jax.Array]] = {
    "features": lambda x, q, k, scale: x,
    "keys": lambda x, q, k, scale: k,
    "cls_row": lambda x, q, k, scale: _row(q[:, 0], k, scale),
    "cls_row_full": lambda x, q, k, scale: _row(
        _all_heads(q[:, 0]), _all_heads(k), scale * q.shape[-2] ** -0.5
    ),
    "mean_query_row": lambda x, q, k, scale: _row(q.astype(jnp.float32).mean(axis=1), k, scale),
    "column_mean": lambda x, q, k, scale: attention_received(q, k, scale),
}


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
      class_token: whether a learned CLS token stands before the patches; the features exclude it.
      qk_norm, qk_scale: see `attention.Attention`.
      remat, scan_unroll: see `stack.run_layers`.
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
    class_token: bool = False
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
        self,
        images: jax.Array,
        *,
        intermediates: Sequence[str] = (),
        stages: Sequence[Stage] = (),
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Encodes images.

        Args:
          images: uint8 [B, H, W, 3], or float in [0, 1].
          intermediates: "name/layer" with name one of INTERMEDIATES; a negative layer counts from
            the last, a fraction is a part of the depth, rounded down.
          stages: where a compressor shortens the sequence inside the encoder, in order; not
            together with intermediates.

        Returns:
          features [B, N, width] after the final norm, and a dict: the intermediates by the name
          asked for, N = h*w patches without CLS (features [B, N, width]; keys [B, N, heads, dim];
          rows and means float32 [B, N], attention that each patch receives: from CLS, from CLS
          with all heads as one (logits / sqrt(width)), from the mean query, from all queries;
          they sum to 1 together with what CLS receives). With `stages`: "tokens", the features as
          VisualTokens of the grid, N of them being left.

        Raises:
          UserError: unknown name or layer, or a CLS row of an encoder without CLS.
        """
        wanted = {asked: self.parse_intermediate(asked) for asked in intermediates}
        x = self._patches(images)
        x = x + self._positions(images.shape[1:3])
        grid = tuple(side // self.patch_size for side in images.shape[1:3])
        tokens = VisualTokens.from_grid(x, grid) if stages else None
        extra = 0
        if self.class_token:
            init = logical(nn.initializers.normal(self.position_scale), "rows", "embed")
            cls = self.param("class_token", init, (1, self.width)).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(cls, (len(x), *cls.shape)), x], axis=1)
            extra = 1

        fields = dict(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            dtype=self.dtype,
        )
        stack = stack_layers(EncoderBlock, self.depth, 0)(**fields, name="layers")
        if self.is_initializing():
            stack(x)
        stacked = nn.unbox(self.variables["params"]["layers"])
        block = EncoderBlock(**fields, parent=None)
        labels = [stage.module.label for stage in stages]
        modules = [
            stage.module.copy(name=label if labels.count(label) == 1 else f"{label}_{i}")
            for i, (stage, label) in enumerate(zip(stages, labels, strict=True))
        ]
        bias = None

        def reduce(index: int, x: jax.Array, keys: jax.Array | None) -> jax.Array:
            nonlocal tokens, bias
            given = tokens.replace(embed=x[:, extra:])
            tokens = modules[index](given, Signals(keys=keys))
            if getattr(modules[index], "proportional", False):
                bias = jnp.log(jnp.maximum(tokens.size, 1.0))
                bias = jnp.pad(bias, ((0, 0), (extra, 0)))
            return jnp.concatenate([x[:, :extra], tokens.embed], axis=1)

        def plain(x, start, stop):
            if start == stop:
                return x
            return run_layers(
                lambda params, x, _: (block.apply({"params": params}, x, bias)[0], None),
                stacked,
                x,
                start,
                stop,
                remat=self.remat,
                unroll=self.scan_unroll,
            )[0]

        found: dict[str, Any] = {}
        inside = {stage.layer: i for i, stage in enumerate(stages) if stage.inside}
        before = [(stage.layer, i) for i, stage in enumerate(stages) if not stage.inside]
        looked_at = {layer for _, layer in wanted.values()} | set(inside)
        done = 0
        for layer in sorted(looked_at | {at for at, _ in before}):
            x = plain(x, done, layer)
            done = layer
            for index in (i for at, i in before if at == layer):
                x = reduce(index, x, None)
            if layer in looked_at:
                merge = None
                if layer in inside:
                    index = inside[layer]

                    def merge(x, inner, index=index):
                        return reduce(index, x, inner["key"][:, extra:])

                def one(params, x, merge=merge):
                    return block.apply({"params": params}, x, bias, merge)

                # Without a merge nothing escapes the layer, so it can be computed again.
                one = one if merge else rematerialised(one, self.remat)
                x, inner = one(layer_of(stacked, layer), x)
                done = layer + 1
                for asked, (name, at) in wanted.items():
                    if at == layer:
                        scale = self.qk_scale * (self.width // self.num_heads) ** -0.5
                        value = INTERMEDIATES[name](x, inner["query"], inner["key"], scale)
                        found[asked] = value[:, extra:]
        x = plain(x, done, self.depth)
        features = RMSNorm(dtype=self.dtype, name="norm")(x[:, extra:])
        if stages:
            found["tokens"] = tokens.replace(embed=features)
        return features, found

    @nn.nowrap
    def parse_intermediate(self, asked: str) -> tuple[str, int]:
        """ "name/layer" -> (name, layer from 0); see `__call__`."""
        name, _, layer = asked.partition("/")
        if name not in INTERMEDIATES:
            raise unknown("encoder intermediate", name, INTERMEDIATES)
        if 0 < (part := _fraction(layer)) < 1:
            layer = str(int(part * self.depth))
        if not layer.lstrip("-").isdigit() or not -self.depth <= int(layer) < self.depth:
            raise UserError(
                f"compressor.layer (or middle_layer): {layer}, no layer of this encoder ({asked})",
                allowed=f"{-self.depth} to {self.depth - 1}, or a fraction of the depth",
            )
        if name.startswith("cls_") and not self.class_token:
            raise UserError(
                "compressor.attention: 'cls', but this encoder has no CLS token",
                allowed="'column_mean' (attention received from all patches), 'mean_query'; "
                "divprune, dart, stride need no attention",
                fix="--compressor.attention=column_mean",
            )
        return name, int(layer) % self.depth

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


def _fraction(layer: str) -> float:
    try:
        return float(layer)
    except ValueError:
        return 0.0


def _resample(table: jax.Array, axis: int, size: int) -> jax.Array:
    """A table over `axis` at `size` evenly spaced cells: the mean of what each cell covers, or,
    where cells are smaller than the table's, linear interpolation between their centres."""
    if table.shape[axis] == size:
        return table
    shape = list(table.shape)
    shape[axis] = size
    return jax.image.resize(table, shape, "linear", antialias=True)
