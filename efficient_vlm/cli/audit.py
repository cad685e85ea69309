"""`efficient-vlm audit`: the ledger of a preset or a config, without weights, in seconds."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from efficient_vlm.cli import ledger_table
from efficient_vlm.cli.methods import Entry, make_entry, read_methods
from efficient_vlm.cli.subject import Subject, read_subject
from efficient_vlm.costs.match import parse_target


def audit(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """`efficient-vlm audit`.

    Args:
      args: preset or config; compressor, its options ("layer=2", "fastv.layer=2"), text, new,
        images, match, json.
      overrides: "section.field=value" of the config.
    """
    subject = read_subject(args, overrides)
    chosen = read_methods(subject, args.compressor, args.options)
    target = parse_target(args.match) if args.match else None
    entries = [make_entry(subject, method, target) for method in chosen]
    if args.json:
        print(json.dumps(to_json(subject, entries), indent=1))
    else:
        ledger_table.show(subject, entries)
    return 0


def to_json(subject: Subject, entries: Sequence[Entry]) -> dict[str, Any]:
    """What --json prints: one method flat, several as a list under "methods"."""
    head = {subject.kind: subject.name, **subject.sizes}
    if subject.projector is not None:
        head["projector"] = subject.projector
    found = []
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
        found.append(row)
    baseline = subject.baseline.to_json()
    head["baseline"] = {
        k: baseline[k] for k in ("compressor", "visual_tokens", "flops", "kv_bytes")
    }
    return {**head, **found[0]} if len(found) == 1 else {**head, "methods": found}
