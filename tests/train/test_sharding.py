"""Sharded training is training on one device; what rules say; other layouts, other processes."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from tiny_models import QUICK_TO_COMPILE

from efficient_vlm import sharding
from efficient_vlm.cli import main as cli
from efficient_vlm.cli.audit_sharding import table
from efficient_vlm.costs.compiled.options import parse_mesh
from efficient_vlm.errors import UserError
from efficient_vlm.kernels import aot
from efficient_vlm.nn.moe import MoE
from efficient_vlm.train.config import TrainConfig, make_mesh
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer
from efficient_vlm.train.state_layout import state_shardings

HERE = Path(__file__).parent
SIZES = dict(data=1, fsdp=2, expert=2, sequence=1, tensor=2)

MESHES = [
    dict(mesh=dict(data=8), zero=True),
    dict(mesh=dict(data=1, fsdp=8)),
    dict(mesh=dict(data=2, tensor=4)),
    dict(mesh=dict(data=2, fsdp=2, tensor=2), zero=True),
    dict(mesh=dict(data=2, sequence=2, tensor=2)),
    dict(mesh=dict(data=2, expert=4)),
    dict(mesh=dict(expert=2, fsdp=2, tensor=2)),
]


def start(kind, jobs, devices=8, process=None):
    """A process of `sharded_steps.py`."""
    asked = {"kind": kind, "jobs": jobs} | ({} if process is None else {"process": process})
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
    }
    return subprocess.Popen(
        [sys.executable, str(HERE / "sharded_steps.py"), json.dumps(asked)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def found(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def assert_close(one, two):
    np.testing.assert_allclose(one["steps"], two["steps"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "moe", "capacity", "fastv"])
def test_meshes_equal_one_device(kind):
    """Ten steps, one program each; data, fsdp, tensor and expert parallel, and mixtures."""
    meshes = {
        "dense": MESHES[1:5],
        "moe": [MESHES[0], *MESHES[5:]],
        "capacity": MESHES[6:],
        "fastv": MESHES[3:4],
    }[kind]
    jobs = [dict(mesh=None, steps=10), *(job | {"steps": 10} for job in meshes)]
    alone, *sharded = found(start(kind, jobs))
    for one in sharded:
        assert_close(one, alone)
        assert one["compilations"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "fastv"])
def test_answers_on_meshes_equal_those_of_one_device(kind):
    """Also where the rows, twelve, do not divide over the mesh; drawn and from pages, too."""
    meshes = [dict(data=2, fsdp=2, tensor=2), dict(data=1, expert=4, sequence=2), dict(fsdp=8)]
    alone, *sharded = found(start(f"{kind}:answers", [None, *meshes]))
    for tokens in (alone[0], alone[2]):
        assert len({tuple(answer) for (answer,) in tokens}) > 3
    assert alone[0] != alone[2]
    for one in sharded:
        assert one == alone


def test_attention_of_parts():
    """The blocked form, each device with rows and heads of its own, and all gradients."""
    jobs = [
        dict(mesh=dict(data=2, tensor=4), kv_heads=4),
        dict(mesh=dict(data=1, tensor=8), kv_heads=2),  # Four devices share a head of keys.
        dict(mesh=dict(data=8), kv_heads=4),  # Four rows: each device does all.
    ]
    answers = found(start("attention", jobs))
    assert all(same < 1e-5 for same, _ in answers)
    assert answers[0][1] == 0


def test_kernels_inside_a_callers_shard_map_and_on_explicit_axes():
    assert all(same < 1e-5 for same in found(start("callers", ["manual", "explicit"], devices=4)))


@pytest.mark.slow
def test_experts_of_parts():
    """Tokens go to their experts all to all, and no device gathers those of others, nor gradients
    of kernels that it does not store."""
    meshes = [
        dict(expert=8, data=1),
        dict(expert=4, data=1, tensor=2),
        dict(data=8),
        dict(data=2, sequence=2, tensor=2),
        dict(data=1, fsdp=8),
        dict(data=1, fsdp=2, expert=2, tensor=2),
    ]
    answers = found(start("experts", meshes))
    for (same, exchanged, gathered, summed), mesh in zip(answers, meshes, strict=True):
        assert same < 1e-5
        assert (exchanged > 0) == ("expert" in mesh)
        if "fsdp" in mesh:
            assert summed == 0
        else:  # What is gathered with it are kernels.
            assert gathered == 0


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu has no package for this platform"
)
def test_a_tpu_moves_only_the_tokens_that_are_there():
    """Its program has the ragged exchange, there and back, and both again for the gradient."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, expert=4), aot.tpu_devices("v5e:2x2"))
    layer = MoE(num_experts=8, top_k=2, expert_dim=256, dtype=jnp.bfloat16)
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    x = jax.ShapeDtypeStruct((8, 128, 256), jnp.bfloat16, sharding=rows)
    valid = jax.ShapeDtypeStruct((8, 128), bool, sharding=rows)
    boxed = jax.eval_shape(layer.init, jax.random.key(0), x, valid)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )

    def loss(params, x, valid):
        return (layer.apply(params, x, valid)[0].astype(jnp.float32) ** 2).sum()

    with sharding.active(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, valid)
    assert lowered.compile().as_text().count(" ragged-all-to-all") >= 4


