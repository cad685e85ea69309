"""Training batches of a published model: conversations about pictures of any size, packed.

    shuffle -> repeat -> windows of samples -> plan of each window -> batches -> decode, tokenise

A window's plan, which samples share a row and which rows a batch, is a function of the seed and of
the sizes of its samples, so every process makes the same one and reads its own rows of it alone.
The state of the iterator is the window and the batch in it.
"""

import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from efficient_vlm.data.chat_batches import Batch, Plan, Plans
from efficient_vlm.data.chat_samples import Samples
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.mixture import MixtureSource, neighbours_of, order_of
from efficient_vlm.data.packing import Size, choose_rooms, holds, pack
from efficient_vlm.data.skips import SkipCounter
from efficient_vlm.data.sources import Source
from efficient_vlm.data.taught import Taught
from efficient_vlm.errors import UserError
from efficient_vlm.families.processor import Processor
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.decode_image import STANDARD, BadRecord
from efficient_vlm.processing.gather import Room
from efficient_vlm.processing.request import Example, pack_request

# Part of the fingerprint: raise it when the same config gives other batches.
FORMAT = 1
# Samples of which the shapes of rows are chosen, and samples that are packed together.
_PLANNED, _WINDOW = 2_000, 2_048


class ChatPipeline:
    """Endless training batches of a published model.

    Args:
      config: of the data.
      source: the samples.
      processor: of the published model.
      models: it with every compressor of the run, which say how many visual tokens reach the
        decoder.
      rows: those of every batch that this process reads; None for all.
      programs: the most shapes of rows.
      soft: ids of learned tokens in front of every conversation.
      pairs: whether records are pairs (`preference_rows.PairSource`). The conversations of one
        then follow each other in a row of text, or have two rows after another where a row may
        hold one only (`apart`).

    Attributes:
      fingerprint: everything that defines content and order.
      rooms: the shapes of rows.
    """

    def __init__(
        self,
        config: DataConfig,
        source: Source,
        processor: Processor,
        models: Sequence[VisionLanguageModel],
        *,
        rows: Sequence[int] | None = None,
        programs: int = 8,
        soft: Sequence[int] = (),
        pairs: bool = False,
        taught: Taught | None = None,
    ):
        self._taught = taught
        self.config, self.source, self.processor = config, source, processor
        self.model = models[0]
        self.tasks, self.tokenizer = source.tasks, processor.tokenizer
        self._rows = range(config.batch_size) if rows is None else rows
        self.skips = SkipCounter(len(source), config.max_skip_fraction)
        self._sizes: dict[int, Size | None] = {}
        self._cache: dict[int, list[Example]] = {}
        self._cache_left = config.cache_mb * 2**20
        self._soft = len(soft)
        self._samples = Samples(config, processor, models, soft, pairs)
        self.apart = pairs and self._samples.alone
        self.rooms = self._choose_rooms(programs)
        self.fingerprint = self._make_fingerprint()

    # --- sizes ------------------------------------------------------------------------------------

    def _choose_rooms(self, programs: int) -> list[Room]:
        config, count = self.config, len(self.source)
        rng = np.random.default_rng(config.seed)
        chosen = np.sort(rng.permutation(count)[:_PLANNED])
        sizes = [size for size in map(self._size, chosen.tolist()) if size is not None]
        if not sizes:
            raise UserError(
                f"data: none of {len(chosen)} samples can be used",
                fix="see `efficient-vlm data inspect` for the reasons",
            )
        samples = self._samples
        uneven = self.processor.family.variable and not samples.pooled
        limits = None
        if count > len(chosen):  # Those that were not seen may need more.
            visual = max(s.visual for s in sizes)
            limits = Size(
                max(*(s.text for s in sizes), samples.max_length - visual),
                max(s.images for s in sizes),
                tuple(max(s.pixels[axis] for s in sizes) for axis in (0, 1)),
                visual,
            )
        return choose_rooms(
            sizes,
            samples.each,
            tokens=config.pack_tokens,
            limits=limits,
            most=programs,
            alone=samples.alone,
            uneven=uneven,
            pooled=samples.pooled,
        )

    def _size(self, index: int) -> Size | None:
        """What a sample needs; None for one that cannot be used."""
        if index in self._sizes:
            return self._sizes[index]
        # What is known of unusable samples from elsewhere is not asked: a plan is a function of the
        # data alone, so that a resumed run makes the same.
        size = None
        try:
            size = self._samples.size(self.source[index])
            self.skips.add(index, None)
        except BadRecord as error:
            self.skips.add(index, error)
        self._sizes[index] = size
        return size

    # --- batches ----------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Batch]:
        """A Grain iterator over batches: `next`, `get_state`, `set_state`."""
        import grain

        order = order_of(self.source, self.config.seed)
        windows = order.batch(self._window).map_with_index(self._plan)
        flat = grain.experimental.FlatMapIterDataset(
            windows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
            Plans(),
        )
        batches = flat.map(self._load)
        if self.config.num_threads:
            batches = grain.experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=self.config.prefetch
            )
        return iter(batches)

    def epoch(self) -> Iterator[Batch]:
        """Batches in which every sample that can be used is once."""
        samples = [index for index in range(len(self.source)) if self._fits(index)]
        for number, first in enumerate(range(0, len(samples), self._window)):
            for plan in self._planned(samples[first : first + self._window], number):
                yield self._load(plan)

    @property
    def _window(self) -> int:
        """Samples that are packed together: all, where they are few, so that an epoch is one."""
        least = self.config.batch_size * 8
        return len(self.source) if least <= len(self.source) <= _WINDOW else max(_WINDOW, least)

    def _plan(self, number: int, samples: np.ndarray) -> list[Plan]:
        """The batches of one window."""
        return self._planned([self._usable(int(index)) for index in samples], number)

    def _planned(self, usable: Sequence[int], number: int) -> list[Plan]:
        sizes = [self._sizes[index] for index in usable]
        samples = self._samples
        packed = pack(sizes, self.rooms, samples.each, alone=samples.alone)
        rng = np.random.default_rng((self.config.seed, number))
        plans, rows = [], self.config.batch_size
        for room in self.rooms:
            own = [tuple(usable[m] for m in row.members) for row in packed if row.room == room]
            own = [own[i] for i in rng.permutation(len(own))]
            own += [()] * (-len(own) % rows)
            plans += [Plan(room, tuple(own[i : i + rows])) for i in range(0, len(own), rows)]
        return [plans[i] for i in rng.permutation(len(plans))]

    def _usable(self, index: int) -> int:
        """The sample, or the next one of the source that can be used."""
        among = neighbours_of(self.source, index)
        for step in range(len(among)):
            candidate = among[(index - among.start + step) % len(among)]
            if self._fits(candidate):
                return candidate
        raise UserError(
            f"data: none of the {len(among)} samples can be used",
            fix="see `efficient-vlm data inspect` for the reasons",
        )

    def _fits(self, index: int) -> bool:
        """Whether a sample can be used, and some room holds it."""
        size = self._size(index)
        if size is None:
            return False
        if any(holds(room, size) for room in self.rooms):
            return True
        self.skips.add(index, BadRecord("too_large", "larger than the shapes of rows"))
        return False

    def described(self) -> list[dict[str, Any]]:
        """What a model card says of the data; see `families.card.Data`.

        How many of the rows a run came to read is not known here.
        """
        config, source = self.config, self.source
        licence = {"license": config.license or None}
        if isinstance(source, MixtureSource):
            return [_facts(part.name, part.source) | licence for part in source.parts]
        facts = _facts(Path(config.path).name or config.source, source)
        return [facts | licence | {"skipped": self.skips.counts}]

    def by_source(self, steps: int) -> list[dict[str, Any]]:
        """What each source of a mixture gave to `steps` steps; see `MixtureSource.summary`."""
        if not isinstance(self.source, MixtureSource):
            return []
        windows = order_of(self.source, self.config.seed).batch(self._window)
        plans = (plan for n in range(steps) for plan in self._plan(n, windows[n]))
        drawn = [i for plan in itertools.islice(plans, steps) for row in plan.rows for i in row]
        bad = [n for numbers in self.skips.state().values() for n in numbers]
        return self.source.summary(self.source.part_counts(drawn), bad)

    def _load(self, plan: Plan) -> Batch:
        """This process's rows of a batch."""
        wanted = [plan.rows[row] for row in self._rows]
        flat = [index for row in wanted for index in row]
        with ThreadPoolExecutor(max(self.config.num_threads, 1)) as pool:
            read = dict(zip(flat, pool.map(self._examples, flat), strict=True))
        grouped = [self._samples.rows([read[index] for index in row]) for row in wanted]
        examples = [row for rows in grouped for row in rows]
        how = dict(variable=self.processor.family.variable, soft=self._soft)
        request = pack_request(self.model, examples, self.processor.rules, plan.room, **how)
        keys = tuple(tuple((i, n) for i in row for n in range(len(read[i]))) for row in wanted)
        inputs = request.inputs
        if self._taught is not None:
            inputs = self._taught.attach(inputs, keys)
        return Batch(inputs, np.asarray(flat, np.int64), keys)

    def _examples(self, index: int) -> list[Example]:
        """A sample's conversations, each with its pictures; none if a picture is damaged.

        Its room then stays empty: another sample would have another size.
        """
        if index in self._cache:
            return self._cache[index]
        try:
            found = self._samples.examples(self.source[index])
        except BadRecord as error:
            self.skips.add(index, error)
            return []
        size = sum(p.images.nbytes for example in found[:1] for p in example.pictured)
        if size <= self._cache_left:
            self._cache_left -= size
            self._cache[index] = found
        return found

    def _make_fingerprint(self) -> dict[str, Any]:
        config = self.config
        return {
            "format": f"chat {FORMAT}",
            "preprocessing": STANDARD,
            **self.source.fingerprint,
            "records": len(self.source),
            "seed": config.seed,
            "batch_size": config.batch_size,
            "tokenizer": self.tokenizer.fingerprint,
            "rooms": [list(map(str, vars(room).values())) for room in self.rooms],
        }


def _facts(name: str, source: Source) -> dict[str, Any]:
    content = source.fingerprint.get("content")
    digest = content if isinstance(content, str) and len(content) == 64 else None
    return {"name": name, "sha256": digest, "rows": len(source)}
