"""The methods that a command line names, with their options, and the ledger of each."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from efficient_vlm.cli import config_file as configs
from efficient_vlm.cli.subject import Subject
from efficient_vlm.compressors import methods
from efficient_vlm.costs.dry_run import dry_run
from efficient_vlm.costs.ledger import Ledger
from efficient_vlm.costs.match import Match, Target, solve
from efficient_vlm.errors import UserError, closest, short
from efficient_vlm.train.workdir_config import read_run_config

_OPTION, _FIELD = "--compressor.", "--config.model.compressor."
_COUNTS = ("budget", "keep", "counts")  # Options that may hold a number of tokens.


@dataclasses.dataclass(frozen=True)
class Entry:
    """One audited method: its ledger and, with --match, what was asked for and reached.

    Attributes:
      note: what a reader should know about its options, or None.
    """

    ledger: Ledger
    target: Target | None = None
    match: Match | None = None
    note: str | None = None


@dataclasses.dataclass
class Chosen:
    """A method with its options, and which of them the command line set."""

    fields: dict[str, Any]
    typed: set[str] = dataclasses.field(default_factory=set)

    def has(self, option: str) -> bool:
        return option in ("budget", *methods.options(self.fields["name"]))

    def shares(self, option: str) -> bool:
        """Whether an option that is given for several methods is one of this one's; `none` keeps
        all tokens whatever the budget of the others."""
        return self.has(option) and self.fields["name"] != "none"

    def set(self, text: str) -> None:
        """Sets one "option=value", read as the type of the method's field."""
        name, (field, _, value) = self.fields["name"], text.partition("=")
        if field == "name":
            raise UserError(
                f"{_OPTION}name={value}: the name of a method is not one of its options",
                fix=f"--compressor={value}",
            )
        if not self.has(field):
            known = ("budget", *methods.options(name))
            guess = closest(field, known)
            raise UserError(
                f"{_OPTION}{field}: {name} has no such option",
                allowed=", ".join(known),
                fix=f"did you mean {_OPTION}{guess}?" if guess else None,
            )
        config = ml_collections.ConfigDict({"model": {"compressor": self.fields}})
        try:
            configs.apply_override(config, f"model.compressor.{text}")
        except UserError as error:
            problem, *more = str(error).replace(_FIELD, _OPTION).splitlines()
            parts = dict(line.strip().split(": ", 1) for line in more)
            if "Sequence[" in parts.get("allowed", ""):
                problem = f"{_OPTION}{field}: {short(value)} is not a list of numbers"
                parts["allowed"] = "numbers with commas, such as 8,16"
            raise UserError(problem, **parts) from None
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
    words = []
    for value in names or ():
        named = [word.strip() for word in value.split(",") if word.strip()]
        if not named:
            raise UserError(
                f"--compressor={value}: no name",
                allowed="names of methods, with commas between them",
                fix="for example --compressor=fastv,divprune; or leave --compressor out",
            )
        words += named
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
            and (len(chosen) == 1 or one or method.shares(field))
        ]
        if not takers:
            raise UserError(
                f"{_OPTION}{field}: none of {', '.join(known)} has this option",
                allowed=", ".join(sorted({o for n in known for o in methods.options(n)})),
            )
        for method in takers:
            method.set(text)
    return chosen


def method_fields(names: Sequence[str], options: Sequence[str]) -> list[dict[str, Any]]:
    """{"name", options} of each method of --compressor and --compressor.OPTION=VALUE, for no model.

    Raises:
      UserError: an unknown name or option, or a value of another type.
    """
    config = ml_collections.ConfigDict({"model": {}})
    nothing = Subject("config", "", config, text_tokens=0, new_tokens=1, images=1)
    return [chosen.fields for chosen in read_methods(nothing, names, options)]


def import_named(names: Sequence[str], workdir: str | None) -> None:
    """Imports the methods of a run's own where one of these names, or "all", may mean one of them.

    Raises:
      UserError: no such run, or what to pass for its methods.
    """
    words = {word.strip() for value in names for word in value.split(",")}
    if workdir is not None and not words <= set(methods.METHODS):
        read_run_config(Path(workdir))


def one_method(subject: Subject, chosen: Sequence[Chosen], target: Target | None) -> dict[str, Any]:
    """The fields of the one method chosen, with its budget; UserError for several."""
    if len(chosen) > 1:
        names = ",".join(method.fields["name"] for method in chosen)
        raise UserError(f"--compressor={names}: several", fix="name one")
    return make_entry(subject, chosen[0], target).ledger.compressor


def make_entry(subject: Subject, method: Chosen, target: Target | None) -> Entry:
    """The ledger of a method; with a target, at the setting that comes nearest to it.

    Raises:
      UserError: options that do not go together, or that the model itself refuses.
    """
    fields, name = method.fields, method.fields["name"]
    if target is None:
        if "budget" not in fields and not methods.find(name).optional_budget:
            raise UserError(
                f"{_OPTION}budget: missing, and {name} has no default",
                allowed="visual tokens to keep of each image (a method inside the decoder counts "
                "those of all images together)",
                fix=f"{_OPTION}budget=64, or --match=mean_processed:128",
            )
        return _finish(subject, Entry(subject.ledger(fields)))
    knobs = subject.knobs(fields)
    tuned = {option for settings in knobs[:1] for option in settings}
    if clash := sorted(method.typed & (tuned | {"budget"})):
        raise UserError(
            f"{_OPTION}{clash[0]}: --match sets what {name} keeps",
            fix=f"leave out {_OPTION}{clash[0]}, or --match",
        )
    fixed = {k: v for k, v in fields.items() if k != "budget"}
    solution = solve(
        lambda settings: subject.ledger({**fixed, **settings}), knobs, target, subject.baseline
    )
    return _finish(subject, Entry(solution.ledger, target, solution))


def _finish(subject: Subject, entry: Entry) -> Entry:
    """The entry with its note, if the model would run as it stands.

    The ledger adds up fields; without this, it has numbers for what the model refuses.
    """
    fields = entry.ledger.compressor
    dry_run(subject.model(fields), subject.images, subject.pooled)
    return dataclasses.replace(entry, note=_count_note(fields, subject.images))


def _count_note(fields: Mapping[str, Any], images: int) -> str | None:
    """What a count of tokens means with several images, for a method inside the decoder."""
    name = fields["name"]
    if images == 1 or not methods.find(name).in_decoder:
        return None
    for option in _COUNTS:
        given = fields.get(option)
        values = given if isinstance(given, list | tuple) else (given,)
        if any(isinstance(v, int) and not isinstance(v, bool) and v for v in values):
            shown = ",".join(map(str, values))
            return (
                f"{name}: {option}={shown} counts the tokens of all {images} images together; "
                "budgets of methods in front of the decoder are for each image"
            )
    return None
