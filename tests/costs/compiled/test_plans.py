"""Plans for pods: what stages cost and need, what fits, the command and the search."""

import dataclasses
import importlib.util
import json
import math
import re
import runpy
from pathlib import Path

import jax
import pytest

from efficient_vlm import sharding
from efficient_vlm.cli import aot_tables
from efficient_vlm.cli import main as cli
from efficient_vlm.cli.audit_aot import make_work
from efficient_vlm.cli.subject import read_subject
from efficient_vlm.costs.compiled import chips, compiled, programs, search
from efficient_vlm.errors import UserError
from efficient_vlm.kernels import aot, aot_gpu, topologies

DOCS = Path(__file__).parents[3] / "docs"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no package for this platform"
)
needs_gpu = pytest.mark.skipif(not aot_gpu.installed(), reason="needs the extra aot-gpu")
_shape = jax.ShapeDtypeStruct


def subject_of(preset, new=64):
    return read_subject(preset=preset, new=new)


# --- what a plan costs ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology",
    [pytest.param("v5e:2x2", marks=needs_libtpu), pytest.param("h100:4", marks=needs_gpu)],
)
def test_stages_cost_what_the_ledger_says(topology):
    """One device for one picture: FLOPs of the compiled program against our own count."""
    subject = subject_of("smolvlm-256m")
    work = make_work(subject, {"name": "none"}, "prefill", 4)
    sizes = dict(data=4, fsdp=1, expert=1, sequence=1, tensor=1)
    answer = compiled.compile_plan(work, topology, sizes)
    stages = {stage.name: stage for stage in answer.stages}
    full = subject.baseline.to_json()["flops"]["full"]
    assert stages["encode"].flops == pytest.approx(full["encoder"] + full["compressor"], rel=0.01)
    # Kernels compute whole blocks of keys: a GPU's are smaller, and causality leaves out more.
    near = 0.1 if answer.chip.gpu else 0.05
    assert stages["prefill"].flops == pytest.approx(full["decoder"] + full["head"], rel=near)
    assert stages["encode"].kernels == {"attention_forward": 12}
    assert stages["prefill"].kernels == {"attention_forward": 30}
    # Parameters are bfloat16, and all of them are there in every stage.
    params = 2 * 256.5e6
    assert all(s.hbm_bytes.arguments > params for s in answer.stages)
    assert answer.fits and answer.estimated_seconds > full["encoder"] / answer.chip.flops
    assert answer.estimate == "roofline, not measured"


@needs_gpu
@needs_libtpu
@pytest.mark.slow
def test_experts_of_a_gpu():
    """On four of them: kernels, what is sent, and the work of evenly loaded experts in blocks, as
    on a TPU; 64 times as much with XLA's own product of groups."""
    subject = subject_of("molmoe-1b")
    sizes = dict(data=1, fsdp=1, expert=4, sequence=1, tensor=1)
    found = [
        compiled.compile_plan(make_work(subject, {"name": "none"}, "prefill", 4), name, sizes)
        for name in ("h100:4", "v5e:2x2")
    ]
    gpu, tpu = ({stage.name: stage for stage in answer.stages}["prefill"] for answer in found)
    assert gpu.kernels == {"attention_forward": 16}
    assert 0.9 * tpu.flops < gpu.flops < 1.5 * tpu.flops
    assert set(gpu.collective_bytes) == {"all-gather", "ragged-all-to-all"}


def test_gpus_without_their_compiler(monkeypatch):
    """CPU devices stand for them, and the answer says so."""
    monkeypatch.setattr(chips.aot_gpu, "installed", lambda: False)
    assert [device.platform for device in chips.devices_of("h100:1")] == ["cpu"]
    answer = dataclasses.replace(answer_of(True, 1.0), chip=chips.CHIPS["h100"])
    assert answer.estimate == "GPU: compiled for CPUs"
    assert "aot-gpu" in aot_tables.bound("h100:1") and "aot-gpu" not in aot_tables.bound("v5e:2x2")


def test_programs_of_a_method_that_counts_tokens_of_all_images():
    """FastV keeps 163 tokens of 13 tiles, each of which has 64."""
    subject = subject_of("smolvlm-256m")
    mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
    for task in ("prefill", "decode"):
        work = make_work(subject, {"name": "fastv", "keep": 163}, task, 1)
        found = [program.name for program in programs.lowered(work, mesh)]
        assert tuple(found) == programs.PROGRAMS[task]


