"""Sources of records: random access, and a fingerprint of the content."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from efficient_vlm.data import layouts, questions
from efficient_vlm.data.columns import Columns
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.llava_json import JsonSource, JsonTable
from efficient_vlm.data.mixture import MixtureSource, Part
from efficient_vlm.data.preference_rows import PairSource
from efficient_vlm.data.records import Conversation, Record
from efficient_vlm.data.row_source import MAX_TRAINING_TEXTS, Reading, RowSource
from efficient_vlm.data.scenes import SceneConfig
from efficient_vlm.data.tables import tfds
from efficient_vlm.data.tables.base import Table
from efficient_vlm.data.tables.parquet import ParquetTable
from efficient_vlm.data.tables.text import TextTable
from efficient_vlm.data.tables.webdataset import WebDatasetTable
from efficient_vlm.data.token_bench import store
from efficient_vlm.errors import UserError, short


class Source(Protocol):
    """Random access to records of one split.

    Attributes:
      tasks: names of the tasks.
      fingerprint: identifies the content; part of the pipeline's fingerprint.
      placed: whether pictures of some records stand behind some of their text.
    """

    tasks: tuple[str, ...]
    placed: bool
    fingerprint: dict[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises `BadRecord` when it cannot be used."""
        ...

    def texts(self) -> Iterator[str]:
        """Questions and answers, for training a tokenizer."""
        ...


class TokenBenchSource:
    """One split of a token_bench build.

    Args:
      folder: a build, see `token_bench.store`.
      split: "train" or "test".
      tasks: names, as in the config that it was built with.
    """

    def __init__(self, folder: Path, split: str, tasks: tuple[str, ...]):
        self.folder = folder
        self.tasks = tasks
        self.placed = False
        self._split = split
        self._data = store.data_source(folder, split)
        built = store.manifest(folder)
        self.fingerprint = {
            "dataset": f"{built['name']} {built['version']}",
            "content": built["splits"][split]["content_sha256"],
        }

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        row = self._data[index]
        texts = zip(row["prompts"], row["answers"], row["tasks"], strict=True)
        conversations = tuple(
            Conversation(((prompt.decode(), answer.decode()),), self.tasks[task])
            for prompt, answer, task in texts
        )
        meta = {
            "glyphs": row["glyphs"],
            "background": row["background"],
            "text": row["text"].decode(),
            "text_box": row["text_box"],
        }
        return Record(f"{self._split}-{index}", (row["image"],), conversations, meta)

    def texts(self) -> Iterator[str]:
        """Questions and answers, for a tokenizer that other sources share."""
        for row in itertools.islice(self._data, MAX_TRAINING_TEXTS):
            for prompt, answer in zip(row["prompts"], row["answers"], strict=True):
                yield prompt.decode()
                yield answer.decode()


def scene_config(config: DataConfig) -> SceneConfig:
    """The settings of token_bench in a `DataConfig`."""
    names = {f.name for f in dataclasses.fields(SceneConfig)}
    shared = {name: getattr(config, name) for name in names - {"seed", "canvas"}}
    canvas = config.canvas or min(config.size)
    return SceneConfig(seed=config.dataset_seed, canvas=canvas, **shared)


def build_token_bench(config: DataConfig, *, full: bool = False) -> Path:
    """Folder of the verified data of `config`, built if needed; see `store.ensure`."""
    root = Path(config.dir) if config.dir else store.default_root()
    sizes = {"train": config.train_images, "test": config.test_images}
    return store.ensure(root.expanduser(), scene_config(config), sizes, full=full)


def open_source(config: DataConfig, split: str) -> Source:
    """The records of `split`, "train" or "test", in any layout; see `DataConfig`."""
    own = split == "test" and config.eval_path
    if config.pairs:
        _check_pairs(config)
    if config.mixture and not own:
        parts = [
            Part(name, open_source(part, split), weight, epochs)
            for name, part, weight, epochs in config.parts()
        ]
        return MixtureSource(parts)
    if config.source == "token_bench" and not config.mixture:
        return TokenBenchSource(build_token_bench(config), split, config.tasks)
    layout = "auto" if config.mixture else config.source
    found = layouts.find(config.eval_path if own else config.path, layout)
    files, has_own_test = layouts.of_split(found, split)
    if found.layout == layouts.TFDS:
        table, has_own_test = _tfds(config, split)
    else:
        table = _table(found.layout, files, config.max_image_bytes)
    fraction = 0.0 if config.eval_path or has_own_test else config.test_fraction
    reading = Reading(
        split=split,
        test_fraction=fraction,
        pictures=config.images,
        max_bytes=config.max_image_bytes,
        held_out=config.held_out,
        separate_turns=config.separate_turns,
    )
    if config.pairs:
        return PairSource(table, reading)
    if isinstance(table, JsonTable):
        return JsonSource(table, reading, _columns(config, table) if _chosen(config) else None)
    return RowSource(table, reading, _columns(config, table))


def _check_pairs(config: DataConfig) -> None:
    for name in ("columns", "template", "separate_turns", "held_out"):
        if getattr(config, name):
            raise UserError(
                f"data.{name}: {short(getattr(config, name))} with data.pairs",
                allowed="rows of prompt (messages, question), chosen, rejected and images",
                fix=f"take data.{name} away",
            )
    if config.generated:
        raise UserError(
            "data.pairs: token_bench has no rejected answers",
            fix="--config.data.source=auto --config.data.path=my.jsonl",
        )


def layout_of(config: DataConfig) -> str:
    """What the fingerprint calls the source: its layout, whether it was named or seen."""
    if config.mixture:
        return "mixture"
    return layouts.find(config.path).layout if config.source == "auto" else config.source


def _chosen(config: DataConfig) -> bool:
    return bool(config.columns or config.template)


def _columns(config: DataConfig, table: Table) -> Columns:
    return Columns(table.names, config.columns, config.template, table.labels)


def _table(layout: str, files: tuple[Path, ...], max_bytes: int) -> Table:
    if layout == layouts.PARQUET:
        return ParquetTable(files)
    if layout == layouts.TAR:
        return WebDatasetTable(files, max_bytes)
    return TextTable(files[0]) if layout == layouts.CSV else JsonTable(files[0])


def _tfds(config: DataConfig, split: str) -> tuple[Table, bool]:
    """(the table of a split, whether there is a split for testing)."""
    own = split == "test" and config.eval_path
    folder = tfds.folder_of(config.eval_path if own else config.path, config.dir)
    splits = tfds.splits_of(folder)
    usual = (name for name in ("test", "validation", "val") if name in splits)
    test = config.eval_split or next(usual, "")
    name = test if split == "test" and test else config.train_split
    return tfds.TfdsTable(str(folder), name), bool(test)


def longest_words(config: DataConfig) -> int:
    """Number of words of the longest question with its answer in token_bench."""
    return questions.longest(scene_config(config))