@pytest.mark.slow
def test_two_processes_and_other_layouts(tmp_path):
    """2 x 4 devices is 1 x 8; what one layout saved another goes on from."""
    mesh = dict(data=2, fsdp=2, tensor=2)
    whole = found(start("moe", [dict(mesh=mesh, steps=6)]))[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(tmp_path / "checkpoints")
    jobs = [dict(mesh=mesh, steps=3, folder=folder), dict(mesh=dict(fsdp=8), mixed=True, steps=2)]
    pair = [start("moe", jobs, 4, process=(i, 2, port)) for i in range(2)]
    one, two = map(found, pair)
    assert [job["steps"] for job in one] == [job["steps"] for job in two]
    assert_close(one[0], {"steps": whole["steps"][:3]})
    # Rows of a process that are no stretch of the batch, as on pods.
    assert_close(one[1], {"steps": whole["steps"][:2]})
    # Two processes -> four devices of one -> one device.
    four = found(start("moe", [dict(mesh=dict(fsdp=4), steps=5, folder=folder)], 4))[0]
    last = found(start("moe", [dict(mesh=None, steps=6, folder=folder)], 1))[0]
    assert_close({"steps": four["steps"] + last["steps"]}, {"steps": whole["steps"][3:]})


# --- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("layers", "embed", "heads", "head_dim"), (3, 8, 4, 16), (None, "fsdp", "tensor")),
        (("experts", "embed", "expert_mlp"), (4, 8, 6), ("expert", "fsdp", "tensor")),
        (("vocab", "embed"), (10, 8), ("tensor", "fsdp")),
        (("embed", "kv_heads", "head_dim"), (8, 3, 16), ("fsdp",)),  # Three heads stay whole.
        (("embed",), (7,), ()),
        (("batch", None, "activation_mlp"), (8, 5, 6), (("fsdp", "expert"), None, "tensor")),
        ((None, None), (8, 8), ()),
    ],
)
def test_where_arrays_lie(names, shape, spec):
    assert sharding.spec_of(names, shape, SIZES) == PartitionSpec(*spec)


def test_two_axes_over_one_are_refused():
    rules = {**sharding.RULES, "other": ("fsdp",)}
    with pytest.raises(UserError, match="'embed' and 'other' of layer/kernel.*'fsdp'"):
        sharding.spec_of(("embed", "other"), (8, 8), SIZES, rules, what="layer/kernel")


