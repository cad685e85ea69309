"""A mixture of experts."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float

from efficient_vlm import checks
from efficient_vlm.errors import UserError, short
from efficient_vlm.nn.experts import Kernels, dispatch
from efficient_vlm.nn.linear import Dtype, Linear, weight_of
from efficient_vlm.nn.mlp import FeedForward, activate
from efficient_vlm.shapes import Array

# A loss is a sum with its denominator, so that micro-batches and devices add up exactly.
Ratio = tuple[Float[Array, "*experts"], Float[Array, ""]]


class MoE(nn.Module):
    """Top-k mixture of gated experts (arXiv 2002.05202), dropless by default.

    The router is a float32 softmax over all experts, of which the `top_k` largest weights are kept
    (and, with `normalize`, rescaled to sum to one). Losses follow Switch (arXiv 2101.03961, eq. 4)
    and ST-MoE (arXiv 2202.08906, eq. 5).

    Attributes:
      num_experts, top_k: number of experts, in total and per token.
      expert_dim: hidden width of one expert.
      shared_dim: hidden width of a dense gated layer applied to every token; 0 for none.
      normalize: whether the weights of the chosen experts sum to one. Ignored for `top_k` 1, where
        the weight would be the constant 1 and the router would get no gradient from the loss;
        "always" applies even then, as in published models.
      activation: of the experts, see `mlp.ACTIVATIONS`.
      capacity: None for dropless; otherwise the capacity factor (Switch, arXiv 2101.03961), such as
        1.25: an expert accepts that multiple of an equal share of a row's tokens, and contributes
        nothing to the others.
      out_scale: scale of the initial output projections.
      dtype: of activations, that of the model.
    """

    num_experts: int
    top_k: int
    expert_dim: int
    shared_dim: int = 0
    normalize: bool | str = True
    activation: str = "silu"
    capacity: float | None = None
    out_scale: float = 1.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S D"], valid: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S D"], dict[str, Ratio]]:
        """Applies the layer.

        Args:
          x: [B, S, D].
          valid: bool [B, S]; padding is computed (shapes are static) but excluded from statistics.

        Returns:
          [B, S, D], and ratios (sum, denominator): scalars "load_balance" and "router_z",
          "expert_load" (tokens of each expert [E], their total), and with a capacity "dropped"
          (choices that were not served, all choices).
        """
        experts, k = self.num_experts, self.top_k
        shape, width = x.shape, x.shape[-1]
        x = x.reshape(-1, width)
        counted = jnp.asarray(valid, jnp.float32).reshape(-1)

        router = Linear(("embed",), (experts,), ("experts_router",), name="router")
        logits = router(x.astype(jnp.float32))
        probabilities = jax.nn.softmax(logits, axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, k)
        if self.normalize == "always" or (self.normalize and k > 1):
            weights = weights / weights.sum(axis=-1, keepdims=True)

        kernels = self._kernels(width)
        y, served = dispatch(
            x.reshape(shape).astype(self.dtype),
            chosen.reshape(*shape[:2], k),
            weights.reshape(*shape[:2], k),
            valid,
            kernels,
            activate(self.activation),
            self.capacity,
        )
        y = y.reshape(-1, width)
        if self.shared_dim:
            dense = FeedForward(self.shared_dim, self.out_scale, self.dtype, name="shared")
            y = y + dense(x.reshape(shape)).reshape(-1, width)

        total = counted.sum()
        routed = jnp.einsum("tke,t->e", jax.nn.one_hot(chosen, experts), counted)
        fraction = routed / jnp.maximum(total * k, 1)
        mean_probability = jnp.einsum("te,t->e", probabilities, counted) / jnp.maximum(total, 1)
        balance = experts * jnp.sum(jax.lax.stop_gradient(fraction) * mean_probability)
        z = jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * counted)
        stats = {
            "load_balance": (balance * total, total),
            "router_z": (z, total),
            "expert_load": (routed, total * k),
        }
        if self.capacity is not None:
            dropped = jnp.einsum("tk,t->", ~served.reshape(-1, k), counted)
            stats["dropped"] = (dropped, total * k)
        return y.reshape(shape), stats

    def _kernels(self, width: int) -> Kernels:
        def weight(name: str, inner: int, outer: int, axes: tuple[str, str], scale: float):
            init = nn.initializers.variance_scaling(
                scale**2, "fan_in", "normal", in_axis=1, out_axis=2, batch_axis=0
            )
            shape = (self.num_experts, inner, outer)
            return weight_of(self, name, init, shape, ("experts", *axes), self.dtype)

        wide = ("embed", "expert_mlp")
        gate = weight("gate", width, self.expert_dim, wide, 1.0)
        up = weight("up", width, self.expert_dim, wide, 1.0)
        return gate, up, weight("down", self.expert_dim, width, wide[::-1], self.out_scale)


def check_moe(moe: Mapping | None) -> None:
    """Raises UserError for a mixture that cannot be built."""
    if moe is None:
        return
    where = "model.decoder.moe"
    checks.known_fields(where, moe, moe_fields())
    for name in ("num_experts", "top_k", "expert_dim"):
        if name not in moe:
            raise UserError(f"{where}.{name}: missing", fix="set it, or moe=None")
    for name, least in (("num_experts", 1), ("top_k", 1), ("expert_dim", 1), ("shared_dim", 0)):
        checks.whole(f"{where}.{name}", moe.get(name, least), least)
    if not moe["top_k"] <= moe["num_experts"]:
        raise UserError(
            f"{where}.top_k: {moe['top_k']}", allowed=f"1 to num_experts={moe['num_experts']}"
        )
    checks.number(
        f"{where}.capacity", moe.get("capacity"), above=0, none=True, fix="None for dropless"
    )
    if moe.get("normalize", True) not in (True, False, "always"):
        raise UserError(
            f"{where}.normalize: {short(moe['normalize'])}", allowed="True, False, 'always'"
        )


def moe_fields() -> tuple[str, ...]:
    return (
        "num_experts",
        "top_k",
        "expert_dim",
        "shared_dim",
        "normalize",
        "activation",
        "capacity",
    )
