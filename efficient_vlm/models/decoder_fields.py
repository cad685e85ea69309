"""The fields of the decoder, checked, and the plan of its layers that follows from them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm import checks, compressors
from efficient_vlm.compressors import POLICIES, Compressor
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.fields import frozen
from efficient_vlm.models.decoder_stack import DENSE, LAYERS
from efficient_vlm.nn.decoder_block import NORM_LAYOUTS
from efficient_vlm.nn.linear import Dtype
from efficient_vlm.nn.moe import check_moe
from efficient_vlm.nn.rotary import check_rope

POSITIONS = ("rope", "learned")
LAYER_TYPES = ("global", "local")


class Run(NamedTuple):
    """Layers `start` to `stop` at one sequence length, and what shortens it in front of them."""

    start: int
    stop: int
    reducer: Compressor | None


class DecoderFields(nn.Module):
    """What a `decoder.Decoder` is made of: its fields, checked, and the plan of its layers.

    Attributes:
      vocab_size: rows of the embedding table.
      width: channels of a token.
      num_heads, num_kv_heads: heads of queries, and of keys and values; None for as many.
      head_dim: channels of a head; None for width / num_heads.
      segments: dicts with "layers" and, optionally, "compressor" (name, budget, options): what
        happens to the visual tokens before these layers.
      compressor: name and options of a method that acts inside the decoder (fastv, ...) and places
        its own cuts; the segments then only say how many layers there are.
      mlp_dim: hidden width of the dense feed-forward layer; not used with `moe`.
      moe: fields of `moe.MoE`, or None for a dense decoder.
      position: "rope", or "learned": a table of `max_positions`, added to what enters the first
        layer (fractional positions of merged tokens are interpolated). Learned positions are then
        part of the tokens: a cut further up cannot renumber them, whatever its policy.
      max_positions: rows of the table of learned positions.
      rope_theta: base of rotary positions (arXiv 2104.09864).
      rope_fraction: share of a head's channels that is rotated.
      rope_scaling: {"type", ...} of longer contexts, see `rotary.frequencies`; None for none.
      rope_sections: frequencies for time, row and column (M-RoPE, arXiv 2409.12191, section 2.1);
        None for one position.
      rope_interleaved: whether these three take turns, or stand in chunks.
      layer_types: "global" or "local" for each layer; None for all global.
      window: keys that a query of a local layer sees, itself the last; None for all.
      window_spares_blocks: whether tokens of a block that see each other do so outside the window.
      local_rope: theta and scaling of local layers, None for those of the others.
      qk_norm: norm of queries and keys: False, True (each head by itself) or "full".
      qk_scale: factor of the usual 1 / sqrt(head_dim) of attention logits.
      qkv_bias, out_bias: whether the products of attention have biases.
      attention_scale: factor of the logits in place of qk_scale / sqrt(head_dim).
      attention_softcap: attention logits l become c * tanh(l / c).
      norm, norm_epsilon: "rms", "rms_plus1" or "layernorm", and what is added to the variance.
      norm_layout: where norms stand in a layer: "pre", "post", "sandwich" or "parallel".
      mlp_gated: whether the dense feed-forward layer has a gate.
      activation: of the feed-forward layers: "silu", "gelu_tanh" and others of
        `mlp.ACTIVATIONS`.
      mlp_bias: whether the products of the dense feed-forward layer have biases.
      dense_layers: layers that are dense where the others are mixtures of experts.
      out_scale: scale of the initial output projections.
      embed_scale: standard deviation of the initial embedding tables.
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
      stacked: whether the parameters of all layers are created as stacks, or layer by layer
        (`stack.SplitLayers`); either kind can be given.
      remat: what the backward pass computes again: "none", "dots" (all but products) or "full".
      scan_unroll: layers that are written out in each turn of the loop over layers.
      dtype: of activations, that of the model.
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
    stacked: bool = True
    remat: str = "none"
    scan_unroll: int = 1
    dtype: Dtype = jnp.float32

    def check(self) -> None:
        for i, segment in enumerate(self.segments):
            checks.known_fields(f"model.decoder.segments[{i}]", segment, ("layers", "compressor"))
            if self.compressor is not None and segment.get("compressor"):
                raise UserError(
                    f"model.decoder.segments[{i}].compressor: set beside "
                    f"{short(self.compressor['name'])}, which places its own cuts",
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
        check_rope("model.decoder.rope", self.rope_spec(), self.dim)
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
    def dense_at(self) -> tuple[bool, ...]:
        return tuple(i in tuple(self.dense_layers) for i in range(self.num_layers))

    @property
    def local_at(self) -> tuple[bool, ...] | None:
        if self.layer_types is None or "local" not in self.layer_types:
            return None
        return tuple(kind == "local" for kind in self.layer_types)

    @nn.nowrap
    def rope_spec(self) -> dict[str, Any] | None:
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
    def runs(self, visual: int, uneven: bool = False) -> list[Run]:
        """The stretches of layers at one length.

        Args:
          visual: tokens that enter the first layer.
          uneven: whether rows have different numbers of them, see `ModelInputs.uneven`.
        """
        total = self.num_layers
        if self.compressor is not None:
            module = compressors.build(**self.compressor, parent=None)
            if uneven and hasattr(module, "uneven"):
                module = module.clone(uneven=True)
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
    def blocks(self) -> dict[str, dict[str, Any]]:
        """Fields of the layers of each stack."""
        spec = self.rope_spec()
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
        return {LAYERS: {**fields, "moe": self.moe}, DENSE: {**fields, "moe": None}}
