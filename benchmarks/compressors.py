"""What compressors save in time, stage by stage, beside what our FLOP count predicts.

    python benchmarks/compressors.py

The visual geometry is that of LLaVA-1.5 (24 x 24 patches and a CLS token of width 1024, 16 heads,
MLP 4096), with the first 4 of the 23 encoder layers; the decoder has 8 layers of width 1024.
Weights are random. Everything runs in this process; see PROTOCOL for what is measured how.
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from compressors_table import targets, write_table

from efficient_vlm import commands, compressors
from efficient_vlm.audit.flops import Cost, model_cost
from efficient_vlm.compressors import DecoderState, Signals, VisualTokens
from efficient_vlm.compressors.methods import METHODS, find
from efficient_vlm.inference import generate
from efficient_vlm.models.vit import INTERMEDIATES
from efficient_vlm.models.vlm import VisionLanguageModel

ROOT = Path(__file__).resolve().parent.parent
# At a batch above 1 one round of `none` takes seconds: one method of each kind, unless --methods.
LARGE_BATCH = (
    *("average_pool", "deco", "random", "fastervlm", "visionzip", "divprune", "cdpruner"),
    *("tome", "fastv", "pyramiddrop", "feather", "sparsevlm"),
)
PROTOCOL = """\
Stages are the programs of `inference.generate`, compiled ahead and called on the same inputs in one
process. Compilation and one warm-up call are not in the times; compile seconds stand apart. A
round goes through all methods, in turn forward and backward, with `none` in front of every third
and at the end; a speed-up is the mean of the two nearest `none` over the method, so that drift of
the machine hits both, and the median over the rounds is reported, like that of the milliseconds.
Calls shorter than 20 ms are repeated inside a sample. Methods that share a program (prefill of 64
re-indexed tokens, an encoder that is asked for nothing) share its measurement. Each call ends in
`block_until_ready`. "decode" is one token for every row, mean of DECODE_STEPS steps.
"scoring" is what a method computes beside the model, called alone: the rows or means of attention
that it asks of the encoder, and its module (score, select, fold); inside the decoder the one-cut
modules at the shape of each cut, and, for PyramidDrop, keys and query of the next layer. Predicted
speed-ups are ratios of FLOPs of `audit.flops`: decoder and head for prefill, with the cuts inside
the decoder; all stages for the first token."""
DECODE_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the model that is measured, and the budget."""

    side: int = 24
    patch: int = 14
    width: int = 1024
    heads: int = 16
    encoder_layers: int = 4
    encoder_mlp: int = 4096
    decoder_layers: int = 8
    decoder_mlp: int = 2816
    vocab: int = 512
    text: int = 64
    budget: int = 64

    @property
    def patches(self) -> int:
        return self.side**2

    def model(self) -> VisionLanguageModel:
        """The model without a method; the connector is LLaVA's, two products."""
        return VisionLanguageModel(
            vocab_size=self.vocab,
            encoder=dict(
                image_size=self.side * self.patch,
                patch_size=self.patch,
                width=self.width,
                depth=self.encoder_layers,
                num_heads=self.heads,
                mlp_dim=self.encoder_mlp,
                position="learned",
                class_token=True,
            ),
            compressor=dict(name="none", budget=self.patches),
            connector=dict(hidden_dim=self.width),
            decoder=dict(
                width=self.width,
                num_heads=self.heads,
                segments=[dict(layers=self.decoder_layers)],
                mlp_dim=self.decoder_mlp,
                bidirectional_visual=False,
            ),
        )


QUICK = Geometry(
    side=8,
    patch=4,
    width=64,
    heads=4,
    encoder_layers=3,
    encoder_mlp=128,
    decoder_layers=4,
    decoder_mlp=96,
    vocab=32,
    text=8,
    budget=16,
)


