"""What a program costs, read from its text: loops, collectives, kernels, products."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from efficient_vlm import sharding
from efficient_vlm.costs.compiled import hlo, hlo_products
from efficient_vlm.kernels import aot
from efficient_vlm.kernels.attention import attention, make_mask
from efficient_vlm.nn import experts

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no package for this platform"
)
_shape = jax.ShapeDtypeStruct


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
    """On a CPU what is computed is in the data of the mask."""
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
    """Loops over blocks of rows, as many as there are rows."""
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
  %m = (f32[1,64]{1,0}, s8[4096]{0}) custom-call(%b, %a), custom_call_target="__cublas$gemm", AXES
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
