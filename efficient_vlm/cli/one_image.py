"""One method on one picture: with the weights of a run, or with statistics of pixels for features.

Both subjects have a `grid`, a `note` on what they see by, and `nearest` and `mark`.
"""

import bisect
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from efficient_vlm.cli import pixel_signals
from efficient_vlm.compressors import Compressor, Signals, VisualTokens, methods
from efficient_vlm.compressors.grids import Grid
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.pipeline import make_spec, make_tokenizer
from efficient_vlm.data.scenes import COLOURS
from efficient_vlm.errors import UserError
from efficient_vlm.evaluation import heat
from efficient_vlm.evaluation.heat import Heat
from efficient_vlm.evaluation.settings import check_trained, parameter_shapes
from efficient_vlm.fields import section
from efficient_vlm.inference.generate import generate
from efficient_vlm.models.prompt_layout import held_mean
from efficient_vlm.models.variants import setting_of
from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.batch import one_question
from efficient_vlm.train.trained import restore
from efficient_vlm.train.workdir_config import read_run_config

_STEPS = 8  # Of tome without an encoder, whose layers it acts in.


@dataclasses.dataclass(frozen=True)
class Marked:
    """What a method made of a picture.

    Attributes:
      name, options: as configured.
      budget: visual tokens, see `variants.setting_of`.
      source: int [N], the token of each patch, -1 for none.
      heat: one number per patch, or None.
      answer: what the model says; "" where it was not asked.
      gone: decoder layers behind which no visual token is left, None if some stay to the end.
    """

    name: str
    options: Mapping[str, Any]
    budget: int
    source: np.ndarray
    heat: Heat | None = None
    answer: str = ""
    gone: int | None = None


class WithoutWeights:
    """A picture seen by `pixel_signals`; methods with parameters or in the decoder cannot run."""

    note = pixel_signals.NOTE
    question = ""

    def __init__(self, image: np.ndarray, grid: Grid):
        self.image, self.grid = image, grid
        descriptors = pixel_signals.describe(image, grid)
        self._tokens = self._on(grid, descriptors)
        patches = pixel_signals.patches_of(image, grid)
        pixels = 2 * patches.reshape(1, len(patches), -1) - 1  # As SigLIP normalises them.
        given = pixel_signals.signals(descriptors, grid)
        self._signals = given.replace(pixels=np.float32(pixels))

    def shown(self, size: tuple[int, int]) -> np.ndarray:
        """The picture as it is cut into patches, uint8 of `size`."""
        return _at_size(self.image, size, "stretch")

    @property
    def aspect(self) -> float:
        """Width over height, as shown."""
        return self.image.shape[1] / self.image.shape[0]

    def nearest(self, fields: Mapping[str, Any], budget: int) -> dict[str, Any]:
        """The method at the setting nearest to `budget` tokens."""
        self._check_runs(fields["name"])
        if methods.find(fields["name"]).whole_grid:
            return dict(fields)  # `mark` says why there is nothing to see.
        knobs = _probe(fields, self.grid).knobs(_STEPS, self._tokens.mask.shape[1])
        return {**fields, **_nearest(knobs, budget, lambda settings: settings.get("budget"))}

    def mark(self, fields: Mapping[str, Any], *, ask: bool = False) -> Marked:
        """Runs a method.

        Raises:
          UserError: it needs more than pixels, or has no such setting.
        """
        del ask
        options = dict(fields)
        name = options.pop("name")
        self._check_runs(name)
        kind = methods.find(name)
        if options.get("budget") is None and not kind.optional_budget:
            raise UserError(
                "--compressor.budget: missing",
                allowed=f"tokens to keep of {self.grid[0] * self.grid[1]} patches",
                fix="--compressor.budget=64",
            )
        module = methods.build(name, **{"grid": self.grid, **options}, parent=None)
        if lacking := sorted(module.needs - pixel_signals.GIVEN):
            raise _needs_run(name, f"it needs {lacking[0]}")
        if kind.whole_grid:
            raise UserError(
                f"--compressor={name}: all patches leave the encoder, so there is no map of it",
                allowed="methods that drop or merge patches",
            )
        if kind.in_encoder:
            source = self._steps(module)
        else:
            source = self._call(module)
        source = np.asarray(source)[0]
        if "attention_row" in module.needs:
            found = Heat(self._signals.attention_row[0], "contrast, in place of attention")
        else:
            found = heat.merged(source)
        budget = options.get("budget")
        budget = heat.counts(source).tokens if budget is None else budget
        return Marked(name, options, budget, source, found)

    def _check_runs(self, name: str) -> None:
        if methods.find(name).in_decoder:
            raise _needs_run(name, "it needs a decoder")

    def _on(self, grid: Grid, descriptors: np.ndarray) -> VisualTokens:
        return VisualTokens.from_grid(jax.numpy.asarray(descriptors)[None], grid, self.grid)

    def _call(self, module: Compressor) -> jax.Array:
        coarse, tokens = module.image_grid(self.grid), self._tokens
        if coarse != self.grid:
            tokens = self._on(coarse, pixel_signals.describe(self.image, coarse))
        return _apply(module, tokens, self._signals, module.label).source

    def _steps(self, module: Compressor) -> jax.Array:
        """A method inside the encoder, one step after the other with nothing between them."""
        tokens, number = self._tokens, self._tokens.mask.shape[1]
        for stage in module.stages(_STEPS, number):
            row = held_mean(tokens, self._signals.attention_row[..., None])[..., 0]
            given = self._signals.replace(keys=tokens.embed[:, :, None], attention_row=row)
            tokens = _apply(stage.module, tokens, given, module.label)
        return tokens.source


