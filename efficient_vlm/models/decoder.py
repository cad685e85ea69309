"""The language model: one configurable causal decoder, dense or MoE, built as segments.

A segment is a scan over equal layers at one static sequence length. Between segments visual tokens
may be dropped or merged, so the layers behind, and their key-value cache, get shorter for real.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm import compressors
from efficient_vlm.compressors import POLICIES, Compressor, DecoderState, Signals, VisualTokens
from efficient_vlm.errors import UserError, check_fields, unknown
from efficient_vlm.inference.cache import KVCache, SegmentCache
from efficient_vlm.models.attention import PADDING_SEGMENT, SHARED_SEGMENT, attention_mask
from efficient_vlm.models.decoder_block import DecoderBlock, LayerInputs
from efficient_vlm.models.layers import Dtype, Linear, RMSNorm, logical
from efficient_vlm.models.moe import check_moe
from efficient_vlm.models.stack import layer_of, rematerialised, run_layers, stack_layers

POSITIONS = ("rope", "learned")


class Run(NamedTuple):
    """Layers `start` to `stop` at one sequence length, and what shortens it in front of them."""

    start: int
    stop: int
    reducer: Compressor | None


class Decoder(nn.Module):
    """A causal language model over visual and text tokens.

    The parameters of all layers are one stack, however they are cut into segments: a checkpoint
    serves every method that drops tokens between layers, at any layer.

    Attributes:
      segments: dicts with "layers" and, optionally, "compressor" (name, budget, options): what
        happens to the visual tokens before these layers.
      compressor: name and options of a method that acts inside the decoder (fastv, ...) and places
        its own cuts; the segments then only say how many layers there are.
      mlp_dim: hidden width of the dense feed-forward layer; not used with `moe`.
      moe: fields of `moe.MoE`, or None for a dense decoder.
      position: "rope", or "learned": a table of `max_positions`, added to what enters the first
        layer (fractional positions of merged tokens are interpolated). Learned positions are then
        part of the tokens: a cut further up cannot renumber them, whatever its policy.
      rope_theta, rope_fraction, qk_norm, qk_scale: see `attention.Attention`.
      out_scale: scale of the initial output projections.
      tie_embeddings: whether the head is the transposed embedding table.
      bidirectional_visual: visual tokens see all visual tokens (a prefix-LM) or only earlier ones.
      proportional_attention: add log(size) to the logits of a merged token (ToMe, arXiv 2210.09461,
        eq. 1), so that it weighs as much as the patches it stands for.
      position_policy: positions of visual tokens where the compressor does not state its own:
        "retain" (index in the source grid, text behind the whole grid) or "reindex" (0, 1, 2, ...
        of the slots that are left, padding included, text behind them).
      remat, scan_unroll: see `stack.run_layers`.
    """

    vocab_size: int
    width: int
    num_heads: int
    segments: Sequence[Mapping[str, Any]]
    compressor: Mapping[str, Any] | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    moe: Mapping[str, Any] | None = None
    position: str = "rope"
    max_positions: int | None = None
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    qk_norm: bool = False
    qk_scale: float = 1.0
    out_scale: float = 1.0
    embed_scale: float = 1.0
    tie_embeddings: bool = False
    bidirectional_visual: bool = True
    proportional_attention: bool = False
    position_policy: str = "retain"
    remat: str = "none"
    scan_unroll: int = 1
    dtype: Dtype = jnp.float32

    def setup(self):
        self._check()
        self.table = self.param(
            "embedding",
            logical(nn.initializers.normal(self.embed_scale), "vocab", "embed"),
            (self.vocab_size, self.width),
        )
        if self.position == "learned":
            self.position_table = self.param(
                "position",
                logical(nn.initializers.normal(self.embed_scale), "position", "embed"),
                (self.max_positions, self.width),
            )
        fields = self._block_fields()
        # Named as the first segment was when each had a stack: its checkpoints stay readable.
        self.layers = stack_layers(DecoderBlock, self.num_layers, 2)(**fields, name="segment_0")
        self.reducers = [
            compressors.build(**segment["compressor"]) if segment.get("compressor") else None
            for segment in self.segments
        ]
        self.norm = RMSNorm(dtype=self.dtype)
        if not self.tie_embeddings:
            self.head = Linear(("embed",), (self.vocab_size,), ("vocab",), dtype=self.dtype)

    def _check(self) -> None:
        for i, segment in enumerate(self.segments):
            check_fields(f"model.decoder.segments[{i}]", segment, ("layers", "compressor"))
            if self.compressor is not None and segment.get("compressor"):
                raise UserError(
                    f"model.decoder.segments[{i}].compressor: set beside "
                    f"{self.compressor['name']!r}, which places its own cuts",
                    fix="leave one of the two out",
                )
        if self.position_policy not in POLICIES:
            raise unknown("model.decoder.position_policy", self.position_policy, POLICIES)
        if self.position not in POSITIONS:
            raise unknown("model.decoder.position", self.position, POSITIONS)
        if self.position == "learned" and not self.max_positions:
            raise UserError("model.decoder.max_positions: missing", fix="set it, or position=rope")
        if self.moe is None and self.mlp_dim is None:
            raise UserError("model.decoder.mlp_dim: missing", fix="set mlp_dim or moe")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise UserError(
                f"model.decoder.num_kv_heads: {self.num_kv_heads}",
                allowed=f"divisors of num_heads={self.num_heads}",
            )
        check_moe(self.moe)

    @property
    def num_layers(self) -> int:
        return sum(segment["layers"] for segment in self.segments)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def dim(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @nn.nowrap
    def runs(self, visual: int) -> list[Run]:
        """The stretches of layers at one length, for `visual` tokens that enter the first."""
        total = self.num_layers
        if self.compressor is not None:
            module = compressors.build(**self.compressor, parent=None)
            stages = module.stages(total, visual)
            starts = [0, *(stage.layer for stage in stages)]
            reducers = [None, *(stage.module for stage in stages)]
        else:
            starts, reducers, start = [], [], 0
            for segment in self.segments:
                options = segment.get("compressor")
                starts.append(start)
                reducers.append(compressors.build(**options, parent=None) if options else None)
                start += segment["layers"]
            if reducers[0] is not None and "decoder" in reducers[0].needs:
                raise UserError(
                    f"model.decoder.segments[0].compressor: {reducers[0].label} looks at the layer "
                    "in front of it, and there is none",
                    fix="put a segment without a compressor first",
                )
        return [
            Run(start, stop, reducer)
            for start, stop, reducer in zip(starts, [*starts[1:], total], reducers, strict=True)
        ]

    @nn.nowrap
    def _block_fields(self) -> dict[str, Any]:
        attention = dict(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            rope_theta=self.rope_theta if self.position == "rope" else None,
            rope_fraction=self.rope_fraction,
            out_scale=self.out_scale,
        )
        return dict(attention=attention, mlp_dim=self.mlp_dim, moe=self.moe, dtype=self.dtype)

    def _parameters(self) -> Any:
        return nn.unbox(self.variables["params"]["segment_0"])

    @nn.nowrap
    def _block(self) -> DecoderBlock:
        return DecoderBlock(**self._block_fields(), parent=None)

    def _run(self, x, start, stop, inputs, cache):
        """Layers `start` to `stop`; outputs with a leading axis, without what attention saw."""
        block = self._block()

        def layer(params, x, cache):
            x, (outputs, _) = block.apply({"params": params}, x, inputs, cache)
            return x, outputs

        options = dict(remat=self.remat, unroll=self.scan_unroll)
        return run_layers(layer, self._parameters(), x, start, stop, cache, **options)

    def _one(self, index, x, inputs, cache):
        """One layer apart, with what its attention saw."""
        block = self._block()

        def layer(params, x, cache):
            return block.apply({"params": params}, x, inputs, cache)

        return rematerialised(layer, self.remat)(layer_of(self._parameters(), index), x, cache)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [...] -> [..., width]."""
        return jnp.take(self.table, tokens, axis=0).astype(self.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., width] -> float32 [..., vocab]."""
        x = self.norm(x)
        x = x @ self.table.T.astype(self.dtype) if self.tie_embeddings else self.head(x)
        return x.astype(jnp.float32)

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
        longest: int | None = None,
        probe: jax.Array | None = None,
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
          cache_slots: room for generated tokens; None for no cache.
          longest: static, places of the longest packed conversation; None for all of S.
          probe: int [B, R], text places whose attention to the visual tokens is wanted; only for a
            decoder that keeps all of them.

        Returns:
          text hidden states [B, S, width] before the final norm; statistics of the layers, each a
          (sum, denominator) with a leading axis over all layers, and, with `probe`,
          "visual_attention" [layers, B, R, T]; the caches; and for each run of layers at one length
          the `source` of its visual tokens, int32 [B, N].
        """
        policy = position_policy or self.position_policy
        prompt = segments != PADDING_SEGMENT if prompt is None else prompt
        runs = self.runs(visual.embed.shape[1])
        if self.position == "learned":
            offset, places = self._visual_positions(visual, columns, policy)
            self._check_table(offset + (longest or text.shape[1]) + (cache_slots or 0))
            visual = visual.replace(embed=visual.embed + self._learned(places))
            text = text + self._learned(offset + positions)
        last_prompt = jnp.max(jnp.where(prompt, jnp.arange(prompt.shape[1]), 0), axis=1)
        fixed = dict(
            prompt=prompt,
            first_visual=visual.embed,
            first_text=text,
            first_live=visual.mask,
            scale=self.qk_scale * self.dim**-0.5,
            bidirectional=self.bidirectional_visual,
        )
        outputs, caches, sources, state = [], [], [], None
        for i, run in enumerate(runs):
            if run.reducer is not None:
                key = None if rng is None else jax.random.fold_in(rng, i)
                visual = self._reduce(i, run.reducer, visual, signals.replace(decoder=state), key)
                policy = run.reducer.position_policy or policy
            sources.append(visual.source)
            count = visual.embed.shape[1]
            offset, visual_positions = self._visual_positions(visual, columns, policy)
            shared = jnp.where(visual.mask, SHARED_SEGMENT, PADDING_SEGMENT)
            marks = jnp.concatenate([shared, segments], axis=1)
            index = jnp.arange(marks.shape[1])
            prefix = count if self.bidirectional_visual else 0
            inputs = LayerInputs(
                positions=jnp.concatenate([visual_positions, offset + positions], axis=1),
                mask=attention_mask(index, index, marks, marks, prefix_length=prefix),
                key_bias=self._key_bias(visual, text.shape[1]),
                live=marks != PADDING_SEGMENT,
                probe=None if probe is None else (count + probe, visual.mask),
            )
            x = jnp.concatenate([visual.embed.astype(self.dtype), text], axis=1)
            if i == 0 and self.is_initializing():
                self.layers(x, inputs, None)
            following = runs[i + 1].reducer if i + 1 < len(runs) else None
            x, (kv, *rest), state = self._through(
                run, following, x, inputs, cache_slots, count + last_prompt, fixed
            )
            visual, text = visual.replace(embed=x[:, :count]), x[:, count:]
            outputs.append(rest)
            if cache_slots is not None:
                grow = ((0, 0), (0, cache_slots))
                caches.append(
                    SegmentCache(
                        key=kv[0],
                        value=kv[1],
                        live=jnp.pad(inputs.live, grow),
                        bias=jnp.pad(inputs.key_bias, grow),
                        start=marks.shape[1],
                        text_offset=offset,
                    )
                )
        stats, attention = jax.tree.map(lambda *each: jnp.concatenate(each), *outputs)
        if probe is not None:
            stats["visual_attention"] = attention
        return text, stats, tuple(caches), tuple(sources)

    def _through(self, run, following, x, inputs, cache_slots, last, fixed):
        """One run of layers; the last one apart if the compressor behind it looks at it.

        Returns:
          x; (caches, statistics, attention) with a leading axis over the layers; what `following`
          sees, or None.
        """
        looked_at = following is not None and "decoder" in following.needs
        done = run.stop - looked_at
        parts, state = [], None
        if done > run.start:
            cache = self._empty(x, cache_slots, done - run.start)
            x, part = self._run(x, run.start, done, inputs, cache)
            parts.append(part)
        if looked_at:
            before = x
            x, (part, seen) = self._one(done, x, inputs, self._empty(x, cache_slots))
            parts.append(jax.tree.map(lambda value: value[None], part))
            if getattr(following, "looks", "previous") == "next":
                block = self._block()
                params = {"params": layer_of(self._parameters(), run.stop)}
                seen = block.apply(params, x, inputs.positions, last, method="look")
            state = DecoderState(
                **seen,
                live=inputs.live,
                last=last,
                bias=inputs.key_bias,
                before=before,
                after=x,
                **fixed,
            )
        if len(parts) == 1:
            return x, parts[0], state
        return x, jax.tree.map(lambda *each: jnp.concatenate(each), *parts), state

    def _empty(self, x, cache_slots, *layers) -> tuple[jax.Array, jax.Array] | None:
        """Room for the keys and values of x [B, S, D] and of `cache_slots` more tokens."""
        if cache_slots is None:
            return None
        room = (*layers, x.shape[0], x.shape[1] + cache_slots, self.kv_heads, self.dim)
        return jnp.zeros(room, self.dtype), jnp.zeros(room, self.dtype)

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

    def step(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One token for every row: int [B] -> (float32 logits [B, vocab], the longer cache)."""
        x = self.embed(tokens)[:, None]
        behind = cache.lengths + cache.generated
        if self.position == "learned":
            x = x + self._learned((cache.segments[0].text_offset + behind)[:, None])
        segments, start = [], 0
        for part in cache.segments:
            stop = start + part.key.shape[0]
            slot = part.start + cache.generated
            live = part.live | (jnp.arange(part.live.shape[1]) == slot)
            place = (part.text_offset + behind)[:, None]
            seen = jnp.ones_like(tokens, dtype=bool)[:, None]
            inputs = LayerInputs(place, live[:, None, :], part.bias, seen, write_index=slot)
            x, (kv, *_) = self._run(x, start, stop, inputs, (part.key, part.value))
            segments.append(part.replace(key=kv[0], value=kv[1], live=live))
            start = stop
        cache = cache.replace(segments=tuple(segments), generated=cache.generated + 1)
        return self.logits(x[:, 0]), cache

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
            bias += jnp.log(jnp.maximum(visual.size, 1.0))
        if visual.bias is not None:
            bias += visual.bias
        return jnp.pad(jnp.where(visual.mask, bias, 0.0), ((0, 0), (0, text)))
