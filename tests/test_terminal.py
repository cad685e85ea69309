"""The display on a real pseudo-terminal, in a real pipe and in a notebook's kernel."""

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import textwrap
import time
import types
from pathlib import Path

import pytest

from efficient_vlm import terminal as progress_module
from efficient_vlm.terminal import Compiling, Progress, format_metrics, format_seconds, stage

ROOT = Path(__file__).resolve().parents[1]
RUN = """
    import time
    from efficient_vlm.terminal import Progress, stage
    with stage("building data"):
        pass
    with Progress(40, log_every=10) as progress:
        for step in range(1, 41):
            time.sleep(0.01)
            if step == 20:
                progress.message("[saved] step 20")
            progress.update(step, {"loss": 2 / step, "accuracy": step / 40, "budget": 16,
                                   "images_per_second": 512.3, "data_wait_fraction": 0.012})
    print("end")
"""


def environment(**extra):
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLUMNS")}
    return {**clean, "PYTHONPATH": str(ROOT), **extra}


def run_in_pipe(**extra):
    command = [sys.executable, "-c", textwrap.dedent(RUN)]
    return subprocess.run(
        command, env=environment(**extra), capture_output=True, text=True, check=True, timeout=60
    )


def run_in_terminal(**extra):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RUN)], env=environment(COLUMNS="160", **extra),
        stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True,
    )  # fmt: skip
    os.close(terminal)
    output = b""
    while True:
        try:
            block = os.read(controller, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not block:
            break
        output += block
    os.close(controller)
    assert process.wait(timeout=60) == 0, output
    return output.decode()


@pytest.mark.parametrize("extra", [{}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}])
def test_a_pipe_gets_plain_lines_and_no_control_codes(extra):
    result = run_in_pipe(**extra)
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert "\r" not in result.stdout
    lines = result.stdout.splitlines()
    assert lines[0] == "building data ..."
    assert re.fullmatch(r"building data: \d\.\d s", lines[1])
    shown = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ")]
    assert shown == [1, 10, 20, 30, 40]
    assert "[saved] step 20" in lines
    assert lines[-1] == "end"
    assert re.fullmatch(
        r"step 10/40  loss 0\.2000  accuracy 0\.250  512 images/s  data wait 1\.2 %  budget 16  "
        r"left 0:0\d",
        next(line for line in lines if line.startswith("step 10/")),
    )


def test_a_terminal_gets_a_live_bar():
    output = run_in_terminal(TERM="xterm-256color")
    assert "\x1b[" in output
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output)
    assert "40/40" in plain
    assert "━" in plain
    for word in ("loss 0.0500", "accuracy 1.000", "512 images/s", "data wait 1.2 %", "budget 16"):
        assert word in plain
    assert "left 0:00" in plain
    assert "[saved] step 20" in plain
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h")  # the cursor comes back


def test_a_dumb_terminal_gets_plain_lines():
    output = run_in_terminal(TERM="dumb")
    assert "\x1b" not in output
    assert "step 40/40" in output


def test_slow_steps_still_get_lines_and_the_last_step_is_always_shown():
    file = io.StringIO()
    with Progress(100, log_every=1000, every_seconds=0.05, file=file) as progress:
        for step in range(1, 4):
            progress.update(step, {"loss": 1.0})
            time.sleep(0.06)
        progress.update(4, {"loss": 1.0})
        progress.update(5, {"loss": 1.0})  # interrupted here
    shown = [line.split()[1] for line in file.getvalue().splitlines()]
    assert shown == ["1/100", "2/100", "3/100", "4/100", "5/100"]


def test_values_are_read_only_when_shown():
    class Device:
        reads = 0

        def __float__(self):
            Device.reads += 1
            return 1.0

    with Progress(100, log_every=50, file=io.StringIO()) as progress:
        for step in range(1, 101):
            progress.update(step, {"loss": Device()})
    assert Device.reads == 3


def test_a_closed_pipe_does_not_stop_training():
    reader, writer = os.pipe()
    os.close(reader)
    file = os.fdopen(writer, "w")
    with Progress(3, log_every=1, file=file) as progress:
        for step in range(1, 4):
            progress.update(step, {"loss": 1.0})
    with contextlib.suppress(BrokenPipeError):
        file.close()


def test_a_notebook_updates_one_line(monkeypatch):
    calls = []

    class Handle:
        def update(self, content, raw):
            calls.append(("update", content["text/plain"]))

    def display(content, raw, display_id):
        calls.append(("display", content["text/plain"]))
        return Handle()

    shell = types.SimpleNamespace(kernel=object())
    fake = types.SimpleNamespace(
        get_ipython=lambda: shell, display=types.SimpleNamespace(display=display)
    )
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert progress_module.in_notebook()
    with Progress(50, log_every=1) as progress:
        for step in range(1, 51):
            progress.update(step, {"loss": 1.0})
    assert [kind for kind, _ in calls] == ["display", "update"]
    assert calls[-1][1].startswith("step 50/50")
    shell.kernel, fake.get_ipython = None, lambda: None
    assert not progress_module.in_notebook()


def test_stage_reports_failure_by_silence_and_formats():
    file = io.StringIO()
    with Progress(1, file=file) as progress:
        with pytest.raises(ValueError, match="x"), stage("work", progress):
            raise ValueError("x")
        with stage("more", progress):
            pass
    assert file.getvalue().splitlines()[:2] == ["work ...", "more ..."]
    assert [format_seconds(s) for s in (0, 6.6, 60, 750, 7500, -3)] == [
        "0:00", "0:07", "1:00", "12:30", "2:05:00", "0:00",
    ]  # fmt: skip
    assert format_metrics({"skipped": 0, "other": 1, "loss": None}) == ""
    assert format_metrics({"skipped": 2}) == "skipped 2"


# ---- compilers -----------------------------------------------------------------------------------


def test_lines_of_what_is_compiled(monkeypatch, capsys):
    seconds = iter([10.0, 10.2, 82.0, 145.0])
    clock = types.SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr(progress_module, "time", clock)
    say = Compiling(2)
    say("encode")
    say("prefill")
    say.done()
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "[0:00] compiling 1 of 2: encode",
        "[1:12] compiling 2 of 2: prefill",
        "[2:15] compiled 2 programs",
    ]


def test_a_compiler_may_be_silent_and_its_pipe_closed(monkeypatch, capsys):
    say = Compiling(1, quiet=True)
    say("decode")
    say.done()
    assert capsys.readouterr() == ("", "")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    say = Compiling(3, at_most=True)
    say("decode")  # No error.
