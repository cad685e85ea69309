"""Plans for pods: what is counted in a compiled program, what fits, and the search."""

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efficient_vlm import cli, sharding
from efficient_vlm.audit.plans import chips, command, compiled, hlo, hlo_products, search
from efficient_vlm.audit.plans.command import make_work
from efficient_vlm.audit.subject import read_subject
from efficient_vlm.errors import UserError
from efficient_vlm.kernels import aot, aot_gpu
from efficient_vlm.kernels.attention import attention, make_mask
from efficient_vlm.models import experts

DOCS = Path(__file__).parents[2] / "docs"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no package for this platform"
)
needs_gpu = pytest.mark.skipif(not aot_gpu.installed(), reason="needs the extra aot-gpu")
_shape = jax.ShapeDtypeStruct


def subject_of(preset, new=64):
    return read_subject(
        argparse.Namespace(preset=preset, config=None, text=None, new=new, images=None), []
    )


# --- what a program costs ------------------------------------------------------------------------


def layers(unroll):
    """Seven products of [64, 128] and [128, 128], and how they change the rows."""

    def run(x, kernels):
        return lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, kernels, unroll=unroll)[0]

    return run


GIVEN = (_shape((64, 128), jnp.float32), _shape((7, 128, 128), jnp.float32))
EXACT = 7 * 2 * 64 * 128 * 128


@pytest.mark.parametrize("unroll", [1, 3, 7])
def test_loops_count_as_often_as_they_turn(unroll):
    program = jax.jit(layers(unroll)).lower(*GIVEN).compile()
    assert hlo.costs(program.as_text()).flops == EXACT


@needs_libtpu
@pytest.mark.parametrize("unroll", [1, 3, 7])
def test_loops_of_a_tpu(unroll):
    """The trap that this is for: JAX's own count has the body of a loop once."""
    program = aot.compile_for_tpu(layers(unroll), *GIVEN)
    found = hlo.costs(program.as_text())
    assert found.flops == EXACT and found.unknown_loops == 0
    assert found.collective_bytes == {}
    if unroll == 1:
        assert program.cost_analysis()["flops"] < EXACT / 3


@needs_libtpu
def test_gradients_between_devices_of_a_tpu():
    """Rows over four devices: the loop's gradients equal the unrolled ones, and are as large as the
    parameters."""
    mesh = Mesh(np.array(aot.tpu_devices("v5e:2x2")), ("data",), axis_types=(AxisType.Auto,))
    lies = [NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())]
    given = [_shape(x.shape, x.dtype, sharding=s) for x, s in zip(GIVEN, lies, strict=True)]
    found = []
    for unroll in (1, 7):
        gradient = jax.grad(lambda x, k, u=unroll: layers(u)(x, k).sum(), 1)
        jitted = jax.jit(gradient, out_shardings=lies[1])
        found.append(hlo.costs(jitted.lower(*given).compile().as_text()))
    loop, unrolled = found
    # The first layer's rows need no gradient, which only the unrolled program sees.
    assert loop.flops == pytest.approx(3 * EXACT / 4, rel=0.06)
    assert unrolled.flops == pytest.approx(loop.flops, rel=0.06)
    for one in found:
        sent = sum(one.collective_bytes.values())
        assert sent == pytest.approx(2 * 7 * 128 * 128 * 4, rel=0.01)


