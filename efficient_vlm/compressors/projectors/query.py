"""Projectors with learned queries in several layers: perceiver, qformer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from efficient_vlm import checks
from efficient_vlm.compressors.projectors.mlp import Parametric, exact_gelu
from efficient_vlm.compressors.projectors.resampler import query_tokens
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import VisualTokens, zero_padding
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.nn.cross_attention import cross_attention
from efficient_vlm.nn.norms import rms_normalised
from efficient_vlm.shapes import Array

STYLES = ("idefics2", "flamingo")


class Queries(Parametric):
    """Base class of both methods, which use the first `budget` of `num_queries` learned queries.

    Positions, sizes and `source` as in `resampler` (`query_tokens`), from the attention of the
    queries to the patches, averaged over heads and layers, with each head's row normalised over the
    patches. In a row with r < budget real patches only the first r queries are real, and they do
    not attend to the others: the row equals that of budget r. At the full budget the tokens are
    unchanged; the parameters exist nevertheless.

    Attributes:
      num_queries: number of learned queries, the largest budget below the full one.
      num_heads: must divide the width.
      depth: number of layers.
    """

    num_queries: int = 64
    num_heads: int = 4
    depth: int = 3

    makes_tokens = True
    _query_deviation = 1.0

    @nn.nowrap
    def check_options(self):
        for name in ("num_queries", "num_heads", "depth"):
            checks.whole(f"compressor.{name}", getattr(self, name))

    @nn.nowrap
    def reachable(self, grid):
        num_tokens = grid[0] * grid[1]
        budgets = range(min(self.num_queries, num_tokens), 0, -1)
        return (num_tokens, *(b for b in budgets if b != num_tokens))

    @nn.compact
    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        num_tokens, width = tokens.embed.shape[1:]
        if width % self.num_heads:
            raise UserError(
                f"compressor.num_heads: {self.num_heads} does not divide the width {width}",
                allowed=f"a divisor of {width}",
            )
        if self.budget == num_tokens and not self.is_initializing():
            return tokens
        real = zero_padding(tokens)
        shape, init = (self.num_queries, width), nn.initializers.normal(self._query_deviation)
        queries = self.weight("queries", init, shape, ("queries", "embed"), real.embed.dtype)
        queries = queries[: self.budget]
        slots = jnp.arange(len(queries)) < jnp.sum(real.mask, axis=1, keepdims=True)
        queries = jnp.broadcast_to(queries, (real.mask.shape[0], *queries.shape))
        embed, attention = self._layers(queries, slots, real)
        if self.budget == num_tokens:
            return tokens
        return query_tokens(real, embed, jax.lax.stop_gradient(attention))

    @nn.nowrap
    def _layers(
        self, x: Float[Array, "B K D"], slots: Bool[Array, "B K"], tokens: VisualTokens
    ) -> tuple[Float[Array, "B K D"], Float[Array, "B K T"]]:
        """Queries, of which `slots` are real, after all layers, and their attention to patches."""
        raise NotImplementedError

    @nn.nowrap
    def _attend(self, name, x, keys, mask, bias, *, affine, patches=0):
        """Multi-head attention of x [B, K, D] to keys [B, S, D].

        Args:
          name: of the parameters.
          x: queries.
          keys: inputs of keys and values.
          mask: bool [B, S], real keys.
          bias: float32 [B, S] on the logits, or None.
          affine: whether the four products have a bias.
          patches: number of patches, which are the first keys.

        Returns:
          [B, K, D], and float32 [B, K, patches]: attention among the patches, mean over heads;
          None without patches.
        """
        width = x.shape[-1]

        def heads(part, y):
            axes = ("embed", "heads")
            y = self.dense(f"{name}_{part}", y, width, axes, bias=affine)
            return y.reshape(*y.shape[:-1], self.num_heads, width // self.num_heads)

        q, k, v = heads("query", x), heads("key", keys), heads("value", keys)
        attended = cross_attention(q, k, v, mask, bias)
        mixed = attended.values.reshape(x.shape)
        y = self.dense(f"{name}_out", mixed, width, ("mlp", "embed"), bias=affine)
        if not patches:
            return y, None
        logits = jax.lax.stop_gradient(attended.logits[..., :patches])
        return y, jax.nn.softmax(logits, axis=-1).mean(axis=1)


class Perceiver(Queries):
    """`perceiver`: latents attend, layer by layer, to the patches and to themselves.

    The Perceiver resampler of Flamingo (arXiv 2204.14198, section 2.1, figure 5) as in Idefics2
    (arXiv 2405.02246, section 3; 64 latents, 3 layers). One layer, with x the patches:

        z = z + attention(n(z); keys and values from [n'(x); n(z)])
        z = z + feed_forward(n''(z)),   no biases in the matrices, inner width 4 D

    * style "idefics2" (default): n are RMS norms with a scale, feed_forward is
      W_2 (SiLU(W_g z) * W_1 z), and a last RMS norm follows.
    * style "flamingo": n are LayerNorms, feed_forward is W_2 relu(W_1 z)^2, no last norm.

    Deviations: keys have as many heads as queries, of width D / num_heads (Idefics2: 16 query and 4
    key heads of 96); the modality projection before Idefics2's latents is the model's connector
    after them here; Flamingo's time embedding is omitted (one image has one time). As published,
    keys have no positions besides those of the encoder.

    Attributes:
      style: "idefics2" or "flamingo", see above.
    """

    style: str = "idefics2"

    label = "perceiver"

    @nn.nowrap
    def check_options(self):
        super().check_options()
        if self.style not in STYLES:
            raise unknown("compressor.style", str(self.style), STYLES)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.budget == num_tokens:
            return 0
        keys = num_tokens + self.budget
        projections = 2 * width * width * (2 * self.budget + 2 * keys)
        matrices = 3 if self.style == "idefics2" else 2
        feed_forward = 2 * self.budget * matrices * 4 * width * width
        layer = projections + 2 * 2 * self.budget * keys * width + feed_forward
        return self.depth * layer + 2 * self.budget * num_tokens * 2  # ... and positions.

    @nn.nowrap
    def _layers(self, x, slots, tokens):
        num_tokens = tokens.mask.shape[1]
        mask = jnp.concatenate([tokens.mask, slots], axis=1)
        bias = tokens.bias
        if bias is not None:
            bias = jnp.concatenate([bias, jnp.zeros(slots.shape, bias.dtype)], axis=1)
        total = 0.0
        for i in range(self.depth):
            y = self._norm(f"{i}_latent_norm", x)
            keys = jnp.concatenate([self._norm(f"{i}_patch_norm", tokens.embed), y], axis=1)
            options = dict(affine=False, patches=num_tokens)
            y, attention = self._attend(str(i), y, keys, mask, bias, **options)
            x, total = x + y, total + attention
            x = x + self._feed_forward(i, self._norm(f"{i}_mlp_norm", x))
        if self.style == "idefics2":
            x = self._norm("norm", x)
        return x, total / self.depth

    @nn.nowrap
    def _norm(self, name, x):
        if self.style == "flamingo":
            return self.layer_norm(name, x, "embed", 1e-5)
        ones, shape = nn.initializers.ones, x.shape[-1:]
        scale = self.weight(f"{name}_scale", ones, shape, ("embed",), jnp.float32)
        return (rms_normalised(x) * scale).astype(x.dtype)

    @nn.nowrap
    def _feed_forward(self, i, x):
        width = x.shape[-1]
        y = self.dense(f"{i}_up", x, 4 * width, ("embed", "mlp"), bias=False)
        if self.style == "idefics2":
            y = y * nn.silu(self.dense(f"{i}_gate", x, 4 * width, ("embed", "mlp"), bias=False))
        else:
            y = jnp.square(nn.relu(y))
        return self.dense(f"{i}_down", y, width, ("mlp", "embed"), bias=False)


class QFormer(Queries):
    """`qformer`: a BERT over learned queries with cross-attention in every second layer.

    BLIP-2 (arXiv 2301.12597, section 3.1; 32 queries, 12 layers, cross-attention in layers 0, 2,
    ...). The queries z pass a LayerNorm first, as do the patches x; then each layer is

        z = LN(z + self_attention(z))
        z = LN(z + cross_attention(z; x))      in every second layer
        z = LN(z + W_2 GELU(W_1 z)),           inner width 4 D, exact GELU, all matrices with bias

    Deviations: the queries have the width of the patches (BLIP-2: 768 for 1408), heads have the
    width D / num_heads (64); the text branch of the pre-training stages and dropout are omitted.
    """

    num_queries: int = 32
    depth: int = 12

    label = "qformer"
    _query_deviation = 0.02

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.budget == num_tokens:
            return 0
        budget, crosses = self.budget, -(-self.depth // 2)
        own = 2 * 4 * budget * width * width + 2 * 2 * budget * budget * width
        cross = 2 * width * width * (2 * budget + 2 * num_tokens)
        cross += 2 * 2 * budget * num_tokens * width
        feed_forward = 2 * 2 * budget * 4 * width * width
        layers = self.depth * (own + feed_forward) + crosses * cross
        return layers + 2 * budget * num_tokens * 2  # ... and positions.

    @nn.nowrap
    def _layers(self, x, slots, tokens):
        def norm(name, y):
            return self.layer_norm(f"{name}_norm", y, "embed", 1e-12)

        num_tokens, total = tokens.mask.shape[1], 0.0
        x, patches = norm("query", x), norm("patch", tokens.embed)
        for i in range(self.depth):
            y, _ = self._attend(f"{i}_self", x, x, slots, None, affine=True)
            x = norm(f"{i}_self", x + y)
            if i % 2 == 0:
                y, attention = self._attend(
                    f"{i}_cross",
                    x,
                    patches,
                    tokens.mask,
                    tokens.bias,
                    affine=True,
                    patches=num_tokens,
                )
                x, total = norm(f"{i}_cross", x + y), total + attention
            y = exact_gelu(self.dense(f"{i}_up", x, 4 * x.shape[-1], ("embed", "mlp")))
            y = self.dense(f"{i}_down", y, x.shape[-1], ("mlp", "embed"))
            x = norm(f"{i}_mlp", x + y)
        return x, total / -(-self.depth // 2)
