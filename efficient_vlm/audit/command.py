"""`efficient-vlm audit`: the ledger of a preset or a config, without weights, in seconds."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from efficient_vlm import config as configs
from efficient_vlm.audit import flops, ledger
from efficient_vlm.audit.ledger import Ledger
from efficient_vlm.audit.match import Match, Target, parse_target, solve
from efficient_vlm.compressors import methods
from efficient_vlm.errors import UserError
from efficient_vlm.models import presets
from efficient_vlm.models.build import construct
from efficient_vlm.models.vlm import VisionLanguageModel

_OPTION, _FIELD = "--compressor.", "--config.model.compressor."


@dataclasses.dataclass(frozen=True)
class Entry:
    """One audited method: its ledger and, with --match, what was asked for and reached."""

    ledger: Ledger
    target: Target | None = None
    match: Match | None = None


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
            fields["decoder"] = {**fields["decoder"], "compressor": dict(method)}
        else:
            fields["compressor"] = dict(method)
            if self.own is not None and method["name"] != self.own["name"]:
                fields["connector"] = {**fields["connector"], "identity": False}
        return construct(VisionLanguageModel, fields, "model")

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


def audit(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`efficient-vlm audit`.

    Args:
      args: preset or config; compressor, its options ("layer=2", "fastv.layer=2"), text, new,
        images, match, json.
      overrides: "section.field=value" of the config.
    """
    subject = read_subject(args, overrides)
    chosen = read_methods(subject, args.compressor, args.options)
    if subject.own and all(m.fields["name"] in ("none", subject.own["name"]) for m in chosen):
        # To compare a projector with itself would tell nothing.
        subject = dataclasses.replace(subject, bare=True)
    target = parse_target(args.match) if args.match else None
    entries = [make_entry(subject, method, target) for method in chosen]
    if args.json:
        print(json.dumps(to_json(subject, entries), indent=1))
    else:
        from efficient_vlm.audit import ledger_table

        ledger_table.show(subject, entries)
    return 0


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


@dataclasses.dataclass
class Chosen:
    """A method with its options, and which of them the command line set."""

    fields: dict[str, Any]
    typed: set[str] = dataclasses.field(default_factory=set)

    def has(self, option: str) -> bool:
        return option in ("budget", *methods.options(self.fields["name"]))

    def set(self, text: str) -> None:
        """Sets one "option=value", read as the type of the method's field."""
        config = ml_collections.ConfigDict({"model": {"compressor": self.fields}})
        try:
            configs.apply_override(config, f"model.compressor.{text}")
        except UserError as error:
            problem, *more = str(error).replace(_FIELD, _OPTION).splitlines()
            parts = dict(line.strip().split(": ", 1) for line in more)
            raise UserError(problem, **parts) from None
        field = text.partition("=")[0]
        self.fields[field] = config.model.compressor.to_dict()[field]
        self.typed.add(field)


def read_methods(
    subject: Subject, names: Sequence[str] | None, options: Sequence[str]
) -> list[Chosen]:
    """The methods of a command line, with their options.

    Args:
      subject: whose own method is meant where no name is given.
      names: values of --compressor, each one name or several with commas.
      options: "layer=2" for every method that has this option, or "fastv.layer=2" for one.

    Raises:
      UserError: an unknown name or option, or a value of another type.
    """
    words = [word.strip() for value in names or () for word in value.split(",") if word.strip()]
    given = subject.config.model.get("compressor")
    given = given.to_dict() if given else {"name": "none"}
    known = [methods.find(name).label for name in dict.fromkeys(words or [given["name"]])]
    chosen = [Chosen(dict(given) if n == given["name"] else {"name": n}) for n in known]
    for option in options:
        name, _, rest = option.partition(".")
        one = name in methods.METHODS and bool(rest)
        if one and name not in known:
            raise UserError(
                f"{_OPTION}{option}: {name} is not audited",
                fix=f"add it: --compressor={','.join([*known, name])}",
            )
        text = rest if one else option
        field = text.partition("=")[0]
        takers = [
            method
            for method in chosen
            if (not one or method.fields["name"] == name)
            and (len(chosen) == 1 or one or method.has(field))
        ]
        if not takers:
            raise UserError(
                f"{_OPTION}{field}: none of {', '.join(known)} has this option",
                allowed=", ".join(sorted({o for n in known for o in methods.options(n)})),
            )
        for method in takers:
            method.set(text)
    return chosen


def make_entry(subject: Subject, method: Chosen, target: Target | None) -> Entry:
    """The ledger of a method; with a target, at the setting that comes nearest to it."""
    fields, name = method.fields, method.fields["name"]
    if target is None:
        if "budget" not in fields and not methods.find(name).optional_budget:
            raise UserError(
                f"{_OPTION}budget: missing, and {name} has no default",
                allowed="visual tokens to keep, for each image",
                fix=f"{_OPTION}budget=64, or --match=mean_processed:128",
            )
        return Entry(subject.ledger(fields))
    knobs = subject.knobs(fields)
    tuned = {option for settings in knobs[:1] for option in settings}
    if clash := sorted(method.typed & (tuned | {"budget"})):
        raise UserError(
            f"{_OPTION}{clash[0]}: --match sets what {name} keeps",
            fix=f"leave out {_OPTION}{clash[0]}, or --match",
        )
    fixed = {k: v for k, v in fields.items() if k != "budget"}
    found = solve(
        lambda settings: subject.ledger({**fixed, **settings}), knobs, target, subject.baseline
    )
    return Entry(found.ledger, target, found)


def to_json(subject: Subject, entries: Sequence[Entry]) -> dict[str, Any]:
    """What --json prints: one method flat, several as a list under "methods"."""
    head = {subject.kind: subject.name, **subject.sizes}
    if subject.own is not None:
        head["own_compressor"] = dict(subject.own)
    found = []
    for entry in entries:
        row = entry.ledger.to_json()
        if entry.match is not None:
            row["match"] = {
                "measure": entry.target.measure,
                "goal": entry.match.goal,
                "reached": entry.match.reached,
                "settings": dict(entry.match.settings),
            }
        found.append(row)
    baseline = subject.baseline.to_json()
    head["baseline"] = {
        k: baseline[k] for k in ("compressor", "visual_tokens", "flops", "kv_bytes")
    }
    return {**head, **found[0]} if len(found) == 1 else {**head, "methods": found}