# --- the command ---------------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_an_answer(capsys):
    """70 billion parameters in training on four chips."""
    words = ["audit", "aot", "--preset=molmo-72b", "--task=train", "--topology=v5e:2x2", "--json"]
    assert cli.run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["estimated_seconds"] is None
    memory = found["hbm_bytes"]
    assert memory["total"] > memory["limit"] == chips.CHIPS["v5e"].hbm_limit
    # Parameters and two moments in float32, cut over four.
    assert memory["arguments"] == pytest.approx(12 * 73.3e9 / 4, rel=0.03)


@needs_libtpu
@pytest.mark.slow
def test_three_plans(capsys):
    """What docs/plans.md is made of: one of each task, each on another generation."""
    pool = ("--compressor=pool",)
    plans = (
        # Those that compile fastest there.
        ("smolvlm-256m", "train", "v5p:2x2x1", [*pool, "--compressor.budget=7"]),
        ("molmo-7b-d", "prefill", "v5e:2x2", [*pool, "--compressor.budget=16", "--mesh=tensor:4"]),
        ("molmoe-1b", "decode", "v6e:2x2", ["--mesh=data:2,tensor:2"]),
    )
    for preset, task, topology, more in plans:
        words = [f"--preset={preset}", f"--task={task}", f"--topology={topology}", *more]
        assert cli.run(["audit", "aot", *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["fits"], found
        memory = found["hbm_bytes"]
        parts = ("arguments", "temporaries", "outputs", "program")
        assert memory["total"] == sum(memory[part] for part in parts) < memory["limit"]
        assert found["flops"] > 0 and found["estimated_seconds"] > 0
        assert ("attention_forward" in found["kernels"]) == (task != "decode")
        assert ("attention_backward_kv" in found["kernels"]) == (task == "train")
        assert sum(stage["unknown_loops"] for stage in found["stages"]) == 0
        assert found["collective_bytes"]
        if task == "decode":
            assert cli.run(["audit", "aot", *words]) == 0
    assert "molmoe-1b, decode" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--topology=v5e:2x2"], "--task"),
        (["--task=trian", "--topology=v5e:2x2"], "train"),
        (["--task=train"], "--topology: missing"),
        (["--task=train", "--topology=v7:2x2"], "v7"),
        (["--task=train", "--topology=v5e"], "no size"),
        (["--task=train", "--topology=h100:x"], "number of GPUs"),
        (["--task=train", "--topology=v5e:2x2", "--batch=0"], "--batch=0"),
        (["--task=train", "--topology=v5e:2x2", "--batch=4,8"], "without --search"),
        (["--task=train", "--topology=v5e:2x2", "--mesh=fsdp:3"], "3 devices, v5e:2x2 has 4"),
        (["--task=train", "--topology=v5e:2x2", "--mesh=fsdp:²"], "AXIS:DEVICES"),
        (["--task=train", "--topology=v5e:2x2", "--mesh=fsdp:2,fsdp:4"], "'fsdp' twice"),
        (["--task=train", "--topology=v5e:2x2", "--batch=6"], "multiples of 4"),
        (["--task=train", "--topology=v5e:2x2", "--search", "--mesh=fsdp:4"], "--search tries"),
        (["--task=train", "--topology=v5e:2x2", "--search", "--remat=full"], "--search tries"),
        (["--task=train", "--topology=v5e:2x2", "--remat=some"], "some"),
        (["--task=train", "--topology=v5e:2x2", "--compressor=pool,stride"], "budget: missing"),
        (["--task=train", "--topology=v5e-6"], "v5e-4, v5e-8"),
        (["--task=train", "--topology=v5p-4"], "TensorCores, two a chip"),
    ],
)
@needs_libtpu
def test_mistakes(words, said):
    with pytest.raises(UserError) as error:
        cli.run(["audit", "aot", "--preset=smolvlm-256m", *words])
    assert said in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_a_pod_that_is_not_there(monkeypatch):
    """The compiler is not asked: by a limit below what it takes."""
    monkeypatch.setitem(topologies._PODS, "v5e", (4, 2))
    aot.tpu_devices.cache_clear()
    for shape in ("2x4", "4x1"):
        with pytest.raises(UserError, match="larger than a pod") as error:
            cli.run(["audit", "aot", "--task=train", f"--topology=v5e:{shape}"])
        assert len(str(error.value).splitlines()) <= 3
    assert topologies.check_size("v5e:2x2") is None
    monkeypatch.undo()
    assert topologies._PODS["v5e"] == (256, 16)


