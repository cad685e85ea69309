"""TFDS builder of the token-budget benchmark.

Shards are written in order and unshuffled: the pipeline shuffles, and TFDS's shuffle buffer needs
TensorFlow once it exceeds memory.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from efficient_vlm.data import questions, scenes
from efficient_vlm.processing.decode_image import encode_png

DESCRIPTION = (
    "Scenes of real handwritten digits in colours, with questions that need few or many visual"
    " tokens. Train and test never share a source glyph."
)
SHARD_BYTES = 64 * 2**20  # Uncompressed pixels per shard; one shard is held in memory.
WORKERS = 2
CHUNK = 32  # Scenes per task: long enough to hide the cost of a future.


@dataclasses.dataclass
class TokenBenchConfig(tfds.core.BuilderConfig):
    """A TFDS config whose name contains a hash of every setting, so that builds never collide.

    Attributes:
      scene: defines images and questions.
      sizes: images per split.
    """

    scene: scenes.SceneConfig = dataclasses.field(default_factory=scenes.SceneConfig)
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def make(cls, scene: scenes.SceneConfig, sizes: dict[str, int]) -> "TokenBenchConfig":
        """A config named after canvas, number of images and a hash of all settings."""
        key = json.dumps([scene.fingerprint(), sorted(sizes.items())])
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        name = f"px{scene.canvas}-n{sum(sizes.values())}-{digest}"
        return cls(name=name, scene=scene, sizes=dict(sizes))


class TokenBench(tfds.core.ShardBasedBuilder):
    """Token-budget benchmark: PNG, a pool of questions per image, and the boxes of all digits.

    `content` maps each split to a SHA-256 of its pixels and texts, computed while building. Unlike
    the hashes of files, it does not depend on the versions of zlib and ArrayRecord.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.content: dict[str, str] = {}
        self.task_counts: dict[str, dict[str, int]] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        scene = self.builder_config.scene
        pool, side = scene.question_pool, scene.canvas
        text = tfds.features.Tensor(shape=(pool,), dtype=np.str_)
        features = {
            "index": tfds.features.Scalar(np.int64),
            "image": tfds.features.Image(shape=(side, side, 3), encoding_format="png"),
            "prompts": text,
            "answers": text,
            "tasks": tfds.features.Tensor(shape=(pool,), dtype=np.int64),
            "glyphs": tfds.features.Tensor(shape=(None, 7), dtype=np.int64),
            "background": tfds.features.Scalar(np.int64),
            "text": tfds.features.Text(),
            "text_box": tfds.features.Tensor(shape=(4,), dtype=np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=DESCRIPTION,
            features=tfds.features.FeaturesDict(features),
            homepage="https://archive.ics.uci.edu/dataset/80",
            license="digits: CC-BY-4.0 (UCI optical recognition of handwritten digits)",
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        del dl_manager  # Nothing is downloaded: the digits are in this package.
        per_shard = max(1, SHARD_BYTES // (3 * self.builder_config.scene.canvas**2))
        return {
            split: [
                functools.partial(self._examples, split, start, min(size, start + per_shard))
                for start in range(0, size, per_shard)
            ]
            for split, size in self.builder_config.sizes.items()
        }

    def _examples(self, split: str, start: int, stop: int) -> Iterator[tuple[int, dict]]:
        """Yields (index, features) of one shard; threads overlap the parts that release the GIL."""
        config = self.builder_config.scene
        counts = self.task_counts.setdefault(split, dict.fromkeys(config.tasks, 0))
        digest = bytes.fromhex(self.content.get(split, ""))
        starts = iter(range(start, stop, CHUNK))
        with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
            submit = lambda at: pool.submit(_chunk, config, split, at, min(stop, at + CHUNK))  # noqa: E731
            waiting = collections.deque(map(submit, itertools.islice(starts, 2 * WORKERS)))
            while waiting:
                for hashed, example in waiting.popleft().result():
                    digest = hashlib.sha256(digest + hashed).digest()
                    for task in example["tasks"]:
                        counts[config.tasks[task]] += 1
                    yield example["index"], example
                waiting.extend(map(submit, itertools.islice(starts, 1)))
        self.content[split] = digest.hex()


def _chunk(config: scenes.SceneConfig, split: str, start: int, stop: int) -> list:
    """(SHA-256 of the content, features) of scenes start..stop-1."""
    out = []
    for index in range(start, stop):
        scene, rng = scenes.compose(config, split, index)
        asked = questions.draw(scene, config, rng)
        hasher = hashlib.sha256(scene.image.data)
        hasher.update(scene.glyphs.astype("<i4").data)
        hasher.update(json.dumps(asked).encode())
        example = {
            "index": index,
            "image": encode_png(scene.image),
            "prompts": np.array([q.prompt for q in asked], object),
            "answers": np.array([q.answer for q in asked], object),
            "tasks": np.array([config.tasks.index(q.task) for q in asked]),
            "glyphs": scene.glyphs.astype(np.int64),
            "background": scene.background,
            "text": scene.text,
            "text_box": np.array(scene.text_box),
        }
        out.append((hasher.digest(), example))
    return out
