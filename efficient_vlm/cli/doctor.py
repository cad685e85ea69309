"""`efficient-vlm doctor`: is this machine ready, and if not, what to type."""

import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "tokenizers",
    "numpy",
    "pillow",
    "matplotlib",
)


def diagnose() -> dict[str, Any]:
    """Versions against the declared bounds, devices, disk and memory, with a list of problems."""
    problems: list[str] = []
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
            problems.append(f"{name} is not installed: pip install -e .")
    problems += _bounds(versions)
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": versions,
    }
    try:
        import jax

        facts["devices"] = [f"{d.device_kind} ({d.platform})" for d in jax.devices()]
    except Exception as error:  # A broken driver can raise anything; say what it was.
        facts["devices"] = []
        problems.append(f"JAX finds no device: {' '.join(str(error).split())[:200]}")
    cache = Path(os.environ.get("EFFICIENT_VLM_DATA") or Path.home() / ".cache")
    while not cache.exists():
        cache = cache.parent
    free = {}
    for label, folder in (("here", Path.cwd()), ("data", cache)):
        gib = shutil.disk_usage(folder).free / 2**30
        free[label] = round(gib, 1)
        if gib < 1:
            problems.append(f"{folder}: {gib:.1f} GiB free; the quickstart needs 1 GiB")
        if not os.access(folder, os.W_OK):
            problems.append(f"{folder} cannot be written")
    facts["free_gib"] = free
    facts["problems"] = problems
    return facts


def _bounds(versions: dict[str, str | None]) -> list[str]:
    """Installed versions outside the bounds of our own metadata."""
    from packaging.requirements import Requirement

    try:
        declared = importlib.metadata.requires("efficient_vlm") or []
    except importlib.metadata.PackageNotFoundError:
        return ["efficient_vlm is not installed: pip install -e ."]
    wrong = []
    for text in declared:
        need = Requirement(text)
        have = versions.get(need.name)
        if need.marker is None and have and not need.specifier.contains(have, prereleases=True):
            wrong.append(f'{need.name} {have} is not tested: pip install "{need}"')
    return wrong


def main(*, as_json: bool = False) -> int:
    """Prints the diagnosis; returns 2 if something stands in the way."""
    facts = diagnose()
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        print(f"Python {facts['python']} on {facts['platform']}, {facts['cores']} cores")
        print(
            "Packages: " + ", ".join(f"{k} {v or 'MISSING'}" for k, v in facts["packages"].items())
        )
        print("Devices: " + (", ".join(facts["devices"]) or "none"))
        print(
            f"Free disk: {facts['free_gib']['here']} GiB here, {facts['free_gib']['data']} for data"
        )
        for problem in facts["problems"]:
            print(f"problem: {problem}")
        print("Ready." if not facts["problems"] else "Fix the above and run doctor again.")
    return 2 if facts["problems"] else 0
