"""What surrounds a process."""

import sys

import pytest

from efficient_vlm import runtime


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is asked")
def test_freed_memory_goes_back_to_the_system():
    """Blocks too small to be mapped, between others that stay in use."""
    blocks = [bytearray(2**16) for _ in range(2_000)]
    kept = blocks[::100]
    del blocks
    before = resident_bytes()
    runtime.return_memory()
    assert before - resident_bytes() > 2**26
    assert len(kept) == 20
