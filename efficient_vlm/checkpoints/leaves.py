"""Leaves of a training state: their names, host copies, checks, hash, and their way through Orbax.

Orbax is imported in this file only, because its v1 interface still changes. It stores plain nested
dicts of arrays; what it would change silently (dtypes, PRNG keys, Python numbers, empty arrays) is
described in a table of our own and compared before anything is read.
"""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from efficient_vlm import checks
from efficient_vlm.errors import UserError

# Format of checkpoint.json, and what parts of paths had other names in earlier ones.
FORMAT = 2
_NAMES_OF_FORMAT_1 = {"segment_0": "layers"}


class NonFiniteState(ValueError):
    """A state with a NaN or Inf leaf was handed to `save`; nothing was written.

    Attributes:
      path: name of the first such leaf, e.g. "params/decoder/head/kernel".
    """

    def __init__(self, path: str):
        super().__init__(f"leaf {path} holds NaN or Inf: not written to a checkpoint")
        self.path = path


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf: its path, its value ready for storage (None if abstract) and its description."""

    path: str
    value: Any
    spec: dict[str, Any]


def leaf_path(key_path: Any) -> str:
    """ "a/0/b" for the key path of a leaf, whatever containers it goes through."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def is_key(leaf: Any) -> bool:
    """True for arrays (or abstract arrays) of typed PRNG keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(path: str, leaf: Any) -> dict[str, Any]:
    """The table row of one leaf, concrete or abstract: path, kind, shape, dtype.

    Raises:
      TypeError: the leaf is not an array, a PRNG key or a Python number.
    """
    if type(leaf) in (bool, int, float):
        return {"path": path, "kind": "python", "shape": [], "dtype": type(leaf).__name__}
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise TypeError(f"leaf {path}: {type(leaf).__name__} cannot be stored in a checkpoint")
    kind = "key" if is_key(leaf) else "array"
    dtype = str(leaf.dtype) if kind == "key" else np.dtype(leaf.dtype).name
    return {"path": path, "kind": kind, "shape": list(leaf.shape), "dtype": dtype}


def host_copy(leaf: Any) -> Any:
    """A host copy that later donation of the device buffer cannot touch.

    On CPU `np.asarray` is a view into the device buffer; hence the explicit copy. An array that
    lives on several processes cannot be copied here and is returned as it is; one that is mapped
    from a file stays mapped.
    """
    if isinstance(leaf, np.memmap):
        return leaf.view(np.ndarray)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf
    return np.array(leaf, copy=True)


def all_finite(value: Any) -> bool:
    """False if a floating-point array holds NaN or Inf; only local shards are checked."""
    if isinstance(value, jax.Array):
        return all(all_finite(np.asarray(shard.data)) for shard in value.addressable_shards)
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return True
    if value.dtype in (np.float32, np.float64):
        # NaN and Inf survive a sum, which needs no temporary array. So does an overflow of finite
        # values, which the full test below tells apart.
        with np.errstate(all="ignore"):
            if np.isfinite(value.sum()):
                return True
    return bool(np.isfinite(value).all())


def snapshot(state: Any) -> list[Leaf]:
    """Host copies of all leaves with their descriptions, in tree order.

    Raises:
      TypeError: a leaf cannot be stored.
      ValueError: two leaves would have the same name on disk.
    """
    pairs = jax.tree_util.tree_leaves_with_path(state)
    for _, leaf in pairs:
        if isinstance(leaf, jax.Array) and leaf.is_fully_addressable and not is_key(leaf):
            leaf.copy_to_host_async()  # all transfers overlap; the copies below only wait
    leaves, names = [], set()
    for key_path, leaf in pairs:
        path = leaf_path(key_path)
        spec = describe(path, leaf)
        if not path or path.replace("/", ".") in names:
            raise ValueError(f"leaf {path!r}: two leaves of the state have this name")
        names.add(path.replace("/", "."))
        if spec["kind"] == "key":
            spec["impl"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
            spec["data_shape"], spec["data_dtype"] = list(leaf.shape), leaf.dtype.name
        elif spec["kind"] == "python":
            leaf = np.asarray(leaf)
            spec["data_shape"], spec["data_dtype"] = [], leaf.dtype.name
        leaves.append(Leaf(path, host_copy(leaf), spec))
    return leaves


def state_sha256(tree: Any) -> str:
    """SHA-256 over path, dtype, shape and bytes of every leaf, sorted by path.

    Independent of container types, devices and shardings: equal digests mean bitwise equal
    numbers. For a state that several processes share see `Checkpoints.sha256`.
    """
    return sha256_of(sorted(snapshot(tree), key=lambda leaf: leaf.path))


def sha256_of(leaves: Iterable[Leaf]) -> str:
    """`state_sha256` of leaves that are sorted by path."""
    digest = hashlib.sha256()
    for leaf in leaves:
        row = f"{leaf.path}|{leaf.spec['kind']}|{leaf.spec['dtype']}|{leaf.spec['shape']}\n"
        digest.update(row.encode())
        digest.update(np.ascontiguousarray(leaf.value).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def rows_of(info: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a checkpoint.json with the paths of today; "stored" is the path on disk.

    Raises:
      UserError: a later version of the package wrote it.
    """
    fix = "update efficient_vlm, or start anew with another --workdir"
    checks.whole("checkpoint.json: format", info["format"], 1, FORMAT, fix=fix)
    names = _NAMES_OF_FORMAT_1 if info["format"] == 1 else {}

    def today(path: str) -> str:
        return "/".join(names.get(part, part) for part in path.split("/"))

    return [{**row, "path": today(row["path"]), "stored": row["path"]} for row in info["leaves"]]


