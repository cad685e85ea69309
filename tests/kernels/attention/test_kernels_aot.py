"""The real TPU compiler takes the kernels, and a program for a TPU holds them by default."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from efficient_vlm import sharding
from efficient_vlm.cli import audit_kernels as audit
from efficient_vlm.cli import audit_kernels_gpu as kernels_gpu
from efficient_vlm.cli import kernel_programs
from efficient_vlm.cli import main as cli
from efficient_vlm.errors import UserError
from efficient_vlm.kernels import aot, aot_gpu
from efficient_vlm.kernels.attention import attention, attention_importance
from efficient_vlm.kernels.paged_attention import attention_decode

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no package for this platform"
)


@needs_libtpu
@pytest.mark.slow
def test_the_audit_compiles_everything(capsys):
    assert cli.run(["audit", "kernels", "--topology=all", "--quick", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["topology"] for row in rows} == set(kernel_programs.ALL)
    assert {"attention", "attention_decode", "grouped_matmul"} == {row["kernel"] for row in rows}
    assert {"forward", "backward", "importance"} == {row["direction"] for row in rows}
    for row in rows:
        assert row["compiled"] and row["error"] is None, row
        assert row["kernel"] == "grouped_matmul" or 0 < row["vmem_bytes"] < 2**26


@needs_libtpu
@pytest.mark.parametrize("heads", [(8, 4), (8, 1)])
def test_kernels_of_a_mesh(heads):
    """Rows over two devices and heads over two: the compiler cuts no kernel by itself."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, tensor=2), aot.tpu_devices("v5e:2x2"))

    def on(names, shape, dtype=jnp.bfloat16):
        spec = sharding.spec_of(names, shape, mesh.shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    h, hk = heads
    rows, matrix = ("batch", None), ("batch", "heads", None, None)
    kv = ("batch", "kv_heads", None, None)
    q, k = on(matrix, (4, h, 512, 64)), on(kv, (4, hk, 512, 64))
    lse, weights = on(matrix[:3], (4, h, 512), jnp.float32), on(rows, (4, 512), jnp.float32)
    query, cache = on(matrix, (4, h, 1, 128)), on(kv, (4, hk, 2048, 128))
    pool = on((None, "kv_heads", None, None), (64, hk, 128, 128))
    lengths, pages = on(rows[:1], (4,), jnp.int32), on(rows, (4, 16), jnp.int32)
    drafts = on(matrix, (4, h, 3, 128))
    places, after = (on(rows, (4, n), jnp.float32) for n in (2048, 3))
    cases = {
        "importance": (attention_importance, (q, k, lse, weights)),
        "contiguous": (lambda *a: attention_decode(*a)[:2], (query, cache, cache, lengths)),
        "paged": (
            lambda q, k, v, n, pages: attention_decode(q, k, v, n, pages=pages)[:2],
            (query, pool, pool, lengths, pages),
        ),
        "drafts in windows": (
            lambda q, k, v, n, places, after: attention_decode(
                q, k, v, n, places=places, after=after
            )[:2],
            (drafts, cache, cache, on(rows, (4, 3), jnp.int32), places, after),
        ),
    }
    for name, (function, given) in cases.items():
        with sharding.active(mesh):
            text = jax.jit(function).lower(*given).compile().as_text()
        assert 'custom_call_target="tpu_custom_call"' in text, name


@needs_libtpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("dim", [72, 256])
def test_every_feature_compiles(dtype, dim):
    """All at once; padded head dims, and kernels that may use no more VMEM than is estimated."""
    q, k = (jax.ShapeDtypeStruct((1, h, 700, dim), dtype) for h in (4, 2))
    row = jax.ShapeDtypeStruct((1, 700), jnp.float32)

    def loss(q, k, v, bias, weights, segments):
        found = attention(
            *(q, k, v),
            causal=True,
            window=100,
            prefix_length=7,
            softcap=10.0,
            q_segments=segments,
            kv_segments=segments,
            key_bias=bias,
            importance_weights=weights,
            implementation="tpu",
        )
        return jnp.sum(found.out.astype(jnp.float32)) + jnp.sum(found.importance**2)

    segments = jax.ShapeDtypeStruct((1, 700), jnp.int32)
    gradient = jax.grad(loss, (0, 1, 2, 3))
    text = aot.compile_for_tpu(gradient, q, k, k, row, row, segments).as_text()
    # Forward, importance, u = P g for the gradient of importance, and the two backward kernels.
    assert text.count('custom_call_target="tpu_custom_call"') == 5


@needs_libtpu
@pytest.mark.parametrize("topology", kernel_programs.ALL[:3])  # tpu7x has the limit of v5p.
@pytest.mark.parametrize("sizes", [(1000, 40), (40, 1000)])
def test_narrow_blocks_fit(topology, sizes):
    """Where logits are few, other things take the room; found on v5p."""
    queries, keys = sizes
    q = jax.ShapeDtypeStruct((2, 8, queries, 256), jnp.float32)
    k = jax.ShapeDtypeStruct((2, 2, keys, 256), jnp.float32)
    bias = jax.ShapeDtypeStruct((2, keys), jnp.float32)

    def loss(q, k, v, bias):
        options = dict(causal=True, window=(30, 9), softcap=10.0, prefix_length=7)
        found = attention(q, k, v, key_bias=bias, implementation="tpu", **options)
        return found.out.sum()

    aot.compile_for_tpu(jax.grad(loss, (0, 1, 2, 3)), q, k, k, bias, topology=topology)


@needs_libtpu
@pytest.mark.parametrize("backward", [False, True])
def test_a_tpu_gets_the_kernels_by_default(backward):
    """Compiled on a CPU host, where `jax.default_backend()` says something else."""
    given = [jax.ShapeDtypeStruct((1, 12, 1024, 64), jnp.bfloat16)] * 3

    def function(q, k, v):
        return attention(q, k, v).out.astype(jnp.float32).sum()

    function = jax.grad(function, (0, 1, 2)) if backward else function
    text = aot.compile_for_tpu(function, *given).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == (3 if backward else 1)
    assert "12,1024,1024" not in text


def test_a_kernel_that_is_not_in_the_program_is_an_error(monkeypatch):
    class Text:
        def as_text(self):
            return ""

    monkeypatch.setattr(aot, "compile_for_tpu", lambda *args, **options: Text())
    program = next(iter(kernel_programs.programs(quick=True)))
    row = audit.compiled(program, "v5e:2x2")
    assert not row.compiled and row.error == "0 of 1 kernels are in the program"


@needs_libtpu
def test_what_the_compiler_refuses_is_said(monkeypatch):
    from efficient_vlm.kernels.attention.tpu import call as tpu_call

    monkeypatch.setattr(tpu_call, "vmem_bytes", lambda *args: 2**20)
    row = audit.compiled(next(iter(kernel_programs.programs(quick=True))), "v5e:2x2")
    assert not row.compiled and "vmem" in row.error.lower()


@pytest.mark.parametrize(
    "topology", ["v9:2x2", "v5e", "H100", "h100:8", "v5e:2x", "v5p:2x2x2x2", "v5e:0x2", "v5e:2x2 "]
)
def test_an_unknown_topology(topology):
    with pytest.raises(UserError) as error:
        cli.run(["audit", "kernels", f"--topology={topology}"])
    assert topology in str(error.value) and len(str(error.value).splitlines()) <= 3


def test_no_libtpu_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    aot.tpu_devices.cache_clear()
    with pytest.raises(UserError, match="libtpu"):
        aot.tpu_devices("v5e:2x2")
    aot.tpu_devices.cache_clear()


@needs_libtpu
@pytest.mark.parametrize("keys", [1, 40, 700, 1100])
def test_decoding_copies_no_cache(keys):
    """Whatever its length: the last block may reach behind it."""
    query = jax.ShapeDtypeStruct((4, 8, 1, 128), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((4, 2, keys, 128), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)

    def decode(*given):
        return attention_decode(*given, implementation="tpu")[:2]

    program = aot.compile_for_tpu(decode, query, cache, cache, lengths)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == 1
    assert program.memory_analysis().temp_size_in_bytes < max(cache.size, 2**17)


@needs_libtpu
@pytest.mark.parametrize(("page", "dim", "dtype"), [(640, 72, "bfloat16"), (4096, 256, "float32")])
def test_large_pages_compile(page, dim, dtype):
    query = jax.ShapeDtypeStruct((4, 8, 1, dim), dtype)
    pool = jax.ShapeDtypeStruct((9, 2, page, dim), dtype)
    lengths, pages = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4,), (4, 2)))

    def decode(q, k, v, lengths, pages):
        return attention_decode(q, k, v, lengths, pages=pages)[:2]

    text = aot.compile_for_tpu(decode, query, pool, pool, lengths, pages).as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1


