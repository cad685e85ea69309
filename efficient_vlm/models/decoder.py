"""The language model: one configurable causal decoder, dense or MoE, built as segments.

A segment is a scan over equal layers at one static sequence length. Between segments visual tokens
may be dropped or merged, so the layers behind, and their key-value cache, get shorter for real.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm import compressors
from efficient_vlm.compressors import Signals, VisualTokens
from efficient_vlm.errors import UserError, check_fields, unknown
from efficient_vlm.inference.cache import KVCache, SegmentCache
from efficient_vlm.models.layers import (
    PADDING_SEGMENT,
    SHARED_SEGMENT,
    Attention,
    Dtype,
    Linear,
    RMSNorm,
    attention_mask,
    attention_rows,
    logical,
    scan_layers,
)
from efficient_vlm.models.moe import MoE, SwiGLU, check_moe

POLICIES = ("retain", "reindex")


class DecoderBlock(nn.Module):
    """Pre-norm attention, then SwiGLU or a mixture of experts."""

    attention: Mapping[str, Any]
    mlp_dim: int
    moe: Mapping[str, Any] | None
    dtype: Dtype

    @nn.compact
    def __call__(self, x, positions, mask, key_bias, valid, cache, write_index, probe):
        norm = functools.partial(RMSNorm, dtype=self.dtype)
        y, inner = Attention(**self.attention, dtype=self.dtype, name="attention")(
            norm(name="attention_norm")(x),
            positions,
            mask=mask,
            key_bias=key_bias,
            cache=cache,
            write_index=write_index,
        )
        x = nn.with_logical_constraint(x + y, ("batch", None, "embed"))
        looks = None
        if probe is not None:
            scale = self.attention["qk_scale"] * self.attention["head_dim"] ** -0.5
            looks = attention_rows(inner["query"], inner["key"], *probe, scale)[None]
        y = norm(name="mlp_norm")(x)
        out_scale, stats = self.attention["out_scale"], {}
        if self.moe is None:
            y = SwiGLU(self.mlp_dim, out_scale, self.dtype, name="mlp")(y)
        else:
            layer = MoE(**self.moe, out_scale=out_scale, dtype=self.dtype, name="moe")
            y, stats = layer(y, valid)
        x = nn.with_logical_constraint(x + y, ("batch", None, "embed"))
        return x, (inner["cache"], stats, looks)


class Decoder(nn.Module):
    """A causal language model over visual and text tokens.

    Attributes:
      segments: dicts with "layers" and, optionally, "compressor" (name, budget, options): what
        happens to the visual tokens before these layers.
      mlp_dim: hidden width of the dense feed-forward layer; not used with `moe`.
      moe: fields of `moe.MoE`, or None for a dense decoder.
      rope_theta, rope_fraction, qk_norm, qk_scale: see `layers.Attention`.
      out_scale: scale of the initial output projections.
      tie_embeddings: whether the head is the transposed embedding table.
      bidirectional_visual: visual tokens see all visual tokens (a prefix-LM) or only earlier ones.
      proportional_attention: add log(size) to the logits of a merged token (ToMe, arXiv 2210.09461,
        eq. 1), so that it weighs as much as the patches it stands for.
      position_policy: rotary positions of visual tokens: "retain" (index in the source grid, text
        behind the whole grid) or "reindex" (0, 1, 2, ... of the kept tokens, text behind them).
    """

    vocab_size: int
    width: int
    num_heads: int
    segments: Sequence[Mapping[str, Any]]
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    moe: Mapping[str, Any] | None = None
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
        self.blocks = [
            self._layers(segment["layers"], name=f"segment_{i}")
            for i, segment in enumerate(self.segments)
        ]
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
        if self.position_policy not in POLICIES:
            raise unknown("model.decoder.position_policy", self.position_policy, POLICIES)
        if self.moe is None and self.mlp_dim is None:
            raise UserError("model.decoder.mlp_dim: missing", fix="set mlp_dim or moe")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise UserError(
                f"model.decoder.num_kv_heads: {self.num_kv_heads}",
                allowed=f"divisors of num_heads={self.num_heads}",
            )
        check_moe(self.moe)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def dim(self) -> int:
        return self.head_dim or self.width // self.num_heads

    def _layers(self, length: int, name: str) -> nn.Module:
        attention = dict(
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            qk_norm=self.qk_norm,
            qk_scale=self.qk_scale,
            rope_theta=self.rope_theta,
            rope_fraction=self.rope_fraction,
            out_scale=self.out_scale,
        )
        shared = nn.broadcast
        block = scan_layers(
            DecoderBlock,
            length,
            (shared, shared, shared, shared, 0, shared, shared),
            remat=self.remat,
            unroll=self.scan_unroll,
        )
        return block(
            attention=attention, mlp_dim=self.mlp_dim, moe=self.moe, dtype=self.dtype, name=name
        )

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
        rng: jax.Array | None = None,
        cache_slots: int | None = None,
        probe: jax.Array | None = None,
    ) -> tuple[jax.Array, dict, tuple[SegmentCache, ...]]:
        """Runs visual tokens and, behind them, text through all layers.

        Args:
          visual: tokens in the decoder's width; `source` spans the source grid.
          text: embedded text [B, S, width].
          positions: int [B, S], 0 for the first token of a conversation.
          segments: int [B, S], 1.. for packed conversations, PADDING_SEGMENT for padding.
          columns: patches per row of the source grid.
          signals: what compressors between segments may look at.
          rng: key for random compressors.
          cache_slots: room for generated tokens; None for no cache.
          probe: int [B, R], text places whose attention to the visual tokens is wanted; only for a
            decoder that keeps all of them.

        Returns:
          text hidden states [B, S, width] before the final norm; statistics of the layers, each a
          (sum, denominator) with a leading axis over all layers, and, with `probe`,
          "visual_attention" [layers, B, R, T]; the caches.
        """
        stats, attention, caches = [], [], []
        for i, segment in enumerate(self.segments):
            block, reducer = self.blocks[i], self.reducers[i]
            if reducer is not None:
                key = None if rng is None else jax.random.fold_in(rng, i)
                visual = reducer(visual, signals, rng=key)
            count = visual.embed.shape[1]
            offset, visual_positions = self._visual_positions(visual, columns)
            places = jnp.concatenate([visual_positions, offset + positions], axis=1)
            shared = jnp.where(visual.mask, SHARED_SEGMENT, PADDING_SEGMENT)
            marks = jnp.concatenate([shared, segments], axis=1)
            index = jnp.arange(marks.shape[1])
            prefix = count if self.bidirectional_visual else 0
            mask = attention_mask(index, index, marks, marks, prefix_length=prefix)
            bias = self._key_bias(visual, text.shape[1])
            live = marks != PADDING_SEGMENT
            x = jnp.concatenate([visual.embed.astype(self.dtype), text], axis=1)
            empty = None
            if cache_slots is not None:
                room = (
                    segment["layers"],
                    x.shape[0],
                    x.shape[1] + cache_slots,
                    self.kv_heads,
                    self.dim,
                )
                empty = (jnp.zeros(room, self.dtype), jnp.zeros(room, self.dtype))
            look_from = None if probe is None else (count + probe, visual.mask)
            x, (kv, layer_stats, looks) = block(x, places, mask, bias, live, empty, None, look_from)
            visual, text = visual.replace(embed=x[:, :count]), x[:, count:]
            stats.append(layer_stats)
            attention.append(looks)
            if cache_slots is not None:
                grow = ((0, 0), (0, cache_slots))
                caches.append(
                    SegmentCache(
                        key=kv[0],
                        value=kv[1],
                        live=jnp.pad(live, grow),
                        bias=jnp.pad(bias, grow),
                        start=marks.shape[1],
                        text_offset=offset,
                    )
                )
        stats = jax.tree.map(lambda *layers: jnp.concatenate(layers), *stats)
        if probe is not None:
            stats["visual_attention"] = jnp.concatenate(attention)[:, 0]
        return text, stats, tuple(caches)

    def step(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One token for every row: int [B] -> (float32 logits [B, vocab], the longer cache)."""
        x = self.embed(tokens)[:, None]
        segments = []
        for block, part in zip(self.blocks, cache.segments, strict=True):
            slot = part.start + cache.generated
            live = part.live | (jnp.arange(part.live.shape[1]) == slot)
            place = (part.text_offset + cache.lengths + cache.generated)[:, None]
            seen = jnp.ones_like(tokens, dtype=bool)[:, None]
            state = (part.key, part.value)
            x, (kv, _, _) = block(x, place, live[:, None, :], part.bias, seen, state, slot, None)
            segments.append(part.replace(key=kv[0], value=kv[1], live=live))
        cache = cache.replace(segments=tuple(segments), generated=cache.generated + 1)
        return self.logits(x[:, 0]), cache

    def _visual_positions(self, visual: VisualTokens, columns: int) -> tuple[int, jax.Array]:
        """Rotary position of the first text token, and of the visual tokens [B, T]."""
        if self.position_policy == "reindex":
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
