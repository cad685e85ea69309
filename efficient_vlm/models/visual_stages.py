"""From pictures to the visual tokens that enter the decoder: encoder, projector, compressor."""

import math
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from efficient_vlm.compressors import Signals, VisualTokens
from efficient_vlm.compressors.between import selectors
from efficient_vlm.compressors.fold import without_padding
from efficient_vlm.compressors.projectors.gather_pool import windows
from efficient_vlm.compressors.tokens import zero_padding
from efficient_vlm.compressors.units import kept_units
from efficient_vlm.errors import UserError
from efficient_vlm.fields import construct
from efficient_vlm.models.connector import Connector, PooledStart
from efficient_vlm.models.image_inputs import gathered, pooled, repeat_rows, resized
from efficient_vlm.models.inputs import Layout, ModelInputs, Pictures
from efficient_vlm.models.vlm_fields import VisionLanguageFields
from efficient_vlm.nn.linear import logical
from efficient_vlm.nn.patch_positions import patch_mask
from efficient_vlm.sharding import constrain

# What there is where patches must all leave the encoder.
_NO_CUTS = "ipcv, encoder_exit, methods between encoder and decoder, or inside the decoder"


class VisualStages(VisionLanguageFields):
    """The stages in front of the decoder of a `vlm.VisionLanguageModel`."""

    def setup_encoder(self) -> None:
        """Called by `setup` of models with an encoder."""
        self.vit = self.make_encoder()
        method = self.make_compressor()
        if self.vit.class_feature and method.in_encoder and not method.whole_grid:
            raise UserError(
                f"compressor.name: {method.label} merges patches inside the encoder, but the "
                "features of this model include the CLS token (model.encoder.class_feature)",
                allowed="methods between encoder and decoder, or inside the decoder",
            )
        # A method inside the encoder or decoder leaves nothing to do between them.
        self.reduce = method if method.between else selectors.Identity(None)
        width = self.language.width * (1 + self.language.deepstack)
        fields = dict(features=width, dtype=self.dtype)
        self.connect = construct(Connector, self.connector, "model.connector", **fields)
        if self.projector is not None and not self.in_place:
            self._check_projector(method)
            self.project = self.make_projector()
        if self.pooled_start and method.makes_tokens and method.between:
            self.start = PooledStart(method.grid)
        if self.padding_embedding:
            init = logical(nn.initializers.normal(0.02), None, "vision")
            shape = (2, self.vit.feature_width)
            self.pad_embedding = self.param("padding_embedding", init, shape)

    @nn.nowrap
    def _check_projector(self, method: nn.Module) -> None:
        fits = method.whole_grid or (method.of_units and self.make_projector().blockwise)
        if method.in_encoder and not fits:
            raise UserError(
                f"compressor.name: {method.label} removes patches inside the encoder, but this "
                f"model's projector ({self.projector['name']}) reads blocks of the whole grid",
                allowed=_NO_CUTS,
            )

    @nn.nowrap
    def _check_in_place(self, method: nn.Module) -> None:
        slots, patches = math.prod(self.slot_grid), math.prod(self.compressed_grid)
        if not (method.makes_tokens and method.between):
            raise UserError(
                f"compressor.name: {method.label} makes no tokens in place of a projector",
                allowed="resampler, perceiver, qformer, mlp, deco, ldpv2, tokenpacker, ...",
                fix="choose one of these, or set model.in_place=False",
            )
        if (method.budget or patches) > slots:
            raise UserError(
                f"compressor.budget: {method.budget or patches} tokens of {method.label} in place "
                "of the model's own projector",
                allowed=f"up to the {slots} slots that a picture has in a prompt",
                fix=f"a method that can give {slots} or fewer",
            )

    @nn.nowrap
    def with_room(self, pictures: Pictures) -> Self:
        """The same model with room for what a method keeps of these pictures (NumPy arrays), where
        their content decides how many tokens that are (`pixelprune`)."""
        method, vit = self.make_compressor(), self.make_encoder()
        if not hasattr(method, "room_for"):
            return self
        images = np.asarray(pictures.pixels).reshape(-1, *np.shape(pictures.pixels)[2:])
        grid = tuple(side // vit.patch_size for side in images.shape[-3:-1])
        pixels = np.asarray(vit.pixels(jnp.asarray(images))).reshape(len(images), *grid, -1)
        valid = None if pictures.valid is None else np.reshape(pictures.valid, (-1, 2))
        there = np.reshape(pictures.mask, -1)
        valid = valid if valid is None else valid[there]
        budget = method.room_for(pixels[there], valid, self.unit_side)
        return self.clone(compressor={**self.compressor, "budget": budget})

    def encode(
        self,
        pictures: Pictures,
        *,
        asked: Mapping[str, str] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> tuple[VisualTokens, Signals]:
        """Pictures to tokens (patches, or what the projector makes of them), each on its own.

        Args:
          pictures: B rows of M; a missing one gives padding tokens.
          asked: signal -> encoder intermediate, in place of what the compressor asks for.
          grid: tokens of the resized picture, in place of what the compressor asks for.

        Returns:
          Tokens with a leading axis B*M (B with a pool index), and the signals that the compressor
          needs.
        """
        if self.in_place:
            self._check_in_place(self.make_compressor())
        _, *source_grid = self.layout(pictures)
        images = pictures.pixels.reshape(-1, *pictures.pixels.shape[2:])
        grid = grid or self.reduce.image_grid(tuple(source_grid))
        patches = tuple(side // self.vit.patch_size for side in images.shape[-3:-1])
        if grid != tuple(source_grid):
            patches = self._resized_patches(grid, pictures)
            images = resized(images, [side * self.vit.patch_size for side in patches])
        method = self.make_compressor()
        left = method.in_encoder and not method.whole_grid
        if left and pictures.pool_index is not None:
            raise UserError(
                f"compressor.name: {method.label} removes patches inside the encoder, but tokens "
                "of this model read patches across crops",
                allowed=_NO_CUTS,
            )
        stages = self.encoder_stages(patches)
        left &= bool(stages)
        asked = method.intermediates() if asked is None else asked
        valid = None if pictures.valid is None else pictures.valid.reshape(-1, 2)
        features, seen = self.vit(
            images, intermediates=tuple(asked.values()), stages=stages, valid=valid
        )
        given = pictures.mask.reshape(-1, 1)
        if left and self.projector is not None:
            return self._units_projected(seen["tokens"], patches, pictures), Signals()
        if left:
            tokens = seen["tokens"]
            source = jnp.where(given, tokens.source, -1)
            return zero_padding(tokens.replace(mask=tokens.mask & given, source=source)), Signals()
        if self.padding_embedding and pictures.padding_share is not None:
            features = features + self._padding_features(pictures.padding_share)
        real = jnp.ones(features.shape[:2], bool)
        if valid is not None:
            real = patch_mask(patches, valid)
        signals = {name: seen[value] for name, value in asked.items()}
        if self.in_place and self.projector is not None:
            side = patches[0] // source_grid[0]
            return patch_tokens(features, real, patches, side, pictures), Signals(**signals)
        if self.projector is not None:
            features, real, signals = self._projected(features, real, signals, patches, pictures)
        if pictures.slot_mask is not None:
            real = pictures.slot_mask.reshape(real.shape)
        if pictures.pool_index is None:
            real &= given
        uneven = valid is not None or pictures.pool_index is not None
        tokens = VisualTokens.from_grid(features, grid, tuple(source_grid), real, uneven)
        return tokens, Signals(**signals)

    def _projected(self, features, real, signals, patches, pictures: Pictures):
        """Features, which of them are real, and signals, of tokens that each read some patches."""
        index = pictures.pool_index
        if index is not None:
            rows = len(pictures.mask)
            features, real, *values = (
                x.reshape(rows, -1, *x.shape[2:]) for x in (features, real, *signals.values())
            )
            signals = dict(zip(signals, values, strict=True))
        features = self.project(features, patches, index)
        if index is None:
            index = jnp.asarray(windows(patches, self.project.side))[None]
        real = gathered(real, index).any(axis=2)
        return features, real, {name: pooled(name, x, index) for name, x in signals.items()}

    def _units_projected(
        self, tokens: VisualTokens, patches: tuple[int, int], pictures: Pictures
    ) -> VisualTokens:
        """What the projector makes of the units that cuts have left of B*M pictures.

        Args:
          tokens: from the encoder: K units, patch behind patch, over the grid `patches`.
          patches: rows and columns of each picture.
          pictures: B rows of M.
        """
        side, x = self.project.side, tokens.embed
        if self.padding_embedding and pictures.padding_share is not None:
            more = self._padding_features(pictures.padding_share)
            holds = jax.nn.one_hot(tokens.source, x.shape[1], dtype=more.dtype, axis=1)
            x = x + jnp.einsum("bkn,bnc->bkc", holds, more)
        # The units side by side in one strip, which the projector reads block by block.
        rows, count = len(x), x.shape[1] // side**2
        strip = x.reshape(rows, count, side, side, -1).swapaxes(1, 2).reshape(x.shape)
        cells = self.project.cells(patches)
        index = None
        if side > 1 and any(length % side for length in patches):  # Blocks that lack patches.
            there = tokens.mask.reshape(rows, count, side**2)
            index = jnp.where(there, windows((side, side * count), side), -1)
        features = self.project(strip, (side, side * count), index)
        position, real, source = kept_units(tokens, cells, patches, side)
        slots = pictures.mask.reshape(-1, 1)
        if pictures.slot_mask is not None:
            slots = pictures.slot_mask.reshape(source.shape)
        source = jnp.where(slots, source, -1)
        held = jax.nn.one_hot(source, count, dtype=jnp.float32).sum(axis=1)
        kept = VisualTokens(
            embed=features,
            position=position,
            size=held,
            mask=real & (held > 0),
            source=source,
            uneven=pictures.valid is not None,
        )
        return zero_padding(kept)

    def _resized_patches(self, grid: tuple[int, int], pictures: Pictures) -> tuple[int, int]:
        """Patches of a picture that is made smaller, so that it becomes a `grid` of tokens."""
        crops = (pictures.pool_index, pictures.slot_mask, pictures.padding_share)
        no_grid = self.vit.class_feature
        if no_grid or pictures.valid is not None or any(part is not None for part in crops):
            raise UserError(
                "compressor.name: downsample makes images smaller, but tokens of this model read "
                "patches across crops, or images of several sizes, or are no grid",
                allowed="pool, which averages tokens; or a smaller picture",
            )
        side = 1 if self.projector is None else self.project.side
        return grid[0] * side, grid[1] * side

    def _padding_features(self, share: jax.Array) -> jax.Array:
        """[B, M, N] shares of real pixels -> [B*M, N, C], what padding adds to the features."""
        share = share.reshape(-1, share.shape[-1], 1)
        none, part = self.pad_embedding.astype(self.dtype)
        # As released: everything below 1 that is not 0 counts as partly padded, -1 too.
        zero = jnp.zeros((), self.dtype)
        return jnp.where(share == 0, none, zero) + jnp.where((share < 1) & (share != 0), part, zero)

    def compress(
        self,
        tokens: VisualTokens,
        signals: Signals,
        inputs: ModelInputs,
        layout: Layout,
        rng: jax.Array | None = None,
    ) -> VisualTokens:
        """N tokens of each picture to `budget` tokens, projected to the decoder's width.

        Pictures that several rows of text are about are compressed once, but where the text says
        which tokens stay, or a draw does.

        Args:
          tokens: from `encode`, leading axis B*M.
          signals: from `encode`.
          inputs: R rows of text, see `ModelInputs`; its pictures are not read.
          layout: from `layout`.
          rng: key for random compressors.

        Returns:
          Tokens [R, M*budget, ...]; the pictures of a row lie below each other in one tall grid.
        """
        rows = len(tokens.mask) // layout.images
        repeats = len(inputs.text) // rows
        instruction = self.instruction(inputs)
        each = self.selects_by_text or self.make_compressor().draws
        if each:
            tokens, signals = repeat_rows((tokens, signals), layout.images, repeats)
        else:
            # No choice depends on it: it only lets parameters be created.
            instruction = instruction.reshape(rows, -1, instruction.shape[-1])
        visual = self._reduced(tokens, signals, instruction[:, 0], layout, rng)
        if not self.selects_by_text:
            visual = visual.replace(bias=None)
        room = inputs.visual_room
        if room is not None and room < visual.mask.shape[1]:
            visual = without_padding(visual, room)
        return visual if each else repeat_rows(visual, 1, repeats)

    def _reduced(self, tokens, signals, instruction, layout: Layout, rng) -> VisualTokens:
        images, rows, columns = layout
        # Nothing else says where rows lie between the encoder and the decoder.
        tokens = tokens.replace(embed=constrain(tokens.embed, "batch", None, None))
        if "text" in self.reduce.needs:
            signals = signals.replace(text=jnp.repeat(instruction, images, axis=0))
        if self.reduce.projected:
            tokens = tokens.replace(embed=self.connect(tokens.embed))
        before, tokens = tokens, self.reduce(tokens, signals, rng=rng)
        if self.pooled_start and self.reduce.makes_tokens:
            tokens = self.start(before, tokens)
        if self.in_place and self.projector is not None:
            tokens = in_slots(tokens, (rows, columns), self.make_projector().side)
        if not self.reduce.projected:
            tokens = tokens.replace(embed=self.connect(tokens.embed))
        if self.slot_token is not None:
            slot = self.language.embed(jnp.asarray(self.slot_token))
            tokens = tokens.replace(embed=tokens.embed + slot)
        tokens = tokens.replace(embed=constrain(tokens.embed, "batch", None, None))
        count = tokens.embed.shape[1]
        image = jnp.tile(jnp.arange(images), tokens.embed.shape[0] // images)
        below = jnp.stack([image * rows, jnp.zeros_like(image)], axis=-1)
        source = jnp.where(tokens.source < 0, -1, tokens.source + (image * count)[:, None])
        tokens = tokens.replace(
            position=tokens.position + below[:, None].astype(jnp.float32),
            source=source,
        )
        return jax.tree.map(lambda x: x.reshape(-1, images * x.shape[1], *x.shape[2:]), tokens)


def patch_tokens(
    features: jax.Array, real: jax.Array, grid: tuple[int, int], side: int, pictures: Pictures
) -> VisualTokens:
    """Patches as tokens, for a compressor in place of a projector that reads side x side of them.

    Args:
      features: [B*M, N, C].
      real: bool [B*M, N].
      grid: rows and columns of the patches.
      side: of what a slot of the prompt stands for.
      pictures: B rows of M.
    """
    real = real & pictures.mask.reshape(-1, 1)
    if pictures.slot_mask is not None:
        slots = pictures.slot_mask.reshape(-1, grid[0] // side, grid[1] // side)
        slots = jnp.repeat(jnp.repeat(slots, side, axis=1), side, axis=2)
        real &= slots.reshape(real.shape)
    uneven = pictures.valid is not None
    return VisualTokens.from_grid(features, grid, None, real, uneven)


def in_slots(tokens: VisualTokens, grid: tuple[int, int], side: int) -> VisualTokens:
    """Tokens made of patches, with positions, sizes and `source` in slots of side x side patches.

    The token that holds the upper left patch of a slot holds the slot.

    Args:
      tokens: over the patches of `grid` slots.
      grid: rows and columns of slots.
      side: see above.
    """
    rows, columns = grid
    first = (jnp.arange(rows)[:, None] * columns * side + jnp.arange(columns)) * side
    position = (tokens.position + 0.5) / side - 0.5
    return tokens.replace(
        position=jnp.where(tokens.mask[..., None], position, 0),
        size=tokens.size / side**2,
        source=tokens.source[:, first.reshape(-1)],
    )
