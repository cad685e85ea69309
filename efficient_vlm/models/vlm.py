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
from efficient_vlm.models.image_inputs import gathered, pooled, repeat_rows, resized
from efficient_vlm.models.inputs import Layout, ModelInputs, Pictures
from efficient_vlm.models.vlm_fields import VisionLanguageFields
from efficient_vlm.nn.kv_cache import CONTIGUOUS, CacheOptions
from efficient_vlm.nn.linear import logical
from efficient_vlm.nn.patch_positions import patch_mask
from efficient_vlm.sharding import constrain


@struct.dataclass
class Output:
    """What a forward pass gives back.

    Attributes:
      logits: float32 [R, S, vocab], of the token behind each text token.
      stats: (sum, denominator) pairs: router statistics with a leading axis over the layers (none
        for a dense decoder), and "selector", see `TextTopK.imitation_loss`.
    """

    logits: jax.Array
    stats: dict[str, Any]


class VisionLanguageModel(VisionLanguageFields):
    """A vision-language model with one fixed token budget; other budgets share its parameters.

    Its fields: `vlm_fields.VisionLanguageFields`. The forward pass is `encode`, `compress` and
    `read`, one behind the other; generation runs the same three as programs of their own.
    """

    def setup(self):
        self.language = self.make_decoder()
        if self.encoder is None:
            return
        self.vit = self.make_encoder()
        method = self.make_compressor()
        if self.vit.class_feature and method.in_encoder:
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
        if self.projector is not None:
            self._check_projector(method)
            self.project = self.make_projector()
        if self.padding_embedding:
            init = logical(nn.initializers.normal(0.02), None, "vision")
            shape = (2, self.vit.feature_width)
            self.pad_embedding = self.param("padding_embedding", init, shape)

    @nn.nowrap
    def _check_projector(self, method: nn.Module) -> None:
        if method.in_encoder:
            raise UserError(
                f"compressor.name: {method.label} merges patches inside the encoder, but this "
                f"model's projector ({self.projector['name']}) reads blocks of the whole grid",
                allowed="methods between encoder and decoder, or inside the decoder",
            )

    def __call__(self, inputs: ModelInputs, *, rng: jax.Array | None = None) -> Output:
        """Next-token logits of a batch of conversations.

        A compressor that looks at the text chooses tokens for each conversation: those that are
        packed in one row then get a row each, and come back to their places. With labels, a
        selector that sees everything learns where the decoder looks (`stats["selector"]`).

        Args:
          inputs: R rows of S text tokens; see `ModelInputs`.
          rng: key for random compressors.

        Raises:
          UserError: inputs whose arrays do not belong together.
        """
        layout = self.layout(inputs.pictures)
        inputs.check(layout)
        packed = inputs
        if self.selects_by_text:
            inputs = inputs.unpacked()
        patches, probe = None, None
        if inputs.pictures is None:
            visual = self.no_pictures(len(inputs.text))
        else:
            patches, signals = self.encode(inputs.pictures)
            visual = self.compress(patches, signals, inputs, layout, rng)
        if self.teaches_selector and inputs.labels is not None and patches is not None:
            probe = _last(inputs.prompts())
        hidden, stats, *_ = self.read(visual, inputs, layout, rng=rng, probe=probe)
        if probe is not None:
            attention = stats.pop("visual_attention")
            repeats = len(inputs.text) // inputs.picture_rows
            patches = repeat_rows(patches, layout.images, repeats)
            teach = (patches, self.instruction(inputs), attention, inputs.asked(), layout.images)
            stats["selector"] = self.reduce.imitation_loss(*teach)
        if inputs is not packed:
            hidden = packed.packed_again(hidden)
        return Output(self.language.logits(hidden), stats)

    # --- stages ------------------------------------------------------------------------------

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
        _, *source_grid = self.layout(pictures)
        images = pictures.pixels.reshape(-1, *pictures.pixels.shape[2:])
        grid = grid or self.reduce.image_grid(tuple(source_grid))
        patches = tuple(side // self.vit.patch_size for side in images.shape[-3:-1])
        if grid != tuple(source_grid):
            patches = self._resized_patches(grid, pictures)
            images = resized(images, [side * self.vit.patch_size for side in patches])
        method, stages = self.make_compressor(), ()
        if method.in_encoder:
            place = dict(class_token=self.vit.class_token)
            stages = method.stages(self.vit.layers_run, grid[0] * grid[1], **place)
        asked = method.intermediates() if asked is None else asked
        valid = None if pictures.valid is None else pictures.valid.reshape(-1, 2)
        features, seen = self.vit(
            images, intermediates=tuple(asked.values()), stages=stages, valid=valid
        )
        given = pictures.mask.reshape(-1, 1)
        if stages:
            tokens = seen["tokens"]
            source = jnp.where(given, tokens.source, -1)
            return zero_padding(tokens.replace(mask=tokens.mask & given, source=source)), Signals()
        if self.padding_embedding and pictures.padding_share is not None:
            features = features + self._padding_features(pictures.padding_share)
        real = jnp.ones(features.shape[:2], bool)
        if valid is not None:
            real = patch_mask(patches, valid)
        signals = {name: seen[value] for name, value in asked.items()}
        if self.projector is not None:
            features, real, signals = self._projected(features, real, signals, patches, pictures)
        if pictures.slot_mask is not None:
            real = pictures.slot_mask.reshape(real.shape)
        if pictures.pool_index is None:
            real &= given
        tokens = VisualTokens.from_grid(features, grid, tuple(source_grid), real)
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
        return visual if each else repeat_rows(visual, 1, repeats)

    def _reduced(self, tokens, signals, instruction, layout: Layout, rng) -> VisualTokens:
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

    def instruction(self, inputs: ModelInputs) -> jax.Array:
        """[R, Q, width], the mean embedding of the prompt of each conversation."""
        prompts = inputs.prompts()
        embedded = self.language.embed(inputs.text)[:, None] * prompts[..., None].astype(self.dtype)
        count = jnp.maximum(prompts.sum(axis=-1), 1)
        return embedded.sum(axis=-2) / count[..., None].astype(self.dtype)

    @nn.nowrap
    def no_pictures(self, rows: int) -> VisualTokens:
        """The visual tokens of prompts without pictures."""
        none = jnp.zeros((rows, 0))
        return VisualTokens(
            embed=jnp.zeros((rows, 0, self.make_decoder().width), self.dtype),
            position=jnp.zeros((rows, 0, 2)),
            size=none,
            mask=none.astype(bool),
            source=none.astype(jnp.int32),
        )

    def read(
        self,
        visual: VisualTokens,
        inputs: ModelInputs,
        layout: Layout,
        *,
        rng: jax.Array | None = None,
        cache_slots: int | None = None,
        cache_options: CacheOptions = CONTIGUOUS,
        probe: jax.Array | None = None,
    ) -> tuple:
        """Visual tokens and text through the decoder.

        Args:
          visual: from `compress`, R rows.
          inputs: R rows of text; its pictures are not read.
          layout: from `layout`.
          rng: key for random compressors between segments.
          cache_slots, cache_options, probe: see `Decoder.__call__`.

        Returns:
          Hidden states of the text [R, S, width], and the rest of what `Decoder.__call__` returns.
        """
        return self.language(
            visual,
            self.language.embed(inputs.text),
            inputs.places(),
            inputs.segments,
            columns=layout.columns,
            signals=Signals(text=self.instruction(inputs)[:, 0]),
            prompt=inputs.judges(),
            position_policy=self._position_policy(),
            rng=rng,
            cache_slots=cache_slots,
            cache_options=cache_options,
            longest=inputs.longest,
            probe=probe,
            placement=inputs.placement,
        )

    def prefill(
        self,
        visual: VisualTokens,
        inputs: ModelInputs,
        layout: Layout,
        *,
        new_tokens: int,
        cache_options: CacheOptions = CONTIGUOUS,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache, tuple[jax.Array, ...]]:
        """Reads prompts, one a row, and keeps what further tokens need.

        Args:
          visual, inputs, layout, rng: see `read`; text padded on the right.
          new_tokens: room to leave in the cache.
          cache_options: how the cache stores keys and values.

        Returns:
          float32 logits [R, vocab] behind the last prompt token; the cache; for each run of decoder
          layers at one length, where every slot is: int32 [R, N], -1 if no token holds it.
        """
        kept = dict(cache_slots=new_tokens, cache_options=cache_options)
        hidden, _, segments, sources = self.read(visual, inputs, layout, rng=rng, **kept)
        last = jnp.take_along_axis(hidden, _last(inputs.live)[:, None, None], axis=1)
        cache = KVCache(segments, inputs.lengths.astype(jnp.int32))
        return self.language.logits(last[:, 0]), cache, sources

    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One token for every row: int32 [R] -> (float32 logits [R, vocab], the longer cache)."""
        return self.language.step(tokens, cache)

    def extend(
        self, tokens: jax.Array, cache: KVCache, counts: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Several tokens for every row, see `Decoder.extend`."""
        return self.language.extend(tokens, cache, counts)

    @property
    def teaches_selector(self) -> bool:
        """Whether the compressor can learn where the decoder looks: it sees everything here."""
        inner = any(segment.get("compressor") for segment in self.decoder["segments"])
        return self.make_compressor().text_scores and not self.selects_by_text and not inner


def _last(marks: jax.Array) -> jax.Array:
    """bool [..., S] -> int [...], the last place that is marked; 0 where none is."""
    return jnp.max(jnp.where(marks, jnp.arange(marks.shape[-1]), 0), axis=-1)