def test_every_parameter_has_its_place(make_model):
    """Golden places of a mixture of experts with grouped keys."""
    moe = dict(num_experts=4, top_k=2, expert_dim=16, shared_dim=8)
    rows = {row.parameter: row for row in table(make_model(moe=moe), SIZES)}
    layer = "language/layers"
    golden = {
        "language/embedding": (("tensor",), ("fsdp",)),
        f"{layer}/attention/query/kernel": (None, ("fsdp",), ("tensor",), None),
        f"{layer}/attention/key/kernel": (None, ("fsdp",), ("tensor",), None),
        f"{layer}/attention/out/kernel": (None, ("tensor",), None, ("fsdp",)),
        f"{layer}/attention_norm/scale": (None, ("fsdp",)),
        f"{layer}/moe/gate": (None, ("expert",), ("fsdp",), ("tensor",)),
        f"{layer}/moe/down": (None, ("expert",), ("tensor",), ("fsdp",)),
        f"{layer}/moe/router/kernel": (None, ("fsdp",), None),
        "vit/layers/up/kernel": (None, ("fsdp",), ("tensor",)),
    }
    assert {name: rows[name].mesh for name in golden} == golden
    gate = rows[f"{layer}/moe/gate"]
    assert gate.bytes == 8 * gate.bytes_per_device
    odd = {row.parameter: row for row in table(make_model(moe=moe), {**SIZES, "tensor": 4})}
    assert "kv_heads 2 by tensor" in odd[f"{layer}/attention/key/kernel"].note


def test_moments_lie_where_their_parameters_do():
    import optax

    mesh = AbstractMesh((2, 2, 1, 1, 1), sharding.AXES)
    boxed = {"kernel": nn.Partitioned(jax.ShapeDtypeStruct((8, 6), "float32"), ("embed", "mlp"))}
    params = sharding.param_shardings(boxed, mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {"params": nn.unbox(boxed), "opt": jax.eval_shape(tx.init, nn.unbox(boxed))}
    for zero, spec in ((False, ("fsdp",)), (True, (("fsdp", "data"),))):
        placed = state_shardings(state, params, tx, mesh, zero=zero)
        assert placed["params"]["kernel"].spec == PartitionSpec("fsdp")
        moments = jax.tree.leaves(placed["opt"])
        assert sorted(str(m.spec) for m in moments) == sorted(
            str(PartitionSpec(*s)) for s in ((), spec, spec)
        )


def test_moments_of_an_optimizer_in_parts():
    """Of Muon, each parameter is in one of two parts, and in the other there is nothing."""
    mesh = AbstractMesh((2, 2, 1, 1, 1), sharding.AXES)
    boxed = {
        name: nn.Partitioned(jax.ShapeDtypeStruct((8, 6), "float32"), ("embed", axis))
        for name, axis in (("kernel", "mlp"), ("embedding", "vocab"))
    }
    tx = make_optimizer(OptimizerConfig(name="muon"), 10, boxed)
    state = {"params": nn.unbox(boxed), "opt": jax.eval_shape(tx.init, nn.unbox(boxed))}
    placed = state_shardings(state, sharding.param_shardings(boxed, mesh), tx, mesh)["opt"]
    assert jax.tree.structure(placed) == jax.tree.structure(state["opt"])
    assert any(m.spec == PartitionSpec("fsdp") for m in jax.tree.leaves(placed))


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (dict(fsdp=0), "train.mesh.fsdp: 0"),
        (dict(data=-2), "train.mesh.data: -2"),
        (dict(fsdp=3), "= 3 devices, there are 1"),
        (dict(fsdq=2), "fsdq"),
    ],
)
def test_meshes_that_cannot_be(mesh, words):
    with pytest.raises(UserError) as error:
        make_mesh(TrainConfig(steps=1, mesh=mesh), 8)
    assert words in str(error.value) and len(str(error.value).splitlines()) <= 3


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        ("v5e:4x4", dict(fsdp=16)),
        ("v5e:16x16", dict(fsdp=256)),
        ("v5e:16x16", dict(fsdp=64, tensor=4)),
        ("v5p:4x4x4", dict(fsdp=64)),
        ("v5p:4x4x4", dict(data=8, expert=2, tensor=4)),
        ("tpu7x:2x2x4", dict(fsdp=16, tensor=2)),
    ],
)
def test_rows_of_the_hosts_of_a_pod(topology, sizes):
    """Chips of a host are neighbours on the torus, not in the order of the mesh."""
    mesh = sharding.make_mesh(sharding.MeshConfig(**sizes), aot.tpu_devices(topology))
    parts = [mesh.shape[axis] for axis in sharding.BATCH]
    wanted = {}
    for at, device in np.ndenumerate(mesh.devices):
        block = np.ravel_multi_index(at[: len(parts)], parts)
        wanted.setdefault(device.process_index, set()).update((2 * block, 2 * block + 1))
    assert len(wanted) > 1
    for process, rows in wanted.items():
        assert sharding.own_rows(mesh, 2 * np.prod(parts), process).tolist() == sorted(rows)


