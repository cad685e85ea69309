"""What `efficient-vlm audit` looks at: a preset or a config, and the model with each method."""

import argparse
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from efficient_vlm.cli import config_file as configs
from efficient_vlm.compressors import methods
from efficient_vlm.costs import flops, ledger
from efficient_vlm.costs.ledger import Ledger
from efficient_vlm.data import pipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.errors import UserError
from efficient_vlm.families import presets
from efficient_vlm.fields import construct, section
from efficient_vlm.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is audited, beside the method.

    Attributes:
      kind, name: "preset" or "config", and which.
      config: with the section "model".
      text_tokens, new_tokens, images: of one question about one picture.
      pooled: tokens of the picture where they read patches across crops, see `flops.model_cost`.
      facts: lines about the preset, for the reader.
    """

    kind: str
    name: str
    config: ml_collections.ConfigDict
    text_tokens: int
    new_tokens: int
    images: int
    pooled: int | None = None
    facts: tuple[str, ...] = ()

    def model(self, method: Mapping[str, Any] | None = None) -> VisionLanguageModel:
        """The model with a method, or as it is configured.

        A model's own projector is part of it: methods get the tokens that it makes.
        """
        fields = section(self.config, "model")
        if method is not None:
            fields["compressor"] = dict(method)
        if self.pooled:
            fields["compressor"] = {"grid": (1, self.pooled), **fields["compressor"]}
        return construct(VisionLanguageModel, fields, "model")

    @property
    def projector(self) -> dict[str, Any] | None:
        """The model's own projector, name and fields, or None."""
        return section(self.config, "model").get("projector")

    @property
    def sizes(self) -> dict[str, int]:
        return dict(text_tokens=self.text_tokens, new_tokens=self.new_tokens, images=self.images)

    @functools.cached_property
    def plain(self) -> VisionLanguageModel:
        """What methods are compared with: the model without any compression."""
        return ledger.without(self.model())

    @functools.cached_property
    def _plain_cost(self) -> flops.Cost:
        return flops.model_cost(self.plain, **self.sizes, pooled=self.pooled)

    @functools.cached_property
    def baseline(self) -> Ledger:
        """The ledger of `plain`."""
        return self._ledger(self.plain)

    def ledger(self, method: Mapping[str, Any]) -> Ledger:
        """The ledger of the model with a method."""
        return dataclasses.replace(self._ledger(self.model(method)), compressor=dict(method))

    def _ledger(self, model: VisionLanguageModel) -> Ledger:
        given = dict(self.sizes, pooled=self.pooled, baseline=self._plain_cost)
        return ledger.build(model, **given)

    def knobs(self, method: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The settings of a method in this model, from the fewest tokens to the most."""
        encoder, decoder = self.plain.make_encoder(), self.plain.make_decoder()
        rows, columns = (1, self.pooled) if self.pooled else self.plain.slot_grid
        probe = dict(method)
        if "budget" not in probe and not _stands_alone(probe):
            probe["budget"] = rows * columns  # Only so that there is a module to ask.
        if methods.find(method["name"]).where == "decoder":
            module = methods.build(**probe, parent=None)
            return list(module.knobs(decoder.num_layers, self.baseline.entering))
        return list(self.model(probe).make_compressor().knobs(encoder.layers_run, rows * columns))


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
            allowed="--preset=" + ", ".join(presets.visual_names()),
            fix="for example --preset=llava-1.5-7b, or --config=configs/quickstart.py",
        )
    facts: tuple[str, ...] = ()
    pooled = None
    if args.preset is not None:
        preset = presets.get(args.preset)
        if preset["visual_tokens"] is None:
            raise UserError(
                f"--preset={args.preset}: a language model without images, nothing to compress",
                allowed=", ".join(presets.visual_names()),
            )
        config = ml_collections.ConfigDict({"model": preset["model"]})
        for override in overrides:
            configs.apply_override(config, override)
        text, images = preset["text_tokens"], preset["images"]
        facts = preset["notes"]
        if args.images is None:
            facts, pooled = (f"picture: {preset['picture']}", *facts), preset["pooled"]
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
    return Subject(kind, name, config, *counts, pooled=pooled, facts=facts)


def _read_data(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Text tokens and images of a question; fills in the vocabulary, without building data."""
    fields = section(config, "data")
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
