"""Block sizes of the TPU kernels per chip, and whether they fit its fast memory (VMEM)."""

import jax

from efficient_vlm.errors import UserError

__all__ = ["CHIPS", "block_sizes", "check", "chip", "lane_dim", "vmem_bytes", "vmem_limit"]

_LANES = 128
_MIB = 2**20

# Physical VMEM of a core in MiB (jax.experimental.pallas.tpu.get_tpu_info), and the limit that the
# kernels request; the compiler's default is 16 to 32.
CHIPS = {
    **{"v5e": (128, 64), "v6e": (128, 64), "v5p": (64, 48), "tpu7x": (64, 48)},
    **{"other": (64, 32)},
}

# pass -> (queries, keys) of a block, for heads of up to 128 and of up to 256.
# Keys of 1024 keep the matrix unit busy; the logits of 512 x 1024 take 2 MiB in float32.
_SIZES = {
    "forward": ((512, 1024), (512, 512)),
    "backward_q": ((512, 512), (256, 512)),
    "backward_kv": ((512, 512), (256, 512)),
    "importance": ((512, 512), (512, 512)),
}
# Arrays of the size of the logits that live at once (logits, exponentials, their gradients, masks).
_LOGITS = {"forward": 4, "backward_q": 5, "backward_kv": 5, "importance": 3}


def lane_dim(dim: int) -> int:
    """Head dim in whole lanes: 64, or multiples of 128."""
    return 64 if dim <= 64 else -(-dim // _LANES) * _LANES


def chip() -> str:
    """The chip that is compiled for; "other" if it is unknown."""
    from jax.sharding import get_abstract_mesh

    device = getattr(get_abstract_mesh(), "abstract_device", None)
    kind = getattr(device, "device_kind", None)
    if kind is None and jax.default_backend() == "tpu":
        kind = jax.devices()[0].device_kind
    names = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
    names |= {"TPU v5": "v5p", "TPU v5p": "v5p", "TPU7x": "tpu7x"}
    return names.get(kind, "other")


def vmem_limit() -> int:
    """Bytes of VMEM that a kernel may use."""
    return CHIPS[chip()][1] * _MIB


def block_sizes(name: str, queries: int, keys: int, dim: int) -> tuple[int, int]:
    """(queries, keys) of a block of a pass, no larger than the problem in whole lanes.

    Raises:
      UserError: blocks that the chip's fast memory does not hold.
    """
    block_q, block_k = _SIZES[name][dim > _LANES]
    block_q = min(block_q, -(-queries // _LANES) * _LANES)
    block_k = min(block_k, -(-keys // _LANES) * _LANES)
    check(name, block_q, block_k, dim)
    return block_q, block_k


# Versions of the compiler differ in the memory they use, by up to 56 KiB so far.
_SPARE = 2**18


def vmem_bytes(name: str, block_q: int, block_k: int, dim: int, itemsize: int = 4) -> int:
    """Upper bound of the bytes of a pass: blocks twice (for prefetching), sums, logits."""
    wide = max(dim, _LANES)  # Lanes are padded in VMEM.
    rows, keys = block_q * wide, block_k * wide
    arrays = {
        "forward": (2 * rows + 2 * keys, rows),
        "backward_q": (3 * rows + 2 * keys, rows),
        "backward_kv": (2 * rows + 4 * keys, 2 * keys),
        "importance": (rows + keys, 0),
    }[name]
    # Numbers of tokens spread over all lanes: sums, and what the compiler keeps of masks.
    vectors = 2 * 4 * 8 * (block_q + block_k) + 12 * 4 * _LANES * max(block_q, block_k)
    logits = 4 * _LOGITS[name] * block_q * block_k
    return 2 * itemsize * arrays[0] + 4 * arrays[1] + vectors + logits + _SPARE


def check(name: str, block_q: int, block_k: int, dim: int) -> None:
    """Raises UserError where `vmem_bytes` is above the limit of the chip."""
    needed, limit = vmem_bytes(name, block_q, block_k, dim), vmem_limit()
    if needed > limit:
        raise UserError(
            f"{name}: blocks of {block_q} x {block_k} at head dim {dim} need "
            f"{needed / _MIB:.0f} MiB of VMEM on {chip()}",
            allowed=f"at most {limit / _MIB:.0f} MiB",
            fix="use smaller blocks",
        )
