"""What `test_sharding.py` runs in a process with eight CPU devices: steps on a mesh, as JSON."""

import json
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_models import DECODER, ENCODER, MOE, VOCAB

from efficient_vlm import sharding
from efficient_vlm.checkpoints.run import Checkpoints
from efficient_vlm.inference.generate import generate
from efficient_vlm.inference.sampling import Sampling, SamplingOptions
from efficient_vlm.kernels.attention import attention, attention_importance, make_mask
from efficient_vlm.kernels.grouped_matmul import grouped_matmul
from efficient_vlm.kernels.paged_attention import attention_decode
from efficient_vlm.models.inputs import ModelInputs, Pictures
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.moe import MoE as MoELayer
from efficient_vlm.processing.batch import training_inputs
from efficient_vlm.train import step as steps
from efficient_vlm.train.state_layout import StateLayout, state_shardings


def make(kind):
    """A model: dense, moe, the same with a capacity, or dense with tokens dropped inside."""
    moe = {"moe": MOE, "capacity": {**MOE, "capacity": 0.75}}.get(kind)
    compressor = dict(name="none", budget=16)
    if kind == "fastv":
        compressor = dict(name="fastv", layer=1, keep=0.5)
    return VisionLanguageModel(
        vocab_size=VOCAB, encoder=ENCODER, compressor=compressor, decoder={**DECODER, "moe": moe}
    )


def batches(count, rows=8):
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(2, VOCAB, (rows, 1, 6)).astype(np.int32)
        batch = {
            "images": rng.integers(0, 256, (rows, 1, 32, 32, 3)).astype(np.uint8),
            "image_mask": np.ones((rows, 1), bool),
            "tokens": tokens,
            "lengths": np.full((rows, 1), 6, np.int32),
            "prompt_lengths": np.full((rows, 1), 3, np.int32),
            "loss_mask": np.arange(6) >= np.full((rows, 1, 6), 3),
        }
        yield training_inputs(batch)


class Place:
    """What a checkpoint stores of the data: how many batches are behind."""

    def __init__(self):
        self.batches = 0

    def get_state(self):
        return {"batches": self.batches}

    def set_state(self, state):
        self.batches = state["batches"]


def run(kind, job):
    """Loss and gradient norm of each step, and how many programs were compiled.

    Args:
      kind: see `make`.
      job: "mesh" (None for one device), "mixed" for one whose devices of a process are not
        neighbours, "zero", "steps", "folder" for a checkpoint at the end, from
        which a later job of the same folder goes on, up to its own number of steps.
    """
    model, tx = make(kind), optax.adamw(1e-2)

    def params():
        return steps.init_params([model], 0)

    def state():
        return steps.init_state(params(), tx)

    layout, init = None, state
    if job["mesh"] is not None:
        devices = jax.devices()
        if job.get("mixed"):
            devices = [devices[i] for i in np.arange(len(devices)).reshape(2, -1).T.flat]
        mesh = sharding.make_mesh(sharding.MeshConfig(**job["mesh"]), devices)
        cut = sharding.param_shardings(jax.eval_shape(params), mesh)
        lies = state_shardings(jax.eval_shape(state), cut, tx, mesh, zero=job.get("zero", False))
        layout, init = StateLayout(mesh, lies), jax.jit(state, out_shardings=lies)
    step, now, found, place = (
        steps.make_train_step(model, tx, layout=layout),
        init(),
        [],
        Place(),
    )
    saved = None
    if "folder" in job:
        saved = Checkpoints(job["folder"], background=False)
        if (restored := saved.restore_latest(now, place)) is not None:
            now = restored[1]
    part = slice(None) if layout is None else sharding.own_rows(layout.mesh, 8)
    for batch in list(batches(job["steps"]))[place.batches :]:
        now, metrics = step(now, jax.tree.map(lambda x: x[part], batch))
        place.batches += 1
        found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    if saved is not None:
        saved.save(place.batches, now, place, wait=True)
        saved.close()
    return {"steps": found, "compilations": step._cache_size()}