def check_match(stored: list[dict], wanted: list[dict], step: int, *, subset: bool) -> None:
    """Compares the leaves on disk with the requested leaves.

    Args:
      stored: rows of the checkpoint.
      wanted: rows of the abstract state.
      step: for the message.
      subset: True if the checkpoint may hold leaves that are not requested.

    Raises:
      UserError: names the first leaf that is missing, extra, of another shape or dtype.
    """
    on_disk, requested = ({row["path"]: row for row in rows} for rows in (stored, wanted))
    problems = []
    for path, row in requested.items():
        if path not in on_disk:
            problems.append(f"leaf {path} is not in the checkpoint")
            continue
        for field in ("shape", "dtype", "kind"):
            if on_disk[path][field] != row[field]:
                problems.append(
                    f"leaf {path} has {field} {on_disk[path][field]} in the checkpoint, "
                    f"{row[field]} in the model"
                )
                break
    if not subset:
        extra = [path for path in on_disk if path not in requested]
        problems += [f"leaf {path} of the checkpoint is not in the model" for path in extra]
    if problems:
        more = f" (and {len(problems) - 1} more leaves differ)" if len(problems) > 1 else ""
        raise UserError(
            f"checkpoint of step {step}: {problems[0]}{more}",
            fix="use the config that wrote it (config.json in the workdir), or another --workdir",
        )


def _orbax() -> Any:
    """The Orbax v1 module, imported on first use (about a second), with its log noise filtered."""
    from orbax.checkpoint import v1 as ocp

    logger = logging.getLogger("absl")
    if not any(getattr(each, "__name__", "") == "_drop_orbax_noise" for each in logger.filters):
        logger.addFilter(_drop_orbax_noise)
    return ocp


def _drop_orbax_noise(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or "orbax" not in record.pathname


def _context(ocp: Any, *, alone: bool = False) -> Any:
    """Settings of Orbax; `alone` for reads that this process does without the others of its job."""
    context = ocp.Context()
    if alone:
        # `multiprocessing_options` became `multiprocessing` in later versions of v1.
        names = "multiprocessing", "multiprocessing_options"
        options = getattr(context, next(name for name in names if hasattr(context, name)))
        number = jax.process_index()
        options.primary_host, options.active_processes = number, {number}
        options.barrier_sync_key_prefix = f"process_{number}"
    # `array_options` became `array` in later versions of v1.
    array = context.array if hasattr(context, "array") else context.array_options
    # Trained weights hardly compress (3 % measured for Gaussian float32), at three times the time.
    array.saving.use_compression = False
    return context


def save_leaves(folder: Path, leaves: list[Leaf]) -> None:
    """Writes the leaves with Orbax into `folder`, which must not exist. Blocks until done."""
    ocp = _orbax()
    values = {
        leaf.path: leaf.value for leaf in leaves if leaf.value.size
    }  # Orbax refuses empty ones
    if values:
        with _context(ocp):
            ocp.save(folder, unflatten_dict(values, sep="/"))


def load_leaves(folder: Path, stored: list[dict], abstract_state: Any) -> Any:
    """Reads the leaves of `abstract_state`, all of them among `stored` (`rows_of`), from `folder`.

    Returns:
      A tree like `abstract_state`. A leaf with a sharding comes back with that sharding; one
      without (or an uncommitted array) comes back uncommitted on the default device; NumPy arrays
      and Python numbers come back as such. Where none has a sharding each process reads for itself.
    """
    rows = {row["path"]: row for row in stored}
    wanted = {
        leaf_path(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)
    }
    request = {}
    for path, row in rows.items():
        shape, dtype = row.get("data_shape", row["shape"]), row.get("data_dtype", row["dtype"])
        if 0 in shape:
            continue
        target = wanted.get(path)
        if path not in wanted:
            request[row["stored"]] = ...  # Orbax's placeholder: not read
        elif row["kind"] == "array" and _sharding(target) is not None:
            request[row["stored"]] = jax.ShapeDtypeStruct(
                shape, jnp.dtype(dtype), sharding=target.sharding
            )
        else:
            request[row["stored"]] = np.empty(shape, jnp.dtype(dtype))
    loaded = {}
    if request:
        ocp = _orbax()
        shared = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in request.values())
        with _context(ocp, alone=jax.process_count() > 1 and not shared):
            loaded = flatten_dict(ocp.load(folder, unflatten_dict(request, sep="/")), sep="/")

    def finish(key_path: Any, target: Any) -> Any:
        path = leaf_path(key_path)
        row = rows[path]
        value = loaded.get(row["stored"])
        if value is None:
            value = np.zeros(
                row.get("data_shape", row["shape"]), jnp.dtype(row.get("data_dtype", row["dtype"]))
            )
        if row["kind"] == "python":
            return value.item()
        sharding = _sharding(target)
        if row["kind"] == "key":
            if sharding is not None and not sharding.is_fully_addressable:
                # device_put cannot reach other processes; a computation can.
                wrap = functools.partial(jax.random.wrap_key_data, impl=row["impl"])
                return jax.jit(wrap, out_shardings=sharding)(value)
            value = jax.random.wrap_key_data(jnp.array(value), impl=row["impl"])
            return value if sharding is None else jax.device_put(value, sharding)
        if isinstance(target, np.generic):
            return value[()]
        if isinstance(target, np.ndarray) or isinstance(value, jax.Array):
            return value
        if sharding is None:
            return jnp.array(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree_util.tree_map_with_path(finish, abstract_state)


def _sharding(leaf: Any) -> Any:
    # An uncommitted array may move to the device where a jitted function needs it; so should the
    # restored one.
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)
