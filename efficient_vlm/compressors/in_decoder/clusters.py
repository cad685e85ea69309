"""DPC-kNN: clusters around density peaks, and a fold that keeps some tokens and merges others."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from efficient_vlm.compressors import select
from efficient_vlm.compressors.tokens import VisualTokens, remap, weighted_means, zero_padding
from efficient_vlm.shapes import Array


def dpc_knn(
    x: Float[Array, "B M D"], mask: Bool[Array, "B M"], num_clusters: int
) -> tuple[Int[Array, "B C"], Bool[Array, "B C"], Int[Array, "B M"]]:
    """Density peaks (Rodriguez & Laio, Science 2014) with k nearest neighbours (Du et al., 2016).

    With d_ij = ||x_i - x_j|| / sqrt(D) and k = `num_clusters`, as SparseVLM (arXiv 2410.04417)
    uses it:

    * density rho_i = exp(-mean of d_ij^2 over the k nearest j, i itself among them);
    * delta_i = the smallest d_ij to a denser j, or the largest distance of all for the densest;
    * centres are the k tokens with the largest rho_i delta_i; the others join the nearest centre.

    DEVIATION: the official code adds noise of 1e-6 to the densities to make them distinct, and is
    not deterministic. Here the lower index counts as denser if two densities are equal. All other
    ties go to the lowest index.

    Args:
      x: [B, M, D].
      mask: bool [B, M], real tokens; the values of the others are ignored.
      num_clusters: static, at most M.

    Returns:
      centre: int32 [B, num_clusters], ascending where valid.
      valid: bool [B, num_clusters]; if there are fewer real tokens, each is its own centre.
      cluster: int32 [B, M], index into `centre`; -1 for tokens that are not real.
    """
    batch, count, width = x.shape
    x = jnp.where(mask[..., None], x, 0).astype(jnp.float32)
    # Distances do not depend on the origin, but the rounding of x.x + y.y - 2 x.y does: a few very
    # large channels are common to all hidden states.
    x = jnp.where(mask[..., None], x - x[jnp.arange(batch), jnp.argmax(mask, axis=1)][:, None], 0)
    product = jnp.einsum("bmd,bnd->bmn", x, x, precision=jax.lax.Precision.HIGHEST)
    norm = jnp.diagonal(product, axis1=1, axis2=2)
    square = jnp.maximum(norm[:, :, None] + norm[:, None, :] - 2 * product, 0.0) / width
    both = mask[:, :, None] & mask[:, None, :]
    index = jnp.arange(count)
    square = jnp.where(index[:, None] == index, 0.0, square)

    nearest = -jax.lax.top_k(jnp.where(both, -square, -jnp.inf), num_clusters)[0]
    real = jnp.isfinite(nearest)
    number = jnp.maximum(jnp.sum(real, axis=-1), 1)
    density = jnp.exp(-jnp.sum(jnp.where(real, nearest, 0.0), axis=-1) / number)

    distance = jnp.sqrt(square)
    denser = density[:, None, :] > density[:, :, None]
    denser |= (density[:, None, :] == density[:, :, None]) & (index < index[:, None])
    widest = jnp.max(jnp.where(both, distance, 0.0), axis=(1, 2))
    gap = jnp.min(jnp.where(denser & both, distance, jnp.inf), axis=-1)
    gap = jnp.where(jnp.isfinite(gap), gap, widest[:, None])

    chosen, valid = select.top_k(density * gap, mask, num_clusters)
    centre = jnp.sort(jnp.where(valid, chosen, count), axis=1).astype(jnp.int32)
    valid = centre < count
    centre = jnp.minimum(centre, count - 1)
    away = jnp.take_along_axis(distance, centre[:, None, :], axis=2)
    cluster = jnp.argmin(jnp.where(valid[:, None, :], away, jnp.inf), axis=-1)
    # A centre belongs to its own cluster even if it equals an earlier one.
    own = (index[:, None] == centre[:, None, :]) & valid[:, None, :]
    cluster = jnp.where(jnp.any(own, axis=-1), jnp.argmax(own, axis=-1), cluster)
    return centre, valid, jnp.where(mask, cluster, -1).astype(jnp.int32)


def keep_and_cluster(
    tokens: VisualTokens,
    scores: Float[Array, "B T"],
    kept: int,
    places: int,
    table: Sequence[int],
) -> VisualTokens:
    """Keeps the best tokens and merges the best of the others into clusters (`dpc_knn`).

    A merged token is the size-weighted mean of its members and takes the index of their centre.

    Args:
      tokens: T tokens per row.
      scores: float32 [B, T].
      kept: static, number of tokens that are kept unchanged.
      places: static, number of clusters.
      table: static; of p losers (real tokens not among the best), p = 0..T - kept, the table[p]
        with the best scores are clustered. At least min(p, places), and not decreasing.

    Returns:
      kept + places tokens per row in source order; a row with fewer real tokens keeps all of them
      unchanged, padding last.
    """
    tokens, num_tokens, count = zero_padding(tokens), tokens.mask.shape[1], max(table)
    best, valid = select.top_k(scores, tokens.mask, kept + count)
    winners = jnp.where(valid, best, num_tokens)[:, :kept]

    losers = jnp.maximum(jnp.sum(tokens.mask, axis=1) - kept, 0)
    number = jnp.asarray(table)[losers]
    chosen = valid[:, kept:] & (jnp.arange(count) < number[:, None])
    pool = jnp.sort(jnp.where(chosen, best[:, kept:], num_tokens), axis=1)
    chosen = pool < num_tokens

    part = gather(tokens, pool)
    centre, real, cluster = dpc_knn(jax.lax.stop_gradient(part.embed), chosen, places)
    member = jax.nn.one_hot(cluster, places, dtype=jnp.float32, axis=1)

    def sums(x):
        return jnp.einsum("bkt,btc->bkc", member, x, precision=jax.lax.Precision.HIGHEST)

    means = weighted_means(part, sums)
    peaks = jnp.where(real, jnp.take_along_axis(pool, centre, axis=1), num_tokens)
    alone, single = gather(tokens, peaks), jnp.sum(member, axis=-1) == 1
    stay = gather(tokens, winners)
    index = jnp.concatenate([winners, peaks], axis=1)
    order = jnp.argsort(index, axis=1)  # Source order; padding, at T, comes last.

    def joined(name):
        if (mean := means[name]) is None:
            return None
        lone = single.reshape(single.shape + (1,) * (mean.ndim - 2))
        mean = jnp.where(lone, getattr(alone, name), mean)  # A lone member is exact.
        fields = jnp.concatenate([getattr(stay, name), mean], axis=1)
        return jnp.take_along_axis(
            fields, order.reshape(order.shape + (1,) * (mean.ndim - 2)), axis=1
        )

    slot = jnp.argsort(order, axis=1).astype(jnp.int32)
    rows = jnp.arange(len(index))[:, None]
    holder = jnp.full(tokens.mask.shape, -1, jnp.int32)
    holder = holder.at[rows, winners].set(slot[:, :kept], mode="drop")
    own = jnp.take_along_axis(slot[:, kept:], jnp.maximum(cluster, 0), axis=1)
    holder = holder.at[rows, pool].set(own, mode="drop")
    return zero_padding(
        VisualTokens(
            **{name: joined(name) for name in ("embed", "position", "size", "bias")},
            mask=jnp.take_along_axis(index, order, axis=1) < num_tokens,
            source=remap(tokens.source, holder),
        )
    )


def gather(tokens: VisualTokens, index: Int[Array, "B K"]) -> VisualTokens:
    """The tokens at `index`, padding where it is T; `source` is unchanged."""
    real = index < tokens.mask.shape[1]
    index = jnp.where(real, index, 0)

    def at(x):
        return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)

    return zero_padding(
        tokens.replace(
            embed=at(tokens.embed),
            position=at(tokens.position),
            size=at(tokens.size),
            mask=real,
            bias=None if tokens.bias is None else at(tokens.bias),
        )
    )
