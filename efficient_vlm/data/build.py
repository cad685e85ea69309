"""Builds generated data in a process of its own, beside one that compiles.

A thread would not do: while data are built, imports and standard output are changed for the whole
process, and a program that is being traced at that moment can break.
"""

import dataclasses
import json
import subprocess
import sys

from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.sources import build_token_bench

# A smaller build takes less time than a process takes to start.
WORTH_A_PROCESS = 4_000


def start(config: DataConfig) -> subprocess.Popen | None:
    """Starts the build, unless there is nothing to build or it is quickly done.

    Whoever opens the data afterwards finds them there; if the process failed, opening them builds
    them, and says what is wrong.
    """
    if config.source != "token_bench" or config.train_images < WORTH_A_PROCESS:
        return None
    fields = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-m", "efficient_vlm.data.build", fields]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 (our own module)


def main() -> None:
    """The process: the fields of a DataConfig as JSON are its only argument."""
    build_token_bench(DataConfig.from_mapping(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
