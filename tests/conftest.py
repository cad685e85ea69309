"""Shared by all tests: one compilation cache, and models small enough to compile in seconds."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import pytest

from efficient_vlm import commands

commands.enable_compilation_cache()

DECODER = dict(
    width=32,
    num_heads=4,
    num_kv_heads=2,
    segments=[dict(layers=2)],
    mlp_dim=48,
    qk_norm=True,
    qk_scale=2.0,
    scan_unroll=2,
)
ENCODER = dict(image_size=32, patch_size=8, width=24, depth=2, num_heads=2, mlp_dim=32)
MOE = dict(num_experts=4, top_k=2, expert_dim=16, shared_dim=8)
VOCAB = 20


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
    """init(model, batch) -> parameters without their logical axes."""
    from flax import linen as nn

    from efficient_vlm.train.step import init_params

    return lambda model, batch, seed=0: nn.unbox(init_params([model], batch, seed))


@pytest.fixture(scope="session")
def inputs():
    """inputs(batch) -> what the model's call takes."""
    from efficient_vlm.train.step import MODEL_INPUTS

    return lambda batch: {name: batch[name] for name in MODEL_INPUTS}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Where generated data of this session live."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny_config(data_dir):
    """A whole config whose steps take milliseconds: 16 patches, one layer each, two arms."""
    return make_tiny_config(data_dir)


def make_tiny_config(data_dir):
    """Background colours are strong, so that "global" is learned in a hundred steps."""
    import ml_collections

    return ml_collections.ConfigDict(
        dict(
            data=dict(
                source="token_bench",
                dir=data_dir,
                tasks=("needle", "global"),
                image_size=32,
                grid=4,
                max_count=1,
                tint=0.8,
                noise=0.0,
                batch_size=8,
                questions_per_image=2,
                train_images=192,
                test_images=64,
            ),
            model=dict(
                encoder=dict(
                    image_size=32, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32
                ),
                compressor=dict(name="none", budget=16),
                decoder=dict(
                    width=16,
                    num_heads=2,
                    segments=[dict(layers=1)],
                    mlp_dim=32,
                    moe=dict(num_experts=2, top_k=1, expert_dim=16),
                ),
            ),
            train=dict(
                steps=6,
                seed=0,
                elastic=[dict(name="none", budget=16), dict(name="random", budget=4)],
                optimizer=dict(name="adamw", learning_rate=1e-2, warmup_steps=2),
                checkpoint_every=2,
                log_every=1,
            ),
            eval=dict(
                images=16,
                batch_size=16,
                new_tokens=2,
                seeds=2,
                map_questions=2,
                methods=[dict(name="none", budgets=[16]), dict(name="random", budgets=[4])],
            ),
        )
    )


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
