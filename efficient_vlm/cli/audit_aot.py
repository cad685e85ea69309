"""`efficient-vlm audit aot`: whether a plan fits a machine that is not here, and what bounds it."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.cli import aot_tables
from efficient_vlm.cli.aot_tables import Planned
from efficient_vlm.cli.methods import Chosen, make_entry
from efficient_vlm.cli.subject import Subject
from efficient_vlm.costs.compiled.chips import chip_of, devices_of, topology_of
from efficient_vlm.costs.compiled.compiled import Answer, compile_plan
from efficient_vlm.costs.compiled.options import batches_of, parse_mesh
from efficient_vlm.costs.compiled.programs import PROGRAMS, TASKS, Work
from efficient_vlm.costs.compiled.search import best, most_plans, search
from efficient_vlm.costs.match import Target
from efficient_vlm.errors import UserError, unknown
from efficient_vlm.terminal import Compiling

__all__ = ["Wanted", "audit_aot", "make_work", "read_plan"]

_SHARES = (1, 4, 9)  # A search without a budget tries one in so many tokens.


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a command line asks of a plan, checked.

    Attributes:
      task: of `programs.TASKS`.
      topology: a shape, such as "v5e:2x4" or "h100:8".
      devices: that it has.
      sizes: of the axes of the mesh.
      batches: pictures on all devices together; several are for a search.
      remat: of a training step.
      adapt: how the model is adapted in it; None for all parameters.
      search: whether meshes, batches and remat are tried.
    """

    task: str
    topology: str
    devices: int
    sizes: dict[str, int]
    batches: list[int]
    remat: str = "full"
    adapt: AdaptConfig | None = None
    search: bool = False


def read_plan(
    *,
    task: str | None,
    topology: str | None,
    mesh: str | None = None,
    batch: str | None = None,
    remat: str | None = None,
    adapt: str | None = None,
    rank: int | None = None,
    search: bool = False,
) -> Wanted:
    """The options of `audit aot` beside what is audited.

    Raises:
      UserError: one that is missing, unknown, or not for this search.
    """
    if task not in TASKS:
        raise unknown("--task", str(task), TASKS)
    if topology is None:
        raise UserError("--topology: missing", fix="--topology=v5e-8, or a shape: v5e:2x4")
    if search and mesh:
        raise UserError("--mesh: --search tries meshes", fix="leave out one of the two")
    if search and remat:
        raise UserError("--remat: --search tries all", fix="leave it out")
    chip_of(topology)
    topology = topology_of(topology)
    devices = len(devices_of(topology))
    batches = batches_of(batch, devices)
    if len(batches) > 1 and not search:
        raise UserError(f"--batch={batch}: several, without --search", fix="one number")
    usual = "fsdp" if task == "train" else "data"
    sizes = parse_mesh(mesh or f"{usual}:{devices}")
    adapting = None
    if adapt is not None or rank is not None:
        if task != "train":
            raise UserError(f"--adapt={adapt}: --task={task}", allowed="--task=train")
        adapting = AdaptConfig(name=adapt or "lora", **({} if rank is None else {"rank": rank}))
    return Wanted(task, topology, devices, sizes, batches, remat or "full", adapting, search)


def audit_aot(
    subject: Subject,
    chosen: Sequence[Chosen],
    target: Target | None,
    wanted: Wanted,
    *,
    quiet: bool = False,
    as_json: bool = False,
) -> int:
    """`efficient-vlm audit aot`: 0 whatever the answer is.

    Args:
      subject: what is audited.
      chosen: its methods. Several are shown beside each other, against none.
      target: what they are matched to, or None.
      wanted: from `read_plan`.
      quiet: say nothing of what is being compiled.
      as_json: print as JSON.
    """
    if wanted.search:
        return _search(subject, chosen, target, wanted, quiet=quiet, as_json=as_json)
    if len(chosen) > 1 and all(method.fields["name"] != "none" for method in chosen):
        chosen = [Chosen({"name": "none"}), *chosen]
    ledgers = [
        # Nothing has a budget to match.
        make_entry(subject, each, None if each.fields["name"] == "none" else target).ledger
        for each in chosen
    ]
    say = Compiling(len(ledgers) * len(PROGRAMS[wanted.task]), quiet=quiet)
    plans = []
    for ledger in ledgers:
        name = ledger.compressor["name"]
        given = (wanted.task, wanted.batches[0], wanted.remat, wanted.adapt)
        work = make_work(subject, ledger.compressor, *given)
        answer = _compile(work, wanted.topology, wanted.sizes, say, name)
        plans.append(Planned(dict(ledger.compressor), ledger.entering, answer))
    say.done()
    head = _head(subject, wanted, work)
    if as_json:
        print(json.dumps(_to_json(head, plans), indent=1))
    elif len(plans) == 1:
        aot_tables.show_one(head, plans[0])
    else:
        aot_tables.show_several(head, plans)
    return 0


