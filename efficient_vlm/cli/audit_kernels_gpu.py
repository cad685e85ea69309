"""`efficient-vlm audit kernels --topology=h100`, or another GPU: registers and spills, without one.

ptxas prints from native code: the programs are compiled in a process of their own, whose output is
read here.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

from efficient_vlm.cli.kernel_programs import Program, Row, programs
from efficient_vlm.costs.compiled import hlo
from efficient_vlm.errors import UserError, first_line
from efficient_vlm.kernels import aot_gpu

# Hopper's kernels are for compute capability 9.0 alone (wgmma); other GPUs get XLA's path.
_HOPPER = 9
_MARK = "@@ program "
_TARGET = 'custom_call_target="mosaic_gpu'


def programs_of(gpu: str, quick: bool) -> list[Program]:
    """What is compiled for a GPU of `aot_gpu.GPUS`."""
    implementation = "gpu" if aot_gpu.GPUS[gpu]["major"] == _HOPPER else "xla"
    return list(programs(quick, implementation))


def compiled(gpu: str, quick: bool, say: Callable[[str], None] = lambda what: None) -> list[Row]:
    """One row for each program; spills of our kernels are an error.

    Args:
      gpu: of `aot_gpu.GPUS`.
      quick: at one size only.
      say: called with what is being compiled.

    Raises:
      UserError: the compiler's wheels are not installed, or its process died.
    """
    words = [
        sys.executable,
        "-m",
        "efficient_vlm.cli.audit_kernels_gpu",
        gpu,
        "quick" if quick else "all",
    ]
    listed = programs_of(gpu, quick)
    what = (f"{program.describe()} for {gpu}" for program in listed)
    environment = {**os.environ, **aot_gpu.environment()}
    code, out, err = run_and_tell(words, environment, lambda: say(next(what, gpu)))
    parts = out.split(_MARK)[1:]
    if code or len(parts) != len(listed):
        last = (err.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"compiling for {gpu} stopped: {last[:200]}")
    return [_row(gpu, program, part) for program, part in zip(listed, parts)]


def run_and_tell(
    words: Sequence[str], environment: Mapping[str, str], tell: Callable[[], None]
) -> tuple[int, str, str]:
    """Runs a command, and calls `tell` at each line of its output that begins with the mark of a
    program.

    Returns:
      Exit code, stdout, stderr.
    """
    lines = []
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(  # noqa: S603
            words, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            for line in process.stdout:
                lines.append(line)
                if line.startswith(_MARK):
                    tell()
        errors.seek(0)
        return process.returncode, "".join(lines), errors.read()


def _row(gpu: str, program: Program, text: str) -> Row:
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", text)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", text)]
    error = re.search(r"^error: (.*)$", text, re.M)
    error = error[1] if error else None
    counts = re.search(r"^kernels: (\d+), flops: (\d+)$", text, re.M)
    error = error or program.problem(*map(int, counts.groups() if counts else (0, 0)))
    if error is None and program.calls and any(spills):
        error = f"{sum(spills)} bytes of registers are spilled"
    facts = (program.kernel, program.shape, program.dtype, program.direction)
    row = Row(gpu, *facts, error is None, None, error)
    return dataclasses.replace(
        row, registers=max(registers, default=None), spill_bytes=sum(spills) if spills else None
    )


def main() -> None:
    """What the other process runs."""
    gpu, size = sys.argv[1:]
    for program in programs_of(gpu, size == "quick"):
        print(f"{_MARK}{program.direction}", flush=True)
        try:
            text = aot_gpu.compile_for_gpu(program.function, *program.given, gpu=gpu).as_text()
            flops = round(hlo.costs(text).flops)
            # A kernel that an earlier program has, too, is not compiled again.
            print(f"kernels: {text.count(_TARGET)}, flops: {flops}", flush=True)
        except Exception as problem:  # Whatever the compiler says is the answer.
            print(f"error: {first_line(problem)}", flush=True)


if __name__ == "__main__":
    main()
