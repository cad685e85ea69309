"""The implementations of `attention`, and which one a call gets.

  reference  the whole map, by definition and with plain autodiff; float64 stays. Small problems.
  xla        blocks of the map in plain XLA, O(N) memory: CPUs, and GPUs without a kernel.
  tpu        Pallas (Mosaic): empty blocks are neither fetched nor computed.
  gpu        Pallas (Mosaic GPU) for Hopper.
  cudnn      cuDNN's. By explicit choice, and by default on Hopper with at most a causal mask, even
             lengths and no bias, cap or weights, because training is faster there.

With `implementation=None` the choice is made when the program is lowered, not when it is traced, so
that a program compiled for a TPU on a CPU host gets the TPU kernels. A program for CUDA does not
say for which GPU it is: it gets `gpu` if this process, or the current mesh, has a Hopper GPU, else
`xla`.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from efficient_vlm.errors import UserError, short, unknown
from efficient_vlm.kernels.attention import xla
from efficient_vlm.kernels.attention.parts import devices_of
from efficient_vlm.kernels.attention.platforms import only_on

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu", "cudnn")

# Up to this many logits on a device (the second number for small heads) blocks cost more than they
# save.
_FEW_LOGITS, _FEW_LOGITS_OF_SMALL_HEADS = 2**20, 2**22
_SMALL_HEAD = 2**16
_HOPPERS = ("H100", "H200")


@struct.dataclass
class Call:
    """The static arguments of a call."""

    scale: float = struct.field(pytree_node=False)
    softcap: float | None = struct.field(pytree_node=False)
    implementation: str | None = struct.field(pytree_node=False)

    def run(self, pass_name: str, *args):
        """One pass by the chosen implementation, or by that of the platform it is lowered for."""

        def of(name: str):
            return functools.partial(_pass(name, pass_name), scale=self.scale, softcap=self.softcap)

        if self.implementation not in (None, "xla"):
            q, *rest = args
            return of(self.implementation)(only_on(self.implementation, q), *rest)
        options = {"cpu": of("xla_looped"), "default": of("xla")}
        if self.implementation is None:
            q, k = args[:2]
            # Importance has no values: its third argument is the bias, or None.
            v = args[2] if getattr(args[2], "ndim", 0) == 4 else k
            if not unserved("tpu", q, k, v):
                options["tpu"] = of("tpu")
            if on_hopper() and not unserved("gpu", q, k, v):
                options["cuda"] = of("gpu")
        return lax.platform_dependent(*args, **options)

    def importance(self, q, k, key_bias, mask, lse, weights):
        """Importance [B, M] from all rows."""
        # The weight of a row is folded into its lse; an lse of +inf leaves out rows of weight 0.
        share = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1)), -jnp.inf)
        lse = jnp.where(share[:, None] > -jnp.inf, lse - share[:, None], jnp.inf)
        return self.run("importance", q, k, key_bias, mask, lse, weights)


def on_hopper() -> bool:
    """Whether the kernels are for the GPU of this process, or without one, for the GPU of the
    current mesh, which may be a description without a device."""
    if jax.default_backend() == "gpu":
        return str(getattr(jax.devices()[0], "compute_capability", "")) == "9.0"
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described is not None and any(name in described.device_kind for name in _HOPPERS)


def _pass(implementation: str, name: str):
    if implementation.startswith("xla"):
        looped = implementation == "xla_looped"
        return functools.partial(getattr(xla, name), looped=looped)
    return getattr(module_of(implementation), name)


def module_of(implementation: str):
    # Imported on first use: Pallas takes half a second.
    name = {"gpu": "hopper"}.get(implementation, implementation)
    return importlib.import_module(f"efficient_vlm.kernels.attention.{name}")


def choose(implementation, q, k, v, **features) -> str | None:
    """The name of an implementation, or None for the best one of the platform."""
    if implementation is None:
        batch, heads, queries, _ = q.shape
        of_head = queries * k.shape[2]
        few = _FEW_LOGITS_OF_SMALL_HEADS if of_head < _SMALL_HEAD else _FEW_LOGITS
        few *= devices_of(q, k.shape[1])
        return "reference" if queries == 1 or batch * heads * of_head <= few else None
    if implementation not in IMPLEMENTATIONS:
        raise unknown("implementation", str(implementation), IMPLEMENTATIONS)
    if problem := unserved(implementation, q, k, v, **features):
        able = [name for name in IMPLEMENTATIONS if not unserved(name, q, k, v, **features)]
        raise UserError(
            f"attention: implementation {short(implementation)} has no {problem}",
            allowed=", ".join(able),
            fix="implementation=None for the best one where the program runs",
        )
    return implementation


def unserved(name: str, q, k, v, softcap=None, key_bias=None, weights=None, given=None):
    """The feature that an implementation lacks for this call, or None."""
    if name in ("reference", "xla"):
        return None
    if name == "cudnn":
        return module_of(name).unserved(q, v, softcap, key_bias, weights, given or {})
    return module_of(name).unserved(q, k, v)
