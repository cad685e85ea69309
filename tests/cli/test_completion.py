"""Completion in a shell, by argcomplete's own protocol, in a process of its own."""

import os
import subprocess
import sys

import pytest

from efficient_vlm.cli import main as cli
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.families import presets

# What bash gives, and where the words may be cut: "=" is one of these, as in an ordinary bash.
BREAKS = " \t\n\"'@><=;|&(:"


def complete(line, heavy=False):
    """What the shell is offered for the last word of a line; {"jax"} for what has been loaded."""
    code = "import sys\nfrom efficient_vlm.cli import main\nmain.main()\n"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line.encode())),
        "COMP_TYPE": "9",
        "_ARGCOMPLETE_COMP_WORDBREAKS": BREAKS,
        "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull,
        "_ARGCOMPLETE_IFS": "\n",
    }
    if heavy:  # argcomplete ends the process itself.
        code = (
            "import os\nreal = os._exit\n"
            "def end(code):\n    import sys\n"
            "    print([m for m in ('jax', 'flax', 'numpy', 'rich') if m in sys.modules])\n"
            "    sys.stdout.flush()\n    real(code)\n"
            "os._exit = end\n" + code
        )
    else:
        del environment["_ARGCOMPLETE_STDOUT_FILENAME"]
        code = "import os\nos.dup2(1, 8)\n" + code
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if heavy else done.stdout.split("\n")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("efficient-vlm ", set(cli.VERBS)),
        ("efficient-vlm do", {"doctor "}),
        ("efficient-vlm audit ", {"aot", "kernels", "sharding"}),
        ("efficient-vlm audit aot --task=", {"train", "prefill", "decode"}),
        ("efficient-vlm audit --compressor=", set(METHODS)),
        ("efficient-vlm audit --compressor=divp", {"divprune "}),
        ("efficient-vlm audit --compressor=none,divp", {"none,divprune "}),
        ("efficient-vlm eval --workdir=x --compressor fastv,str", {"fastv,stride "}),
        ("efficient-vlm compress --compressor=all,to", {"all,tokenpacker", "all,tome", "all,tofu"}),
        ("efficient-vlm audit --preset=qwen2.5-vl", {"qwen2.5-vl-3b", "qwen2.5-vl-7b"}),
        ("efficient-vlm audit sharding --preset=", set(presets.names())),
        ("efficient-vlm audit --match=mean_p", {"mean_processed:"}),
        ("efficient-vlm audit kernels --qui", {"--quick ", "--quiet "}),
        ("efficient-vlm methods visi", {"visionselector", "visionzip"}),
    ],
)
def test_what_is_offered(line, offered):
    found = {word.strip() for word in complete(line)}
    wanted = {word.strip() for word in offered}
    if line.endswith((" ", "=")) and "--" not in line:
        assert wanted <= found  # And options.
    else:
        assert found == wanted


def test_nothing_heavy_is_loaded():
    assert complete("efficient-vlm audit --compressor=", heavy=True).strip() == "[]"