# --- GPU -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("0 bytes spill stores\nptxas info : Used 168 registers\nkernels: 1, flops: 9\n", None),
        # An earlier program has the same kernel: it is not compiled again.
        ("kernels: 1, flops: 9\n", None),
        ("12 bytes spill stores\nkernels: 1, flops: 9\n", "12 bytes of registers"),
        ("kernels: 0, flops: 9\n", "0 of 1 kernels"),
        ("error: no such layout\n", "no such layout"),
    ],
)
def test_what_ptxas_says(text, error):
    row = kernels_gpu._row("h100", next(iter(kernel_programs.programs(True, "gpu"))), text)
    assert row.compiled == (error is None)
    assert row.error is None if error is None else error in row.error


def test_one_masked_product_per_expert_is_an_error():
    forward, _ = kernel_programs._experts()
    least = 2 * 8192 * 1024 * 1024
    assert forward.problem(0, 1.3 * least) is None
    assert forward.problem(0, 64 * least) == "64 times the work of its products"


def test_no_gpu_compiler_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="aot-gpu"):
        cli.run(["audit", "kernels", "--topology=b200"])


def test_hopper_without_spills():
    """Where the extra `aot-gpu` is installed."""
    try:
        aot_gpu.environment()
    except UserError as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    rows = kernels_gpu.compiled("h100", quick=True)
    assert rows and all(row.compiled and not row.spill_bytes for row in rows), rows