def _apply(module: Compressor, tokens: VisualTokens, signals: Signals, name: str) -> VisualTokens:
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, signals))
    if shapes.get("params"):
        raise _needs_run(name, "it needs trained parameters")
    return jax.jit(lambda *given: module.apply({}, *given))(tokens, signals)


class _Known(NamedTuple):
    """As much of a `Pipeline` as is known without the data."""

    tokenizer: Any
    spec: Any


class WithRun:
    """A picture seen by the newest checkpoint of a run."""

    def __init__(self, image: np.ndarray, workdir: Path, question: str | None):
        self.config = read_run_config(workdir)
        data = DataConfig.from_mapping(section(self.config, "data"))
        self.tokenizer, spec = _tokenizer(data, workdir), make_spec(data, data.tasks)
        trained = restore(self.config, workdir, _Known(self.tokenizer, spec))
        self.model, self.params, self._resize = trained.model, trained.params, spec.resize
        self._image, vit = image, self.model.make_encoder()
        self.grid = self.model.slot_grid
        self._pixels = tuple(side * vit.patch_size for side in vit.grid)
        self.note = f"the encoder and decoder of {workdir}"
        self.question = question or _question(data)
        ids = self.tokenizer.encode_prompt(self.question)
        if len(ids) > spec.max_length:
            raise UserError(
                f"--question: {len(ids)} tokens", allowed=f"at most {spec.max_length} in this run"
            )
        self._ids, self._length = ids, spec.max_length

    def shown(self, size: tuple[int, int]) -> np.ndarray:
        """The picture as the encoder gets it, uint8 of `size`."""
        return _at_size(self._image, size, self._resize)

    @property
    def aspect(self) -> float:
        """Width over height, as shown."""
        if self._resize == "stretch":
            return self._image.shape[1] / self._image.shape[0]
        return self._pixels[1] / self._pixels[0]

    def nearest(self, fields: Mapping[str, Any], budget: int) -> dict[str, Any]:
        """The method at the setting nearest to `budget` tokens (in the decoder: on average)."""
        vit, decoder = self.model.make_encoder(), self.model.make_decoder()
        fields = dict(fields)
        kind = methods.find(fields["name"])
        has = methods.options(fields["name"])
        if kind.in_decoder:
            fields.pop("budget", None)  # It is matched by the knobs of the method.
        if not vit.class_token and fields.get("attention") is None and "attention" in has:
            fields["attention"] = "column_mean"
        if "middle_layer" in has and "middle_layer" not in fields:
            fields["middle_layer"] = 9 / 24  # As published, in a deeper or shallower encoder.
        depth = decoder.num_layers if kind.in_decoder else vit.layers_run
        first_cut = {"layer": 1} if "layer" in has else {"layers": (1,)} if "layers" in has else {}
        try:
            return self._reach(fields, depth, budget)
        except UserError as error:
            if not kind.in_decoder or not first_cut or set(first_cut) & set(fields):
                raise
            try:  # Published cuts may lie behind the last layer of a small model.
                return self._reach({**fields, **first_cut}, depth, budget)
            except UserError:
                raise error from None

    def _reach(self, fields: dict[str, Any], depth: int, budget: int) -> dict[str, Any]:
        knobs = _probe(fields, self.grid).knobs(depth, self.grid[0] * self.grid[1])

        def reached(settings):
            return setting_of(self._variant({**fields, **settings}))[1]

        return {**fields, **_nearest(knobs, budget, reached)}

    def mark(self, fields: Mapping[str, Any], *, ask: bool = False) -> Marked:
        """Runs a method; with `ask`, the model also answers the question.

        Raises:
          UserError: it has not been trained here, or has no such setting.
        """
        variant = self._variant(fields)
        variant.make_compressor()
        check_trained([variant], parameter_shapes(self.params))
        pixels = images.resize(self._image, self._pixels, mode=self._resize)[None]
        inputs = one_question(pixels, self._ids, self._length)
        out = generate(
            variant,
            self.params,
            inputs,
            new_tokens=8 if ask else 1,
            eos_id=self.tokenizer.eos_ids,
        )
        sources = [np.asarray(source[0]) for source in out.sources]
        seen = heat.heat(variant, self.params, inputs, sources)
        name, budget = setting_of(variant)
        options = {k: v for k, v in variant.compressor.items() if k != "name"}
        answer = self.tokenizer.answer(out.tokens[0, 0]).strip() if ask else ""
        gone = None
        if (sources[0] >= 0).any() and not (sources[-1] >= 0).any():
            gone = int(seen.scores.max())
        return Marked(name, options, budget, heat.where_ended(sources), seen, answer, gone)

    def _variant(self, fields: Mapping[str, Any]):
        options = dict(fields)
        return self.model.with_compressor(
            options.pop("name"), options.pop("budget", None), **options
        )


