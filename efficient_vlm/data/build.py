"""Builds generated data in a separate process, beside one that compiles.

A thread would not do: building redirects standard output and patches imports for the whole process,
which can break a program that is being traced at that moment.
"""

import dataclasses
import json
import subprocess
import sys

from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.sources import build_token_bench

# A build of fewer images takes less time than starting a process.
WORTH_A_PROCESS = 4_000


def start(config: DataConfig) -> subprocess.Popen | None:
    """Starts the build, unless there is nothing to build or the build is small.

    Opening the data afterwards uses the build; if the process failed, it builds them itself and
    reports what is wrong.
    """
    if not config.generated or config.train_images < WORTH_A_PROCESS:
        return None
    fields = json.dumps(dataclasses.asdict(config))
    command = [sys.executable, "-m", "efficient_vlm.data.build", fields]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603 (our own module)


def main() -> None:
    """The process: the fields of a DataConfig as JSON are its only argument."""
    build_token_bench(DataConfig.from_mapping(json.loads(sys.argv[1])))


if __name__ == "__main__":
    main()
