"""`efficient-vlm doctor`: which verbs this machine can run, and what to type for the others."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.errors import unknown

__all__ = ["EXTRAS", "NEEDS", "diagnose", "main"]

_BASE = ("jax", "jaxlib", "flax", "numpy")
_MODEL = (*_BASE, "jaxtyping", "rich", "optax", "ml-collections")
# tensorflow-datasets needs array-record and importlib_resources where TensorFlow is absent.
_DATA = (
    *(*_MODEL, "pillow", "grain", "tokenizers", "tensorflow-datasets", "absl-py"),
    *("array-record", "importlib-resources", "pyarrow"),
)
_PUBLISHED = (*_DATA, "jinja2", "orbax-checkpoint", "ml-dtypes", "huggingface-hub", "scipy")
# Verb -> the packages that its modules import; the fonts of generated text are matplotlib's.
NEEDS = {
    "train": (*_PUBLISHED, "matplotlib"),
    "eval": (*_PUBLISHED, "matplotlib"),
    "audit": (*_DATA, "jinja2"),
    "audit aot": (*_DATA, "jinja2"),
    "audit kernels": (*_BASE, "jaxtyping", "rich"),
    "audit sharding": (*_DATA, "jinja2"),
    "compress": _PUBLISHED,
    "generate": _PUBLISHED,
    "import": _PUBLISHED,
    "export": _PUBLISHED,
    "methods": _MODEL,
    "metrics": _PUBLISHED,
    "presets": (*_BASE, "rich", "pillow", "tokenizers", "jinja2"),
    "report": (*_BASE, "pillow", "scipy"),
    "data build": (*_DATA, "matplotlib"),
    "data inspect": (*_DATA, "matplotlib"),
}


@dataclasses.dataclass(frozen=True)
class Extra:
    """What a part of some verbs needs beside the packages of NEEDS.

    Attributes:
      verbs: that have the part.
      part: in words.
      packages: without which it cannot run.
      name: of the extra that brings them.
    """

    verbs: tuple[str, ...]
    part: str
    packages: tuple[str, ...]
    name: str


# Of these two extras a verb needs one: `audit aot` has CPUs in the place of GPUs.
_DESCRIBED = ("audit aot", "audit kernels")
_GPU = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
EXTRAS = (
    Extra(_DESCRIBED, "TPUs that are not here", ("libtpu",), "tpu"),
    Extra(_DESCRIBED, "GPUs that are not here", _GPU, "aot-gpu"),
    Extra(("train",), "train.tensorboard", ("tensorboardX",), "tensorboard"),
    Extra(("eval",), "--metric=bleu", ("sacrebleu",), "captions"),
)
# What the driver of an accelerator leaves in /dev -> (its name, JAX's platform, our extra).
_DRIVERS = {
    "nvidia[0-9]*": ("an NVIDIA GPU", "gpu", "cuda"),
    "accel[0-9]*": ("a TPU", "tpu", "tpu"),
    "vfio/[0-9]*": ("a TPU", "tpu", "tpu"),
}


def diagnose(*, dev: Path = Path("/dev")) -> dict[str, Any]:
    """Versions against the declared bounds, then devices (for which JAX is imported), and disk.

    Args:
      dev: where drivers show themselves.

    Returns:
      Facts; "verbs": verb -> {"problems": lines, "extras": lines}; "problems": all lines, those of
      devices and disk included, but not those of extras.
    """
    names = sorted({name for needs in NEEDS.values() for name in needs})
    wrong = _wrong(names)
    verbs = {
        verb: {"problems": [wrong[n] for n in needs if n in wrong], "extras": _extras(verb)}
        for verb, needs in NEEDS.items()
    }
    devices, problems = _devices(dev)
    free, full = _disk()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in names},
        "devices": devices,
        "free_gib": free,
        "verbs": verbs,
        "problems": [*wrong.values(), *problems, *full],
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wrong(names: Sequence[str]) -> dict[str, str]:
    """Package -> what is wrong with it and what mends it; those in order are left out."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        return dict.fromkeys(names, "packaging is not installed: pip install packaging")
    try:
        declared = importlib.metadata.requires("efficient_vlm") or []
    except importlib.metadata.PackageNotFoundError:
        declared = []
    bounds = {}
    for text in declared:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            bounds[canonicalize_name(need.name)] = need
    found = {}
    for name in names:
        need, have = bounds.get(name), _version(name)
        if have is None:
            found[name] = f'{name} is not installed: pip install "{need or name}"'
            continue
        try:
            fits = need is None or need.specifier.contains(have, prereleases=True)
        except InvalidRequirement:
            fits = False
        if not fits:
            found[name] = f'{name} {have} is not {need.specifier}: pip install "{need}"'
    return found


