"""The language model: one configurable causal decoder, dense or MoE, built as segments.

A segment is a scan over equal layers at one static sequence length. Between segments visual tokens
may be dropped or merged, so the layers behind, and their key-value cache, get shorter for real.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm import compressors
from efficient_vlm.compressors import DecoderState, Signals, VisualTokens
from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import make_mask
from efficient_vlm.models.cache import KVCache, SegmentCache, make_segment
from efficient_vlm.models.decoder_fields import DecoderFields
from efficient_vlm.models.decoder_stack import DENSE, LAYERS, DecoderStack, joined
from efficient_vlm.models.prompt_layout import Placement, held_mean, place_tokens
from efficient_vlm.models.watched import pieces, watched
from efficient_vlm.nn import kv_cache
from efficient_vlm.nn.attention import PADDING_SEGMENT, SHARED_SEGMENT
from efficient_vlm.nn.decoder_block import DecoderBlock, LayerInputs
from efficient_vlm.nn.kv_cache import CONTIGUOUS, CacheOptions
from efficient_vlm.nn.linear import Linear, head_product, logical, take, weight_of
from efficient_vlm.nn.norms import make_norm
from efficient_vlm.nn.stack import make_layers


class Decoder(DecoderFields):
    """A causal language model over visual and text tokens.

    The parameters of all layers are one stack, however they are cut into segments: a checkpoint
    serves every method that drops tokens between layers, at any layer. Its fields:
    `decoder_fields.DecoderFields`.
    """

    def setup(self):
        self.check()
        init, shape = nn.initializers.normal(self.embed_scale), (self.vocab_size, self.width)
        self.table = weight_of(self, "embedding", init, shape, ("vocab", "embed"), jnp.float32)
        if self.position == "learned":
            self.position_table = self.param(
                "position",
                logical(nn.initializers.normal(self.embed_scale), "position", "embed"),
                (self.max_positions, self.width),
            )
        blocks = self.blocks()
        dense = sum(self.dense_at)
        if dense < self.num_layers:
            count = self.num_layers - dense
            self.layers = make_layers(DecoderBlock, count, 2, blocks[LAYERS], LAYERS, self.stacked)
        if dense:
            fields = (dense, 2, blocks[DENSE], DENSE, self.stacked)
            self.more_layers = make_layers(DecoderBlock, *fields)
        self.reducers = [
            compressors.build(**segment["compressor"]) if segment.get("compressor") else None
            for segment in self.segments
        ]
        self.final_norm = make_norm(self.norm, self.norm_epsilon, dtype=self.dtype, name="norm")
        if not self.tie_embeddings:
            vocab = (self.head_size or self.vocab_size,), ("vocab",)
            self.head = Linear(("embed",), *vocab, dtype=self.dtype, bias=self.head_bias)

    def _stack(self, deepstack: jax.Array | None = None) -> DecoderStack:
        params, blocks = self.variables["params"], self.blocks()
        names = [name for name in (LAYERS, DENSE) if name in params]
        return DecoderStack(
            {name: blocks[name] for name in names},
            {name: nn.unbox(params[name]) for name in names},
            self.path,
            self.dense_at,
            self.local_at,
            remat=self.remat,
            unroll=self.scan_unroll,
            deepstack=deepstack,
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [...] -> [..., width]."""
        x = take(self.table, tokens, self.dtype)
        return (
            x if self.embed_multiplier == 1.0 else x * jnp.asarray(self.embed_multiplier, x.dtype)
        )

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., width] -> float32 [..., vocab]."""
        x = self.final_norm(x)
        if self.tie_embeddings:
            x = head_product(x, self.table, self.dtype, self.head_size)
        else:
            x = self.head(x)
        x = x.astype(jnp.float32)
        return (
            x
            if self.final_softcap is None
            else self.final_softcap * jnp.tanh(x / self.final_softcap)
        )

    def __call__(
        self,
        visual: VisualTokens,
        text: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        *,
        columns: int,
        signals: Signals,
        prompt: jax.Array | None = None,
        position_policy: str | None = None,
        rng: jax.Array | None = None,
        cache_slots: int | None = None,
        cache_options: CacheOptions = CONTIGUOUS,
        longest: int | None = None,
        probe: jax.Array | None = None,
        placement: Placement | None = None,
        uneven: bool = False,
        watch: tuple[int, ...] = (),
    ) -> tuple[jax.Array, dict, tuple[SegmentCache, ...], tuple[jax.Array, ...]]:
        """Runs visual tokens and, behind them, text through all layers.

        Args:
          visual: tokens in the decoder's width; `source` spans the source grid.
          text: embedded text [B, S, width].
          positions: int [B, S], 0 for the first token of a conversation.
          segments: int [B, S], 1.. for packed conversations, PADDING_SEGMENT for padding.
          columns: patches per row of the source grid.
          signals: what compressors between segments may look at.
          prompt: bool [B, S], text in front of the answer, whose attention methods inside the
            decoder may use; None for all that is not padding.
          position_policy: of the visual tokens; None for the decoder's own.
          rng: key for random compressors.
          cache_slots: room for tokens behind the prompts; None for no cache.
          cache_options: how the cache stores them.
          longest: static, places of the longest packed conversation; None for all of S.
          probe: int [B, R], text places whose attention to the visual tokens is wanted; only for a
            decoder that keeps all of them.
          placement: where in the text the visual tokens belong, over the slots that `source` of
            `visual` counts; then `positions`, `columns` and `bidirectional_visual` do not matter.
            None for all in front of the text.
          uneven: static, see `ModelInputs.uneven`.
          watch: static, layers from 0 whose hidden states and attention are wanted, without a
            cache.

        Returns:
          text hidden states [B, S, width] before the final norm; statistics of the layers, each a
          (sum, denominator) with a leading axis over all layers, and, with `probe`,
          "visual_attention" [layers, B, R, T], with `watch`, "watched", layer -> `Watched`; the
          caches; and for each run of layers at one length
          the `source` of its visual tokens, int32 [B, N].
        """
        policy = position_policy or self.position_policy
        prompt = segments != PADDING_SEGMENT if prompt is None else prompt
        runs = self.runs(visual.embed.shape[1], uneven)
        deep, slots = None, visual
        if self.deepstack:
            deep = visual.embed.reshape(*visual.embed.shape[:2], self.deepstack + 1, self.width)
            visual, deep = visual.replace(embed=deep[:, :, 0]), deep[:, :, 1:]
        if self.position == "learned":
            place = self._place(visual, positions, segments, prompt, columns, policy, placement)
            if placement is None:  # Else whoever placed the tokens knows how far they reach.
                lengths = (longest or text.shape[1]) + (cache_slots or 0)
                self._check_table(visual.source.shape[1] * (policy == "retain") + lengths)
            visual = visual.replace(embed=visual.embed + self._learned(place.visual_position))
            text = text + self._learned(place.text_position)
        last_prompt = jnp.max(jnp.where(prompt, jnp.arange(prompt.shape[1]), 0), axis=1)
        lengths = jnp.sum(segments != PADDING_SEGMENT, axis=1, dtype=jnp.int32)
        scale = self.attention_scale or self.qk_scale * self.dim**-0.5
        fixed = dict(
            prompt=prompt,
            first_visual=visual.embed,
            first_text=text,
            first_live=visual.mask,
            scale=scale,
            softcap=self.attention_softcap,
            bidirectional=self.bidirectional_visual,
        )
        room = None if cache_slots is None else (cache_slots, cache_options)
        outputs, caches, sources, state, inside = [], [], [], None, {}
        for i, run in enumerate(runs):
            if run.reducer is not None:
                key = None if rng is None else jax.random.fold_in(rng, i)
                visual = self._reduce(i, run.reducer, visual, signals.replace(decoder=state), key)
                policy = run.reducer.position_policy or policy
            sources.append(visual.source)
            count = visual.embed.shape[1]
            place = self._place(visual, positions, segments, prompt, columns, policy, placement)
            inputs = self._inputs(visual, place, segments)
            if probe is not None:
                inputs = inputs.replace(probe=(count + probe, visual.mask))
            x = jnp.concatenate([visual.embed.astype(self.dtype), text], axis=1)
            if i == 0 and self.is_initializing():
                for layers in (getattr(self, name, None) for name in ("layers", "more_layers")):
                    if layers is not None:
                        layers(x, inputs, None)
                if len(runs) == 1 and probe is None:
                    # Every parameter is there; running the layers would only take time.
                    return text, {}, (), (visual.source,)
            following = runs[i + 1].reducer if i + 1 < len(runs) else None
            stack = self._stack(_deep_of(deep, slots, visual) if i and deep is not None else deep)
            x, (kv, *rest), state, seen = self._through(
                stack, run, following, x, inputs, room, count + last_prompt, fixed, watch
            )
            own = (inputs, scale, self.attention_softcap)
            inside |= {layer: watched(visual, *found, *own) for layer, found in seen.items()}
            visual, text = visual.replace(embed=x[:, :count]), x[:, count:]
            outputs.append((None, *rest))
            if room is not None:
                paged = cache_options.kind == "paged"
                caches.append(make_segment(kv, inputs, place, visual.mask, lengths, paged))
        _, stats, attention = joined(outputs)
        if probe is not None:
            stats["visual_attention"] = attention
        if watch:
            stats["watched"] = inside
        return text, stats, tuple(caches), tuple(sources)

    def _place(self, visual, positions, segments, prompt, columns, policy, placement) -> Placement:
        """Places of what is left, under a policy; see `Placement`."""
        if placement is not None:
            live = segments != PADDING_SEGMENT
            return place_tokens(placement, visual, live, policy, segments)
        offset, visual_position = self._visual_positions(visual, columns, policy)
        rows, count = visual.mask.shape
        length = jnp.max(jnp.where(prompt, 1 + jnp.arange(prompt.shape[1]), 0), axis=1)
        block = 1 if self.bidirectional_visual else 0
        return Placement(
            visual_index=jnp.broadcast_to(jnp.arange(count), (rows, count)),
            # The first token of every conversation that is packed here stands behind the pictures.
            text_index=count + positions,
            visual_position=visual_position,
            text_position=offset + positions,
            visual_block=jnp.full((rows, count), block),
            text_block=jnp.zeros_like(positions),
            next_index=count + length,
            next_position=offset + length,
        )

    def _inputs(self, visual, place: Placement, segments) -> LayerInputs:
        """What the layers of a run get."""
        own = SHARED_SEGMENT if place.visual_segment is None else place.visual_segment
        own = jnp.where(visual.mask, own, PADDING_SEGMENT)
        marks = jnp.concatenate([own, segments], axis=1)
        index, positions, blocks = (
            jnp.concatenate(
                [getattr(place, f"{part}_{name}") for part in ("visual", "text")], axis=1
            )
            for name in ("index", "position", "block")
        )
        options = dict(
            causal=True,
            q_positions=index,
            kv_positions=index,
            q_segments=marks,
            kv_segments=marks,
            shared_segment=SHARED_SEGMENT,
            q_blocks=blocks,
            kv_blocks=blocks,
        )
        sizes, local = (index.shape[1], index.shape[1]), None
        if self.local_at is not None and self.window is not None:
            near = dict(window=self.window, window_spares_blocks=self.window_spares_blocks)
            local = make_mask(*sizes, **near, **options)
        return LayerInputs(
            positions=positions,
            mask=make_mask(*sizes, **options),
            key_bias=self._key_bias(visual, segments.shape[1]),
            live=marks != PADDING_SEGMENT,
            local_mask=local,
        )

    def _through(self, stack, run, following, x, inputs, room, last, fixed, watch):
        """One run of layers; those of `watch` apart, and the last if the compressor behind it looks
        at it.

        Returns:
          x; (caches, statistics, attention) with a leading axis over the layers; what `following`
          sees, or None; layer of `watch` -> (x behind it, what its attention saw).
        """
        looked_at = following is not None and "decoder" in following.needs
        parts, state, found = [], None, {}
        for first, end in pieces(run.start, run.stop - looked_at, watch):
            if first in watch:
                x, part, seen = stack.one(first, x, inputs, self._empty(x, room))
                found[first] = x, seen
            else:
                cache = self._empty(x, room, stack, end - first)
                x, part = stack.run(x, first, end, inputs, cache)
            parts.append(part)
        if looked_at:
            before, final = x, run.stop - 1
            x, part, seen = stack.one(final, x, inputs, self._empty(x, room))
            parts.append(part)
            if final in watch:
                found[final] = x, seen
            if getattr(following, "looks", "previous") == "next":
                seen = stack.look(run.stop, x, inputs, last)
            state = DecoderState(
                **seen,
                live=inputs.live,
                last=last,
                bias=inputs.key_bias,
                before=before,
                after=x,
                **fixed,
            )
        return x, joined(parts), state, found

    def _empty(self, x, room, stack=None, layers=None) -> tuple | None:
        """An empty cache for x [B, S, D] and more tokens, `room` being (how many, options) or None;
        of several layers one array, or for split ones a tuple."""
        if room is None:
            return None
        slots, options = x.shape[1] + room[0], room[1]
        cache = kv_cache.empty(options, len(x), slots, self.kv_heads, self.dim, self.dtype)
        if layers is None:
            return cache
        if stack.split:
            return tuple((part,) * layers for part in cache)
        return tuple(jnp.broadcast_to(part, (layers, *part.shape)) for part in cache)

    def _reduce(self, i, reducer, visual, signals, rng) -> VisualTokens:
        if self.compressor is None:
            return self.reducers[i](visual, signals, rng=rng)
        # Methods that place their own cuts have no parameters.
        return reducer.apply({}, visual, signals, rng=rng)

    @nn.nowrap
    def _check_table(self, needed: int) -> None:
        if needed > self.max_positions:
            raise UserError(
                f"model.decoder.max_positions: {self.max_positions}, but visual tokens, text and "
                f"answer need {needed}",
                fix=f"set it to {needed} or more, keep fewer visual tokens, or position=rope",
            )

    def _learned(self, positions: jax.Array) -> jax.Array:
        """[B, S] positions -> [B, S, width], linear between the rows of the table."""
        positions = jnp.clip(positions.astype(jnp.float32), 0, self.max_positions - 1)
        low = jnp.floor(positions).astype(jnp.int32)
        high = jnp.minimum(low + 1, self.max_positions - 1)
        part = (positions - low)[..., None]
        table = self.position_table
        return (table[low] * (1 - part) + table[high] * part).astype(self.dtype)

    def extend(
        self, tokens: jax.Array, cache: KVCache, counts: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Further tokens after those in a cache, each row at its own length.

        Args:
          tokens: int32 [B, S].
          cache: with room for them (`KVCache.room`).
          counts: int32 [B], how many of the S tokens each row has, the first ones; None for all.

        Returns:
          float32 logits [B, S, vocab] after each token, without meaning past `counts`, and the
          longer cache. Tokens past the room of a row are not stored: their logits are NaN.
        """
        rows, new = tokens.shape
        counts = jnp.full(rows, new, jnp.int32) if counts is None else counts
        window = None if self.local_at is None else self.window
        inputs = [part.inputs(cache.lengths, counts, new, window) for part in cache.segments]
        x = self.embed(tokens)
        if self.position == "learned":
            x = x + self._learned(inputs[0].positions)
        stack, segments, start = self._stack(), [], 0
        for part, given in zip(cache.segments, inputs, strict=True):
            stop = start + part.num_layers
            x, (parts, *_) = stack.run(x, start, stop, given, part.parts)
            segments.append(part.replace(parts=parts))
            start = stop
        longer = cache.replace(segments=tuple(segments), lengths=cache.lengths + counts)
        stored = cache.lengths[:, None] + jnp.arange(new) < cache.room
        return jnp.where(stored[..., None], self.logits(x), jnp.nan), longer

    def step(
        self, tokens: jax.Array, cache: KVCache, counts: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """`extend` by one token a row: int [B] -> (float32 logits [B, vocab], the longer cache)."""
        logits, cache = self.extend(tokens[:, None], cache, counts)
        return logits[:, 0], cache

    def _visual_positions(
        self, visual: VisualTokens, columns: int, policy: str
    ) -> tuple[int, jax.Array]:
        """Position of the first text token, and of the visual tokens [B, T]."""
        if policy == "reindex":
            count = visual.embed.shape[1]
            shape = visual.mask.shape
            return count, jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32), shape)
        row, column = visual.position[..., 0], visual.position[..., 1]
        return visual.source.shape[1], row * columns + column

    def _key_bias(self, visual: VisualTokens, text: int) -> jax.Array:
        """float32 [B, T + text], added to the attention logits of each key."""
        bias = jnp.zeros(visual.mask.shape, jnp.float32)
        if self.proportional_attention:
            bias += visual.log_sizes()
        if visual.bias is not None:
            bias += visual.bias
        return jnp.pad(jnp.where(visual.mask, bias, 0.0), ((0, 0), (0, text)))


def _deep_of(deep: jax.Array, slots: VisualTokens, visual: VisualTokens) -> jax.Array:
    """The features [B, T, n, D] of the tokens that are left, from those of all that entered."""
    each = jnp.maximum(slots.source, 0)[:, :, None, None]
    return held_mean(visual, jnp.take_along_axis(deep, each, axis=1))
