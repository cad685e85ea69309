"""All stages of some methods at one batch size, for `compressors.py`."""

import dataclasses
import functools
import gc
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from compressors_model import Method, make_inputs, parameters
from compressors_timing import Program, Timing, compiled, interleave

from efficient_vlm import compressors
from efficient_vlm.compressors import DecoderState, Signals, VisualTokens
from efficient_vlm.inference import stages
from efficient_vlm.kernels.attention import attention
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.intermediates import INTERMEDIATES
from efficient_vlm.nn.stack import layer_of, unstack

DECODE_STEPS = 8


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
        inputs = make_inputs(geometry, batch_size)
        self.pictures, self.text = inputs.pictures, inputs.replace(pictures=None)
        self.layout = self.none.model.layout(self.pictures)
        self.known = parameters(self.none.model) if known is None else known
        self.found, self.rng = Measured(), jax.random.key(0)
        self.encoded, self.visual = {}, {}

    def say(self, text: str) -> None:
        print(f"[batch {self.batch_size}] {text}", file=sys.stderr, flush=True)

    def params(self, model: VisionLanguageModel) -> Any:
        """The common weights, and random ones for what the method has of its own; layers split."""
        return unstack(parameters(model, self.known))

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
            key_of[method.name] = key = method.programs.encode
            if key not in programs:
                given = (self.params(key[0]), self.pictures)
                programs[key], _ = compiled(stages.encode_stage, key, *given)
                self.encoded[key] = jax.block_until_ready(programs[key].run())
        timing = interleave(programs, self.none.programs.encode, self.rounds)
        self.found.take("encode", timing, programs, key_of)

    def compress(self) -> None:
        """In groups, so that not all trained projectors are in memory at once."""
        prompts = (self.text, self.rng)
        timing, seconds = {}, {}
        for start in range(0, len(self.methods), 6):
            group = dict.fromkeys(["none"])
            group.update({m.name: m for m in self.methods[start : start + 6]})
            group["none"], programs, modules = self.none, {}, {}
            for name, method in group.items():
                params, (tokens, signals) = (
                    self.params(method.model),
                    self.encoded[method.programs.encode],
                )
                static = (method.model, self.layout)
                given = (params, tokens, signals, *prompts)
                programs[name], _ = compiled(stages.compress_stage, static, *given)
                self.visual[name] = jax.block_until_ready(programs[name].run())
                seconds[name] = programs[name].compile_s
                if method.module.between and name != "none":
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

            def signal(q, k, lse, name=name):
                seen = dict(query=q, key=k, lse=lse, mask=None, key_bias=None, live=None)
                return INTERMEDIATES[name](None, seen, dim**-0.5)

            # The attention beside it has given the lse.
            lse = attention(*(x.swapaxes(1, 2) for x in (q, k, k)), scale=dim**-0.5).lse
            programs[name] = compiled(jax.jit(signal), (), q, k, lse)[0]
        if programs:
            found = interleave(programs, next(iter(programs)), self.rounds)
            for name, names in wanted.items():
                self.found.signal_ms[name] = sum(found[asked].ms for asked in names)

    def prefill_and_decode(self) -> None:
        programs, decoders, key_of = {}, {}, {}
        prompts = (self.text, self.rng)
        kept, params = {}, unstack(self.known)
        for method in self.methods:
            model, visual = method.programs.prefill, self.visual[method.name]
            key_of[method.name] = key = (model, visual.embed.shape, visual.bias is None)
            if key not in programs:
                static = (model, self.layout, self.new_tokens)
                given = (params, visual, *prompts)
                programs[key], _ = compiled(stages.prefill_stage, static, *given)
                first, cache, _ = jax.block_until_ready(programs[key].run())
                later = method.programs.decode
                decoders[key] = self._decoder(later, params, first.tokens, cache)
                kept[key] = cache.nbytes
            self.found.temporaries[method.name] = programs[key].temporaries
            self.found.kv_bytes[method.name] = kept[key]
        reference = key_of["none"]
        found = interleave(programs, reference, self.rounds)
        self.found.take("prefill", found, programs, key_of)
        found = interleave(decoders, reference, self.rounds)
        self.found.take("decode", found, decoders, key_of)

    def _decoder(self, model, params, token, cache) -> Program:
        """Some steps from a copy of the cache, which the program writes into."""
        program, executable = compiled(stages.decode_stage, (model,), params, token, cache)

        def run(cache):
            now = token
            for _ in range(DECODE_STEPS):
                chosen, cache = executable(params, now, cache)
                now = chosen.tokens
            return now

        copies = lambda: (jax.tree.map(jnp.copy, cache),)  # noqa: E731
        return dataclasses.replace(program, run=run, prepare=copies, steps=DECODE_STEPS)

    def cuts(self) -> None:
        """One-cut modules of the methods inside the decoder, at the shapes of their cuts."""
        for method in self.methods:
            if method.module.in_decoder:
                for program in self._cut_programs(method):
                    self._alone({method.name: program})

    def _cut_programs(self, method: Method) -> Iterator[Program]:
        geometry, decoder = self.geometry, method.model.make_decoder()
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
                positions = jnp.broadcast_to(jnp.arange(places), (batch, places))
                given = (method.model, start, self.known, after, positions, last)
                yield compiled(_look, given[:2], *given[2:])[0]
            now = module.budget

    def select_one_row(self) -> float:
        """Milliseconds of ranking a row of N and gathering: what follows any one-row score."""
        tokens, _ = self.encoded[self.none.programs.encode]
        row = jnp.asarray(np.random.default_rng(5).random(tokens.mask.shape), jnp.float32)
        method = Method.create("fastervlm", self.geometry, self.new_tokens)
        program = self._module(method, {}, tokens, Signals(attention_row=row))
        return interleave({0: program}, 0, self.rounds)[0].ms


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(model: VisionLanguageModel, layer: int, params, x, positions, last):
    """Keys of all places and one query a row of a layer, for methods that look ahead."""

    def look(bound, *inputs):
        decoder = bound.language
        layer_params = {"params": layer_of(decoder._parameters(), layer)}
        return decoder._block().apply(layer_params, *inputs, method="look")

    return model.apply({"params": params}, x, positions, last, method=look)
