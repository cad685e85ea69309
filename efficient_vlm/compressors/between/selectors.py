"""Methods that keep some tokens unchanged and drop the rest: none, random, stride, text_topk."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from efficient_vlm import checks
from efficient_vlm.compressors import fold, score, select
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.signals import NO_SIGNALS
from efficient_vlm.compressors.tokens import VisualTokens
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.nn.linear import product, weight_of
from efficient_vlm.nn.norms import rms_normalised
from efficient_vlm.shapes import Array

BIASES = ("add", "straight_through", "none")


class Identity(Compressor):
    """`none`: every patch becomes a token. The budget is None or the number of patches."""

    budget: int | None = None

    label = "none"
    optional_budget = True

    @nn.nowrap
    def reachable(self, grid):
        return (grid[0] * grid[1],)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        if self.budget is not None:
            self.check_call(tokens, signals, needs_grid=False)
        return tokens


class Random(Compressor):
    """`random`: a uniform draw without replacement from the real tokens of each row.

    The baseline that many published methods fail to beat. Rows are drawn independently.

    Attributes:
      seed: seeds the key if the call has no `rng`; every call then keeps the same tokens.
    """

    seed: int = 0

    label = "random"
    draws = True

    @nn.nowrap
    def check_options(self):
        checks.whole("compressor.seed", self.seed, None)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        rng = jax.random.key(self.seed) if rng is None else rng
        scores = score.random(rng, tokens.mask.shape)
        return fold.drop(tokens, select.top_k(scores, tokens.mask, self.budget))


class Stride(Compressor):
    """`stride`: tokens evenly spaced in raster order over the real tokens of each row."""

    label = "stride"

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        return fold.drop(tokens, select.stride(tokens.mask, self.budget))


class TextTopK(Compressor):
    """`text_topk`: the tokens most relevant to the instruction.

    score_t = <W_q n(text), W_k n(token_t)> / sqrt(d), with n the division by the root mean square;
    the `budget` best tokens are kept. A selection has no gradient, so the score is trained
    differently. At the full budget it can imitate the decoder's attention (training's `selector`
    loss, see `imitation_loss`); at smaller budgets the attention bias of the kept tokens carries a
    gradient:

    * "add": `tokens.bias` is the score, in value and gradient: more relevant tokens also receive
      more attention.
    * "straight_through": the bias is exactly 0 and has the gradient of the score.
    * "none": neither bias nor gradient (for a scorer that imitates, or is frozen).

    At the full budget "add" acts as "straight_through": the values of the tokens are unchanged. (If
    several questions share one copy of the tokens, the model omits this bias.)

    Attributes:
      bias: see above.
      dim: inner width of both projections over all heads; None for the width of the tokens.
      num_heads: several heads are combined by their soft maximum (`score.text_relevance`).
    """

    bias: str = "add"
    dim: int | None = None
    num_heads: int = 1

    label = "text_topk"
    needs = frozenset({"text"})
    text_guided = True
    text_scores = True

    @nn.nowrap
    def check_options(self):
        if self.bias not in BIASES:
            raise unknown("compressor.bias", str(self.bias), BIASES)
        heads = checks.whole("compressor.num_heads", self.num_heads)
        if self.dim is not None and checks.whole("compressor.dim", self.dim) % heads:
            raise UserError(
                f"compressor.dim: {self.dim} does not split into {heads} heads",
                allowed=f"a multiple of {heads}",
                fix=f"compressor.dim={-(-self.dim // heads) * heads}",
            )

    @nn.nowrap
    def _dim(self, width: int) -> int:
        dim = self.dim or width
        if dim % self.num_heads:
            raise UserError(
                f"compressor.num_heads: a width of {width} does not split into {self.num_heads}",
                allowed=f"a divisor of {width}",
                fix="give compressor.dim, a multiple of compressor.num_heads",
            )
        return dim

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0):
        if self.bias == "none" and self.budget == num_tokens:
            return 0
        dim = self._dim(width)
        return 2 * text_width * dim + 2 * num_tokens * width * dim + 2 * num_tokens * dim

    @nn.compact
    def scores(self, tokens: VisualTokens, text: Float[Array, "B Q Dt"]) -> Float[Array, "B Q T"]:
        """Relevance of each token to each of several instructions.

        Args:
          tokens: VisualTokens with leading axis B.
          text: [B, Q, Dt], one embedding per instruction.

        Returns:
          float32 [B, Q, T]; 0 for padding.
        """
        embed = tokens.embed
        dim = self._dim(embed.shape[-1])
        init, axes, dtype = nn.initializers.lecun_normal(), ("embed", "heads"), jnp.float32
        query_kernel = weight_of(self, "query", init, (text.shape[-1], dim), axes, dtype)
        key_kernel = weight_of(self, "key", init, (embed.shape[-1], dim), axes, dtype)

        heads = (self.num_heads, dim // self.num_heads)
        query = product(rms_normalised(text), query_kernel, dtype)
        real = jnp.where(tokens.mask[..., None], embed, 0)
        keys = product(rms_normalised(real), key_kernel, dtype)
        relevance = jax.vmap(score.text_relevance, in_axes=(1, None), out_axes=1)(
            query.reshape(*query.shape[:-1], *heads), keys.reshape(*keys.shape[:-1], *heads)
        )
        return jnp.where(tokens.mask[:, None], relevance, 0.0)

    def imitation_loss(
        self,
        patches: VisualTokens,
        instruction: Float[Array, "B Q Dt"],
        attention: Float[Array, "layers B Q MN"],
        asked: Bool[Array, "B Q"],
        images: int,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Divergence of the scores from the decoder's attention, in nats.

        The teacher is the attention of the last prompt token to the visual tokens, mean over heads
        and layers; the student is a softmax over the scores. Only the selector gets a gradient.

        Args:
          patches: leading axis B*M.
          instruction: [B, Q, width].
          attention: [layers, B, Q, M*N].
          asked: bool [B, Q], slots that hold a question.
          images: M.

        Returns:
          (sum over questions of KL(teacher, student), number of questions).
        """
        batch, questions = asked.shape
        text = jnp.repeat(jax.lax.stop_gradient(instruction), images, axis=0)
        scores = self.scores(jax.lax.stop_gradient(patches), text)
        scores = scores.reshape(batch, images, questions, -1).swapaxes(1, 2)
        real = patches.mask.reshape(batch, 1, -1)
        scores = jnp.where(real, scores.reshape(batch, questions, -1), -1e30)
        teacher = jax.lax.stop_gradient(attention.mean(axis=0))
        ratio = jnp.log(jnp.maximum(teacher, 1e-9)) - jax.nn.log_softmax(scores, axis=-1)
        counted = asked & real.any(axis=-1)
        loss = jnp.where(counted, jnp.sum(jnp.where(real, teacher * ratio, 0.0), axis=-1), 0.0)
        return loss.sum(), counted.sum().astype(jnp.float32)

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        num_tokens = tokens.embed.shape[1]
        scores = self.scores(tokens, signals.text[:, None])[:, 0]
        full = self.budget == num_tokens
        if self.bias == "none":
            bias = tokens.bias
        else:
            bias = straight_through(scores)
            if self.bias == "add" and not full:
                # Rows within the budget keep all, as at the full budget.
                whole = tokens.mask.sum(axis=1, keepdims=True) <= self.budget
                bias = jnp.where(whole, bias, scores)
            bias = bias if tokens.bias is None else tokens.bias + bias
        tokens = tokens.replace(bias=bias)
        if full:
            return tokens
        return fold.drop(tokens, select.top_k(scores, tokens.mask, self.budget))


def straight_through(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Exactly 0, with the gradient of x."""
    return x - jax.lax.stop_gradient(x)
