"""The fields of `config.data`; importing this costs nothing."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_vlm import checks
from efficient_vlm.errors import UserError, short

SOURCES = ("token_bench", "auto", "llava_json", "parquet", "csv", "webdataset", "tfds")
RESIZES = ("stretch", "letterbox")


# Fields of a source, which the parts of a mixture may have for themselves.
PART_FIELDS = (
    *("source", "path", "images", "eval_path", "test_fraction", "columns", "template", "held_out"),
    *("separate_turns", "train_split", "eval_split", "dir", "tasks", "dataset_seed"),
    *("train_images", "test_images"),
)
_OF_PARTS = ("weight", "epochs", "name")


class _Map(dict):
    """A mapping that can be hashed, as a frozen config must be; nothing changes it."""

    def __hash__(self) -> int:
        return hash(tuple(sorted((key, str(value)) for key, value in self.items())))


NOTHING = _Map()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data, their order and their form. Zero means "automatic" where stated.

    Attributes:
      source: "token_bench" (generated), or your own images: "auto" sees the layout of `path` by
        its name and beginning; "llava_json" (JSON or JSONL, conversations or messages), "parquet",
        "csv", "webdataset" and "tfds" name it.
      path: of your own images: a file; a folder or a pattern of Parquet or tar shards; the name or
        the folder of a data set of TensorFlow Datasets that lies in `dir`.
      images: folder that image paths are relative to, and which they may not leave; empty: that of
        the file.
      eval_path: another such path for evaluation; without it, shards or a split for testing, else
        `test_fraction`.
      test_fraction: share of the images held out (at least one).
      columns: of a table: which column (field, ending of a tar's members) is what, such as
        "image=file,question=q,answer=a"; also messages, system, task, id. Empty: by their names.
        Inside others they are "outer/inner".
      template: a question for every row, with {column} for the text of a column, such as "What is
        shown?"; empty: the question column.
      held_out: answers (classes) that training never sees; evaluation then has the tasks seen and
        held_out.
      separate_turns: each question is a conversation of its own, where pictures stand in front;
        otherwise those of a row are turns of one.
      pairs: rows have a chosen and a rejected answer (`preference_rows`); evaluation asks for the
        chosen one.
      train_split, eval_split: tfds: names of splits; empty: test, else validation, if there is one.
      mixture: several sources, a list of {"path": ..., "weight": 0.7, "epochs": 2, "name": ...}
        with any fields of this section that say what a source is. Weights are shares of the
        examples; without them, sources count by their size times `epochs`. A source is read
        `epochs` times at most before all begin again.
      tokenizer: a tokenizer.json; empty: words for token_bench, a BPE trained on the texts for
        your own images.
      vocab_size: of this BPE.
      dir: folder of generated data; empty: $EFFICIENT_VLM_DATA or ~/.cache/efficient_vlm/data.
        tfds: folder of prepared data sets; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      license: of the data, for model cards; empty: none is stated.
      seed: of the order and of the questions drawn; runs that differ in `train.seed` alone share
        both. `--config.seed=N` sets both seeds.
      image_size: (height, width) or one number, in pixels, as the model sees it.
      resize: "stretch" or "letterbox".
      batch_size: images per step, over all processes.
      questions_per_image: Q; 0: 8 for token_bench, else 1.
      max_length: L, tokens per conversation with its answer; 0: as many as token_bench needs (8
        or more), else 256. Longer samples are skipped, never cut.
      max_images: M, images per sample.
      pack: published models: several samples share a row where that changes nothing.
      pack_tokens: published models: token places of such a row, about.
      max_pixels: largest image (width x height) that is decoded.
      max_image_bytes: largest image file.
      max_skip_fraction: the run stops when clearly more than this share of samples is unusable.
      allow_data_change: resume although the data differ from those of the checkpoint.
      num_threads: threads that prepare batches; 0 prepares them in the calling thread.
      prefetch: batches prepared ahead.
      cache_mb: memory for decoded samples, in MiB; later epochs then cost almost nothing.
      tasks: token_bench: names of `scenes.TASKS` (needle, count, point, global, ...).
      dataset_seed: of the generated images, apart from `seed`: several runs share one build.
      train_images, test_images: size of the generated splits.
      canvas: token_bench: side of a scene in pixels; 0: image_size.
      grid: token_bench: cells per side; 0: as many as fit glyphs with their jitter.
      glyph: token_bench: side of a digit in pixels.
      jitter: token_bench: pixels by which a digit is moved inside its cell, at most.
      clutter: token_bench: white digits that no question asks about.
      max_count: token_bench: colours that occur several times do so at most this often.
      dense_length: token_bench: characters of the text to read.
      dense_px: token_bench: smallest and largest font size in pixels.
      noise: token_bench: standard deviation of the pixel noise (1 is the full range).
      tint: token_bench: strength of the background colour.
      question_pool: token_bench: questions stored per image.
    """

    source: str = "token_bench"
    path: str = ""
    images: str = ""
    eval_path: str = ""
    test_fraction: float = 0.05
    columns: Mapping[str, str] | str = NOTHING
    template: str = ""
    held_out: tuple[str, ...] = ()
    separate_turns: bool = False
    pairs: bool = False
    train_split: str = "train"
    eval_split: str = ""
    mixture: tuple[Mapping[str, Any], ...] = ()
    tokenizer: str = ""
    vocab_size: int = 4096
    dir: str = ""
    license: str = ""
    seed: int = 0
    image_size: int | tuple[int, int] = 64
    resize: str = "stretch"
    batch_size: int = 32
    questions_per_image: int = 0
    max_length: int = 0
    max_images: int = 1
    pack: bool = True
    pack_tokens: int = 2048
    max_pixels: int = 50_000_000
    max_image_bytes: int = 64 * 2**20
    max_skip_fraction: float = 0.01
    allow_data_change: bool = False
    num_threads: int = 2
    prefetch: int = 8
    cache_mb: int = 512
    tasks: tuple[str, ...] = ("needle", "count", "point", "global")
    dataset_seed: int = 0
    train_images: int = 16_000
    test_images: int = 1_000
    canvas: int = 0
    grid: int = 8
    glyph: int = 8
    jitter: int = 0
    clutter: int = 0
    max_count: int = 9
    dense_length: int = 4
    dense_px: tuple[int, int] = (8, 12)
    noise: float = 0.03
    tint: float = 0.15
    question_pool: int = 16

    def __post_init__(self):
        # Config files and command lines give lists; a frozen, hashable config needs tuples.
        for name in ("tasks", "dense_px", "image_size", "held_out", "mixture"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in ("tasks", "held_out"):
            value = getattr(self, name)
            if isinstance(value, str):
                names = tuple(each.strip() for each in value.split(",") if each.strip())
                object.__setattr__(self, name, names)
        object.__setattr__(self, "columns", _pairs(self.columns))
        if isinstance(self.mixture, tuple):
            object.__setattr__(self, "mixture", tuple(map(_mapping, self.mixture)))

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any]) -> "DataConfig":
        """Checks names and values; see `validate`."""
        checks.known_fields("data", fields, (f.name for f in dataclasses.fields(cls)))
        config = cls(**fields)
        validate(config)
        return config

    @property
    def generated(self) -> bool:
        """Whether all data are token_bench's: their words and lengths are known beforehand."""
        return self.source == "token_bench" and not self.mixture

    def parts(self) -> list[tuple[str, "DataConfig", float | None, float | None]]:
        """(name, config, weight, epochs) of each source of the mixture."""
        found = []
        for part in self.mixture:
            fields = {"source": "auto", **part}
            weight, epochs, name = (fields.pop(key, None) for key in _OF_PARTS)
            own = dataclasses.replace(self, **{"mixture": (), "path": ""} | fields)
            found.append((name or own.path or own.source, own, weight, epochs))
        return found

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        if isinstance(self.image_size, tuple):
            return self.image_size
        return (self.image_size, self.image_size)


