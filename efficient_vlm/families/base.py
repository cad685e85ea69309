"""The type of a family of published models."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from efficient_vlm.checkpoints.names import NameMap
from efficient_vlm.errors import unknown
from efficient_vlm.processing.conversation import PromptStyle

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of published models.

    Attributes:
      name: as in `import --verify` and `presets`.
      model_types: values of "model_type" in config.json.
      model: config.json -> fields of `VisionLanguageModel`.
      tensors: fills a name map, given config.json and the spelling of the names in the file.
      spellings: the spellings that are accepted: name -> (pattern, replacement) pairs from the
        names in a file to those that `tensors` uses; the first is that of the hub.
      memory: (pattern, replacement) pairs from the names of the hub to those of the modules of
        transformers 5, which adapters are named by; the first that matches counts.
      ignored: patterns of tensors (hub spelling) that the model does not use; they are kept and
        exported again.
      processor: (preprocessor config, config.json) -> a picture processor; None without images.
      image_token: config.json -> id of the token that marks each visual token in a prompt.
      special_ids: setting that config.json may lack -> the special token whose id it is, looked up
        in the files of the tokenizer.
      picture_options: options of the processor that a user may set.
      prompt: name of a function of `prompts` for checkpoints without a chat template.
      prompt_options: options of that function.
      own_prompt: whether that function is used although the checkpoint has a chat template.
      begin: where the beginning token comes from: "tokenizer" (added by the tokenizer unless the
        template has written it), "prompt" (written by the function above), "template" (nothing is
        added to the template's text; this holds for all language models) or "bos_or_eos" (the
        tokenizer's beginning token, or else its end token, before everything).
      placeholder: marks one image in a rendered prompt.
      blocks: which tokens of a prompt see each other in both directions: None, "prefix" (the whole
        prompt), "image" (the tokens of one image) or "images" (all tokens that belong to images).
      block_ids: config.json -> ids of the other tokens that belong to images (for "images").
      variable: whether the number of tokens of an image depends on the picture's size, so that a
        budget can only be checked once the pictures are known.
      positions: "sequence", or "mrope" (one position for time, row and column).
    """

    name: str
    model_types: tuple[str, ...]
    model: Callable[[Config], dict[str, Any]]
    tensors: Callable[[NameMap, Config, str], None]
    spellings: Mapping[str, tuple[tuple[str, str], ...]] = dataclasses.field(
        default_factory=lambda: {"hub": ()}
    )
    memory: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    processor: Callable[[Config, Config], Any] | None = None
    image_token: Callable[[Config], int] | None = None
    special_ids: Mapping[str, str] = dataclasses.field(default_factory=dict)
    picture_options: tuple[str, ...] = ()
    prompt: str = "plain"
    prompt_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    own_prompt: bool = False
    begin: str = "tokenizer"
    placeholder: str = "<image>"
    blocks: str | None = None
    variable: bool = False
    block_ids: Callable[[Config], tuple[int, ...]] | None = None
    positions: str = "sequence"

    def check_pictures(self, field: str, options: Iterable[str]) -> None:
        """Raises UserError for an option that the picture processor does not have."""
        for option in options:
            if option not in self.picture_options:
                known = self.picture_options or (f"none for {self.name}",)
                raise unknown(field, option, known)

    def prompt_style(self, config: Config) -> PromptStyle:
        """How prompts of a model with this config.json are written."""
        token = self.image_token
        return PromptStyle(
            family=self.name,
            pictures=self.processor is not None,
            options=self.prompt_options,
            placeholder=self.placeholder,
            begin=self.begin,
            image_token=functools.partial(token, config) if token else None,
        )

    def rules(self, config: Config) -> dict[str, Any]:
        """How prompts are placed: keyword arguments of `processing.placing.place`."""
        return dict(
            image_token=self.image_token(config) if self.image_token else None,
            blocks=self.blocks,
            block_ids=self.block_ids(config) if self.block_ids else (),
            positions=self.positions,
        )