def settings(name: str, geometry: Geometry) -> dict[str, Any]:
    """Options of a method: the budget, or the nearest that it reaches; published forms inside."""
    budget = geometry.budget
    special = {
        "none": dict(budget=geometry.patches),
        "mlp": dict(),
        "tome": dict(budget=budget),
        "qformer": dict(budget=budget, num_queries=budget),
        "minicpm_merger": dict(layer=max(1, round(geometry.encoder_layers * 7 / 27))),
        "hiprune": dict(budget=budget, middle_layer=0.375),  # Layer 9 of CLIP's 24.
        "fastv": dict(layer=2, keep=budget),
        "dart": dict(layer=2, keep=budget),
        "sparsevlm": dict(budget=budget),
        "fitprune": dict(rate=0.9),
        **{label: dict() for label in ("pyramiddrop", "feather", "v2drop", "vtw")},
    }
    options = special.get(name, {})
    if name not in special or name == "minicpm_merger":
        grid = (geometry.side, geometry.side)
        reachable = compressors.reachable(name, grid)
        options = {**options, "budget": min(reachable, key=lambda b: (abs(b - budget), b))}
    return options


@dataclasses.dataclass
class Method:
    """One method in the model: who runs which stage (as `generate.generate` decides), its cost."""

    name: str
    options: dict[str, Any]
    model: VisionLanguageModel
    encoder: VisionLanguageModel
    decoder: VisionLanguageModel
    cost: Cost

    @classmethod
    def create(cls, name: str, geometry: Geometry, new_tokens: int) -> "Method":
        options, base = settings(name, geometry), geometry.model()
        budget = options.get("budget")
        rest = {k: v for k, v in options.items() if k != "budget"}
        if "features" in compressors.options(name):  # A projector of its own: no connector.
            rest["features"] = geometry.width
            base = base.clone(connector=dict(identity=True))
        model = base.with_compressor(name, budget, **rest)
        module = model.make_compressor()
        plain = geometry.model().with_compressor("none", geometry.patches)
        grid = (geometry.side, geometry.side)
        shared = (
            module.image_grid(grid) == grid
            and module.where != "encoder"
            and not module.intermediates()
        )
        policy = dict(position_policy=module.position_policy)
        return cls(
            name=name,
            options=options,
            model=model,
            encoder=plain if shared else model,
            decoder=model
            if module.where == "decoder"
            else plain.with_compressor("none", geometry.patches, **policy),
            cost=model_cost(model, text_tokens=geometry.text, new_tokens=new_tokens),
        )

    @functools.cached_property
    def module(self) -> compressors.base.Compressor:
        return self.model.make_compressor()


@dataclasses.dataclass
class Program:
    """A compiled stage. `prepare` makes what a call consumes, outside the clock."""

    run: Callable[..., Any]
    prepare: Callable[[], tuple] = tuple
    steps: int = 1
    compile_s: float = 0.0
    temporaries: int = 0

    def seconds(self, calls: int) -> float:
        given = [jax.block_until_ready(self.prepare()) for _ in range(calls)]
        start = time.perf_counter()
        for arguments in given:
            jax.block_until_ready(self.run(*arguments))
        return (time.perf_counter() - start) / calls / self.steps


def compiled(function: Callable, static: tuple, *arguments: Any) -> tuple[Program, Callable]:
    """Compiles a jitted function whose first arguments are static; also the raw executable."""
    start = time.perf_counter()
    executable = function.lower(*static, *arguments).compile()
    took = time.perf_counter() - start
    temporaries = executable.memory_analysis().temp_size_in_bytes
    run = functools.partial(executable, *arguments)
    return Program(run, compile_s=took, temporaries=temporaries), executable


@dataclasses.dataclass
class Timing:
    """Medians over the rounds: ms of a call, and how many times faster than the reference."""

    ms: float
    speedup: float
    spread: float  # Interquartile range of the speed-ups over their median.


