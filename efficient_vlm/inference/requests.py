"""From words and pictures to the inputs of a published model."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from efficient_vlm.adapt.prompts import soft_ids
from efficient_vlm.errors import UserError
from efficient_vlm.families.processor import Processor
from efficient_vlm.families.weights import Weights
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.processing.chat_template import Template
from efficient_vlm.processing.conversation import Conversation, prompt_ids
from efficient_vlm.processing.hub_tokenizer import HubTokenizer
from efficient_vlm.processing.messages import pictures_in_order, read_messages
from efficient_vlm.processing.pictures.base import Pictured
from efficient_vlm.processing.request import Example, Request, make_request

# Text is padded to a multiple of this: prompts of about one length share a program.
BUCKET = 32


class Requests:
    """The side of a `Pretrained` that reads prompts.

    Attributes:
      model, weights, processor: see `Pretrained`.
    """

    model: VisionLanguageModel
    weights: Weights
    processor: Processor

    @property
    def tokenizer(self) -> HubTokenizer:
        """The tokenizer; UserError if the directory has none."""
        return self.processor.tokenizer

    @property
    def template(self) -> Template | str:
        """The chat template of the directory, or the name of the family's own prompt."""
        return self.processor.template

    @property
    def pictures(self) -> Any:
        """The picture processor of the directory."""
        return self.processor.pictures

    @functools.cached_property
    def soft_ids(self) -> tuple[int, ...]:
        """Ids of the learned tokens in front of every prompt (prompt tuning); () for none."""
        reader = self.weights.reader
        return soft_ids(self.weights.fused if reader is None else reader.abstract)

    def request(
        self, questions: Sequence[Conversation], images: Sequence[Sequence[Any]] | None = None
    ) -> Request:
        """Renders, tokenises and places prompts; see `generate`."""
        if not questions:
            raise UserError("prompt: none", fix="ask at least one question")
        images = [[] for _ in questions] if images is None else list(images)
        if len(images) != len(questions):
            raise UserError(
                f"images: {len(images)} lists for {len(questions)} questions",
                fix="give one list of pictures for each question",
            )
        asked, pictured = [], []
        for question, row in zip(questions, images, strict=True):
            if not isinstance(row, list | tuple):
                raise UserError(
                    f"images: a {type(row).__name__}, not a list", fix="images=[picture]"
                )
            if not isinstance(question, str):
                question, named = read_messages(question)
                row = pictures_in_order(named, row)
            asked.append(question)
            pictured.append(tuple(self.pictures(picture) for picture in row))
        how = (self.processor.style, self.template, self.tokenizer)
        soft = self.soft_ids
        ids = [[*soft, *prompt_ids(*how, *row)] for row in zip(asked, pictured, strict=True)]
        return self.place(ids, pictured)

    def place(
        self, ids: Sequence[Sequence[int]], pictured: Sequence[Sequence[Pictured]]
    ) -> Request:
        """Token ids with visual slots among them, and the pictures that go there, as arrays."""
        rows = zip(ids, pictured, strict=True)
        return self.batch([Example([row], pictures) for row, pictures in rows])

    def batch(self, examples: Sequence[Example]) -> Request:
        """Conversations as token ids, several about the same pictures or one, as arrays.

        With targets they have labels, for `train.step`.
        """
        model = self.model
        if any(example.pictured for example in examples):
            model = self.processor.seeing(model)
        options = dict(
            variable=self.processor.family.variable, multiple=BUCKET, soft=len(self.soft_ids)
        )
        return make_request(model, examples, self.processor.rules, **options)

    def _seen(self, request: Request) -> np.ndarray:
        """Ids of each prompt, as published code counts them: with one for its pictures."""
        seen = np.where(request.inputs.live, request.inputs.text, -1)
        if request.inputs.pictures is None:
            return seen
        slot = [
            self.processor.family.image_token(self.processor.config) if row else -1
            for row in request.pictured
        ]
        return np.concatenate([seen, np.array(slot, seen.dtype)[:, None]], axis=1)
