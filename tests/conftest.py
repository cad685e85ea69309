"""Shared by all tests: one compilation cache, and models small enough to compile in seconds."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest
import shape_checks  # noqa: F401  First: it looks at what is imported from here on.
from tiny_models import DECODER, ENCODER, QUICK_TO_COMPILE, VOCAB, make_tiny_config

from efficient_vlm.cli import run as commands
from efficient_vlm.runtime import enable_compilation_cache

enable_compilation_cache()
# Tracing makes millions of objects that live on: searching them for cycles again and again takes a
# quarter of the time. `forget_programs` searches once for each file.
gc.disable()
# Thousands of small programs that run once or twice: compiling them is nearly all of the time.
# Processes that tests start, which train and time, compile as users' do: flags are read once, when
# the first device is asked for.
jax.config.update("jax_disable_most_optimizations", True)
with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE}")
    jax.devices()

# Marks of tests that take minutes, which run where `-m` or an address names them.
LEFT_OUT = {"slow": "slow tests", "matrix": "combinations of methods and families"}
COUNTS = pytest.StashKey[dict]()


def pytest_collection_modifyitems(config, items):
    """Leaves out what takes minutes; where it is asked for, files with slow tests come first, or
    one process would end with them while others wait.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if any("::" in word for word in config.args):
        return
    counts = {}
    for mark in LEFT_OUT:
        if mark in config.option.markexpr:
            continue
        out = {item for item in items if item.get_closest_marker(mark)}
        if out:
            counts[mark] = len(out)
            config.hook.pytest_deselected(items=list(out))
            items[:] = [item for item in items if item not in out]
    config.stash[COUNTS] = counts
    if hasattr(config, "workeroutput"):  # Of pytest-xdist, whose workers collect.
        config.workeroutput["left_out"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[COUNTS] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter, config):
    for mark, count in config.stash.get(COUNTS, {}).items():
        what = f"{count} {LEFT_OUT[mark]}"
        terminalreporter.write_line(f"{what} left out: pytest -m {mark} runs them")


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Thousands of programs in one process run out of memory maps, and the process dies."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def make_model():
    """make_model(compressor=..., budget=..., moe=..., decoder=..., encoder=...) -> model."""
    from efficient_vlm.models.vlm import VisionLanguageModel

    def make(name="none", budget=16, *, moe=None, decoder=None, encoder=None, **fields):
        options = fields.pop("options", {})
        return VisionLanguageModel(
            vocab_size=VOCAB,
            encoder={**ENCODER, **(encoder or {})},
            compressor=dict(name=name, budget=budget, **options),
            decoder={**DECODER, "moe": moe, **(decoder or {})},
            **fields,
        )

    return make


@pytest.fixture(scope="session")
def make_batch():
    """make_batch(images=, questions=, length=, seed=) -> a random batch of the data contract."""

    def make(batch=3, questions=2, length=6, *, images=1, side=32, seed=0):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(3, length + 1, (batch, questions)).astype(np.int32)
        prompts = np.array([[rng.integers(1, n - 1) for n in row] for row in lengths], np.int32)
        tokens = rng.integers(2, VOCAB, (batch, questions, length)).astype(np.int32)
        place = np.arange(length)
        tokens = np.where(place < lengths[..., None], tokens, 0)
        return {
            "images": rng.integers(0, 256, (batch, images, side, side, 3)).astype(np.uint8),
            "image_mask": np.ones((batch, images), bool),
            "tokens": tokens,
            "lengths": lengths,
            "prompt_lengths": prompts,
            "loss_mask": (place >= prompts[..., None]) & (place < lengths[..., None]),
            "task": np.zeros((batch, questions), np.int32),
            "index": np.arange(batch, dtype=np.int64),
        }

    return make


@pytest.fixture(scope="session")
def init():
    """init(model) -> parameters without their logical axes."""
    from flax import linen as nn

    from efficient_vlm.train.step import init_params

    return lambda model, seed=0: nn.unbox(init_params([model], seed))


@pytest.fixture(scope="session")
def inputs():
    """inputs(batch) -> `ModelInputs` of all its tokens: [B, Q*L]."""
    from efficient_vlm.processing.batch import training_inputs

    def make(batch):
        # Training leaves out the last token of each conversation, which is only ever predicted.
        tokens, mask = batch["tokens"], batch["loss_mask"]
        more = 1 + tokens.shape[-1] - mask.shape[-1]
        tokens = np.pad(tokens, ((0, 0), (0, 0), (0, 1)))
        mask = np.pad(mask, ((0, 0), (0, 0), (0, more)))
        return training_inputs({**batch, "tokens": tokens, "loss_mask": mask})

    return make


@pytest.fixture(scope="session")
def logits_of(inputs):
    """logits_of(model, params, batch) -> [B, Q, L, vocab] of a compiled forward pass."""

    def run(model, params, batch, rng=None):
        apply = jax.jit(lambda p, given, r: model.apply({"params": p}, given, rng=r).logits)
        logits = apply(params, inputs(batch), rng)
        return logits.reshape(*batch["tokens"].shape, -1)

    return run


@pytest.fixture(scope="session")
def prompts():
    """prompts(batch, lengths=None) -> `ModelInputs` of its texts up to lengths, a row each."""
    from efficient_vlm.processing.batch import question_inputs

    def make(batch, lengths=None):
        lengths = batch["prompt_lengths"] if lengths is None else lengths
        return question_inputs({**batch, "lengths": lengths, "prompt_lengths": lengths})

    return make


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where generated data of this session live."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny_config(data_dir):
    """A whole config whose steps take milliseconds: 16 patches, one layer each, two arms."""
    return make_tiny_config(data_dir)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, data_dir):
    """(workdir, results) of a tiny run that has learned to tell the background; do not change it.

    Copy the folder before anything is run in it.
    """
    config = make_tiny_config(data_dir)
    config.data.batch_size = 16
    config.train.update(steps=150, checkpoint_every=50)
    config.train.elastic = [dict(name="none", budget=16, weight=0.8), *config.train.elastic[1:]]
    config.train.optimizer.warmup_steps = 10
    config.eval.update(images=48)
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, commands.fit(config, workdir)