def test_only_aot_takes_its_options():
    for word in ("--task=train", "--batch=8", "--remat=full", "--search", "--topology=v5e:2x2"):
        with pytest.raises(UserError, match="only `audit .*`audit aot`|only `audit aot`"):
            cli.run(["audit", "--preset=smolvlm-256m", word])
        if word != "--topology=v5e:2x2":
            with pytest.raises(UserError, match="`audit kernels` does not take it"):
                cli.run(["audit", "kernels", word])


def test_refusals_of_the_compiler_are_read():
    new = "Ran out of memory on HBM, the total memory required for HLO temporaries (47.37G) exceeds"
    assert compiled._needed(f"{new} available HBM (15.75G).") == round(47.37 * 2**30)
    assert compiled._needed("Used 17.30G of 15.75G hbm. Exceeded") == round(17.3 * 2**30)
    assert compiled._needed("INTERNAL: something else") is None


# --- search --------------------------------------------------------------------------------------


def answer_of(fits, seconds):
    memory = compiled.Memory(1, 1, 1, 1, 10)
    times = {"flops": seconds} if fits else None
    stage = compiled.CompiledStage("train", fits, memory, *(None,) * 5, times, 0.0)
    return compiled.Answer("v5e:4x4", {}, 16, chips.CHIPS["v5e"], [stage])


def test_search_tries_what_may_be_better():
    subject = subject_of("smolvlm-256m")
    work = make_work(subject, {"name": "none"}, "train", 16)
    asked = []

    def compile_one(one, sizes):
        asked.append((one.batch, one.remat))
        # 16 pictures fit with "dots", more never.
        return answer_of(one.batch == 16 and one.remat != "none", 2.0)

    tried = list(search.search([("all", work)], [16, 32, 64], 16, compile_one))
    full = [(16, "none"), (16, "dots"), (32, "none"), (32, "dots"), (32, "full")]
    assert asked == full  # Nine heads: one mesh; a batch that fits nowhere ends the larger ones.
    assert search.best(tried)["all"].work.remat == "dots"
    assert search.best(tried)["all"].rate == 8.0


def test_a_plan_that_does_not_compile_is_an_answer():
    subject = subject_of("smolvlm-256m")
    work = make_work(subject, {"name": "none"}, "train", 16)
    broken = UserError("train does not compile for v5e:4x4: INTERNAL")

    def compile_one(one, sizes):
        if one.remat == "none":
            raise broken
        return answer_of(True, 2.0)

    tried = list(search.search([("all", work)], [16], 16, compile_one))
    assert [one.error for one in tried] == [broken, None]
    assert search.best(tried)["all"].work.remat == "dots"
    assert "does not compile" in aot_tables.line(tried[0])
    assert "does not compile" in aot_tables.row_of(tried[0], {})["error"]

    def none(one, sizes):
        raise broken

    with pytest.raises(UserError, match="does not compile"):
        list(search.search([("all", work)], [16], 16, none))


def test_meshes_of_a_mixture():
    work = make_work(subject_of("molmoe-1b"), {"name": "none"}, "train", 256)
    found = search.meshes(work, 256)
    assert all(math.prod(sizes.values()) == 256 for sizes in found)
    assert {sizes["expert"] for sizes in found} == {1, 4, 8}
    assert {sizes["tensor"] for sizes in found} == {1, 2, 4, 8}
    none = dataclasses.replace(work, batch=3)
    with pytest.raises(UserError, match="no mesh of 256"):
        list(search.search([("all", none)], [3], 256, lambda *_: None))


# --- the committed table -------------------------------------------------------------------------


def test_the_page_is_made_of_the_numbers():
    page = runpy.run_path(str(DOCS / "plans.py"))
    rows = json.loads((DOCS / "plans.json").read_text())
    assert (DOCS / "plans.md").read_text() == page["render"](rows)
    assert {page["key"](row) for row in rows} == set(page["settings"]())
    for row in rows:
        assert "error" in row or re.fullmatch(r"(\w+:\d+,?)+", row["mesh_text"])
