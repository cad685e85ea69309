"""DPC-kNN: clusters around density peaks, and a fold that keeps some tokens and merges others."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from efficient_vlm.compressors import select
from efficient_vlm.compressors.tokens import VisualTokens, remap, weighted_means, zero_padding
from efficient_vlm.kernels import ordering
from efficient_vlm.shapes import Array


def dpc_knn(
    x: Float[Array, "B M D"],
    mask: Bool[Array, "B M"],
    num_clusters: int,
    clusters: Int[Array, " B"] | None = None,
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
      clusters: int [B], k of rows with fewer than `num_clusters`; None for that many in all.

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

    nearest = -ordering.top_k(-square, num_clusters, both)[0]
    real = jnp.isfinite(nearest)
    if clusters is not None:
        real &= jnp.arange(num_clusters) < clusters[:, None, None]
    number = jnp.maximum(jnp.sum(real, axis=-1), 1)
    density = jnp.exp(-jnp.sum(jnp.where(real, nearest, 0.0), axis=-1) / number)

    distance = jnp.sqrt(square)
    denser = density[:, None, :] > density[:, :, None]
    denser |= (density[:, None, :] == density[:, :, None]) & (index < index[:, None])
    widest = jnp.max(jnp.where(both, distance, 0.0), axis=(1, 2))
    gap = jnp.min(jnp.where(denser & both, distance, jnp.inf), axis=-1)
    gap = jnp.where(jnp.isfinite(gap), gap, widest[:, None])

    chosen, valid = select.top_k(density * gap, mask, num_clusters, clusters)
    centre = jnp.sort(jnp.where(valid, chosen, count), axis=1).astype(jnp.int32)
    valid = centre < count
    centre = jnp.minimum(centre, count - 1)
    away = jnp.take_along_axis(distance, centre[:, None, :], axis=2)
    cluster = ordering.best(-away, valid[:, None, :])
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
    each: tuple[Int[Array, " B"], Int[Array, " B"]] | None = None,
    slots: int | None = None,
) -> VisualTokens:
    """Keeps the best tokens and merges the best of the others into clusters (`dpc_knn`).

    A merged token is the size-weighted mean of its members and takes the index of their centre.

    Args:
      tokens: T tokens per row.
      scores: float32 [B, T].
      kept: static, number of tokens that are kept unchanged.
      places: static, number of clusters.
      table: static; of p losers (real tokens not among the best), the last entry being for all p
        from there on, the table[p] with the best scores are clustered, and at least min(p, places).
        Not decreasing.
      each: int [B] twice, kept tokens and clusters of each row, at most `kept` and `places`; None
        for as many in all rows.
      slots: static, the most tokens that a row is left with; None for kept + places.

    Returns:
      `slots` tokens per row in source order; a row with fewer real tokens keeps all of them
      unchanged, padding last.
    """
    tokens, num_tokens = zero_padding(tokens), tokens.mask.shape[1]
    count, slots = max(*table, places), slots or kept + places
    count = min(count, num_tokens)
    own_kept, own_places = (jnp.full(len(scores), n) for n in (kept, places))
    if each is not None:
        own_kept, own_places = each
    most = min(kept + count, num_tokens)
    best, valid = select.top_k(scores, tokens.mask, most)
    best = jnp.where(valid, best, num_tokens)
    winners = jnp.where(jnp.arange(kept) < own_kept[:, None], best[:, :kept], num_tokens)

    losers = jnp.maximum(jnp.sum(tokens.mask, axis=1) - own_kept, 0)
    number = jnp.asarray(table)[jnp.minimum(losers, len(table) - 1)]
    number = jnp.maximum(number, jnp.minimum(losers, own_places))
    number = jnp.where(own_places > 0, number, 0)
    behind = own_kept[:, None] + jnp.arange(count)
    pool = jnp.take_along_axis(best, jnp.minimum(behind, most - 1), axis=1)
    chosen = (behind < most) & (jnp.arange(count) < number[:, None])
    pool = jnp.sort(jnp.where(chosen, pool, num_tokens), axis=1)
    chosen = pool < num_tokens

    part = gather(tokens, pool)
    embed = jax.lax.stop_gradient(part.embed)
    centre, real, cluster = dpc_knn(embed, chosen, places, None if each is None else own_places)
    member = jax.nn.one_hot(cluster, places, dtype=jnp.float32, axis=1)

    def sums(x):
        return jnp.einsum("bkt,btc->bkc", member, x, precision=jax.lax.Precision.HIGHEST)

    means = weighted_means(part, sums)
    peaks = jnp.where(real, jnp.take_along_axis(pool, centre, axis=1), num_tokens)
    alone, single = gather(tokens, peaks), jnp.sum(member, axis=-1) == 1
    stay = gather(tokens, winners)
    index = jnp.concatenate([winners, peaks], axis=1)
    order = jnp.argsort(index, axis=1)  # Source order; padding, at T, comes last.
    kept_order = order[:, :slots]

    def joined(name):
        if (mean := means[name]) is None:
            return None
        lone = single.reshape(single.shape + (1,) * (mean.ndim - 2))
        mean = jnp.where(lone, getattr(alone, name), mean)  # A lone member is exact.
        fields = jnp.concatenate([getattr(stay, name), mean], axis=1)
        return jnp.take_along_axis(
            fields, kept_order.reshape(kept_order.shape + (1,) * (mean.ndim - 2)), axis=1
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
            mask=jnp.take_along_axis(index, kept_order, axis=1) < num_tokens,
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