def _probe(fields: Mapping[str, Any], grid: Grid) -> Compressor:
    """A module to ask for its knobs."""
    kind, options = methods.find(fields["name"]), dict(fields)
    name = options.pop("name")
    options["budget"] = None if kind.in_decoder else grid[0] * grid[1]
    return methods.build(name, **{"grid": grid, **options}, parent=None)


def _nearest(knobs, budget: int, reached) -> Mapping[str, Any]:
    """Of settings with ever more tokens, the one nearest to `budget`; the smaller of two."""
    settings = list(knobs)
    if not settings:
        return {}
    place = bisect.bisect_left(settings, budget, key=reached)
    near = settings[max(place - 1, 0) : place + 1]
    return min(near, key=lambda each: abs(reached(each) - budget))


def _needs_run(name: str, why: str) -> UserError:
    return UserError(
        f"--compressor={name}: {why}, which only a run has",
        allowed="without --workdir: methods that need features, keys or attention of an encoder",
        fix="add --workdir=RUN of a trained model",
    )


def _at_size(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resized to look at: small pictures keep their pixels instead of being blurred."""
    if mode == "stretch" and min(size) >= 2 * max(image.shape[:2]):
        rows = np.arange(size[0]) * image.shape[0] // size[0]
        columns = np.arange(size[1]) * image.shape[1] // size[1]
        return image[rows[:, None], columns]
    return images.resize(image, size, mode=mode)


def _tokenizer(data, workdir: Path):
    """The run's tokenizer, without its data."""
    known = data.tokenizer or data.generated
    if not known and not (workdir / "tokenizer.json").is_file():
        raise UserError(
            f"--workdir={workdir}: it holds no tokenizer.json",
            fix="train first, or set data.tokenizer in its config.json",
        )
    return make_tokenizer(data, None, workdir)


def _question(data) -> str:
    if not data.generated:
        return "What is in this image?"
    return f"which digit is {COLOURS[0]}" if "needle" in data.tasks else "what background colour"
