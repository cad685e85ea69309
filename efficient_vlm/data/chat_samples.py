"""What a record becomes for a published model: its size before anything is decoded, its arrays."""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.packing import Size
from efficient_vlm.data.record_messages import record_messages
from efficient_vlm.data.records import Record
from efficient_vlm.errors import UserError, first_line, short
from efficient_vlm.families.processor import Processor
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.decode_image import BadRecord, picture_size
from efficient_vlm.processing.labels import labelled
from efficient_vlm.processing.request import Example, packs


class _Text(NamedTuple):
    """A picture of which only the text is known."""

    text: str


class Samples:
    """Records as a published model reads them.

    Args:
      config: of the data.
      processor: of the model.
      models: it with every compressor of the run.
      soft: ids of learned tokens in front of every conversation.
      pairs: whether records are pairs of conversations that end in two answers
        (`preference_rows`), of which only these are learnt from.

    Attributes:
      pooled: whether visual tokens read patches of any image of a row.
      alone: whether a row of text may hold one conversation only.
      each: the most visual tokens in the decoder of an image of the model's own size.
    """

    def __init__(
        self,
        config: DataConfig,
        processor: Processor,
        models: Sequence[VisionLanguageModel],
        soft: Sequence[int] = (),
        pairs: bool = False,
    ):
        self.config, self.processor, self.pairs = config, processor, pairs
        self._models, self._soft = tuple(models), tuple(soft)
        self.pooled = self._pools()
        self._apart = [m for m in models if not packs(m, self.pooled)]
        self.alone = not config.pack or bool(self._apart)

    def _pools(self) -> bool:
        if self.processor.family.processor is None:
            return False
        blank = np.zeros((64, 64, 3), np.uint8)
        return self.processor.pictures(blank).pool_index is not None

    @property
    def max_length(self) -> int:
        """The most tokens of a conversation."""
        return self.config.max_length or 4096

    @functools.cached_property
    def _budget(self) -> int | None:
        """The most visual tokens of an image in the decoder; None for all there are."""
        budgets = [
            None if model.make_compressor().in_decoder else model.compressor.get("budget")
            for model in self._models
        ]
        return None if None in budgets else max(map(int, budgets))

    @functools.cached_property
    def each(self) -> int:
        """See the class."""
        model = self._models[0]
        if model.encoder is None:
            return 0
        whole = math.prod(model.slot_grid)
        return whole if self._budget is None else min(whole, self._budget)

    def _visual(self, tokens: Sequence[int]) -> int:
        """Visual tokens in the decoder of images with so many each."""
        if self.pooled:
            return sum(tokens)
        if not self.processor.family.variable:
            return self.each * len(tokens)
        return sum(n if self._budget is None else min(n, self._budget) for n in tokens)

    def size(self, record: Record) -> Size:
        """What a row of text needs for a record; for one conversation of a pair, where `alone`.

        Raises:
          BadRecord: it cannot be used.
          UserError: several conversations, for a compressor that looks at the text.
        """
        if self._apart and len(record.conversations) > 1 and not self.pairs:
            method = self._apart[0].compressor["name"]
            raise UserError(
                f"data: sample {short(record.id)} has {len(record.conversations)} conversations, "
                f"of which {method} reads one in a row",
                allowed="one conversation a sample",
                fix="data.separate_turns=False, or a compressor that does not look at the text",
            )
        if len(record.images) > self.config.max_images:
            raise BadRecord("too_many_images", f"{record.id}: {len(record.images)}")
        limit = dict(max_pixels=self.config.max_pixels, max_bytes=self.config.max_image_bytes)
        given = [picture_size(data, **limit) for data in record.images]
        pictures = self.processor.pictures if given else None
        with _refusals(record):
            texts = [_Text(pictures.text(*size)) for size in given]
            views = [pictures.views(*size) for size in given]
            tokens = [pictures.count(*size) // view[0] for size, view in zip(given, views)]
            total = [self._ids(record, texts, n)[0] for n in range(len(record.conversations))]
        slots = sum(pictures.count(*size) for size in given)
        longest = max(len(ids) for ids in total)
        if longest > self.max_length:
            raise BadRecord("too_long", f"{record.id}: {longest} tokens")
        if self.pairs and self.alone:  # Each has a row of its own.
            total = [max(total, key=len)]
        each = [count for count, view in zip(tokens, views) for _ in range(view[0])]
        return Size(
            text=sum(len(ids) - slots for ids in total),
            images=len(each) * len(total),
            pixels=tuple(max((view[axis] for view in views), default=0) for axis in (1, 2)),
            visual=(slots if self.pooled else self._visual(each)) * len(total),
        )

    def _ids(self, record: Record, pictured: Sequence[Any], number: int) -> tuple:
        conversation = record.conversations[number]
        messages = record_messages(conversation, record.images)
        how = (self.processor.style, self.processor.template, self.processor.tokenizer)
        ids, targets = labelled(*how, messages, pictured, end=True, last=self.pairs)
        return [*self._soft, *ids], [False] * len(self._soft) + targets

    def examples(self, record: Record) -> list[Example]:
        """A record's conversations, each with its pictures.

        Raises:
          BadRecord: a picture is damaged.
        """
        pictured = [_pictured(self.processor.pictures, data) for data in record.images]
        found = []
        for number in range(len(record.conversations)):
            ids, targets = self._ids(record, pictured, number)
            found.append(Example([ids], pictured, [targets]))
        return found

    def rows(self, members: Sequence[Sequence[Example]]) -> list[list[Example]]:
        """The rows of text of the samples that share a row: one, or where `alone` two for a pair.

        Args:
          members: the examples of each sample; none of one that is damaged.
        """
        if not (self.pairs and self.alone):
            return [[example for examples in members for example in examples]]
        flat = [[example] for examples in members for example in examples]
        return flat or [[], []]


@contextlib.contextmanager
def _refusals(record: Record) -> Iterator[None]:
    """Turns what a processor or a template refuses into a skipped sample."""
    try:
        yield
    except UserError as error:
        raise BadRecord("refused", f"{record.id}: {first_line(error)}") from error


def _pictured(processor: Any, data: bytes) -> Any:
    try:
        return processor(data)
    except UserError as error:
        raise BadRecord("corrupt", first_line(error)) from error
