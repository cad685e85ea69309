"""What surrounds a process: versions and device, and where compiled programs are kept."""

import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from efficient_vlm import __version__


def environment() -> dict[str, str]:
    """Versions and device, stored with results."""
    import platform

    import flax
    import jax

    device = jax.devices()[0]
    return {
        "efficient_vlm": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "cores": str(os.cpu_count()),
    }


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache, so that a resumed run starts at once.

    `EFFICIENT_VLM_COMPILATION_CACHE` names another folder, or "off". JAX's own setting, if there
    is one, is left alone.
    """
    import jax

    folder = os.environ.get("EFFICIENT_VLM_COMPILATION_CACHE")
    if folder == "off" or jax.config.jax_compilation_cache_dir:
        return
    folder = folder or str(user_cache() / "compiled" / _machine())
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def user_cache() -> Path:
    """Where this user's files are kept that can be made again; it need not be there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "efficient_vlm"


def _machine() -> str:
    """A name for the processor: programs compiled for one may not run on another."""
    import hashlib
    import platform

    try:
        text = Path("/proc/cpuinfo").read_text()
        flags = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        flags = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def return_memory() -> None:
    """Gives memory that tracing and compiling have used back to the operating system.

    glibc keeps what is freed below a block that is in use: after a short run of the quickstart,
    with programs of four budgets and evaluation, 440 of 970 MB.
    """
    if sys.platform == "linux":
        import ctypes

        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # Other C libraries lack it.
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def paused_collection() -> Iterator[None]:
    """Pauses the search for cyclic garbage.

    Imports and tracing create many objects and next to no cycles: it would take a tenth of their
    time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
