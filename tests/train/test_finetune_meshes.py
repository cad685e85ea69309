"""Fine-tuning on meshes and in two processes is fine-tuning on one device."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import QUICK_TO_COMPILE
from tuned_models import SMOLVLM, TESTS, golden_with_words, mixed_rows, tuning_config, write_rows

pytestmark = pytest.mark.slow

STEPS = 4
MESHES = [
    dict(data=8),
    dict(data=1, fsdp=8),
    dict(data=2, tensor=4),
    dict(data=2, fsdp=2, tensor=2),
]
LORA = dict(name="lora", rank=4, alpha=8.0, targets="all-linear")
EXPERTS = dict(name="lora", rank=4, alpha=8.0, targets=["decoder", "experts"])
STARTED = []


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Processes of a test that failed end with it."""
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    names = ("qwen2_5_vl", "molmo_olmoe")
    found = {name: golden_with_words(name, folder / name) for name in names}
    return found | {"smolvlm": SMOLVLM}


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return write_rows(folder / "rows.jsonl", mixed_rows(folder, 40))


@pytest.fixture(scope="module")
def single_turns(tmp_path_factory):
    """Molmo's own prompt has one question and one answer."""
    folder = tmp_path_factory.mktemp("single_turns")
    rows = [row for row in mixed_rows(folder, 60) if len(row["messages"]) == 2]
    return write_rows(folder / "rows.jsonl", rows)


def start(config, jobs, devices, process=None):
    """A process of `tuned_steps.py`."""
    asked = {"config": config.to_dict(), "jobs": jobs}
    asked |= {} if process is None else {"process": process}
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    }
    STARTED.append(
        subprocess.Popen(
            [sys.executable, str(TESTS / "train" / "tuned_steps.py"), json.dumps(asked)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    return STARTED[-1]


def found(process):
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def make_config(directory, rows_file, adapt):
    config = tuning_config(directory, rows_file, adapt=adapt, data=dict(batch_size=8))
    config.train.update(steps=STEPS, checkpoint_every=STEPS)
    return config


def jobs_of(folder, meshes):
    return [dict(mesh=mesh, workdir=str(folder / str(n))) for n, mesh in enumerate(meshes)]


@pytest.mark.parametrize(
    ("name", "adapt", "meshes"),
    [
        pytest.param("smolvlm", LORA, MESHES, id="smolvlm-lora"),
        pytest.param("smolvlm", dict(name="full"), MESHES, id="smolvlm-full"),
        pytest.param(
            *("molmo_olmoe", EXPERTS, [*MESHES[1:], dict(expert=4, tensor=2)]), id="molmo-experts"
        ),
        pytest.param("molmo_olmoe", dict(name="full"), [dict(expert=4, fsdp=2)], id="molmo-full"),
        pytest.param("qwen2_5_vl", LORA, MESHES, id="qwen2.5-vl"),
        pytest.param("smolvlm", dict(LORA, name="qlora"), MESHES[3:], id="smolvlm-qlora"),
    ],
)
def test_meshes_equal_one_device(
    checkpoints, rows_file, single_turns, tmp_path, name, adapt, meshes
):
    """Loss and gradient norm of every step; what is frozen is cut as what is trained."""
    rows = single_turns if name.startswith("molmo") else rows_file
    config = make_config(checkpoints[name], rows, adapt)
    processes = [
        start(config, jobs_of(tmp_path / "one", [{}]), 1),
        start(config, jobs_of(tmp_path / "meshes", meshes), 8),
    ]
    (alone,), sharded = map(found, processes)
    assert len(alone["steps"]) == STEPS and alone["steps"][0] != alone["steps"][-1]
    for mesh, one in zip(meshes, sharded, strict=True):
        np.testing.assert_allclose(one["steps"], alone["steps"], rtol=1e-4, err_msg=str(mesh))
        assert one["compilations"] == alone["compilations"] <= 8


@pytest.mark.parametrize(
    ("name", "teacher"), [("smolvlm", None), ("qwen2_5_vl", "molmo_olmoe")], ids=str
)
def test_two_processes_equal_one(checkpoints, rows_file, tmp_path, name, teacher):
    """Each reads its own rows of every batch, what the first asked of a teacher included; the
    checkpoint goes on in one process."""
    config = make_config(checkpoints[name], rows_file, LORA)
    if teacher is not None:
        config.distil = dict(kind="forward_kl", top_k=8, teacher=str(checkpoints[teacher]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pair = [
        start(config, jobs_of(tmp_path / "pair", [dict(fsdp=2)]), 2, process=(number, 2, port))
        for number in range(2)
    ]
    alone = start(config, jobs_of(tmp_path / "one", [{}]), 1)
    both = [found(process)[0] for process in pair]
    (expected,) = found(alone)
    assert both[0]["compilations"] == both[1]["compilations"] == expected["compilations"]
    np.testing.assert_allclose(both[0]["steps"], expected["steps"], rtol=1e-4)
    config.train.steps = STEPS + 2
    again = [
        found(start(config, [dict(mesh={}, workdir=str(tmp_path / name / "0"))], 1))[0]
        for name in ("pair", "one")
    ]
    assert len(again[0]["steps"]) == STEPS + 2
    np.testing.assert_allclose(again[0]["steps"], again[1]["steps"], rtol=1e-4)