def make_work(
    subject: Subject,
    method: Mapping[str, Any],
    task: str,
    batch: int,
    remat: str = "full",
    adapt: AdaptConfig | None = None,
) -> Work:
    """What a subject is to do with a compressor, see `programs.Work`."""
    counts = (subject.images, subject.text_tokens, subject.new_tokens)
    return Work(subject.model(method), task, batch, *counts, subject.pooled, remat, adapt)


def _compile(
    work: Work, topology: str, sizes: Mapping[str, int], say: Callable[[str], None], label: str
) -> Answer:
    several = len(PROGRAMS[work.task]) > 1

    def program(name: str) -> None:
        say(f"{label}, {name} for {topology}" if several else f"{label} for {topology}")

    return compile_plan(work, topology, sizes, program)


def _head(subject: Subject, wanted: Wanted, work: Work) -> dict[str, Any]:
    head = {subject.kind: subject.name, "task": wanted.task, "batch": work.batch}
    head |= {"images": work.images, "text": work.text, "new": work.new}
    if wanted.task == "train":
        head["remat"] = work.remat
    if work.adapt is not None:
        head["adapt"] = work.adapt.name
    return head


def _to_json(head: Mapping[str, Any], plans: Sequence[Planned]) -> dict[str, Any]:
    """One plan flat, several as a list under "methods" with what each needs beside none."""
    if len(plans) == 1:
        return {**head, "compressor": plans[0].method, **plans[0].answer.to_json()}
    none = aot_tables.none_of(plans)
    rows = [
        {
            "compressor": plan.method,
            "visual_tokens": plan.tokens,
            "chips": plan.chips(none),
            "of_none": plan.share(none),
            "chips_of_stages": plan.stage_chips(none),
            **plan.answer.to_json(),
        }
        for plan in plans
    ]
    return {**head, "methods": rows}


# ---- search --------------------------------------------------------------------------------------


def _search(
    subject: Subject,
    chosen: Sequence[Chosen],
    target: Target | None,
    wanted: Wanted,
    *,
    quiet: bool,
    as_json: bool,
) -> int:
    works = _works(subject, chosen, target, wanted)
    each = len(PROGRAMS[wanted.task])
    most = each * most_plans([work for _, work in works], wanted.batches, wanted.devices)
    say = Compiling(most, at_most=True, quiet=quiet)

    def compile_one(work: Work, sizes: Mapping[str, int]) -> Answer:
        mesh = aot_tables.mesh_text(sizes)
        remat = f", remat {work.remat}" if work.task == "train" else ""
        label = f"{work.model.compressor['name']}, {mesh}, batch {work.batch}{remat}"
        return _compile(work, wanted.topology, sizes, say, label)

    tried = []
    for one in search(works, wanted.batches, wanted.devices, compile_one):
        tried.append(one)
        if not as_json:
            print(aot_tables.line(one), flush=True)
    say.done()
    best_plans = best(tried)
    if as_json:
        rows = [aot_tables.row_of(one, best_plans) for one in tried]
        head = {subject.kind: subject.name, "task": wanted.task, "topology": wanted.topology}
        print(json.dumps({**head, "tried": rows}, indent=1))
    else:
        aot_tables.show_best(tried, best_plans, wanted.topology)
    return 0


def _works(
    subject: Subject, chosen: Sequence[Chosen], target: Target | None, wanted: Wanted
) -> list[tuple[str, Work]]:
    """(label, what is to be done) of each method: as it is set, or at a few shares of tokens."""
    works = []
    for method in chosen:
        if target is not None:
            targets = [target]
        elif "budget" in method.fields or method.fields["name"] == "none" or method.typed:
            targets = [None]
        else:
            tokens = subject.baseline.entering
            targets = [Target("mean_processed", tokens / share) for share in _SHARES]
        for each in targets:
            ledger = make_entry(subject, method, each).ledger
            label = f"{ledger.compressor['name']} {round(ledger.entering)}"
            given = (wanted.task, wanted.batches[0], wanted.remat, wanted.adapt)
            work = make_work(subject, ledger.compressor, *given)
            works.append((label, work))
    return works
