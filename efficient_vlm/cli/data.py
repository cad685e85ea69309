"""`efficient-vlm data build` and `efficient-vlm data inspect`, without the parsing of arguments."""

import collections
from collections.abc import Sequence
from pathlib import Path

from efficient_vlm.cli import config_file
from efficient_vlm.data.config import DataConfig, validate
from efficient_vlm.data.inspect import contact_sheet
from efficient_vlm.data.mixture import MixtureSource
from efficient_vlm.data.pipeline import make_spec
from efficient_vlm.data.records import REASONS
from efficient_vlm.data.sources import build_token_bench, layout_of, open_source
from efficient_vlm.data.token_bench import store
from efficient_vlm.errors import UserError
from efficient_vlm.fields import section
from efficient_vlm.processing.decode_image import BadRecord


def read_data(config: str, overrides: Sequence[str] = ()) -> DataConfig:
    """The section data of "FILE.py" or "FILE.py:ARG" with "section.field=value" of the config."""
    return DataConfig.from_mapping(section(config_file.load(config, overrides), "data"))


def build(config: DataConfig, *, full: bool = True) -> Path:
    """Builds (when needed) and verifies the data of `config`, and prints what there is.

    Args:
      config: see `DataConfig`.
      full: compare the SHA-256 of every file, not only its size.

    Returns:
      The manifest of the build; for your own images their path, as nothing is built.

    Raises:
      UserError: bad config or damaged data.
    """
    validate(config)
    if not config.generated:
        _print_counts("train", open_source(config, "train"))
        print(f"{layout_of(config)} is read as it is: nothing to build")
        return Path(config.path)
    folder = build_token_bench(config, full=full)
    manifest = store.manifest(folder)
    tasks = list(config.tasks)
    rows = [
        [split, part["images"], *(part["questions"][task] for task in tasks)]
        for split, part in manifest["splits"].items()
    ]
    _print_table("token_bench", ["split", "images", *tasks], rows)
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(f"{size / 2**20:.1f} MiB, {'SHA-256 of every file' if full else 'sizes'} verified")
    print(f"source: {manifest['source']}")
    print(f"licence: {manifest['licence']}")
    print(f"manifest: {folder / store.MANIFEST}")
    return folder / store.MANIFEST


def inspect(
    config: DataConfig,
    *,
    split: str = "train",
    output: str | Path = "contact_sheet.png",
    images: int = 12,
    seed: int = 0,
    scan: int = 1000,
) -> Path:
    """Prints what the first `scan` samples hold and writes a contact sheet.

    Args:
      config: see `DataConfig`.
      split: "train" or "test".
      output: PNG to write.
      images: samples on the sheet.
      seed: of their draw.
      scan: samples to go through for the counts; 0 means all.

    Returns:
      The path of the sheet.

    Raises:
      UserError: bad config, no data, no usable sample.
    """
    validate(config)
    source = open_source(config, split)
    _print_counts(split, source, scan)
    if isinstance(source, MixtureSource):
        _print_parts(source)
    title = f"{layout_of(config)}, {split}: {len(source)} samples, tasks {', '.join(source.tasks)}"
    spec = make_spec(config, source.tasks, source.placed)
    shown = contact_sheet(source, spec, output, title=title, images=images, seed=seed)
    if not shown:
        raise UserError(f"data: no {split} sample can be shown", fix="see the reasons above")
    print(f"contact sheet: {output}")
    return Path(output)


def _print_counts(split: str, source, scan: int = 0) -> None:
    """Conversations per task, most frequent answers, and unusable samples by reason."""
    number = min(scan, len(source)) if scan else len(source)
    answers = collections.defaultdict(collections.Counter)
    bad = collections.Counter()
    for index in range(number):
        try:
            record = source[index]
        except BadRecord as error:
            bad[error.reason] += 1
            continue
        for conversation in record.conversations:
            answers[conversation.task][conversation.answer[:40]] += 1
    rows = [
        [task, sum(counter.values()), len(counter), _most(counter)]
        for task, counter in sorted(answers.items())
    ]
    columns = ["task", "conversations", "different answers", "most frequent"]
    _print_table(f"{split}: {number} of {len(source)} samples", columns, rows)
    for reason, count in sorted(bad.items()):
        print(f"unusable: {count} {reason} ({REASONS[reason]})")


def _print_parts(source: MixtureSource) -> None:
    """What each source gives to as many examples as there are samples."""
    rows = [
        [part["source"], part["samples"], part["drawn"], f"{part['epochs']:g}"]
        for part in source.summary(len(source))
    ]
    columns = ["source", "samples", "drawn", "epochs"]
    _print_table(f"{len(source)} examples of the mixture", columns, rows)


def _most(counter: collections.Counter) -> str:
    total = sum(counter.values())
    return ", ".join(f"{a!r} {n / total:.0%}" for a, n in counter.most_common(3))


def _print_table(title: str, columns: list[str], rows: list[list]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and column != columns[-1] else "left")
    for row in rows:
        # Text, not str: answers are no markup.
        table.add_row(*(Text(str(value)) for value in row))
    Console().print(table)
