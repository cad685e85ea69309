"""The whole model: encoder -> token compressor -> connector -> decoder."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from efficient_vlm.compressors import Signals, VisualTokens
from efficient_vlm.models.cache import KVCache
from efficient_vlm.models.image_inputs import repeat_rows
from efficient_vlm.models.inputs import Layout, ModelInputs
from efficient_vlm.models.visual_stages import VisualStages
from efficient_vlm.models.watched import Watched
from efficient_vlm.nn.kv_cache import CONTIGUOUS, CacheOptions


@struct.dataclass
class Output:
    """What a forward pass gives back.

    Attributes:
      logits: float32 [R, S, vocab], of the token behind each text token.
      stats: (sum, denominator) pairs: router statistics with a leading axis over the layers (none
        for a dense decoder), "selector", see `TextTopK.imitation_loss`, and "penalty", of the
        visual tokens that have one.
      watched: layer -> `watched.Watched`, of the layers that were asked for.
    """

    logits: jax.Array
    stats: dict[str, Any]
    watched: dict[int, Watched] = struct.field(default_factory=dict)


class VisionLanguageModel(VisualStages):
    """A vision-language model with one fixed token budget; other budgets share its parameters.

    Its fields: `vlm_fields.VisionLanguageFields`. The forward pass is `encode`, `compress` and
    `read`, one behind the other; generation runs the same three as programs of their own.
    """

    def setup(self):
        self.language = self.make_decoder()
        if self.encoder is not None:
            self.setup_encoder()

    def __call__(
        self,
        inputs: ModelInputs,
        *,
        rng: jax.Array | None = None,
        encoded: tuple[VisualTokens, Signals] | None = None,
        watch: tuple[int, ...] = (),
    ) -> Output:
        """Next-token logits of a batch of conversations.

        A compressor that looks at the text chooses tokens for each conversation: those that are
        packed in one row then get a row each, and come back to their places. With labels, a
        selector that sees everything learns where the decoder looks (`stats["selector"]`).

        Args:
          inputs: R rows of S text tokens; see `ModelInputs`.
          rng: key for random compressors.
          encoded: what `encode` gives for the pictures, where it is known; it depends on the
            compressor only by the signals that this asks for, and by its size of pictures.
          watch: static, layers of the decoder from 0 whose inside is returned as well.

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
            patches, signals = encoded or self.encode(inputs.pictures)
            visual = self.compress(patches, signals, inputs, layout, rng)
        if self.teaches_selector and inputs.labels is not None and patches is not None:
            probe = _last(inputs.prompts())
        penalty = visual.penalty
        looks = dict(probe=probe, watch=watch)
        hidden, stats, *_ = self.read(visual, inputs, layout, rng=rng, **looks)
        inside = stats.pop("watched", {})
        if probe is not None:
            attention = stats.pop("visual_attention")
            repeats = len(inputs.text) // inputs.picture_rows
            patches = repeat_rows(patches, layout.images, repeats)
            teach = (patches, self.instruction(inputs), attention, inputs.asked(), layout.images)
            stats["selector"] = self.reduce.imitation_loss(*teach)
        if penalty is not None:
            stats["penalty"] = penalty.sum(), visual.mask.sum().astype(jnp.float32)
        if inputs is not packed:
            hidden = packed.packed_again(hidden)
        return Output(self.language.logits(hidden), stats, inside)

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
        watch: tuple[int, ...] = (),
    ) -> tuple:
        """Visual tokens and text through the decoder.

        Args:
          visual: from `compress`, R rows.
          inputs: R rows of text; its pictures are not read.
          layout: from `layout`.
          rng: key for random compressors between segments.
          cache_slots, cache_options, probe, watch: see `Decoder.__call__`.

        Returns:
          Hidden states of the text [R, S, width], and the rest of what `Decoder.__call__` returns.
        """
        return self.language(
            visual.replace(penalty=None),
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
            uneven=inputs.uneven,
            watch=watch,
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