# Limits of number fields; a field that is in neither table takes any number of its type.
_LOWEST = {
    **dict.fromkeys(("batch_size", "max_images", "max_pixels", "max_image_bytes", "prefetch"), 1),
    "pack_tokens": 32,
    **dict.fromkeys(("seed", "dataset_seed", "num_threads", "cache_mb"), 0),
    **dict.fromkeys(("questions_per_image", "max_length", "canvas"), 0),
}
_FRACTIONS = ("max_skip_fraction", "test_fraction")


def validate(config: DataConfig) -> None:
    """Raises UserError for the first field with a wrong type or a value out of range."""
    for field in dataclasses.fields(DataConfig):
        _check_field(field.name, getattr(config, field.name), field.default)
    checks.one_of("data.source", config.source, SOURCES)
    checks.one_of("data.resize", config.resize, RESIZES)
    if len(config.size) != 2 or not all(
        isinstance(side, int) and 1 <= side <= 4096 for side in config.size
    ):
        raise UserError(
            f"data.image_size: {short(config.image_size)}",
            allowed="a number or (height, width), 1 to 4096",
            fix="data.image_size=64",
        )
    if config.mixture:
        _check_mixture(config)
    elif config.source != "token_bench" and not config.path:
        raise UserError(
            "data.path: empty",
            allowed="a JSON, JSONL, Parquet, CSV or tar file, or a TFDS name",
            fix="--config.data.path=my.jsonl",
        )