def test_a_gather_that_goes_on_beside_a_loop():
    """It is started before four turns, each of which works on while it arrives, and awaited behind
    them: sent once, written once, and no traffic of what works meanwhile."""
    whole, part = "f32[64,512]{1,0}", "f32[64,128]{1,0}"
    state, size = f"({part}, {whole}, {part})", 64 * 128 * 4
    gather = 'all-gather(%part), channel_id=7, dimensions={1}, frontend_attributes={chain_id="5"}'
    turns = 'backend_config={"known_trip_count":{"n":"4"}}'
    text = f"""HloModule step

%begin (part: f32[64,128]) -> {state} {{
  %part = {part} parameter(0)
  %gather.0 = {whole} {gather}
  ROOT %0 = ({part}, {whole}) custom-call(%gather.0), custom_call_target="AsyncCollectiveStart"
}}

%work (part: f32[64,128], whole: f32[64,512], x: f32[64,128]) -> {state} {{
  %part = {part} parameter(0)
  %whole = {whole} parameter(1)
  %x = {part} parameter(2)
  %gather.1 = {whole} {gather}
  %twice = {part} add(%x, %x)
  ROOT %all = {state} tuple(%part, %gather.1, %twice)
}}

%end (part: f32[64,128], whole: f32[64,512]) -> f32[64,512] {{
  %part = {part} parameter(0)
  %whole = {whole} parameter(1)
  %gather.2 = {whole} {gather}
  ROOT %2 = {whole} custom-call(%whole, %gather.2), custom_call_target="AsyncCollectiveDone"
}}

%turn (state: {state}) -> {state} {{
  %state = {state} parameter(0)
  %a = {part} get-tuple-element(%state), index=0
  %b = {whole} get-tuple-element(%state), index=1
  %c = {part} get-tuple-element(%state), index=2
  ROOT %next = {state} fusion(%a, %b, %c), kind=kOutput, calls=%work
}}

%more (state: {state}) -> pred[] {{
  %state = {state} parameter(0)
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (given: f32[64,128], x: f32[64,128]) -> f32[64,512] {{
  %given = {part} parameter(0)
  %x = {part} parameter(1)
  %begun = ({part}, {whole}) fusion(%given), kind=kCustom, calls=%begin
  %a = {part} get-tuple-element(%begun), index=0
  %b = {whole} get-tuple-element(%begun), index=1
  %first = {state} tuple(%a, %b, %x)
  %loop = {state} while(%first), condition=%more, body=%turn, {turns}
  %c = {part} get-tuple-element(%loop), index=0
  %d = {whole} get-tuple-element(%loop), index=1
  ROOT %gathered = {whole} fusion(%c, %d), kind=kCustom, calls=%end
}}
"""
    found = hlo.costs(text)
    assert found.collective_bytes == {"all-gather": 3 * size}
    assert found.hbm_bytes == (1 + 4) * size + 4 * 2 * size


def test_a_sum_of_which_a_slice_is_kept():
    """A TPU's reduce-scatter is a fusion: the slice alone is written, and half as much is sent."""
    text = """HloModule step

%all-reduce-scatter (input: f32[64,512]) -> f32[64,128] {
  %input = f32[64,512]{1,0} parameter(0)
  %sum = f32[64,512]{1,0} all-reduce(%input), channel_id=3, to_apply=%add
  %first = u32[] constant(0)
  ROOT %part = f32[64,128]{1,0} dynamic-slice(%sum, %first, %first), dynamic_slice_sizes={64,128}
}

ENTRY %main (given: f32[64,512]) -> f32[64,128] {
  %given = f32[64,512]{1,0} parameter(0)
  ROOT %cut = f32[64,128]{1,0} fusion(%given), kind=kCustom, calls=%all-reduce-scatter
}
"""
    found, size = hlo.costs(text), 64 * 128 * 4
    assert found.collective_bytes == {"reduce-scatter": 3 * size}
    assert found.hbm_bytes == (4 + 1) * size


