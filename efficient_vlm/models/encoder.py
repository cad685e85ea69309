"""The vision encoder: one configurable vision transformer (arXiv 2010.11929)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm.compressors import Stage, VisualTokens
from efficient_vlm.errors import UserError
from efficient_vlm.models.encoder_stack import EncoderStack
from efficient_vlm.nn.encoder_block import EncoderBlock
from efficient_vlm.nn.intermediates import parse_intermediate
from efficient_vlm.nn.linear import Dtype, Linear, logical
from efficient_vlm.nn.norms import make_norm
from efficient_vlm.nn.patch_positions import patch_mask, patch_positions
from efficient_vlm.nn.stack import LayerStack, make_layers


class ViT(nn.Module):
    """Images to patch features.

    Attributes:
      image_size: pixels, one side or (height, width), multiples of `patch_size`. The position
        tables have this size; another size at call time interpolates them.
      patch_size: pixels along a side of a patch.
      width: channels of a patch.
      depth: layers.
      num_heads: attention heads of a layer.
      mlp_dim: hidden width of the MLP.
      crop_remainder: whether an image that is no multiple of the patch size loses its last rows and
        columns (SigLIP at 384 pixels has 27 patches of 14), or is an error.
      stem_dim: hidden width of a two-layer patch embedding (GELU between); None for one product.
      pixel_mean, pixel_std: images in [0, 1] are shifted and scaled by these (one number, or one
        per channel), so that content is not small beside the position embedding.
      patch_bias: whether the (last product of the) patch embedding has a bias.
      temporal_patch: frames that one patch spans; a still picture stands for all of them.
      position: how patches know where they are: "factorised" (a table of rows and one of columns),
        "learned", "bicubic", "bicubic_antialias", "corners", "bucketed" (one table, resized each in
        its own way for other images, see `patch_positions`) or "none".
      position_grid: rows and columns of the position table; None for those of `image_size`.
      position_scale: standard deviation of the initial position tables.
      rope_theta: base of rotary positions over rows and columns (`rotary.axial`); None for none.
      window: patches along a side of the windows inside which layers attend, except `full_layers`;
        None for no windows (arXiv 2502.13923, section 2.1.1).
      full_layers: layers that attend to the whole image although there are windows.
      class_token: whether a learned CLS token stands before the patches.
      class_feature: whether the features include that token, in front; they are then no grid but
        one row.
      class_position: whether that token has a position embedding.
      norm, norm_epsilon: "rms", "rms_plus1" or "layernorm", and what is added to the variance.
      activation, mlp_gated: of the MLP: "gelu_tanh" and others of `mlp.ACTIVATIONS`.
      bias: whether the products of the layers have biases.
      qkv_bias: whether those of queries, keys and values have; None for what `bias` says.
      layer_scale: a learned factor per channel behind attention and MLP (arXiv 2103.17239).
      pre_norm: a norm in front of the first layer (CLIP).
      final_norm: a norm behind the last; not with feature_layers.
      feature_layers: the features are the outputs of these layers, side by side (-1 is the last);
        None for the output of the last, normed. Layers behind all of them do not run.
      qk_norm, qk_scale: norm of queries and keys (False, True or "full"), and a factor of the
        attention logits, see `attention.Attention`.
      stacked: whether the parameters of all layers are created as stacks, or layer by layer
        (`stack.SplitLayers`); either kind can be given.
      remat: what the backward pass computes again: "none", "dots" (all but products) or "full".
      scan_unroll: layers that are written out in each turn of the loop over layers.
      dtype: of activations, that of the model.
    """

    image_size: int | Sequence[int]
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    crop_remainder: bool = False
    stem_dim: int | None = None
    pixel_mean: float | Sequence[float] = 0.5
    pixel_std: float | Sequence[float] = 0.5
    patch_bias: bool = False
    temporal_patch: int = 1
    position: str = "factorised"
    position_grid: Sequence[int] | None = None
    position_scale: float = 0.5
    rope_theta: float | None = None
    window: int | None = None
    full_layers: Sequence[int] = ()
    class_token: bool = False
    class_feature: bool = False
    class_position: bool = False
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    activation: str = "gelu_tanh"
    mlp_gated: bool = False
    bias: bool = False
    qkv_bias: bool | None = None
    layer_scale: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    feature_layers: Sequence[int] | None = None
    qk_norm: bool | str = False
    qk_scale: float = 1.0
    stacked: bool = True
    remat: str = "none"
    scan_unroll: int = 1
    dtype: Dtype = jnp.float32

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row of an image of `image_size`."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        remainder = height % self.patch_size or width % self.patch_size
        if remainder and not self.crop_remainder:
            raise UserError(
                f"model.encoder.image_size: {size} is not a multiple of the patch size",
                allowed=f"multiples of model.encoder.patch_size={self.patch_size}",
            )
        return height // self.patch_size, width // self.patch_size

    @nn.nowrap
    def feature_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the features of an image of `grid` patches."""
        return (1, 1 + grid[0] * grid[1]) if self.class_feature else tuple(grid)

    @property
    def layers_run(self) -> int:
        """Layers that the features need."""
        if self.feature_layers is None:
            return self.depth
        return max(self._layer(layer) for layer in self.feature_layers) + 1

    @property
    def feature_width(self) -> int:
        """Channels of the features."""
        return self.width * len(self.feature_layers or (0,))

    @nn.nowrap
    def _layer(self, layer: int) -> int:
        if not -self.depth <= layer < self.depth:
            raise UserError(
                f"model.encoder.feature_layers: {layer} of {self.depth} layers",
                allowed=f"{-self.depth} to {self.depth - 1}",
            )
        return layer % self.depth

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        intermediates: Sequence[str] = (),
        stages: Sequence[Stage] = (),
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Encodes images.

        Args:
          images: uint8 [B, H, W, 3], or float in [0, 1]; [B, temporal_patch, H, W, 3] for frames
            that differ.
          intermediates: "name/layer" with name one of INTERMEDIATES; a negative layer counts from
            the last that runs, a fraction is a part of those, rounded down.
          stages: where a compressor shortens the sequence inside the encoder, in order; not
            together with intermediates.
          valid: int32 [B, 2], rows and columns of patches that are real, from the upper left
            corner; the others are padding, which nothing sees. None for all.

        Returns:
          features [B, N, feature_width], normed behind the last layer, and a dict: the
          intermediates by the name
          asked for, N = h*w patches without CLS (features [B, N, width]; keys [B, N, heads, dim];
          rows and means float32 [B, N], attention that each patch receives: from CLS, from CLS
          with all heads as one (logits / sqrt(width)), from the mean query, from all queries;
          they sum to 1 together with what CLS receives). With `stages` that do not leave the whole
          grid: "tokens", the features as VisualTokens of the grid, N of them being left.

        Raises:
          UserError: unknown name or layer, or a CLS row of an encoder without CLS.
        """
        if self.class_token and self.window is not None:
            raise UserError("model.encoder.window: not with class_token, which is in no window")
        wanted = {
            name: parse_intermediate(name, self.layers_run, self.class_token)
            for name in intermediates
        }
        kept = [self._layer(layer) for layer in self.feature_layers or ()]
        left = bool(stages) and not stages[0].module.whole_grid
        if left and len(kept) > 1 and not stages[0].module.of_units:
            raise UserError(
                f"compressor.name: {stages[0].module.label} merges patches inside the encoder, "
                f"whose features are those of {len(kept)} layers side by side",
                allowed="methods between encoder and decoder, or inside the decoder",
            )
        grid = tuple(side // self.patch_size for side in images.shape[-3:-1])
        pixels = self.pixels(images)
        x = self._embedded(pixels) + patch_positions(self, grid, valid).astype(self.dtype)
        mask = None if valid is None else patch_mask(grid, valid)
        tracked = bool(stages) or self._placed or valid is not None
        tokens = VisualTokens.from_grid(x, grid, mask=mask) if tracked else None
        if self.class_token:
            x = self._behind_class_token(x)
        norm = functools.partial(make_norm, self.norm, self.norm_epsilon, dtype=self.dtype)
        if self.pre_norm:
            x = norm(name="pre_norm")(x)
        asked = any("pixels" in stage.module.needs for stage in stages)
        given = (x, tokens, stages, wanted, kept, valid, pixels if asked else None)
        x, outputs, results, tokens = self._through(*given)
        skipped = int(self.class_token and not self.class_feature)
        results = {name: value[:, skipped:] for name, value in results.items()}
        if kept:
            features = jnp.concatenate([outputs[layer][:, skipped:] for layer in kept], axis=-1)
        else:
            features = x[:, skipped:]
            features = norm(name="norm")(features) if self.final_norm else features
        if left:
            results["tokens"] = tokens.replace(embed=features)
        return features, results

    def _through(self, x, tokens, stages, wanted, kept, valid, pixels):
        """All layers: x [B, S, D], see `EncoderStack.encode`, and the patches that are left."""
        layers = self._layers(x)
        if self.is_initializing() and not (stages or wanted):
            # Every parameter is there; running the layers would only take time.
            return x, dict.fromkeys(kept, x), {}, tokens
        stack = EncoderStack(
            layers,
            tokens,
            stages,
            self._compressors(stages),
            extra=int(self.class_token),
            rotary=self.rope_theta is not None,
            window=self.window,
            full_layers=self.full_layers,
            padded=valid is not None,
            pixels=pixels,
        )
        scale = self.qk_scale * (self.width // self.num_heads) ** -0.5
        return *stack.encode(x, self.layers_run, wanted, kept, scale), stack.tokens

    def _behind_class_token(self, x: jax.Array) -> jax.Array:
        """[B, N, D] -> [B, 1 + N, D]."""
        init = logical(nn.initializers.normal(self.position_scale), "rows", "embed")
        cls = self.param("class_token", init, (1, self.width)).astype(self.dtype)
        if self.class_position:
            cls = cls + self.param("class_position", init, (1, self.width)).astype(self.dtype)
        return jnp.concatenate([jnp.broadcast_to(cls, (len(x), *cls.shape)), x], axis=1)

    def _layers(self, x: jax.Array) -> LayerStack:
        """The layers with their parameters, which an input x [B, S, D] creates."""
        fields = dict(
            width=self.width,
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            dtype=self.dtype,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            mlp_gated=self.mlp_gated,
            bias=self.bias,
            qkv_bias=self.qkv_bias,
            layer_scale=self.layer_scale,
            rope_theta=self.rope_theta,
        )
        layers = make_layers(EncoderBlock, self.depth, 0, fields, "layers", self.stacked)
        if self.is_initializing():
            layers(x)
        return LayerStack(
            EncoderBlock(**fields, parent=None),
            nn.unbox(self.variables["params"]["layers"]),
            (*self.path, "layers"),
            remat=self.remat,
            unroll=self.scan_unroll,
        )

    def _compressors(self, stages: Sequence[Stage]) -> list[nn.Module]:
        """The modules of stages as children of this one, named by their methods."""
        labels = [stage.module.label for stage in stages]
        return [
            stage.module.copy(name=label if labels.count(label) == 1 else f"{label}_{i}")
            for i, (stage, label) in enumerate(zip(stages, labels, strict=True))
        ]

    @property
    def _placed(self) -> bool:
        """Whether layers need to know where a patch is."""
        return self.rope_theta is not None or self.window is not None

    @nn.nowrap
    def pixels(self, images: jax.Array) -> jax.Array:
        """[B, N, frames * patch_size**2 * 3], normalised, patch by patch."""
        if images.ndim == 4 and self.temporal_patch > 1:
            images = jnp.broadcast_to(
                images[:, None], (len(images), self.temporal_patch, *images.shape[1:])
            )
        elif images.ndim == 4:
            images = images[:, None]
        p = self.patch_size
        rows, columns = (side // p for side in images.shape[2:4])
        images = images[:, :, : rows * p, : columns * p]
        batch, frames, height, width, channels = images.shape
        if jnp.issubdtype(images.dtype, jnp.integer):
            images = images.astype(jnp.float32) / 255
        images = (images - jnp.asarray(self.pixel_mean)) / jnp.asarray(self.pixel_std)
        x = images.astype(self.dtype)
        x = x.reshape(batch, frames, height // p, p, width // p, p, channels)
        return x.transpose(0, 2, 4, 1, 3, 5, 6).reshape(batch, -1, frames * p * p * channels)

    def _embedded(self, x: jax.Array) -> jax.Array:
        """Pixels of patches to states [B, N, D], without positions."""
        if self.stem_dim is not None:
            x = Linear(("patch",), (self.stem_dim,), ("mlp",), dtype=self.dtype, name="stem")(x)
            x = nn.gelu(x)
        axis = "patch" if self.stem_dim is None else "mlp"
        fields = dict(dtype=self.dtype, bias=self.patch_bias, name="embed")
        return Linear((axis,), (self.width,), ("embed",), **fields)(x)
