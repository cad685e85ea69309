"""Tables and lists of a model card, in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOT_RECORDED = "not recorded"
# What a row of results is about, in the order of the columns.
_ABOUT = ("benchmark", "task", "control", "compressor", "budget", "metric")
_MS = ("encode", "compress", "prefill", "decode_per_token")


def cell(value: Any) -> str:
    """Text that stays in its line and its cell."""
    text = " ".join(str(value).split())
    for mark in ("\\", "|", "<", "`", "*", "[", "#"):
        text = text.replace(mark, f"\\{mark}")
    return text


def code(value: Any) -> str:
    """Text between backticks, as it is but for line breaks, backticks and bars."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39)).replace('|', '/')}`"


def number(value: Any) -> str:
    """Whole numbers in groups of three digits, others with four digits that count."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return cell(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def fields(facts: Mapping[str, Any]) -> str:
    """One line for each fact."""
    lines = [f"- {cell(name)}: {_value(value)}" for name, value in facts.items()]
    return "\n".join(lines) or NOT_RECORDED


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{cell(key)} {_value(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        between = "; " if any(isinstance(each, Mapping) for each in value) else ", "
        return between.join(map(_value, value)) or "none"
    return number(value)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts that fit into cells."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def data(sources: Sequence[Any]) -> str:
    """Sources of data (`card.Data`), and what was left out of each."""
    if not sources:
        return NOT_RECORDED
    heads = ("source", "SHA-256", "licence", "rows", "used", "skipped")
    rows = []
    for each in sources:
        name = code(each.name) + (f" ({code(each.hub)})" if each.hub else "")
        counts = [NOT_RECORDED if n is None else number(n) for n in (each.rows, each.used)]
        skipped = "; ".join(f"{number(n)}: {cell(why)}" for why, n in each.skipped.items())
        digest = code(each.sha256) if each.sha256 else NOT_RECORDED
        licence = cell(each.license) if each.license else "none stated"
        rows.append((name, digest, licence, *counts, skipped or "none recorded"))
    return table(heads, rows)


def results(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of results.json: what each is about, a value with its 95 % interval, and of how many."""
    if not rows:
        return NOT_RECORDED
    about = [name for name in _ABOUT if any(name in row for row in rows)]
    named = all("accuracy" in row and "value" not in row for row in rows)
    heads = [*about, "accuracy" if named else "value", "95 % interval", "questions"]
    return table(heads, (_result(row, about) for row in rows))


def _result(row: Mapping[str, Any], about: Sequence[str]) -> list[str]:
    value = row.get("value", row.get("accuracy"))
    interval = row.get("ci95")
    between = NOT_RECORDED
    if isinstance(interval, list | tuple) and len(interval) == 2:
        between = " to ".join(map(number, interval))
    counted = row.get("n")
    cells = [cell(row[name]) if name in row else "" for name in about]
    shown = [NOT_RECORDED if each is None else number(each) for each in (value, counted)]
    return [*cells, shown[0], between, shown[1]]


def cost(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of costs: FLOPs to the first token and per token, bytes of the cache, milliseconds."""
    if not rows:
        return NOT_RECORDED
    heads = ["compressor", "budget", "visual tokens", "FLOPs to the first token"]
    heads += ["FLOPs per token", "KV bytes", *(f"ms {stage.replace('_', ' ')}" for stage in _MS)]
    return table(heads, map(_costs, rows))


def _costs(row: Mapping[str, Any]) -> list[str]:
    flops, ms = row.get("flops"), row.get("ms")
    if isinstance(flops, Mapping):
        flops = sum(flops.values())
    ms = ms if isinstance(ms, Mapping) else {}
    values = [row.get("compressor"), row.get("budget"), row.get("visual_tokens"), flops]
    values += [row.get("decode_flops"), row.get("kv_bytes"), *(ms.get(stage) for stage in _MS)]
    return [NOT_RECORDED if each is None else number(each) for each in values]
