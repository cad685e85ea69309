"""`efficient-vlm audit`: the ledger of a preset or a config, without weights, in seconds."""

import json
from collections.abc import Sequence
from typing import Any

from efficient_vlm.cli import ledger_table
from efficient_vlm.cli.methods import Chosen, Entry, make_entry
from efficient_vlm.cli.subject import Subject
from efficient_vlm.costs.match import Target


def audit(
    subject: Subject, chosen: Sequence[Chosen], target: Target | None, *, as_json: bool = False
) -> int:
    """`efficient-vlm audit`.

    Args:
      subject: what is audited.
      chosen: its methods, see `methods.read_methods`.
      target: what they are matched to, or None.
      as_json: print as JSON.
    """
    entries = [make_entry(subject, method, target) for method in chosen]
    if as_json:
        print(json.dumps(to_json(subject, entries), indent=1))
    else:
        ledger_table.show(subject, entries)
    return 0


def to_json(subject: Subject, entries: Sequence[Entry]) -> dict[str, Any]:
    """What --json prints: one method flat, several as a list under "methods"."""
    head = {subject.kind: subject.name, **subject.sizes}
    if subject.projector is not None:
        head["projector"] = subject.projector
    rows = []
    for entry in entries:
        row = entry.ledger.to_json()
        if entry.note is not None:
            row["note"] = entry.note
        if entry.match is not None:
            row["match"] = {
                "measure": entry.target.measure,
                "goal": entry.match.goal,
                "reached": entry.match.reached,
                "off": entry.match.off,
                "settings": dict(entry.match.settings),
            }
        rows.append(row)
    baseline = subject.baseline.to_json()
    head["baseline"] = {
        k: baseline[k] for k in ("compressor", "visual_tokens", "flops", "kv_bytes")
    }
    return {**head, **rows[0]} if len(rows) == 1 else {**head, "methods": rows}
