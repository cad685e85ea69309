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
from efficient_vlm.models.build import frozen
from efficient_vlm.models.decoder_block import NORM_LAYOUTS, DecoderBlock, LayerInputs
from efficient_vlm.models.decoder_stack import DENSE, MAIN, DecoderStack, joined
from efficient_vlm.models.layers import Dtype, Linear, logical, make_norm
from efficient_vlm.models.moe import check_moe
from efficient_vlm.models.placement import Placement, held_mean, place_tokens
from efficient_vlm.models.rotary import check_rope
from efficient_vlm.models.stack import stack_layers

POSITIONS = ("rope", "learned")
LAYER_TYPES = ("global", "local")


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
      rope_theta, rope_fraction, rope_scaling, rope_sections, rope_interleaved: see
        `rotary.rotate`.
      layer_types: "global" or "local" for each layer; None for all global.
      window, window_spares_blocks: keys that a query of a local layer sees, see
        `attention.attention_mask`; window None for all.
      local_rope: theta and scaling of local layers, None for those of the others.
      qk_norm, qk_scale, qkv_bias, out_bias: see `attention.Attention`; `attention_scale` is its
        logit_scale, `attention_softcap` its softcap.
      norm, norm_epsilon, norm_layout: see `decoder_block.DecoderBlock`.
      mlp_gated, activation, mlp_bias: of the dense feed-forward layer, see `moe.FeedForward`.
      dense_layers: layers that are dense where the others are mixtures of experts.
      out_scale: scale of the initial output projections.
      embed_multiplier: text embeddings are multiplied by this (Gemma); visual tokens are not.
      final_softcap: logits l become c * tanh(l / c).
      head_size: entries that the head scores, the first ones of the table; None for all. Molmo's
        table has more rows than its head.
      head_bias: whether the head has a bias.
      deepstack: visual tokens come with this many more features side by side in their channels,
        added behind each of the first layers (arXiv 2406.04334).
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
    rope_scaling: Mapping[str, Any] | None = None
    rope_sections: Sequence[int] | None = None
    rope_interleaved: bool = False
    layer_types: Sequence[str] | None = None
    window: int | None = None
    window_spares_blocks: bool = False
    local_rope: Mapping[str, Any] | None = None
    qk_norm: bool | str = False
    qk_scale: float = 1.0
    qkv_bias: bool = False
    out_bias: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    norm_layout: str = "pre"
    mlp_gated: bool = True
    activation: str = "silu"
    mlp_bias: bool = False
    dense_layers: Sequence[int] = ()
    out_scale: float = 1.0
    embed_scale: float = 1.0
    embed_multiplier: float = 1.0
    final_softcap: float | None = None
    head_size: int | None = None
    head_bias: bool = False
    deepstack: int = 0
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
        blocks = self._blocks()
        dense = sum(self._dense)
        if dense < self.num_layers:
            main = stack_layers(DecoderBlock, self.num_layers - dense, 2)
            self.layers = main(**blocks[MAIN], name=MAIN)
        if dense:
            self.more_layers = stack_layers(DecoderBlock, dense, 2)(**blocks[DENSE], name=DENSE)
        self.reducers = [
            compressors.build(**segment["compressor"]) if segment.get("compressor") else None
            for segment in self.segments
        ]
        self.final_norm = make_norm(self.norm, self.norm_epsilon, dtype=self.dtype, name="norm")
        if not self.tie_embeddings:
            vocab = (self.head_size or self.vocab_size,), ("vocab",)
            self.head = Linear(("embed",), *vocab, dtype=self.dtype, bias=self.head_bias)

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
        if self.norm_layout not in NORM_LAYOUTS:
            raise unknown("model.decoder.norm_layout", self.norm_layout, NORM_LAYOUTS)
        check_moe(self.moe)
        check_rope("model.decoder.rope", self._rope(), self.dim)
        if self.layer_types is not None and len(self.layer_types) != self.num_layers:
            raise UserError(
                f"model.decoder.layer_types: {len(self.layer_types)} for {self.num_layers} layers",
                fix="one of global, local for each layer, or None",
            )
        for kind in self.layer_types or ():
            if kind not in LAYER_TYPES:
                raise unknown("model.decoder.layer_types", str(kind), LAYER_TYPES)
        if self.dense_layers and (self.moe is None or self.mlp_dim is None):
            raise UserError(
                f"model.decoder.dense_layers: {tuple(self.dense_layers)}, but moe or mlp_dim is "
                "missing",
                fix="set both, or dense_layers=()",
            )

    @property
    def _dense(self) -> tuple[bool, ...]:
        return tuple(i in tuple(self.dense_layers) for i in range(self.num_layers))

    @property
    def _local(self) -> tuple[bool, ...] | None:
        if self.layer_types is None or "local" not in self.layer_types:
            return None
        return tuple(kind == "local" for kind in self.layer_types)

    @nn.nowrap
    def _rope(self) -> dict[str, Any] | None:
        if self.position != "rope":
            return None
        spec = dict(theta=self.rope_theta, fraction=self.rope_fraction, scaling=self.rope_scaling)
        return {**spec, "sections": self.rope_sections, "interleaved": self.rope_interleaved}

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
    def _blocks(self) -> dict[str, dict[str, Any]]:
        """Fields of the layers of each stack."""
        spec = self._rope()
        attention = dict(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            logit_scale=self.attention_scale,
            softcap=self.attention_softcap,
            rope=frozen(spec),
            local_rope=frozen({**spec, **self.local_rope}) if self.local_rope and spec else None,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            out_scale=self.out_scale,
        )
        mlp = dict(
            mlp_dim=self.mlp_dim,
            out_scale=self.out_scale,
            gated=self.mlp_gated,
            activation=self.activation,
            bias=self.mlp_bias,
        )
        fields = dict(
            attention=attention,
            mlp=mlp,
            dtype=self.dtype,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            norm_layout=self.norm_layout,
        )
        return {MAIN: {**fields, "moe": self.moe}, DENSE: {**fields, "moe": None}}

    def _stack(self, deepstack: jax.Array | None = None) -> DecoderStack:
        names = ([MAIN] if not all(self._dense) else []) + ([DENSE] if any(self._dense) else [])
        params, blocks = self.variables["params"], self._blocks()
        return DecoderStack(
            {name: blocks[name] for name in names},
            {name: nn.unbox(params[name]) for name in names},
            self._dense,
            self._local,
            remat=self.remat,
            unroll=self.scan_unroll,
            deepstack=deepstack,
        )

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int [...] -> [..., width]."""
        x = jnp.take(self.table, tokens, axis=0).astype(self.dtype)
        return (
            x if self.embed_multiplier == 1.0 else x * jnp.asarray(self.embed_multiplier, x.dtype)
        )

    def logits(self, x: jax.Array) -> jax.Array:
        """[..., width] -> float32 [..., vocab]."""
        x = self.final_norm(x)
        table = self.table[: self.head_size]
        x = x @ table.T.astype(self.dtype) if self.tie_embeddings else self.head(x)
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
        longest: int | None = None,
        probe: jax.Array | None = None,
        placement: Placement | None = None,
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
          placement: where in the text the visual tokens belong, over the slots that `source` of
            `visual` counts; then `positions`, `columns` and `bidirectional_visual` do not matter.
            None for all in front of the text.

        Returns:
          text hidden states [B, S, width] before the final norm; statistics of the layers, each a
          (sum, denominator) with a leading axis over all layers, and, with `probe`,
          "visual_attention" [layers, B, R, T]; the caches; and for each run of layers at one length
          the `source` of its visual tokens, int32 [B, N].
        """
        policy = position_policy or self.position_policy
        prompt = segments != PADDING_SEGMENT if prompt is None else prompt
        runs = self.runs(visual.embed.shape[1])
        deep, slots = None, visual
        if self.deepstack:
            deep = visual.embed.reshape(*visual.embed.shape[:2], self.deepstack + 1, self.width)
            visual, deep = visual.replace(embed=deep[:, :, 0]), deep[:, :, 1:]
        if self.position == "learned":
            place = self._place(visual, positions, segments, prompt, columns, policy, placement)
            lengths = (longest or text.shape[1]) + (cache_slots or 0)
            self._check_table(visual.source.shape[1] * (policy == "retain") + lengths)
            visual = visual.replace(embed=visual.embed + self._learned(place.visual_position))
            text = text + self._learned(place.text_position)
        last_prompt = jnp.max(jnp.where(prompt, jnp.arange(prompt.shape[1]), 0), axis=1)
        scale = self.attention_scale or self.qk_scale * self.dim**-0.5
        fixed = dict(
            prompt=prompt,
            first_visual=visual.embed,
            first_text=text,
            first_live=visual.mask,
            scale=scale,
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
            place = self._place(visual, positions, segments, prompt, columns, policy, placement)
            inputs, index = self._inputs(visual, place, segments)
            if probe is not None:
                inputs = inputs.replace(probe=(count + probe, visual.mask))
            x = jnp.concatenate([visual.embed.astype(self.dtype), text], axis=1)
            if i == 0 and self.is_initializing():
                for layers in (getattr(self, name, None) for name in ("layers", "more_layers")):
                    if layers is not None:
                        layers(x, inputs, None)
            following = runs[i + 1].reducer if i + 1 < len(runs) else None
            stack = self._stack(_deep_of(deep, slots, visual) if i and deep is not None else deep)
            x, (kv, *rest), state = self._through(
                stack, run, following, x, inputs, cache_slots, count + last_prompt, fixed
            )
            visual, text = visual.replace(embed=x[:, :count]), x[:, count:]
            outputs.append((None, *rest))
            if cache_slots is not None:
                grow = ((0, 0), (0, cache_slots))
                behind = place.next_index[:, None] + jnp.arange(cache_slots)
                caches.append(
                    SegmentCache(
                        key=kv[0],
                        value=kv[1],
                        live=jnp.pad(inputs.live, grow),
                        bias=jnp.pad(inputs.key_bias, grow),
                        index=jnp.concatenate([index, behind.astype(index.dtype)], axis=1),
                        behind=place.next_position,
                        start=x.shape[1],
                    )
                )
        _, stats, attention = joined(outputs)
        if probe is not None:
            stats["visual_attention"] = attention
        return text, stats, tuple(caches), tuple(sources)

    def _place(self, visual, positions, segments, prompt, columns, policy, placement) -> Placement:
        """Places of what is left, under a policy; see `Placement`."""
        if placement is not None:
            return place_tokens(placement, visual, segments != PADDING_SEGMENT, policy)
        offset, visual_position = self._visual_positions(visual, columns, policy)
        rows, count = visual.mask.shape
        index = jnp.broadcast_to(
            jnp.arange(count + positions.shape[1]), (rows, count + positions.shape[1])
        )
        length = jnp.max(jnp.where(prompt, 1 + jnp.arange(prompt.shape[1]), 0), axis=1)
        block = 1 if self.bidirectional_visual else 0
        return Placement(
            visual_index=index[:, :count],
            text_index=index[:, count:],
            visual_position=visual_position,
            text_position=offset + positions,
            visual_block=jnp.full((rows, count), block),
            text_block=jnp.zeros_like(positions),
            next_index=count + length,
            next_position=offset + length,
        )

    def _inputs(self, visual, place: Placement, segments) -> tuple[LayerInputs, jax.Array]:
        """What the layers of a run get, and the place of each token in the prompt."""
        shared = jnp.where(visual.mask, SHARED_SEGMENT, PADDING_SEGMENT)
        marks = jnp.concatenate([shared, segments], axis=1)
        index, positions, blocks = (
            jnp.concatenate(
                [getattr(place, f"{part}_{name}") for part in ("visual", "text")], axis=1
            )
            for name in ("index", "position", "block")
        )
        options = dict(q_blocks=blocks, kv_blocks=blocks)
        local = None
        if self._local is not None and self.window is not None:
            near = dict(window=self.window, window_spares_blocks=self.window_spares_blocks)
            local = attention_mask(index, index, marks, marks, **near, **options)
        inputs = LayerInputs(
            positions=positions,
            mask=attention_mask(index, index, marks, marks, **options),
            key_bias=self._key_bias(visual, segments.shape[1]),
            live=marks != PADDING_SEGMENT,
            local_mask=local,
        )
        return inputs, index

    def _through(self, stack, run, following, x, inputs, cache_slots, last, fixed):
        """One run of layers; the last one apart if the compressor behind it looks at it.

        Returns:
          x; (caches, statistics, attention) with a leading axis over the layers; what `following`
          sees, or None.
        """
        looked_at = following is not None and "decoder" in following.needs
        done = run.stop - looked_at
        parts, state = [], None
        if done > run.start:
            cache = self._empty(x, cache_slots, stack, done - run.start)
            x, part = stack.run(x, run.start, done, inputs, cache)
            parts.append(part)
        if looked_at:
            before = x
            x, part, seen = stack.one(done, x, inputs, self._empty(x, cache_slots))
            parts.append(part)
            if getattr(following, "looks", "previous") == "next":
                seen = stack.look(run.stop, x, inputs.positions, last)
            state = DecoderState(
                **seen,
                live=inputs.live,
                last=last,
                bias=inputs.key_bias,
                before=before,
                after=x,
                **fixed,
            )
        return x, joined(parts), state

    def _empty(self, x, cache_slots, stack=None, layers=None) -> tuple | None:
        """Room for keys and values of x [B, S, D] and of `cache_slots` more tokens; of several
        layers one array, or for split ones a tuple."""
        if cache_slots is None:
            return None
        room = (x.shape[0], x.shape[1] + cache_slots, self.kv_heads, self.dim)
        if layers is None:
            part = jnp.zeros(room, self.dtype)
        elif stack.split:
            part = (jnp.zeros(room, self.dtype),) * layers
        else:
            part = jnp.zeros((layers, *room), self.dtype)
        return part, part

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
        if self.position == "learned":
            x = x + self._learned((cache.segments[0].behind + cache.generated)[:, None])
        stack, segments, start = self._stack(), [], 0
        for part in cache.segments:
            stop = start + len(part.key)
            slot = part.start + cache.generated
            live = part.live | (jnp.arange(part.live.shape[1]) == slot)
            place = (part.behind + cache.generated)[:, None]
            seen = jnp.ones_like(tokens, dtype=bool)[:, None]
            inputs = LayerInputs(place, live[:, None, :], part.bias, seen, write_index=slot)
            if self._local is not None and self.window is not None:
                here = jax.lax.dynamic_slice_in_dim(part.index, slot, 1, axis=1)
                near = live & (part.index > here - self.window)
                inputs = inputs.replace(local_mask=near[:, None, :])
            x, (kv, *_) = stack.run(x, start, stop, inputs, (part.key, part.value))
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


def _deep_of(deep: jax.Array, slots: VisualTokens, visual: VisualTokens) -> jax.Array:
    """The features [B, T, n, D] of the tokens that are left, from those of all that entered."""
    each = jnp.maximum(slots.source, 0)[:, :, None, None]
    return held_mean(visual, jnp.take_along_axis(deep, each, axis=1))
