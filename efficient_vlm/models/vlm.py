"""The whole model: encoder -> token compressor -> connector -> decoder."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from efficient_vlm.compressors import Signals, VisualTokens
from efficient_vlm.compressors.between import selectors
from efficient_vlm.compressors.projectors.gather_pool import windows
from efficient_vlm.compressors.tokens import zero_padding
from efficient_vlm.errors import UserError
from efficient_vlm.fields import construct
from efficient_vlm.models.cache import KVCache
from efficient_vlm.models.connector import Connector
from efficient_vlm.models.image_inputs import (
    NO_EXTRAS,
    ImageExtras,
    Layout,
    gathered,
    pooled,
    repeat_rows,
    resized,
)
from efficient_vlm.models.prompt_layout import Placement
from efficient_vlm.models.vlm_fields import VisionLanguageFields
from efficient_vlm.nn.attention import PADDING_SEGMENT, SHARED_SEGMENT
from efficient_vlm.nn.kv_cache import CONTIGUOUS, CacheOptions
from efficient_vlm.nn.layers import logical
from efficient_vlm.nn.patch_positions import patch_mask
from efficient_vlm.sharding import constrain


@struct.dataclass
class Output:
    """What a training forward pass gives back.

    Attributes:
      logits: float32 [B, Q, L, vocab].
      stats: (sum, denominator) pairs: router statistics with a leading axis over the layers (none
        for a dense decoder), and "selector", see `TextTopK.imitation_loss`.
    """

    logits: jax.Array
    stats: dict[str, Any]


class VisionLanguageModel(VisionLanguageFields):
    """A vision-language model with one fixed token budget; other budgets share its parameters.

    Its fields: `vlm_fields.VisionLanguageFields`.
    """

    def setup(self):
        self.language = self.make_decoder()
        if self.encoder is None:
            return
        self.vit = self.make_encoder()
        method = self.make_compressor()
        if self.vit.class_feature and method.where == "encoder":
            raise UserError(
                f"compressor.name: {method.label} merges patches inside the encoder, but the "
                "features of this model include the CLS token (model.encoder.class_feature)",
                allowed="methods between encoder and decoder, or inside the decoder",
            )
        # A method inside the encoder or decoder leaves nothing to do between them.
        self.reduce = method if method.where == "between" else selectors.Identity(None)
        width = self.language.width * (1 + self.language.deepstack)
        fields = dict(features=width, dtype=self.dtype)
        self.connect = construct(Connector, self.connector, "model.connector", **fields)
        if self.projector is not None:
            self._check_projector(method)
            self.project = self.make_projector()
        if self.padding_embedding:
            init = logical(nn.initializers.normal(0.02), None, "vision")
            shape = (2, self.vit.feature_width)
            self.pad_embedding = self.param("padding_embedding", init, shape)

    @nn.nowrap
    def _check_projector(self, method: nn.Module) -> None:
        if method.where == "encoder":
            raise UserError(
                f"compressor.name: {method.label} merges patches inside the encoder, but this "
                f"model's projector ({self.projector['name']}) reads blocks of the whole grid",
                allowed="methods between encoder and decoder, or inside the decoder",
            )

    # --- stages ------------------------------------------------------------------------------

    def encode(
        self,
        images: jax.Array,
        image_mask: jax.Array,
        *,
        asked: Mapping[str, str] | None = None,
        grid: tuple[int, int] | None = None,
        extras: ImageExtras = NO_EXTRAS,
    ) -> tuple[VisualTokens, Signals]:
        """Images to tokens (patches, or what the projector makes of them), each on its own.

        Args:
          images: uint8 [B, M, H, W, 3], or float in [0, 1]; [B, M, frames, H, W, 3] for an encoder
            whose patches span several frames.
          image_mask: bool [B, M]; a missing image gives padding tokens.
          asked: signal -> encoder intermediate, in place of what the compressor asks for.
          grid: tokens of the resized image, in place of what the compressor asks for.
          extras: see `ImageExtras`.

        Returns:
          Tokens with a leading axis B*M (B with a pool index), and the signals that the compressor
          needs.
        """
        _, *source_grid = self.layout(images, extras)
        batch = images.shape[0]
        images = images.reshape(-1, *images.shape[2:])
        grid = grid or self.reduce.image_grid(tuple(source_grid))
        patches = tuple(side // self.vit.patch_size for side in images.shape[-3:-1])
        if grid != tuple(source_grid):
            patches = self._resized_patches(grid, extras)
            images = resized(images, [side * self.vit.patch_size for side in patches])
        method, stages = self.make_compressor(), ()
        if method.where == "encoder":
            place = dict(class_token=self.vit.class_token)
            stages = method.stages(self.vit.layers_run, grid[0] * grid[1], **place)
        asked = method.intermediates() if asked is None else asked
        valid = None if extras.valid is None else extras.valid.reshape(-1, 2)
        features, found = self.vit(
            images, intermediates=tuple(asked.values()), stages=stages, valid=valid
        )
        there = image_mask.reshape(-1, 1)
        if stages:
            tokens = found["tokens"]
            tokens = tokens.replace(
                mask=tokens.mask & there, source=jnp.where(there, tokens.source, -1)
            )
            return zero_padding(tokens), Signals()
        if self.padding_embedding and extras.padding_share is not None:
            features = features + self._padding_features(extras.padding_share)
        real = jnp.ones(features.shape[:2], bool)
        if valid is not None:
            real = patch_mask(patches, valid)
        signals = {name: found[value] for name, value in asked.items()}
        if self.projector is not None:
            index = extras.pool_index
            if index is not None:
                features, real, *values = (
                    x.reshape(batch, -1, *x.shape[2:]) for x in (features, real, *signals.values())
                )
                signals = dict(zip(signals, values, strict=True))
            features = self.project(features, patches, index)
            if index is None:
                index = jnp.asarray(windows(patches, self.project.side))[None]
            real = gathered(real, index).any(axis=2)
            signals = {name: pooled(name, x, index) for name, x in signals.items()}
            if extras.pool_index is not None:
                there = jnp.ones((batch, 1), bool)
        mask = real if extras.slot_mask is None else extras.slot_mask.reshape(real.shape)
        mask &= there
        tokens = VisualTokens.from_grid(features, grid, tuple(source_grid), mask)
        return tokens, Signals(**signals)

    def _resized_patches(self, grid: tuple[int, int], extras: ImageExtras) -> tuple[int, int]:
        """Patches of an image that is made smaller, so that it becomes a `grid` of tokens."""
        crops = (extras.pool_index, extras.slot_mask, extras.padding_share)
        no_grid = self.vit.class_feature
        if no_grid or extras.valid is not None or any(part is not None for part in crops):
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
        instruction: jax.Array,
        layout: Layout,
        rng: jax.Array | None = None,
    ) -> VisualTokens:
        """N tokens of each image to `budget` tokens, projected to the decoder's width.

        Args:
          tokens: from `encode`, leading axis R*M.
          signals: from `encode`.
          instruction: [R, width], from `instruction`.
          layout: from `layout`.
          rng: key for random compressors.

        Returns:
          Tokens [R, M*budget, ...]; the images of a row lie below each other in one tall grid.
        """
        images, rows, _ = layout
        # Nothing else says where rows lie between the encoder and the decoder.
        tokens = tokens.replace(embed=constrain(tokens.embed, "batch", None, None))
        if "text" in self.reduce.needs:
            signals = signals.replace(text=jnp.repeat(instruction, images, axis=0))
        if self.reduce.projected:
            tokens = tokens.replace(embed=self.connect(tokens.embed))
        tokens = self.reduce(tokens, signals, rng=rng)
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

    def instruction(self, tokens: jax.Array, prompt_lengths: jax.Array) -> jax.Array:
        """[..., L] prompts -> [..., width], the mean embedding of each prompt."""
        inside = jnp.arange(tokens.shape[-1]) < prompt_lengths[..., None]
        embedded = self.language.embed(tokens) * inside[..., None].astype(self.dtype)
        return embedded.sum(axis=-2) / jnp.maximum(prompt_lengths, 1)[..., None].astype(self.dtype)

    def prefill(
        self,
        visual: VisualTokens,
        prompts: jax.Array,
        lengths: jax.Array,
        layout: Layout,
        *,
        new_tokens: int,
        rng: jax.Array | None = None,
        placement: Placement | None = None,
        cache_options: CacheOptions = CONTIGUOUS,
    ) -> tuple[jax.Array, KVCache, tuple[jax.Array, ...]]:
        """Reads prompts with visual tokens in front of the text, or where `placement` puts them.

        Args:
          visual: from `compress`, one row per prompt.
          prompts: int32 [R, P], text tokens, padded on the right.
          lengths: int32 [R].
          layout: from `layout`.
          new_tokens: room to leave in the cache.
          rng: key for random compressors between segments.
          placement: see `prompt_layout.Placement`.
          cache_options: see `kv_cache.CacheOptions`.

        Returns:
          float32 logits [R, vocab] behind the last prompt token; the cache; for each run of decoder
          layers at one length, where every slot is: int32 [R, N], -1 if no token holds it.
        """
        hidden, _, segments, sources = self._read(
            *(visual, prompts, lengths, layout, rng, placement),
            cache_slots=new_tokens,
            cache_options=cache_options,
        )
        last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
        cache = KVCache(segments, lengths.astype(jnp.int32))
        return self.language.logits(last[:, 0]), cache, sources

    def text_logits(
        self,
        images: jax.Array | None,
        image_mask: jax.Array | None,
        tokens: jax.Array,
        lengths: jax.Array,
        placement: Placement | None = None,
        extras: ImageExtras = NO_EXTRAS,
        *,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits of prompts with images anywhere in them, all stages in one pass.

        Args:
          images, image_mask, extras: see `encode`; images None for none.
          tokens: int32 [R, S], text tokens without visual slots, padded on the right.
          lengths: int32 [R].
          placement: see `prompt_layout.Placement`; None for images in front of the text.
          rng: key for random compressors.

        Returns:
          float32 [R, S, vocab].
        """
        if images is None:
            visual, layout = self.no_images(len(tokens)), Layout(0, 1, 1)
        else:
            layout = self.layout(images, extras)
            patches, signals = self.encode(images, image_mask, extras=extras)
            instruction = self.instruction(tokens, lengths)
            visual = self.compress(patches, signals, instruction, layout, rng)
        hidden, *_ = self._read(visual, tokens, lengths, layout, rng, placement)
        return self.language.logits(hidden)

    @nn.nowrap
    def no_images(self, rows: int) -> VisualTokens:
        """The visual tokens of prompts without images."""
        none = jnp.zeros((rows, 0))
        return VisualTokens(
            embed=jnp.zeros((rows, 0, self.make_decoder().width), self.dtype),
            position=jnp.zeros((rows, 0, 2)),
            size=none,
            mask=none.astype(bool),
            source=none.astype(jnp.int32),
        )

    def _read(self, visual, tokens, lengths, layout, rng, placement, **cache):
        place = jnp.arange(tokens.shape[1])
        prompt = place < lengths[:, None]
        judges = prompt
        # Placed images may stand behind text, and see it; in front of all text they see none.
        segment = 1 if placement is None else SHARED_SEGMENT
        if placement is not None and placement.visual_index.shape[1]:
            # Text in front of an image has not seen it: only what is behind all of them may judge.
            behind = placement.text_index > placement.visual_index.max(axis=1, keepdims=True)
            some = (prompt & behind).any(axis=1, keepdims=True)
            judges = jnp.where(some, prompt & behind, prompt)
        return self.language(
            visual,
            self.language.embed(tokens),
            jnp.broadcast_to(place, tokens.shape),
            jnp.where(prompt, segment, PADDING_SEGMENT),
            columns=layout.columns,
            signals=Signals(text=self.instruction(tokens, lengths)),
            prompt=judges,
            position_policy=self._position_policy(),
            rng=rng,
            placement=placement,
            **cache,
        )

    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One token for every row: int32 [R] -> (float32 logits [R, vocab], the longer cache)."""
        return self.language.step(tokens, cache)

    def extend(
        self, tokens: jax.Array, cache: KVCache, counts: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Several tokens for every row, see `Decoder.extend`."""
        return self.language.extend(tokens, cache, counts)

    # --- training ----------------------------------------------------------------------------

    def __call__(
        self,
        images: jax.Array,
        image_mask: jax.Array,
        tokens: jax.Array,
        lengths: jax.Array,
        prompt_lengths: jax.Array,
        *,
        rng: jax.Array | None = None,
    ) -> Output:
        """Next-token logits of Q conversations about the same images.

        The conversations of a row are packed behind one copy of its visual tokens; each sees the
        images and itself only. A compressor that looks at the text chooses tokens for each
        conversation: then each gets a row of its own.

        Args:
          images: uint8 [B, M, H, W, 3].
          image_mask: bool [B, M].
          tokens: int32 [B, Q, L].
          lengths: int32 [B, Q], tokens that are not padding; 0 for an empty slot.
          prompt_lengths: int32 [B, Q], tokens before the first answer.
          rng: key for random compressors.
        """
        batch, questions, length = tokens.shape
        layout = self.layout(images)
        patches, signals = self.encode(images, image_mask)
        instruction = self.instruction(tokens, prompt_lengths)
        if self.selects_by_text:
            patches, signals = repeat_rows((patches, signals), layout.images, questions)
            rows_instruction = instruction.reshape(batch * questions, -1)
            tokens, lengths = tokens.reshape(-1, 1, length), lengths.reshape(-1, 1)
            prompt_lengths = prompt_lengths.reshape(-1, 1)
        else:
            # No choice depends on it here: it only lets parameters be created.
            rows_instruction = instruction.mean(axis=1)
        visual = self.compress(patches, signals, rows_instruction, layout, rng)
        if not self.selects_by_text:
            visual = visual.replace(bias=None)
        rows, packed = tokens.shape[:2]
        place = jnp.arange(length)
        valid = place < lengths[..., None]
        segments = jnp.where(valid, 1 + jnp.arange(packed)[:, None], PADDING_SEGMENT)
        asks = jnp.arange(packed) * length + jnp.maximum(prompt_lengths - 1, 0)
        hidden, stats, *_ = self.language(
            visual,
            self.language.embed(tokens.reshape(rows, -1)),
            jnp.broadcast_to(place, tokens.shape).reshape(rows, -1),
            segments.reshape(rows, -1),
            columns=layout.columns,
            signals=Signals(text=rows_instruction),
            prompt=(valid & (place < prompt_lengths[..., None])).reshape(rows, -1),
            position_policy=self._position_policy(),
            rng=rng,
            longest=length,
            probe=asks if self.teaches_selector else None,
        )
        if self.teaches_selector:
            attention = stats.pop("visual_attention")
            asked = (lengths > 0) & (prompt_lengths > 0)
            teach = (patches, instruction, attention, asked, layout.images)
            stats["selector"] = self.reduce.imitation_loss(*teach)
        logits = self.language.logits(hidden)
        return Output(logits.reshape(batch, questions, length, -1), stats)

    @property
    def teaches_selector(self) -> bool:
        """Whether the compressor can learn where the decoder looks: it sees everything here."""
        inner = any(segment.get("compressor") for segment in self.decoder["segments"])
        selector = isinstance(self.make_compressor(), selectors.TextTopK)
        return selector and not self.selects_by_text and not inner
