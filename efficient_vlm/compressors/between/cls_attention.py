"""Methods that rank patches by one row of encoder attention: their base class, and fastervlm.

The CLS row of an attention map shows which patches an encoder reads. The encoder provides that row
as `Signals.attention_row`, recomputed next to its fused attention.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from efficient_vlm.compressors import fold, select
from efficient_vlm.compressors.base import Compressor
from efficient_vlm.compressors.signals import NO_SIGNALS, Signals
from efficient_vlm.compressors.tokens import VisualTokens
from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.shapes import Array

ATTENTION = {"cls": "cls_row", "mean_query": "mean_query_row", "column_mean": "column_mean"}


def check_layer(field: str, value) -> None:
    """UserError unless `value` is an integer; the encoder checks that it has such a layer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(
            f"compressor.{field}: {short(value)} is not a layer of the encoder",
            allowed="0, 1, 2, ... from the first, or -1, -2, ... from the last",
        )


class AttentionGuided(Compressor):
    """Base of the methods that rank patches by the attention they receive in the encoder.

    Attributes:
      position_policy: "reindex", as all their official codes do (for LLaVA).
      attention: "cls", attention of the CLS token, mean over heads (all papers but HiPrune's);
        "mean_query", that of the mean query; "column_mean", the mean over all queries. The last two
        serve encoders without CLS and are not published.
      layer: executed encoder layer; negative values count from the last. The papers use the layer
        whose output LLaVA reads, CLIP's second to last: -1 if the encoder ends with it.
    """

    position_policy: str | None = "reindex"
    attention: str = "cls"
    layer: int = -1

    needs = frozenset({"attention_row"})

    @nn.nowrap
    def check_options(self):
        if self.attention not in tuple(ATTENTION):
            raise unknown("compressor.attention", str(self.attention), ATTENTION)
        check_layer("layer", self.layer)

    @nn.nowrap
    def intermediates(self):
        return {"attention_row": f"{ATTENTION[self.attention]}/{self.layer}"}

    @nn.nowrap
    def row(self, tokens: VisualTokens, signals: Signals) -> Float[Array, "B T"]:
        """The attention that each token receives, float32; 0 for padding."""
        return jnp.where(tokens.mask, signals.attention_row, 0).astype(jnp.float32)


def as_selection(keep: Bool[Array, "B T"], k: int) -> select.Selection:
    """The first k True indices of `keep` as a selection, in ascending order."""
    return select.top_k(jnp.zeros(keep.shape, jnp.float32), keep, k)


def as_mask(selection: select.Selection, num_tokens: int) -> Bool[Array, "B {num_tokens}"]:
    """The inverse of `as_selection`: True at the valid indices."""
    indices, valid = selection
    kept = jnp.where(valid, indices, num_tokens)
    rows = jnp.arange(indices.shape[0])[:, None]
    return jnp.zeros((indices.shape[0], num_tokens), bool).at[rows, kept].set(True, mode="drop")


def cosine_to(queries: Float[Array, "B K D"], keys: Float[Array, "B T D"]) -> Float[Array, "B K T"]:
    """Similarity of each key to each query: their cosine times the length of the query.

    The factor is the same for all keys of a query, so the keys are ordered by their cosines.
    Dividing after the product preserves exact ties between vectors of small integers.

    Args:
      queries: float32 [B, K, D].
      keys: float32 [B, T, D]; a zero key has similarity 0 to every query.

    Returns:
      float32 [B, K, T].
    """
    products = jnp.einsum("bkd,btd->bkt", queries, keys, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.sqrt(jnp.sum(jnp.square(keys), axis=-1))
    return products / jnp.maximum(lengths, 1e-12)[:, None]


class FasterVLM(AttentionGuided):
    """`fastervlm`: the T patches that the CLS token attends to most, mean over heads.

    Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning",
    arXiv 2412.01818v1, section 3. Kept in raster order, positions re-indexed. Ties: lowest index.

    Deviations: the paper's reduction ratio R is set as the budget T = N (1 - R).
    """

    label = "fastervlm"

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        self.check_call(tokens, signals, needs_grid=False)
        if self.budget == tokens.mask.shape[1]:
            return tokens
        return fold.drop(tokens, select.top_k(self.row(tokens, signals), tokens.mask, self.budget))
