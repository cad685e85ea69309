"""What `efficient-vlm audit` looks at: a preset or a config, and the model with each method."""

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from efficient_vlm import config as configs
from efficient_vlm.audit import flops, ledger
from efficient_vlm.audit.ledger import Ledger
from efficient_vlm.compressors import grids, methods
from efficient_vlm.errors import UserError
from efficient_vlm.models import presets
from efficient_vlm.models.build import construct
from efficient_vlm.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is audited, beside the method.

    Attributes:
      kind, name: "preset" or "config", and which.
      config: with the section "model".
      text_tokens, new_tokens, images: of one question about one picture.
      own: the projector that the published model has itself, or None.
      bare: compare with no compression at all, also where the model has a projector of its own.
      facts: lines about the preset, for the reader.
    """

    kind: str
    name: str
    config: ml_collections.ConfigDict
    text_tokens: int
    new_tokens: int
    images: int
    own: Mapping[str, Any] | None = None
    bare: bool = False
    facts: tuple[str, ...] = ()

    def model(self, method: Mapping[str, Any] | None = None) -> VisionLanguageModel:
        """The model with a method, or as it is configured.

        A method inside the decoder acts behind the model's own projector. Any other takes its
        place, and an identity connector, which only fits that projector, becomes one matrix.
        """
        fields = configs.section(self.config, "model")
        if method is None:
            return construct(VisionLanguageModel, fields, "model")
        if self.own is not None and methods.find(method["name"]).where == "decoder":
            found = {**self._entry_grid(), **method}
            fields["decoder"] = {**fields["decoder"], "compressor": found}
        else:
            fields["compressor"] = dict(method)
            if self.own is not None and method["name"] != self.own["name"]:
                fields["connector"] = {**fields["connector"], "identity": False}
        return construct(VisionLanguageModel, fields, "model")

    def _entry_grid(self) -> dict[str, grids.Grid]:
        """The option `grid` of one image behind the model's own projector; {} if it has none."""
        grid = self.model().make_encoder().grid
        budget = self.own.get("budget")
        if budget is not None:
            grid = grids.fitted_grid(grid, budget)
        return {"grid": grid} if budget in (None, grid[0] * grid[1]) else {}

    @property
    def sizes(self) -> dict[str, int]:
        return dict(text_tokens=self.text_tokens, new_tokens=self.new_tokens, images=self.images)

    @functools.cached_property
    def plain(self) -> VisionLanguageModel:
        """What methods are compared with: as published, or without any compression."""
        model = self.model()
        return ledger.without(model) if self.own is None or self.bare else model

    @functools.cached_property
    def _plain_cost(self) -> flops.Cost:
        return flops.model_cost(self.plain, **self.sizes)

    @functools.cached_property
    def baseline(self) -> Ledger:
        """The ledger of `plain`."""
        return ledger.build(self.plain, **self.sizes, baseline=self._plain_cost)

    def ledger(self, method: Mapping[str, Any]) -> Ledger:
        """The ledger of the model with a method."""
        built = ledger.build(self.model(method), **self.sizes, baseline=self._plain_cost)
        return dataclasses.replace(built, compressor=dict(method))

    def knobs(self, method: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The settings of a method in this model, from the fewest tokens to the most."""
        encoder, decoder = self.plain.make_encoder(), self.plain.make_decoder()
        rows, columns = encoder.grid
        probe = dict(method)
        if "budget" not in probe and not _stands_alone(probe):
            probe["budget"] = rows * columns  # Only so that there is a module to ask.
        if methods.find(method["name"]).where == "decoder":
            module = methods.build(**probe, parent=None)
            return list(module.knobs(decoder.num_layers, self.baseline.entering))
        return list(self.model(probe).make_compressor().knobs(encoder.depth, rows * columns))


def _stands_alone(method: Mapping[str, Any]) -> bool:
    """Whether a method can be built without a budget (fastv can, visionzip and tome cannot)."""
    if not methods.find(method["name"]).optional_budget:
        return False
    try:
        methods.build(**method, parent=None)
    except UserError:
        return False
    return True


def read_subject(args: argparse.Namespace, overrides: Sequence[str]) -> Subject:
    """The preset or config of a command line, with its overrides."""
    if (args.preset is None) == (args.config is None):
        raise UserError(
            "audit: give one of --preset and --config",
            allowed="--preset=" + ", ".join(presets.names()),
            fix="for example --preset=llava-1.5-7b, or --config=configs/quickstart.py",
        )
    facts: tuple[str, ...] = ()
    own = None
    if args.preset is not None:
        preset = presets.get(args.preset)
        config = ml_collections.ConfigDict({"model": preset["model"]})
        for override in overrides:
            configs.apply_override(config, override)
        text, images = preset["text_tokens"], preset["images"]
        facts = preset["notes"]
        if args.images is None:
            facts = (f"picture: {preset['picture']}", *facts)
        if config.model.compressor["name"] != "none":
            own = config.model.compressor.to_dict()
    else:
        config = configs.load(args.config, overrides)
        if "model" not in config:
            raise UserError(f"--config={args.config}: it has no section model", fix="add one")
        text, images = _read_data(config)
    sizes = {"text": text, "new": 1, "images": images}
    for name, least in (("text", 0), ("new", 1), ("images", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name}={value}", allowed=f"{least} or more")
        sizes[name] = sizes[name] if value is None else value
    name = args.preset or args.config
    kind = "preset" if args.preset else "config"
    counts = sizes["text"], sizes["new"], sizes["images"]
    return Subject(kind, name, config, *counts, own=own, facts=facts)


def _read_data(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Text tokens and images of a question; fills in the vocabulary, without building data."""
    from efficient_vlm.data import pipeline
    from efficient_vlm.data.config import DataConfig

    fields = configs.section(config, "data")
    # The data themselves are not looked at: a config may still wait for its path.
    data = DataConfig.from_mapping({**fields, "path": fields.get("path") or "unknown"})
    spec, vocabulary = pipeline.make_spec(data, data.tasks), data.vocab_size
    known = pipeline.preview(data)
    if known is not None:
        vocabulary = known[1].vocab_size
    if "vocab_size" not in config.model:
        with config.unlocked():
            config.model.vocab_size = vocabulary
    return spec.max_length, spec.max_images