def _extras(verb: str) -> list[str]:
    lines = []
    for extra in EXTRAS:
        missing = [name for name in extra.packages if _version(name) is None]
        if verb in extra.verbs and missing:
            fix = f"pip install 'efficient_vlm[{extra.name}]'"
            lines.append(f"{extra.part}: {', '.join(missing)} not installed: {fix}")
    return lines


def _devices(dev: Path) -> tuple[list[str], list[str]]:
    """(devices that JAX has, problems with them)."""
    try:
        import jax

        found = jax.devices()
    except Exception as error:  # A missing package or a broken driver; say what it was.
        return [], [f"JAX finds no device: {' '.join(str(error).split())[:200]}"]
    problems = []
    for pattern, (name, platform_name, extra) in _DRIVERS.items():
        # Whoever sets the variable has chosen.
        asked = platform_name in os.environ.get("JAX_PLATFORMS", platform_name).replace(
            "cuda", "gpu"
        )
        idle = any(dev.glob(pattern)) and platform_name not in {d.platform for d in found}
        if asked and idle:
            fix = f"pip install 'efficient_vlm[{extra}]'"
            problems.append(f"{name} is here, but JAX does not use it: {fix}")
    return [f"{d.device_kind} ({d.platform})" for d in found], list(dict.fromkeys(problems))


def _disk() -> tuple[dict[str, float], list[str]]:
    """(free GiB, problems) of the current folder and of the one for data."""
    cache = Path(os.environ.get("EFFICIENT_VLM_DATA") or Path.home() / ".cache")
    while not cache.exists():
        cache = cache.parent
    free, problems = {}, []
    for label, folder in (("here", Path.cwd()), ("data", cache)):
        gib = shutil.disk_usage(folder).free / 2**30
        free[label] = round(gib, 1)
        if gib < 1:
            problems.append(f"{folder}: {gib:.1f} GiB free; the quickstart needs 1 GiB")
        if not os.access(folder, os.W_OK):
            problems.append(f"{folder} cannot be written: choose another one")
    return free, problems


def main(verb: str | None = None, *, as_json: bool = False) -> int:
    """Prints the diagnosis.

    Args:
      verb: of NEEDS; it also needs one of its compilers. None for all verbs.
      as_json: print as JSON.

    Returns:
      0, or 1 if something stands in the way.

    Raises:
      UserError: no such verb.
    """
    if verb is not None and verb not in NEEDS:
        raise unknown("doctor", verb, NEEDS)
    facts = diagnose()
    if verb is not None:
        of_packages = {line for each in facts["verbs"].values() for line in each["problems"]}
        own = facts["verbs"][verb]
        rest = [line for line in facts["problems"] if line not in of_packages]
        compilers = sum(verb in extra.verbs for extra in EXTRAS) if verb in _DESCRIBED else None
        if len(own["extras"]) == compilers:
            rest += own["extras"]
        facts |= {"verbs": {verb: own}, "problems": [*own["problems"], *rest]}
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        _show(facts)
    return 1 if facts["problems"] else 0


def _show(facts: dict[str, Any]) -> None:
    print(f"Python {facts['python']} on {facts['platform']}, {facts['cores']} cores")
    print("Packages: " + ", ".join(f"{k} {v or 'MISSING'}" for k, v in facts["packages"].items()))
    print("Devices: " + (", ".join(facts["devices"]) or "none"))
    free = facts["free_gib"]
    print(f"Free disk: {free['here']} GiB here, {free['data']} for data")
    for verb, found in facts["verbs"].items():
        print(f"{verb:<15}{'; '.join(found['problems']) or 'ready'}")
        for line in found["extras"]:
            print(f"{'':<15}{line}")
    for problem in facts["problems"]:
        print(f"problem: {problem}")
    print("Fix the above and run doctor again." if facts["problems"] else "Ready.")