@needs_libtpu
def test_sums_of_one_channel():
    """JAX gives every `psum` of its own the channel 1; they are as many all the same."""
    mesh = Mesh(np.array(aot.tpu_devices("v5e:2x2")), ("data",), axis_types=(AxisType.Auto,))

    def run(x):
        total = lax.psum(x @ x, "data")
        return lax.psum(jnp.tanh(total) @ x, "data")

    jitted = jax.jit(
        jax.shard_map(
            run, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
        )
    )
    x = _shape((256, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    found = hlo.costs(jitted.lower(x).compile().as_text())
    assert found.collective_bytes == {"all-reduce": 2 * 2 * 256 * 256 * 4}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("pad", "holes", "spread"), [(0, 1, 1), (2, 1, 2), (1, 3, 1)])
def test_pairs_of_a_window(stride, pad, holes, spread):
    """By hand: each output, each place of the window, whether an input is there."""
    size, window = 9, 4
    wide = (size - 1) * holes + 1
    outputs = (wide + 2 * pad - (window - 1) * spread - 1) // stride + 1
    pairs = sum(
        0 <= o * stride + w * spread - pad < wide and (o * stride + w * spread - pad) % holes == 0
        for o in range(outputs)
        for w in range(window)
    )
    assert hlo_products.meeting(size, window, outputs, pad, stride, holes, spread) == pairs


def test_convolutions_and_batches():
    def run(x, kernel, a, b):
        return lax.conv_general_dilated(x, kernel, (2, 2), "VALID"), jnp.einsum(
            "bij,bjk->bik", a, b
        )

    given = ((1, 3, 16, 16), (5, 3, 4, 4), (6, 8, 9), (6, 9, 10))
    program = jax.jit(run).lower(*(_shape(s, jnp.float32) for s in given)).compile()
    exact = 2 * 5 * 7 * 7 * 3 * 4 * 4 + 2 * 6 * 8 * 9 * 10
    assert hlo.costs(program.as_text()).flops == exact


def test_a_slice_of_a_stack_is_read_and_not_all_of_it():
    """Twice as long a stack is read twice as much, not four times."""
    moved = []
    for count in (7, 14, 28):
        given = (GIVEN[0], _shape((count, 128, 128), jnp.float32))
        program = jax.jit(layers(1)).lower(*given).compile()
        moved.append(hlo.costs(program.as_text()).hbm_bytes)
    assert moved[2] - moved[1] == pytest.approx(2 * (moved[1] - moved[0]), rel=0.01)
    assert moved[0] > 7 * 128 * 128 * 4


def test_loops_without_a_length_are_said():
    def run(x):
        return lax.while_loop(lambda x: x.sum() < 100.0, lambda x: x @ x, x)

    found = hlo.costs(jax.jit(run).lower(_shape((8, 8), jnp.float32)).compile().as_text())
    assert found.unknown_loops == 1 and found.flops == 2 * 8**3


@pytest.mark.parametrize(("causal", "share"), [(True, 0.625), (False, 1.0)])
def test_loops_over_blocks_turn_as_often_as_usual(causal, share):
    """On a CPU, and so in plans for GPUs, what is computed is in the data of the mask."""
    length, heads, dim = 4096, 2, 64

    def run(q, k, v):
        live = jnp.ones((1, length), bool)
        mask = make_mask(length, length, causal=causal, kv_live=live)
        return attention(q, k, v, mask=mask, implementation="xla").out

    given = [_shape((1, heads, length, dim), jnp.float32)] * 3
    for function, products in ((run, 2), (jax.grad(lambda *x: (run(*x) ** 2).sum(), (0, 1, 2)), 7)):
        program = jax.jit(function).lower(*given).compile()
        found = hlo.costs(program.as_text())
        exact = 2 * products * heads * length**2 * dim
        assert found.flops == pytest.approx(share * exact, rel=0.01)
        assert found.unknown_loops == 0


def mixture(devices, across):
    """Costs of the gradients of eight experts on as many devices, cut over some of them."""
    # Rows of 256: a TPU sends no fewer than two lines of 128.
    rows, tokens, width, inner, number, top_k = 8, 128, 256, 256, 8, 2
    mesh = sharding.make_mesh(sharding.MeshConfig(expert=across), devices)

    def given(shape, *spec):
        lies = NamedSharding(mesh, PartitionSpec(*spec))
        return _shape(shape, jnp.bfloat16, sharding=lies)

    def loss(x, weights, kernels):
        chosen = jnp.arange(tokens)[:, None] + jnp.arange(top_k)
        chosen = jnp.broadcast_to(chosen % number, weights.shape)
        valid = jnp.ones((rows, tokens), bool)
        y, _ = experts.dispatch(x, chosen, weights, valid, kernels, jax.nn.silu)
        return (y.astype(jnp.float32) ** 2).sum()

    wide, back = (number, width, inner), (number, inner, width)
    kernels = (given(wide, "expert"), given(wide, "expert"), given(back, "expert"))
    x, weights = (given((rows, tokens, size), sharding.BATCH) for size in (width, top_k))
    with sharding.active(mesh):
        program = jax.jit(jax.grad(loss, (0, 2))).lower(x, weights, kernels).compile()
    # Of one device: of its rows three products, each with two gradients, and what it sends.
    pairs = rows * tokens * top_k // len(devices)
    return hlo.costs(program.as_text()), 3 * 3 * 2 * pairs * width * inner, pairs * width * 2


def test_experts_on_a_cpu():
    """And so in plans for GPUs: loops over blocks of rows, as many as there are rows."""
    found, flops, _ = mixture(jax.devices()[:1], 1)
    assert found.flops == pytest.approx(flops, rel=0.1) and found.unknown_loops == 0


@needs_libtpu
@pytest.mark.parametrize("across", [1, 4, 8])
def test_experts_on_other_devices_cost_as_much(across):
    """There is room for everything of everyone; what is there is not more."""
    found, flops, rows = mixture(aot.tpu_devices("v5e:2x4"), across)
    assert found.flops == pytest.approx(flops, rel=0.01) and found.unknown_loops == 0
    # There and back, and so for the gradients.
    sent = found.collective_bytes.get("ragged-all-to-all", 0) / rows
    assert sent == (4 if across > 1 else 0)


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
    """On four of them: kernels, what is sent, and the work of evenly loaded experts in blocks, as on
    a TPU; 64 times as much with XLA's own product of groups."""
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
    assert "aot-gpu" in command._bound("h100:1") and "aot-gpu" not in command._bound("v5e:2x2")


def test_kernels_of_a_gpu_are_read():
    """Their names and their work stand in scopes, the axes of a product of cuBLAS in its settings;
    what a loop reads and writes in place counts by its parts."""
    text = """
HloModule gpu

%fused (p0: f32[64,8], p1: s32[], p2: f32[1,8]) -> f32[64,8] {
  %p0 = f32[64,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,8}
  %new = f32[1,8]{1,0} add(%old, %p2)
  ROOT %put = f32[64,8]{1,0} dynamic-update-slice(%p0, %new, %p1, %zero)
}

ENTRY %main (a: f32[64,8], i: s32[], b: f32[1,8]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[1,8]{1,0} parameter(2)
  %m = (f32[1,64]{1,0}, s8[4194304]{0}) custom-call(%b, %a), custom_call_target="__cublas$gemm", AXES
  %c = f32[64,8]{1,0} fusion(%a, %i, %b), kind=kLoop, calls=%fused
  ROOT %mpmd_map.7 = f32[64,8]{1,0} custom-call(%c), custom_call_target="mosaic_gpu_v2", METADATA
}
"""
    scopes = 'metadata={op_name="jit(f)/about_4096_flops/attention_forward/mpmd_map"}'
    axes = 'backend_config={"rhs_contracting_dimensions":["1"],"rhs_batch_dimensions":[]}'
    found = hlo.costs(text.replace("METADATA", scopes).replace("AXES", axes))
    assert found.kernels == {"attention_forward": 1} and found.flops == 4096 + 2 * 8 * 64
    # A row read, one written, one more read with its place; the kernel reads and writes all.
    moved = (3 * 8 * 4 + 4) + 2 * 64 * 8 * 4
    assert found.hbm_bytes == moved + (8 + 64 * 8 + 64) * 4  # Without the room of the library.


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
        (["--task=train", "--topology=v5e:32x8"], "larger than a pod"),
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
        (["--task=train", "--topology=v5e:2x2", "--compressor=pool,stride"], "several"),
    ],
)
@needs_libtpu
def test_mistakes(words, said):
    with pytest.raises(UserError) as error:
        cli.run(["audit", "aot", "--preset=smolvlm-256m", *words])
    assert said in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_only_aot_takes_its_options():
    for word in ("--task=train", "--batch=8", "--remat=full", "--search", "--topology=v5e:2x2"):
        with pytest.raises(UserError, match="only `audit (aot|sharding)`"):
            cli.run(["audit", "--preset=smolvlm-256m", word])
        if word != "--topology=v5e:2x2":
            with pytest.raises(UserError, match="does not take it"):
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
    stage = compiled.Stage("train", fits, memory, *(None,) * 5, times, 0.0)
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
    assert "does not compile" in command._line(tried[0])
    assert "does not compile" in command._row(tried[0], {})["error"]

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