def _check_mixture(config: DataConfig) -> None:
    for part in config.mixture:
        checks.known_fields("data.mixture", part, (*PART_FIELDS, *_OF_PARTS))
        for name in ("weight", "epochs"):
            checks.number(f"data.mixture.{name}", part.get(name), above=0, none=True)
        if not isinstance(part.get("name", ""), str):
            raise UserError(f"data.mixture.name: {short(part['name'])}", allowed="text")
    if len({part.get("weight") is None for part in config.mixture}) > 1:
        raise UserError(
            "data.mixture: some sources have a weight and others have none",
            allowed="a weight for each, or for none of them",
            fix="add the missing weights, or use epochs instead",
        )
    for _, part, _, _ in config.parts():
        validate(part)


def _pairs(columns: Any) -> Any:
    """ "image=file,answer=a" as a mapping; what is neither stays as it is, and is refused."""
    if isinstance(columns, str):
        pairs = [pair.partition("=") for pair in columns.split(",") if pair.strip()]
        if all(equals and name.strip() and role.strip() for role, equals, name in pairs):
            return _Map((role.strip(), name.strip()) for role, _, name in pairs)
        return columns
    return _Map(columns) if isinstance(columns, Mapping) else columns


def _mapping(value: Any) -> Any:
    return _Map(value) if isinstance(value, Mapping) else value


def _check_field(name: str, value: Any, default: Any) -> None:
    """The default shows the type; a whole number is accepted where the default is a fraction."""
    field, fix = f"data.{name}", f"data.{name}={short(default)}"
    if name == "image_size":
        good, wanted = isinstance(value, int | tuple) and not isinstance(value, bool), "int or pair"
    elif name == "columns":
        good = isinstance(value, Mapping)
        good = good and all(isinstance(part, str) for pair in value.items() for part in pair)
        wanted, fix = "roles and names", "--config.data.columns=image=FILE,question=Q,answer=A"
    elif name == "mixture":
        good = isinstance(value, tuple) and all(isinstance(part, Mapping) for part in value)
        wanted, fix = "a list of sources", """--config.data.mixture='[{"path": "a.jsonl"}]'"""
    elif isinstance(default, bool):
        good, wanted = isinstance(value, bool), "True or False"
    elif isinstance(default, int):
        checks.whole(field, value, _LOWEST.get(name), fix=fix)
        return
    elif isinstance(default, float):
        limits = (0, 1) if name in _FRACTIONS else ()
        checks.number(field, value, *limits, fix=fix)
        return
    elif isinstance(default, tuple):
        item = type(default[0]) if default else str
        good = isinstance(value, tuple) and all(isinstance(each, item) for each in value)
        good &= name != "dense_px" or len(value) == 2
        wanted = f"a list of {'names' if item is str else 'two whole numbers'}"
    else:
        good, wanted = isinstance(value, str), "text"
    if not good:
        raise UserError(f"{field}: {short(value)} has the wrong type", allowed=wanted, fix=fix)