def answers(kind, mesh):
    """Tokens of twelve answers and where patches ended, with parameters and devices of a mesh; then
    tokens of drawn answers, with keys and values in pages of int8.

    Args:
      kind: see `make`.
      mesh: None for one device.
    """
    model, first = make(kind), next(batches(1))
    boxed = steps.init_params([model], 0)
    params, placed = nn.unbox(boxed), None
    if mesh is not None:
        placed = sharding.make_mesh(sharding.MeshConfig(**mesh))
        params = jax.device_put(params, sharding.param_shardings(boxed, placed))
    pixels = np.repeat(first.pictures.pixels, 2, axis=0)[:12]
    rng = np.random.default_rng(1)
    prompts = rng.integers(2, VOCAB, (12, 6)).astype(np.int32)
    pictures = Pictures(pixels, np.ones((12, 1), bool))
    inputs = ModelInputs.of_rows(prompts, rng.integers(0, 7, 12), pictures=pictures)
    with sharding.active(placed):
        found = generate(model, params, inputs, new_tokens=5, eos_id=1)
        drawn = generate(model, params, inputs, new_tokens=5, eos_id=1, **DRAWN)
    sources = [np.asarray(source).tolist() for source in found.sources]
    return found.tokens.tolist(), sources, drawn.tokens.tolist()


DRAWN = dict(
    sampling=Sampling.of(
        [
            SamplingOptions(temperature=3.0, top_p=0.9, presence_penalty=0.5, seed=row)
            for row in range(12)
        ],
        VOCAB,
    ),
    cache=dict(kind="paged", page=16, dtype="int8"),
)


NAMES = (("batch", "heads", None, None), *(("batch", "kv_heads", None, None),) * 2)
NAMES += (("batch", None),) * 2


def attention_of_parts(job):
    """Largest difference to one device, of the largest value; gathers in the program."""
    mesh, kv_heads = job["mesh"], job["kv_heads"]
    rng = np.random.default_rng(0)
    shapes = ((4, 8, 40, 16), (4, kv_heads, 60, 16), (4, kv_heads, 60, 16), (4, 60), (4, 40))
    given = [jnp.asarray(rng.random(shape), jnp.float32) for shape in shapes]
    lengths = np.array([60, 13, 1, 40])

    def loss(q, k, v, bias, weights):
        found = attention(
            *(q, k, v),
            causal=True,
            kv_lengths=lengths,
            key_bias=bias,
            importance_weights=weights,
            implementation="xla",
        )
        lse = jnp.where(jnp.isfinite(found.lse), found.lse, 0)
        return jnp.sum(found.out**2) + jnp.sum(lse) + jnp.sum(found.importance**2), found[::2]

    def everything(*args):
        again = attention_importance(
            *args[:2],
            attention(*args[:3], causal=True, implementation="xla").lse,
            args[4],
            mask=make_mask(40, 60, causal=True),
            implementation="xla",
        )
        return jax.grad(loss, (0, 1, 2, 3, 4), has_aux=True)(*args), again

    gradient = jax.jit(everything)
    alone = gradient(*given)
    mesh = sharding.make_mesh(sharding.MeshConfig(**mesh))
    specs = [
        sharding.spec_of(names, x.shape, mesh.shape) for names, x in zip(NAMES, given, strict=True)
    ]
    given = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(given, specs, strict=True)]
    with sharding.active(mesh):
        program = jax.jit(lambda *x: gradient(*x)).lower(*given).compile()
    parts = program(*given)
    differences = [
        float(jnp.abs(a - b).max() / jnp.abs(a).max())
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(parts), strict=True)
    ]
    return max(differences), program.as_text().count("all-gather(")