def interleave(programs: dict[Any, Program], reference: Any, rounds: int) -> dict[Any, Timing]:
    """Times all programs in rounds, with the reference in front of every third and at the end."""
    calls = {}
    for key, program in programs.items():
        program.seconds(1)  # Warm-up.
        calls[key] = max(1, min(20, math.ceil(0.02 / max(program.seconds(1), 1e-6))))
    others = [key for key in programs if key != reference]
    seconds, ratios = {key: [] for key in programs}, {key: [] for key in others}
    for turn in range(rounds):
        order = others if turn % 2 == 0 else others[::-1]
        before = programs[reference].seconds(calls[reference])
        seconds[reference].append(before)
        for start in range(0, len(order), 3):
            chunk = order[start : start + 3]
            found = {key: programs[key].seconds(calls[key]) for key in chunk}
            after = programs[reference].seconds(calls[reference])
            seconds[reference].append(after)
            for key, value in found.items():
                seconds[key].append(value)
                ratios[key].append((before + after) / 2 / value)
            before = after
    result = {reference: Timing(1e3 * statistics.median(seconds[reference]), 1.0, 0.0)}
    for key in others:
        middle = statistics.median(ratios[key])
        low, high = np.percentile(ratios[key], (25, 75))
        ms = 1e3 * statistics.median(seconds[key])
        result[key] = Timing(ms, middle, float((high - low) / middle))
    return result


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Random arrays of these shapes: gains of norms 1, the rest of variance 1 / fan-in."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if "scale" in str(path[-1]).lower():
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = leaf.shape[-2] if len(leaf.shape) > 1 else 1
        values = rng.standard_normal(leaf.shape, np.float32) * fan_in**-0.5
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def parameters(model: VisionLanguageModel, batch: dict[str, Any], known: Any = None) -> Any:
    """Parameters of a model, `known` ones where it has them; the others random."""
    inputs = (batch["images"], batch["image_mask"], batch["prompts"])
    lengths = batch["lengths"]
    start = functools.partial(model.init, rng=jax.random.key(1))
    shapes = jax.eval_shape(start, jax.random.key(0), *inputs, lengths, lengths)
    shapes = nn.unbox(shapes)["params"]
    if known is None:
        return random_params(shapes)
    flat = dict(jax.tree_util.tree_flatten_with_path(known)[0])
    paths = jax.tree_util.tree_flatten_with_path(shapes)[0]
    own = {p: s for p, s in paths if p not in flat or flat[p].shape != s.shape}
    filled = random_params(own, seed=1) if own else {}
    names = {path: getattr(path[-1], "key", "") for path in own}
    for path in own:
        if names[path] == "scale":
            filled[path] = jnp.ones(own[path].shape, own[path].dtype)
    return jax.tree_util.tree_map_with_path(lambda p, s: filled.get(p, flat.get(p)), shapes)


def make_batch(geometry: Geometry, batch: int) -> dict[str, Any]:
    """Random pictures, one question of `text` tokens for each."""
    rng = np.random.default_rng(0)
    pixels = geometry.side * geometry.patch
    return dict(
        images=jnp.asarray(rng.integers(0, 256, (batch, 1, pixels, pixels, 3)), jnp.uint8),
        image_mask=jnp.ones((batch, 1), bool),
        prompts=jnp.asarray(rng.integers(0, geometry.vocab, (batch, 1, geometry.text)), jnp.int32),
        lengths=jnp.full((batch, 1), geometry.text, jnp.int32),
    )


@dataclasses.dataclass
class Measured:
    """What the phases find for one batch size; keys are method names."""

    timing: dict[str, dict[str, Timing]] = dataclasses.field(default_factory=dict)
    compile_s: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    temporaries: dict[str, int] = dataclasses.field(default_factory=dict)
    kv_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    signal_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    module_ms: dict[str, float] = dataclasses.field(default_factory=dict)
    select_ms: float | None = None

    def take(self, stage: str, found: dict, programs: dict, key_of: dict[str, Any]) -> None:
        self.timing[stage] = {name: found[key] for name, key in key_of.items()}
        self.compile_s[stage] = {name: programs[key].compile_s for name, key in key_of.items()}


