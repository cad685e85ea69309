"""GRPO with an exact-match reward, and a price per visual token, on a small trained model.

    python experiments/grpo/run.py --seeds=0-2 --base=runs/grpo_base

Trains config.py (a run that is finished is not repeated), learns from rewards with each seed, and
writes results.json beside this file. See README.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efficient_vlm.checkpoints.run import Checkpoints
from efficient_vlm.cli import config_file, run
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.evalset import make_eval
from efficient_vlm.data.pipeline import make_train
from efficient_vlm.evaluation.protocol import evaluate
from efficient_vlm.evaluation.settings import EvalConfig
from efficient_vlm.fields import construct, section
from efficient_vlm.inference.generate import generate
from efficient_vlm.inference.sampling import Sampling
from efficient_vlm.processing.batch import question_inputs
from efficient_vlm.runtime import enable_compilation_cache, environment
from efficient_vlm.train.preference import group_advantages, grpo
from efficient_vlm.train.rewards import exact_match, make_grpo_step, repeated, rollouts
from efficient_vlm.train.step import init_state
from efficient_vlm.train.trained import restore
from efficient_vlm.train.workdir_config import read_run_config

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
SETTINGS = dict(
    steps=120,
    images=32,  # Per step, with `questions` each, of which each is answered `group` times.
    questions=4,
    group=8,
    budget=9,  # Visual tokens of 25.
    learning_rate=2e-4,
    beta=0.01,  # Of the KL to the model that it starts from.
    price_steps=30,
    price=0.01,  # Of a visual token; a right answer is worth 1.
    price_learning_rate=0.2,
    budgets=(25, 9, 4, 1),
)
COMPRESSOR = dict(name="text_topk", bias="none")


def base(workdir: Path, overrides: Sequence[str]) -> tuple[Any, DataConfig, EvalConfig]:
    """(the model that all seeds start from, its data, its evaluation)."""
    config = config_file.load(str(HERE / "config.py"), overrides)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        done = max(checkpoints.committed(), default=0)
    if done < config.train.steps:
        run.fit(config, workdir, say=print)
    config = read_run_config(workdir)
    data = DataConfig.from_mapping(section(config, "data"))
    trained = restore(config, workdir, make_train(data, workdir=workdir))
    return trained, data, construct(EvalConfig, section(config, "eval"), "eval")


def batches(data: DataConfig, settings: Mapping[str, Any], seed: int) -> Any:
    """Batches of questions from images that the model was trained on."""
    shape = dict(batch_size=settings["images"], questions_per_image=settings["questions"])
    config = {**vars(data), **shape, "seed": seed + 1_000, "num_threads": 0}
    return iter(make_train(DataConfig(**config)))


def sampled(model: Any, params: Any, batch: Mapping[str, Any], end: Any, group: int, seed: Any):
    """(prompts, answers and whether each is right) of every question `group` times."""
    asked = repeated(question_inputs(batch), group)
    seeds = np.random.default_rng(seed).integers(2**32, size=len(asked.text), dtype=np.uint32)
    how = Sampling(temperature=np.ones(len(seeds), np.float32), seed=seeds)
    out = generate(model, params, asked, new_tokens=2, eos_id=end, sampling=how)
    tokens, lengths = out.tokens.reshape(len(seeds), -1), out.lengths.reshape(-1)
    wanted = np.repeat(np.stack(_answers(batch)), group, axis=0)
    return asked, (tokens, lengths), exact_match(tokens, lengths, wanted, np.ones_like(lengths))


def _answers(batch: Mapping[str, Any]) -> list[np.ndarray]:
    """The answer of each question, which is one word."""
    tokens, prompt = batch["tokens"], batch["prompt_lengths"]
    rows = tokens.reshape(-1, tokens.shape[-1])
    return [row[at : at + 1] for row, at in zip(rows, prompt.reshape(-1), strict=True)]


def learn(trained: Any, data: DataConfig, settings: Mapping[str, Any], seed: int) -> tuple:
    """(the parameters after GRPO, mean reward and KL of each step)."""
    model = trained.model.with_compressor(**COMPRESSOR, budget=settings["budget"])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(settings["learning_rate"]))
    state = init_state(jax.tree.map(jnp.copy, trained.params), tx)
    step = make_grpo_step(model, tx, reference=trained.params, beta=settings["beta"])
    end, group, curve = trained.pipeline.tokenizer.eos_ids, settings["group"], []
    source = batches(data, settings, seed)
    for number in range(settings["steps"]):
        batch = next(source)
        drawn = sampled(model, state["params"], batch, end, group, (seed, number))
        asked, answers, right = drawn
        state, metrics = step(state, rollouts(asked, *answers, right.reshape(-1, group)))
        curve.append((float(right.mean()), float(metrics["kl"])))
        if number % 10 == 9:
            mean = np.mean(curve[-10:], axis=0)
            print(f"  step {number + 1}: reward {mean[0]:.3f}  kl {mean[1]:.4f}", flush=True)
    return state["params"], curve


def learn_budgets(trained, params, data, settings, seed, scale) -> tuple[np.ndarray, list]:
    """A policy over budgets for each task, of the same losses with a price; answers stay.

    Args:
      scale: of `group_advantages`.

    Returns:
      Its probabilities [tasks, budgets], and of each step (reward, right, visual tokens).
    """
    budgets, group, end = settings["budgets"], settings["group"], trained.pipeline.tokenizer.eos_ids
    models = [trained.model.with_compressor(**COMPRESSOR, budget=b) for b in budgets]
    logits = jnp.zeros((len(data.tasks), len(budgets)))
    tx = optax.adam(settings["price_learning_rate"])
    state, curve = tx.init(logits), []

    @jax.jit
    def update(logits, state, task, choice, advantages):
        def loss(logits):
            now = jax.nn.log_softmax(logits)[task, choice][:, None]
            given = (now, jax.lax.stop_gradient(now), advantages, choice[:, None])
            total, count = grpo(*given, beta=0.0)["loss"]
            return total / count

        updates, state = tx.update(jax.grad(loss)(logits), state)
        return optax.apply_updates(logits, updates), state

    source = batches(data, settings, seed + 500)
    for number in range(settings["price_steps"]):
        batch = next(source)
        task = np.repeat(batch["task"].reshape(-1), group)
        key = jax.random.fold_in(jax.random.key(seed), number)
        choice = np.asarray(jax.random.categorical(key, logits[task]))
        # Each answer at every budget, so that shapes stay: one of them is the one that was drawn.
        given = [(batch, end, group, (seed, number, at)) for at in range(len(budgets))]
        right = [sampled(m, params, *g)[2] for m, g in zip(models, given, strict=True)]
        right = np.choose(choice, right)
        tokens = np.array(budgets)[choice]
        rewards = (right - settings["price"] * tokens).reshape(-1, group)
        advantages = group_advantages(rewards, scale=scale).reshape(-1)
        logits, state = update(logits, state, task, choice, advantages)
        curve.append((float(rewards.mean()), float(right.mean()), float(tokens.mean())))
    return np.asarray(jax.nn.softmax(logits)), curve


def scoring(trained: Any, data: DataConfig, evaluation: EvalConfig, budget: int) -> Any:
    """From parameters to the rows of greedy answers about images of unseen glyphs."""
    test = make_eval(
        DataConfig(**{**vars(data), "batch_size": evaluation.batch_size}),
        limit=evaluation.images,
        tokenizer=trained.pipeline.tokenizer,
    )
    methods = [dict(**COMPRESSOR, budgets=[budget])]
    asked = EvalConfig(**{**vars(evaluation), "methods": methods, "map_questions": 0})

    def score(params: Any) -> list[dict[str, Any]]:
        return evaluate(trained.model, params, test, asked)["eval"]

    return score


def one(seed: int, trained: Any, data: DataConfig, score: Any, settings: Mapping[str, Any]) -> dict:
    """What results.json says of a seed."""
    start = time.monotonic()
    params, curve = learn(trained, data, settings, seed)
    after = score(params)
    rounded = [[round(value, 4) for value in row] for row in curve]
    found = {
        "seed": seed,
        "reward_and_kl": rounded,
        "reward": [round(float(np.mean([r for r, _ in p])), 4) for p in (curve[:10], curve[-10:])],
        "greedy": after,
    }
    for scale in (True, False) if settings["price_steps"] else ():
        chosen, prices = learn_budgets(trained, params, data, settings, seed, scale)
        rows = [[round(float(p), 4) for p in row] for row in chosen]
        found["budgets_scaled" if scale else "budgets_unscaled"] = {
            "probabilities": dict(zip(data.tasks, rows, strict=True)),
            "reward_right_tokens": [[round(v, 4) for v in row] for row in prices],
        }
    return {**found, "seconds": round(time.monotonic() - start, 1)}


def seeds_of(text: str) -> list[int]:
    """ "0-2" or "0,3" as numbers."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(n) for n in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", default="0-2", help="a range or a list (default: %(default)s)")
    parser.add_argument("--base", type=Path, default=Path("runs/grpo_base"), help="its workdir")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--set", action="append", default=[], help="section.field=value")
    parser.add_argument("--steps", type=int, default=SETTINGS["steps"])
    parser.add_argument("--price-steps", type=int, default=SETTINGS["price_steps"])
    parser.add_argument("--learning-rate", type=float, default=SETTINGS["learning_rate"])
    args = parser.parse_args(argv)
    enable_compilation_cache()
    settings = {**SETTINGS, "steps": args.steps, "price_steps": args.price_steps}
    settings["learning_rate"] = args.learning_rate
    trained, data, evaluation = base(args.base.absolute(), args.set)
    score, found = scoring(trained, data, evaluation, settings["budget"]), []
    before = score(trained.params)
    for seed in seeds_of(args.seeds):
        found.append(one(seed, trained, data, score, settings))
        first, last = found[-1]["reward"]
        print(f"seed {seed}: reward {first:.3f} -> {last:.3f}", flush=True)
        told = dict(settings=settings, environment=environment(), greedy=before, seeds=found)
        args.out.write_text(json.dumps(told, indent=1) + "\n")
    return int(any(last <= first for first, last in (each["reward"] for each in found)))


if __name__ == "__main__":
    sys.exit(main())