def kernels_of_callers(kind):
    """Largest difference to one device, of the largest value, of what is called inside a
    `shard_map` of the caller, or with arrays on explicit axes."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 4, 600, 8)), jnp.float32)
    lengths = jnp.array([600, 300, 0, 30])

    def everything(x, lengths):
        def loss(x):
            given = dict(
                causal=True, kv_lengths=lengths, importance_weights=jnp.ones((len(x), 600))
            )
            found = attention(x, x, x, implementation="xla", **given)
            return jnp.sum(found.out**2) + jnp.sum(found.importance[:, :9]), found.out

        decoded = attention_decode(x[:, :, :1], x, x, lengths).out
        few = x[:, :, :40]  # A whole map, for which two heads share their keys.
        found = (
            *jax.grad(loss, has_aux=True)(x),
            decoded,
            attention(few, few[:, :2], few[:, :2]).out,
            attention(
                *(few, few[:, :2], few[:, :2]),
                importance_weights=jnp.ones((len(x), 1)),
                importance_rows=jnp.full((len(x), 1), 3),
            ).importance,
        )
        if kind == "explicit":
            return found
        rows = x.reshape(-1, 8)

        def routed(rows):
            return jnp.sum(grouped_matmul(rows, kernels, jnp.array([len(rows), 0])) ** 2)

        return *found, jax.grad(routed)(rows)

    kernels = jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.float32)
    alone = everything(x, lengths)
    axes = (AxisType.Explicit if kind == "explicit" else AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("rows", "heads"), axis_types=axes)
    if kind == "explicit":
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows", "heads")))
        parts = everything
    else:
        rows = PartitionSpec("rows")
        parts = jax.shard_map(everything, mesh=mesh, in_specs=rows, out_specs=rows)
    again = jax.jit(parts)(x, lengths)
    pairs = zip(map(np.asarray, alone), map(np.asarray, again), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def experts_of_parts(mesh):
    """Largest difference of layer and gradients to one device, of the largest value; collectives
    of the program: all-to-all, gathers of anything as large as all tokens, and sums over devices of
    anything as large as the experts' kernels."""
    given = dict(num_experts=8, top_k=2, expert_dim=32)
    layer, x = MoELayer(**given), jax.random.normal(jax.random.key(1), (16, 12, 24))
    valid = jnp.ones(x.shape[:2], bool)
    boxed = layer.init(jax.random.key(0), x, valid)
    params = nn.unbox(boxed)

    def loss(params, x):
        y, stats = layer.apply(params, x, valid)
        return jnp.sum(y**2) + stats["load_balance"][0], y

    gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
    alone = jax.jit(gradient)(params, x)
    mesh = sharding.make_mesh(sharding.MeshConfig(**mesh))
    places = (
        sharding.param_shardings(boxed, mesh),
        NamedSharding(mesh, PartitionSpec(sharding.BATCH)),
    )
    given_parts = jax.device_put((params, x), places)
    out = (None, places)
    with sharding.active(mesh):
        jitted = jax.jit(lambda *x: gradient(*x), out_shardings=out)
        program = jitted.lower(*given_parts).compile()
    parts = program(*given_parts)
    differences = [
        float(jnp.abs(a - b).max() / jnp.abs(a).max())
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(parts), strict=True)
    ]
    text = program.as_text()

    def large(kind, size):
        shapes = re.findall(rf"f32\[([\d,]+)\]\S* {kind}\(", text)
        return sum(math.prod(int(n) for n in shape.split(",")) >= size for shape in shapes)

    kernels = 8 * 32 * 24 * 2 // (mesh.shape["expert"] * mesh.shape["tensor"])
    return (
        max(differences),
        text.count(" all-to-all("),
        large("all-gather", 16 * 12 * 24),
        large("all-reduce", kernels // 2),
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    if "process" in asked:
        number, count, port = asked["process"]
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    parts = {
        "attention": attention_of_parts,
        "experts": experts_of_parts,
        "callers": kernels_of_callers,
    }
    kind, _, what = asked["kind"].partition(":")
    if what == "answers":
        print(json.dumps([answers(kind, mesh) for mesh in asked["jobs"]]))
    elif kind in parts:
        print(json.dumps([parts[asked["kind"]](mesh) for mesh in asked["jobs"]]))
    else:
        print(json.dumps([run(asked["kind"], job) for job in asked["jobs"]]))
