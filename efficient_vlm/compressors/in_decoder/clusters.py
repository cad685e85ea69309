"""DPC-kNN: clusters around density peaks, for tokens of which a summary is kept."""

import jax
import jax.numpy as jnp

from efficient_vlm.compressors import select


def dpc_knn(x: jax.Array, mask: jax.Array, num_clusters: int) -> tuple[jax.Array, ...]:
    """Density peaks (Rodriguez & Laio, Science 2014) with k nearest neighbours (Du et al., 2016).

    With d_ij = ||x_i - x_j|| / sqrt(D) and k = `num_clusters`, as SparseVLM (arXiv 2410.04417,
    section 3.4) uses it:

    * density rho_i = exp(-mean of d_ij^2 over the k nearest j, i itself among them);
    * delta_i = the smallest d_ij to a denser j, or the largest distance of all if there is none;
    * centres are the k tokens with the largest rho_i delta_i; the others join the nearest centre.

    DEVIATION: the official code adds noise of 1e-6 to the densities, so that no two are equal, and
    is not deterministic. Here, of two equal densities the one with the lower index is the denser.
    Further ties go to the lowest index.

    Args:
      x: [B, M, D].
      mask: bool [B, M], real tokens; nothing of the others is used.
      num_clusters: static, at most M.

    Returns:
      centre: int32 [B, num_clusters], ascending where valid.
      valid: bool [B, num_clusters]; with fewer real tokens than clusters, each is its own centre.
      cluster: int32 [B, M], index into `centre`; -1 for tokens that are not real.
    """
    batch, count, width = x.shape
    x = jnp.where(mask[..., None], x, 0).astype(jnp.float32)
    # Distances do not change with the origin, but the rounding of x.x + y.y - 2 x.y does: hidden
    # states share a few very large channels.
    x = jnp.where(mask[..., None], x - x[jnp.arange(batch), jnp.argmax(mask, axis=1)][:, None], 0)
    product = jnp.einsum("bmd,bnd->bmn", x, x, precision=jax.lax.Precision.HIGHEST)
    norm = jnp.diagonal(product, axis1=1, axis2=2)
    square = jnp.maximum(norm[:, :, None] + norm[:, None, :] - 2 * product, 0.0) / width
    both = mask[:, :, None] & mask[:, None, :]
    index = jnp.arange(count)
    square = jnp.where(index[:, None] == index, 0.0, square)

    nearest = -jax.lax.top_k(jnp.where(both, -square, -jnp.inf), num_clusters)[0]
    found = jnp.isfinite(nearest)
    number = jnp.maximum(jnp.sum(found, axis=-1), 1)
    density = jnp.exp(-jnp.sum(jnp.where(found, nearest, 0.0), axis=-1) / number)

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
    # A centre belongs to itself, also where it equals an earlier one.
    own = (index[:, None] == centre[:, None, :]) & valid[:, None, :]
    cluster = jnp.where(jnp.any(own, axis=-1), jnp.argmax(own, axis=-1), cluster)
    return centre, valid, jnp.where(mask, cluster, -1).astype(jnp.int32)
