"""What `efficient-vlm audit` looks at: a preset or a config, and the model with each method."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from efficient_vlm.cli import config_file as configs
from efficient_vlm.cli.pictures import picture_options
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
        if methods.find(method["name"]).in_decoder:
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


def read_subject(
    *,
    preset: str | None = None,
    config: str | None = None,
    overrides: Sequence[str] = (),
    text: int | None = None,
    new: int = 1,
    images: int | None = None,
    picture: str | None = None,
    pictures: Sequence[str] = (),
) -> Subject:
    """What is audited.

    Args:
      preset, config: name of a published model, or a config file; one of the two.
      overrides: "section.field=value" of the config.
      text, new, images: of one question; None for those of the preset or config.
      picture: "HEIGHTxWIDTH" in pixels, that a preset sees; None for its default.
      pictures: "option=value" of the preset's picture processor.

    Raises:
      UserError: neither or both of preset and config, no such thing, a number out of range, or
        settings of pictures for a config.
    """
    if (preset is None) == (config is None):
        raise UserError(
            "audit: give one of --preset and --config",
            allowed="--preset=" + ", ".join(presets.visual_names()),
            fix="for example --preset=llava-1.5-7b, or --config=configs/quickstart.py",
        )
    for option, value, least in (("text", text, 0), ("new", new, 1), ("images", images, 1)):
        if value is not None and value < least:
            raise UserError(f"--{option}={value}", allowed=f"{least} or more")
    if preset is not None:
        options = picture_options(pictures)
        subject = _of_preset(preset, overrides, picture, options, given=images is not None)
    else:
        if picture or pictures:
            option = f"--pictures.{pictures[0]}" if pictures else f"--picture={picture}"
            raise UserError(
                f"{option}: for presets",
                fix="of a config: --config.data.image_size and --config.model.encoder.image_size",
            )
        subject = _of_config(config, overrides)
    sizes = {"new_tokens": new, "text_tokens": text, "images": images}
    return dataclasses.replace(subject, **{k: v for k, v in sizes.items() if v is not None})


def _of_preset(
    name: str,
    overrides: Sequence[str],
    picture: str | None,
    options: Mapping[str, Any],
    *,
    given: bool,
) -> Subject:
    """A published model and its picture; `given`: how many images was said, whatever picture."""
    if given and (picture or options):
        option = f"--picture={picture}" if picture else f"--pictures.{next(iter(options))}"
        raise UserError(f"--images: {option} says how many there are", fix="leave out one of them")
    size = presets.PICTURE if picture is None else _read_size(picture)
    preset = presets.get(name, picture=size, options=options)
    if preset["visual_tokens"] is None:
        raise UserError(
            f"--preset={name}: a language model without images, nothing to compress",
            allowed=", ".join(presets.visual_names()),
        )
    config = ml_collections.ConfigDict({"model": preset["model"]})
    for override in overrides:
        configs.apply_override(config, override)
    facts, pooled = preset["notes"], None
    if not given:
        facts, pooled = (f"picture: {preset['picture']}", *facts), preset["pooled"]
    counts = preset["text_tokens"], 1, preset["images"]
    return Subject("preset", name, config, *counts, pooled=pooled, facts=facts)


def _read_size(text: str) -> tuple[int, int]:
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) != 2 or not all(sides):
        raise UserError(
            f"--picture={text}", allowed="HEIGHTxWIDTH in pixels", fix="--picture=768x1024"
        )
    return sides[0], sides[1]


def _of_config(spec: str, overrides: Sequence[str]) -> Subject:
    config = configs.load(spec, overrides)
    if "model" not in config:
        raise UserError(f"--config={spec}: it has no section model", fix="add one")
    text, images = _read_data(config)
    return Subject("config", spec, config, text, 1, images)


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
