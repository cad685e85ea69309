"""Sources of records: random access, and a fingerprint of the content."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

from efficient_vlm.data import questions
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.llava_json import LlavaSource
from efficient_vlm.data.records import Conversation, Record
from efficient_vlm.data.scenes import SceneConfig
from efficient_vlm.data.token_bench import store


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
    """The records of `split`, "train" or "test"."""
    if config.source == "token_bench":
        return TokenBenchSource(build_token_bench(config), split, config.tasks)
    shared = dict(pictures=config.images, max_bytes=config.max_image_bytes)
    if split == "test" and config.eval_path:
        return LlavaSource(config.eval_path, **shared)
    fraction = 0.0 if config.eval_path else config.test_fraction
    return LlavaSource(config.path, split=split, test_fraction=fraction, **shared)


def longest_words(config: DataConfig) -> int:
    """Number of words of the longest question with its answer in token_bench."""
    return questions.longest(scene_config(config))