def test_batches_that_do_not_divide():
    mesh = AbstractMesh((2, 2, 1, 1, 2), sharding.AXES)
    sharding.check_batch(8, mesh, accumulate=2)
    with pytest.raises(UserError, match="multiples of 8"):
        sharding.check_batch(12, mesh, accumulate=2)


@pytest.mark.parametrize("text", ["fsdp", "fsdp:0", "width:2", "fsdp:2:3"])
def test_mesh_of_the_command_line(text):
    with pytest.raises(UserError):
        parse_mesh(text)


def test_audit_sharding_of_a_method(capsys):
    """Arrays of the decoder, and its cache, are those of the tokens that enter it."""
    command, counts = ["audit", "sharding", "--preset=llava-1.5-7b", "--text=10", "--json"], []
    for words in ([], ["--compressor=pool", "--compressor.budget=64"]):
        assert cli.run([*command, *words]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        held = [row for row in rows if row["kind"] != "parameter"]
        # The cache has its heads in front of its slots.
        counts.append([row["shape"][2 if row["kind"] == "cache" else 1] for row in held])
    assert counts == [[577, 577, 586, 586, 587], [577, 577, 74, 74, 75]]
    for word in ("--compressor=pool,stride", "--compressor=nonsense", "--batch=4,8"):
        with pytest.raises(UserError, match="several|nonsense"):
            cli.run([*command, word])


def test_audit_sharding(capsys):
    words = ["audit", "sharding", "--preset=llava-1.5-7b", "--mesh=fsdp:4,tensor:4"]
    assert cli.run([*words, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    parameters = [row for row in read["rows"] if row["kind"] == "parameter"]
    assert read["totals"]["bytes"] == 4 * sum(np.prod(row["shape"]) for row in parameters)
    # Two moments for each parameter, where it is.
    totals = read["totals"]
    assert totals["moment_bytes_per_device"] == 2 * totals["bytes_per_device"]
    held = {row["parameter"]: row for row in read["rows"] if row["kind"] != "parameter"}
    # Four pictures, 576 + 64 tokens and one more; 32 heads over four devices, rows over four.
    cache = held["keys or values of one of 32 layers"]
    assert cache["shape"] == [4, 32, 641, 128]
    assert cache["mesh"] == [["fsdp"], ["tensor"], None, None]
    assert cache["bytes_per_device"] == 4 * 641 * 32 * 128 * 2 / 16
    assert held["decoder, inside a layer"]["mesh"] == [["fsdp"], None, ["tensor"]]
    assert held["encoder, between layers"]["shape"] == [4, 577, 1024]
    assert read["totals"]["bytes_per_device"] < 1.02 * read["totals"]["bytes"] / 16
    assert cli.run(words) == 0
    assert "layers, embed, mlp" in capsys.readouterr().out
