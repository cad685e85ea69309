"""From words and pictures to the inputs of a published model, for questions and for training."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficient_vlm.errors import UserError
from efficient_vlm.families import hub
from efficient_vlm.families.base import Config, Family
from efficient_vlm.processing.chat_template import Template
from efficient_vlm.processing.conversation import PromptStyle
from efficient_vlm.processing.hub_tokenizer import HubTokenizer, read_json


class Processor:
    """Tokenizer, chat template and pictures of a published model, read when they are needed.

    Args:
      family, config: what the model is, and its config.json.
      directory: where its files are.
      picture_options: of the family's picture processor.
      source: where the files came from; None for what the directory says.
    """

    def __init__(
        self,
        family: Family,
        config: Config,
        directory: Path,
        picture_options: Mapping[str, Any] | None = None,
        source: hub.Source | None = None,
    ):
        self.family, self.config, self.directory = family, dict(config), directory
        self.picture_options = dict(picture_options or {})
        self.source = source or hub.of_folder(directory)

    @functools.cached_property
    def tokenizer(self) -> HubTokenizer:
        """The tokenizer; UserError if the directory has none."""
        return HubTokenizer.from_hf(self.directory)

    @functools.cached_property
    def template(self) -> Template | str:
        """The chat template of the directory, or the name of the family's own prompt."""
        found = None if self.family.own_prompt else Template.find(self.directory)
        return found or self.family.prompt

    @functools.cached_property
    def pictures(self) -> Any:
        """The picture processor of the directory."""
        if self.family.processor is None:
            raise UserError(f"images: {self.family.name} is a language model without images")
        # As in transformers 5: a nested mapping of the newer file replaces all of the older one.
        settings = read_json(self.directory / "processor_config.json").get("image_processor")
        if settings is None:
            settings = read_json(self.directory / "preprocessor_config.json")
        return self.family.processor(settings, self.config, **self.picture_options)

    @functools.cached_property
    def style(self) -> PromptStyle:
        """How prompts are written."""
        return self.family.prompt_style(self.config)

    @functools.cached_property
    def rules(self) -> dict[str, Any]:
        """How prompts are placed: keyword arguments of `processing.placing.place`."""
        return self.family.rules(self.config)

    def seeing(self, model: Any) -> Any:
        """The model with the pixel statistics of this processor."""
        if self.family.processor is None:
            return model
        seen = dict(pixel_mean=self.pictures.mean, pixel_std=self.pictures.std)
        return model.clone(encoder={**model.encoder, **seen})