class Run:
    """All stages of some methods at one batch size."""

    def __init__(self, geometry, names, batch_size, rounds, known=None):
        self.geometry, self.rounds, self.batch_size = geometry, rounds, batch_size
        self.new_tokens = DECODE_STEPS
        self.methods = [
            Method.create(name, geometry, self.new_tokens)
            for name in dict.fromkeys(("none", *names))
        ]
        self.none = self.methods[0]
        self.batch = make_batch(geometry, batch_size)
        self.layout = self.none.model.layout(self.batch["images"])
        self.known = parameters(self.none.model, self.batch) if known is None else known
        self.found, self.rng = Measured(), jax.random.key(0)
        self.encoded, self.visual = {}, {}

    def say(self, text: str) -> None:
        print(f"[batch {self.batch_size}] {text}", file=sys.stderr, flush=True)

    def params(self, model: VisionLanguageModel) -> Any:
        """The common weights, and random ones for what the method has of its own."""
        return parameters(model, self.batch, self.known)

    def measure(self) -> Measured:
        for phase in (self.encode, self.compress, self.signals, self.prefill_and_decode, self.cuts):
            start = time.perf_counter()
            phase()
            gc.collect()
            self.say(f"{phase.__name__}: {time.perf_counter() - start:.0f} s")
        return self.found

    def encode(self) -> None:
        programs, key_of = {}, {}
        for method in self.methods:
            key_of[method.name] = key = method.encoder
            if key not in programs:
                given = (self.params(key), self.batch["images"], self.batch["image_mask"])
                programs[key], _ = compiled(generate._encode, (key,), *given)
                self.encoded[key] = jax.block_until_ready(programs[key].run())
        timing = interleave(programs, self.none.encoder, self.rounds)
        self.found.take("encode", timing, programs, key_of)

    def compress(self) -> None:
        """In groups, so that not all trained projectors are in memory at once."""
        prompts = (self.batch["prompts"], self.batch["lengths"], self.rng)
        timing, seconds = {}, {}
        for start in range(0, len(self.methods), 6):
            group = dict.fromkeys(["none"])
            group.update({m.name: m for m in self.methods[start : start + 6]})
            group["none"], programs, modules = self.none, {}, {}
            for name, method in group.items():
                params, (tokens, signals) = self.params(method.model), self.encoded[method.encoder]
                static = (method.model, self.layout)
                given = (params, tokens, signals, *prompts)
                programs[name], _ = compiled(generate._compress, static, *given)
                self.visual[name] = jax.block_until_ready(programs[name].run())
                seconds[name] = programs[name].compile_s
                if method.module.where == "between" and name != "none":
                    modules[name] = self._module(method, params.get("reduce", {}), tokens, signals)
            timing |= interleave(programs, "none", self.rounds)
            self._alone(modules)
        self.found.timing["compress"], self.found.compile_s["compress"] = timing, seconds

    def _module(self, method, params, tokens, signals) -> Program:
        """Score, select and fold alone. Text as wide as the decoder, tokens as what comes in."""
        if "text" in method.module.needs:
            text = np.random.default_rng(2).standard_normal((len(tokens.mask), self.geometry.width))
            signals = signals.replace(text=jnp.asarray(text, jnp.float32))
        module = method.module

        @jax.jit
        def apply(params, tokens, signals, rng):
            return module.apply({"params": params}, tokens, signals, rng=rng)

        return compiled(apply, (), params, tokens, signals, self.rng)[0]

    def _alone(self, programs: dict[str, Program]) -> None:
        if programs:
            found = interleave(programs, next(iter(programs)), self.rounds)
            for name, timing in found.items():
                self.found.module_ms[name] = self.found.module_ms.get(name, 0.0) + timing.ms

    def signals(self) -> None:
        """Rows and means of attention that the encoder computes for a method, alone."""
        vit, rng = self.none.model.make_encoder(), np.random.default_rng(3)
        places, dim = self.geometry.patches + 1, vit.width // vit.num_heads
        shape = (self.batch_size, places, vit.num_heads, dim)
        q, k = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
        wanted = {}
        for method in self.methods:
            asked = [value.partition("/")[0] for value in method.module.intermediates().values()]
            wanted[method.name] = [name for name in asked if name not in ("features", "keys")]
        programs = {}
        for name in sorted({name for names in wanted.values() for name in names}):
            row = jax.jit(functools.partial(INTERMEDIATES[name], None, scale=dim**-0.5))
            programs[name] = compiled(row, (), q, k)[0]
        if programs:
            found = interleave(programs, next(iter(programs)), self.rounds)
            for name, names in wanted.items():
                self.found.signal_ms[name] = sum(found[asked].ms for asked in names)

    def prefill_and_decode(self) -> None:
        programs, decoders, key_of = {}, {}, {}
        prompts = (self.batch["prompts"], self.batch["lengths"], self.rng)
        kept = {}
        for method in self.methods:
            model, visual = method.decoder, self.visual[method.name]
            key_of[method.name] = key = (model, visual.embed.shape, visual.bias is None)
            if key not in programs:
                static = (model, self.layout, self.new_tokens)
                params = self.known
                programs[key], _ = compiled(generate._prefill, static, params, visual, *prompts)
                token, cache, _ = jax.block_until_ready(programs[key].run())
                decoders[key], kept[key] = self._decoder(model, params, token, cache), cache.nbytes
            self.found.temporaries[method.name] = programs[key].temporaries
            self.found.kv_bytes[method.name] = kept[key]
        reference = key_of["none"]
        found = interleave(programs, reference, self.rounds)
        self.found.take("prefill", found, programs, key_of)
        found = interleave(decoders, reference, self.rounds)
        self.found.take("decode", found, decoders, key_of)

    def _decoder(self, model, params, token, cache) -> Program:
        """Some steps from a copy of the cache, which the program writes into."""
        program, executable = compiled(generate._decode, (model,), params, token, cache)

        def run(cache):
            now = token
            for _ in range(DECODE_STEPS):
                now, cache = executable(params, now, cache)
            return now

        copies = lambda: (jax.tree.map(jnp.copy, cache),)  # noqa: E731
        return dataclasses.replace(program, run=run, prepare=copies, steps=DECODE_STEPS)

    def cuts(self) -> None:
        """One-cut modules of the methods inside the decoder, at the shapes of their cuts."""
        for method in self.methods:
            if method.module.where == "decoder":
                for program in self._cut_programs(method):
                    self._alone({method.name: program})

    def _cut_programs(self, method: Method) -> Iterator[Program]:
        geometry, decoder = self.geometry, method.decoder.make_decoder()
        rng, now = np.random.default_rng(4), geometry.patches
        batch, width, heads = self.batch_size, geometry.width, geometry.heads

        def draw(*shape):
            return jnp.asarray(rng.standard_normal(shape, np.float32))

        first, text = draw(batch, geometry.patches, width), draw(batch, geometry.text, width)
        for start, _, module in decoder.runs(geometry.patches):
            if module is None:
                continue
            places = now + geometry.text
            after = draw(batch, places, width)
            inner = {
                name: draw(batch, places, heads, width // heads)
                for name in ("query", "key", "plain_query", "plain_key")
            }
            grid = (geometry.side, geometry.side)
            full = VisualTokens.from_grid(first, grid)
            spaced = jnp.linspace(0, geometry.patches - 1, now).astype(jnp.int32)
            spaced = jnp.broadcast_to(spaced, (batch, now))
            tokens = compressors.tokens.take(full, spaced, jnp.ones_like(spaced, bool))
            tokens = tokens.replace(embed=after[:, :now])
            last = jnp.full((batch,), places - 1, jnp.int32)
            state = DecoderState(
                **inner,
                live=jnp.ones((batch, places), bool),
                prompt=jnp.ones((batch, geometry.text), bool),
                last=last,
                bias=jnp.zeros((batch, places)),
                before=draw(batch, places, width),
                after=after,
                first_visual=first,
                first_text=text,
                first_live=jnp.ones((batch, geometry.patches), bool),
                scale=(width // heads) ** -0.5,
                bidirectional=decoder.bidirectional_visual,
            )
            cut = jax.jit(lambda t, s, m=module: m.apply({}, t, Signals(decoder=s)))
            yield compiled(cut, (), tokens, state)[0]
            if "decoder" in module.needs and module.looks == "next":
                model = method.decoder
                look = jax.jit(
                    lambda p, *given, at=start: model.apply(
                        {"params": p},
                        *given,
                        method=lambda m, *g: m.language._one(at, "look", *g),
                    )
                )
                positions = jnp.broadcast_to(jnp.arange(places), (batch, places))
                yield compiled(look, (), self.known, after, positions, last)[0]
            now = module.budget

    def select_one_row(self) -> float:
        """Milliseconds of ranking a row of N and gathering: what follows any one-row score."""
        tokens, _ = self.encoded[self.none.encoder]
        row = jnp.asarray(np.random.default_rng(5).random(tokens.mask.shape), jnp.float32)
        method = Method.create("fastervlm", self.geometry, self.new_tokens)
        program = self._module(method, {}, tokens, Signals(attention_row=row))
        return interleave({0: program}, 0, self.rounds)[0].ms


def rows_of(run: Run) -> list[dict[str, Any]]:
    """One row a method, plain types."""
    found, none, rows = run.found, run.none, []
    base = {stage: found.timing[stage]["none"].ms for stage in found.timing}
    for method in run.methods:
        cost, name = method.cost, method.name
        timing = {stage: found.timing[stage][name] for stage in found.timing}
        # Times from the interleaved ratios, so that drift between phases cancels.
        relative = {stage: base[stage] / timing[stage].speedup for stage in timing}
        first = ("encode", "compress", "prefill")
        to_first = sum(base[s] for s in first) / sum(relative[s] for s in first)
        predicted = prefill_flops(none, none) / prefill_flops(method, none)
        measured = timing["prefill"].speedup
        signal, module = found.signal_ms.get(name, 0.0), found.module_ms.get(name)
        scoring = None if module is None else signal + module
        rows.append(
            dict(
                method=name,
                options=method.options,
                where=method.module.where,
                batch=run.batch_size,
                visual_tokens=dict(
                    entering=cost.visual_tokens, mean_processed=cost.mean_visual_tokens
                ),
                ms={stage: t.ms for stage, t in timing.items()},
                speedup={stage: t.speedup for stage, t in timing.items()},
                spread={stage: t.spread for stage, t in timing.items()},
                speedup_prefill_measured=measured,
                speedup_prefill_predicted=predicted,
                efficiency=measured / predicted,
                speedup_first_token_measured=to_first,
                speedup_first_token_predicted=none.cost.total / cost.total,
                slower_than_none=name != "none" and to_first < 1,
                slower_stages=[s for s, t in timing.items() if t.speedup < 0.97],
                signal_ms=signal,
                module_ms=module,
                scoring_share_of_prefill=None if scoring is None else scoring / base["prefill"],
                kv_bytes=found.kv_bytes[name],
                kv_bytes_predicted=cost.kv_bytes * run.batch_size,
                prefill_temporary_bytes=found.temporaries[name],
                flops=dict(cost.flops),
                compile_s={stage: found.compile_s[stage][name] for stage in found.timing},
            )
        )
        if name == "visionzip":
            share = (signal + run.select_one_row()) / base["prefill"]
            rows[-1]["score_alone_share_of_prefill"] = share
    return rows


def prefill_flops(method: Method, none: Method) -> int:
    """FLOPs of the prefill program: decoder, head, and the cuts that happen inside it."""
    flops = method.cost.flops
    total = flops["decoder"] + flops["head"]
    if method.module.where == "decoder":
        total += flops["compressor"] - none.cost.flops["compressor"]  # Both project all patches.
    return total


def environment() -> dict[str, Any]:
    """Versions, processor and load."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        **commands.environment(),
        "processor": names[0] if names else "unknown",
        "load_average_at_start": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Measures, prints the table and the targets, writes both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,8", help="batch sizes (1,8)")
    parser.add_argument("--methods", help="names, default: all (batch 1), one of each kind (8)")
    parser.add_argument("--rounds", type=int, help="default 5 at batch 1, 3 above")
    parser.add_argument("--encoder-layers", type=int, help="of CLIP-L's 23 (4)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a test, not a benchmark")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--table", type=Path, help="Markdown file")
    args = parser.parse_args()
    geometry = QUICK if args.quick else Geometry()
    if args.encoder_layers:
        geometry = dataclasses.replace(geometry, encoder_layers=args.encoder_layers)
    out, table = args.out, args.table
    if not args.quick and not args.methods:  # Parts of a run do not overwrite the whole.
        out = out or ROOT / "benchmarks/results/compressors_cpu.json"
        table = table or ROOT / "docs/benchmark_compressors.md"
    facts, start, rows, known, rounds = environment(), time.perf_counter(), [], None, {}
    for batch in (int(part) for part in args.batch.split(",")):
        names = args.methods.split(",") if args.methods else METHODS if batch == 1 else LARGE_BATCH
        for name in names:
            find(name)
        rounds[batch] = args.rounds or (5 if batch == 1 else 3)
        run = Run(geometry, names, batch, rounds[batch], known)
        run.measure()
        known = run.known
        rows += rows_of(run)
        del run
        gc.collect()
    facts["load_average_at_end"] = round(os.getloadavg()[0], 2)
    result = dict(
        command=" ".join(["python", "benchmarks/compressors.py", *sys.argv[1:]]),
        environment=facts,
        geometry=dataclasses.asdict(geometry),
        protocol=PROTOCOL.replace("DECODE_STEPS", str(DECODE_STEPS)),
        rounds=rounds,
        seconds=round(time.perf_counter() - start, 1),
        targets=targets(rows),
        rows=rows,
    )
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
    text = write_table(result)
    if table:
        table.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
