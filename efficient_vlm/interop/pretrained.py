"""A published model ready to be asked: weights, tokenizer, pictures and prompt in one object."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm.errors import UserError
from efficient_vlm.inference.generate import Generated, generate
from efficient_vlm.interop import prompts as prompting
from efficient_vlm.interop.families.base import Family
from efficient_vlm.interop.families.table import family_of
from efficient_vlm.interop.imported import open_weights
from efficient_vlm.interop.load import build_model, export, parameter_shapes, read_config
from efficient_vlm.interop.pictures.base import Pictured
from efficient_vlm.interop.placing import Prompt, place
from efficient_vlm.interop.tokenizer import Tokenizer, read_json
from efficient_vlm.models.placement import Placement
from efficient_vlm.models.stack import fuse
from efficient_vlm.models.vlm import NO_EXTRAS, ImageExtras, VisionLanguageModel

# Text is padded to a multiple of this: prompts of about one length share a program.
BUCKET = 32
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of prompts as arrays; see `VisionLanguageModel.text_logits`.

    Attributes:
      model: at the size of these pictures.
      tokens, lengths, placement: of R rows.
      images, image_mask, extras: of R rows; images None for none.
      pictured: for each row what each of its pictures became.
    """

    model: VisionLanguageModel
    tokens: np.ndarray
    lengths: np.ndarray
    placement: Placement
    images: np.ndarray | None
    image_mask: np.ndarray | None
    extras: ImageExtras
    pictured: tuple[tuple[Pictured, ...], ...]


class Pretrained:
    """A published model. Made by `from_pretrained`.

    Attributes:
      model: a `VisionLanguageModel`; its compressor is the one in use.
      params: parameters in split form (`models.stack.unstack`).
      family, config: what it is, and its config.json.
      tokenizer: a `tokenizer.Tokenizer`, or None if the directory has none.
      directory: where it came from.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        params: Any,
        family: Family,
        config: Mapping[str, Any],
        directory: Path,
        picture_options: Mapping[str, Any],
        carried: Mapping[str, np.ndarray],
    ):
        self.model, self.params, self.family, self.config = model, params, family, dict(config)
        self.directory, self._carried = directory, carried
        self._picture_options = dict(picture_options)

    # --- parts that are read when they are needed ------------------------------------------------

    @functools.cached_property
    def fused(self) -> Any:
        """Parameters as `generate` uses them: products of one input joined (`stack.fuse`)."""
        leaf = jax.tree.leaves(self.params)[0]
        # A second copy of most weights, worth it where reading them is all that decoding does.
        on_cpu = all(device.platform == "cpu" for device in jnp.asarray(leaf).devices())
        return fuse(self.params) if on_cpu else self.params

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; UserError if the directory has none."""
        return Tokenizer.from_hf(self.directory)

    @functools.cached_property
    def template(self) -> prompting.Template | str:
        """The chat template of the directory, or the name of the family's own prompt."""
        names = ("chat_template.jinja", "chat_template.json")
        own = any((self.directory / name).is_file() for name in names)
        for name in ("tokenizer_config.json", "processor_config.json"):
            own = own or "chat_template" in read_json(self.directory / name)
        return prompting.Template.from_hf(self.directory) if own else self.family.prompt

    @functools.cached_property
    def pictures(self) -> Any:
        """The picture processor of the directory."""
        if self.family.processor is None:
            raise UserError(f"images: {self.family.name} is a language model without images")
        settings = {
            **read_json(self.directory / "processor_config.json"),
            **read_json(self.directory / "preprocessor_config.json"),
        }
        try:
            return self.family.processor(settings, self.config, **self._picture_options)
        except TypeError:
            if not self._picture_options:
                raise
            raise UserError(
                f"{', '.join(self._picture_options)}: no option of {self.family.name}'s pictures",
                allowed="max_pixels and min_pixels (Qwen), split (SmolVLM), max_tiles (InternVL)",
            ) from None

    # --- what a user does ------------------------------------------------------------------------

    def with_compressor(self, name: str, budget: int | None = None, **options: Any) -> "Pretrained":
        """The same weights with another compressor; see `compressors.build`."""
        compressor = {"name": name, **options}
        if budget is not None:
            compressor["budget"] = budget
        model = self.model.clone(compressor=compressor)
        check_compressor(model, self.family.variable)
        parts = (self.family, self.config, self.directory, self._picture_options, self._carried)
        other = Pretrained(model, self.params, *parts)
        for name in ("fused", "tokenizer", "template", "pictures"):
            if name in self.__dict__:
                setattr(other, name, self.__dict__[name])
        return other

    def with_params(self, params: Any) -> "Pretrained":
        """The same model with other weights, for example after fine-tuning."""
        parts = (self.family, self.config, self.directory, self._picture_options, self._carried)
        return Pretrained(self.model, params, *parts)

    def generate(
        self,
        prompt: str | Sequence[str],
        images: Any = None,
        *,
        max_new_tokens: int = 64,
        stream: Callable[[str], None] | None = None,
        rng: jax.Array | None = None,
    ) -> Any:
        """Answers a question, or several, greedily.

        Args:
          prompt: a question, or a list of them.
          images: for one question a list of pictures (paths, Pillow images, uint8 arrays); for
            several a list of lists. None for none.
          max_new_tokens: the most tokens of an answer.
          stream: called with pieces of the answer to a single question as they come.
          rng: key for random compressors.

        Returns:
          The answer, or a list of answers.

        Raises:
          UserError: a picture or a prompt that cannot be used.
        """
        single = isinstance(prompt, str)
        out = self.run(
            [prompt] if single else list(prompt),
            [[] if images is None else images] if single else images,
            max_new_tokens=max_new_tokens,
            stream=stream if single else None,
            rng=rng,
        )
        answers = self.answers(out)
        return answers[0] if single else answers

    def answers(self, out: Generated) -> list[str]:
        """The text of each answer up to its end."""
        return [self.tokenizer.decode(self._until_end(row)) for row in out.tokens[:, 0]]

    def run(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[Any]] | None = None,
        *,
        max_new_tokens: int = 64,
        stream: Callable[[str], None] | None = None,
        rng: jax.Array | None = None,
    ) -> Generated:
        """As `generate` for several questions, with tokens, times and cache sizes."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {max_new_tokens}", allowed="1, 2, 3, ...")
        request = self.request(questions, images)
        ends = self.tokenizer.eos_ids or (-1,)
        decoder = self.tokenizer.stream()

        def on_token(tokens: np.ndarray) -> None:
            if stream is not None and int(tokens[0]) not in ends:
                stream(decoder.push(int(tokens[0])))

        out = generate(
            request.model,
            self.fused,
            request.images,
            request.image_mask,
            request.tokens[:, None],
            request.lengths[:, None],
            new_tokens=max_new_tokens,
            eos_id=ends,
            rng=rng,
            placement=request.placement,
            extras=request.extras,
            on_token=on_token,
        )
        if stream is not None:
            stream(decoder.finish())
        return out

    def logits(self, request: Request, rng: jax.Array | None = None) -> jax.Array:
        """Next-token logits behind each text token of a request: float32 [R, S, vocab]."""
        return _logits(
            request.model,
            self.params,
            request.images,
            request.image_mask,
            request.tokens,
            request.lengths,
            request.placement,
            request.extras,
            rng,
        )

    def save(self, directory: str | os.PathLike, **options: Any) -> tuple[Path, ...]:
        """Writes the model in Hugging Face's layout, with tokenizer and settings beside it.

        Args:
          directory: to write to, not the one it came from.
          **options: dtype and max_shard_bytes of `load.export`.
        """
        directory = Path(directory)
        if directory.resolve() == self.directory.resolve():
            raise UserError(f"{directory}: the checkpoint came from there", fix="name another one")
        files = export(
            directory,
            self.family,
            self.config,
            self.model,
            self.params,
            carried=self._carried,
            **options,
        )
        copy_settings(self.directory, directory)
        return files

    # --- from words and pictures to arrays -------------------------------------------------------

    def request(
        self, questions: Sequence[str], images: Sequence[Sequence[Any]] | None = None
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
        pictured = []
        for row in images:
            if not isinstance(row, list | tuple):
                raise UserError(
                    f"images: a {type(row).__name__}, not a list", fix="images=[picture]"
                )
            pictured.append(tuple(self.pictures(picture) for picture in row))
        ids = [self._ids(question, row) for question, row in zip(questions, pictured, strict=True)]
        return self.place(ids, pictured)

    def place(
        self, ids: Sequence[Sequence[int]], pictured: Sequence[Sequence[Pictured]]
    ) -> Request:
        """Token ids with visual slots among them, and the pictures that go there, as arrays."""
        model = self.model
        if any(pictured):
            seen = dict(pixel_mean=self.pictures.mean, pixel_std=self.pictures.std)
            model = model.clone(encoder={**model.encoder, **seen})
        model, images, mask, extras, slots, grids = gather(model, pictured)
        prompts = [
            Prompt(np.asarray(row), s, g) for row, s, g in zip(ids, slots, grids, strict=True)
        ]
        family, config = self.family, self.config
        longest = max(len(row) - len(s) for row, s in zip(ids, slots, strict=True))
        tokens, lengths, placement = place(
            prompts,
            family.image_token(config) if images is not None else None,
            0 if images is None else visual_tokens(model, mask, extras),
            length=-(-longest // BUCKET) * BUCKET,
            blocks=family.blocks,
            block_ids=family.block_ids(config) if family.block_ids else (),
            positions=family.positions,
        )
        if lengths.min() == 0:
            raise UserError("prompt: no text", fix="ask something about the picture")
        both = (tokens, lengths, placement, images, mask, extras)
        return Request(model, *both, tuple(map(tuple, pictured)))

    def _ids(self, question: str, pictured: Sequence[Pictured]) -> list[int]:
        content: Any = question  # What templates of language models expect.
        if self.family.processor is not None:
            content = [{"type": "image"}] * len(pictured) + [{"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        options = {}
        if isinstance(self.template, prompting.Template):
            options["add_generation_prompt"] = True
        elif self.template == "plain":
            options["placeholder"] = self.family.placeholder
        text = prompting.render([message], self.template, **options)
        text = prompting.expand(text, [p.text for p in pictured], self.family.placeholder)
        spelled = isinstance(self.template, prompting.Template) or self.template in (
            "paligemma",
            "molmo",
        )
        return self.tokenizer.encode(text, bos=False if spelled else None)

    def _until_end(self, tokens: np.ndarray) -> list[int]:
        ends = [i for i, token in enumerate(tokens) if int(token) in self.tokenizer.eos_ids]
        return [int(token) for token in tokens[: ends[0] if ends else len(tokens)]]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, *args):
    *args, rng = args
    return model.apply({"params": params}, *args, rng=rng, method="text_logits")


def visual_tokens(model: VisionLanguageModel, mask: np.ndarray, extras: ImageExtras) -> int:
    """Slots of a row, real or not."""
    if extras.pool_index is not None:
        return extras.pool_index.shape[1]
    return mask.shape[1] * math.prod(model.slot_grid)


def check_compressor(model: VisionLanguageModel, variable: bool = False) -> None:
    """Raises UserError for a compressor that this model cannot have, before anything runs.

    Args:
      model: at its nominal size of image.
      variable: see `families.base.Family`; then a larger budget is not an error yet.
    """
    if model.encoder is None:
        if model.compressor["name"] != "none":
            raise UserError(
                f"compressor.name: {model.compressor['name']}, but this model sees no images"
            )
        return
    budget, cells = model.compressor.get("budget"), math.prod(model.slot_grid)
    if variable and isinstance(budget, int) and budget > cells:
        model = model.clone(compressor={**model.compressor, "budget": cells})
    plain = model.clone(compressor={"name": "none"})
    more = set(parameter_shapes(model)) - set(parameter_shapes(plain))
    if more:
        raise UserError(
            f"compressor.name: {model.compressor['name']} has weights of its own ({min(more)}), "
            "which a published checkpoint does not hold",
            allowed="training-free methods, see docs/compressors.md",
        )


def gather(model: VisionLanguageModel, pictured: Sequence[Sequence[Pictured]]):
    """Pictures of R rows as arrays of one shape.

    Returns:
      The model at that size; images [R, M, H, W, 3], mask [R, M] and extras; for each row its
      slots and the grids of its images (`placing.Prompt`).
    """
    rows = len(pictured)
    nothing = [np.zeros(0, np.int64)] * rows
    most = max(sum(len(p.images) for p in row) for row in pictured)
    if most == 0:
        return model, None, None, NO_EXTRAS, nothing, [None] * rows
    patch = model.encoder["patch_size"]
    every = [p for row in pictured for p in row]
    size = [max(p.images.shape[axis] for p in every) for axis in (1, 2)]
    model = model.sized(*size)
    images = np.zeros((rows, most, *size, 3), np.float32)
    mask = np.zeros((rows, most), bool)
    valid = np.tile(np.array(size) // patch, (rows, most, 1)).astype(np.int32)
    for row, each in enumerate(pictured):
        at = 0
        for p in each:
            count, height, width = p.images.shape[:3]
            images[row, at : at + count, :height, :width] = p.images
            mask[row, at : at + count] = True
            valid[row, at : at + count] = p.valid
            at += count
    padded = (valid[mask] != np.array(size) // patch).any()
    extras = ImageExtras(valid=valid if padded else None)
    if every[0].pool_index is not None:
        return _gather_pooled(model, pictured, images, mask, extras)
    if every[0].padding_share is not None:
        share = np.zeros((rows, most, every[0].padding_share.shape[1]), np.float32)
        for row, each in enumerate(pictured):
            if each:
                whole = np.concatenate([p.padding_share for p in each])
                share[row, : len(whole)] = whole
        extras = extras.replace(padding_share=share)
    grid = np.array(model.slot_grid)
    index = np.arange(grid.prod()).reshape(grid)
    slots, grids = [], []
    for each in pictured:
        own, start = [np.zeros(0, np.int64)], 0
        for p in each:
            tokens = np.concatenate(
                [
                    index[:h, :w].reshape(-1) + (start + i) * grid.prod()
                    for i, (h, w) in enumerate(p.grids)
                ]
            )
            if p.slots is not None:
                tokens = p.slots + start * grid.prod()
            own.append(tokens)
            start += len(p.images)
        slots.append(np.concatenate(own))
        grids.append(np.concatenate([p.grids for p in each]) if each else None)
    if every[0].slots is not None or padded:
        has_slot = np.zeros((rows, most * grid.prod()), bool)
        for row, at in enumerate(slots):
            has_slot[row, at] = True
        extras = extras.replace(slot_mask=has_slot.reshape(rows, most, -1))
    return model, images, mask, extras, slots, grids


def _gather_pooled(model, pictured, images, mask, extras):
    """Pictures whose tokens read patches across crops (Molmo2)."""
    patches = math.prod(side // model.encoder["patch_size"] for side in images.shape[2:4])
    counts = [sum(len(p.pool_index) for p in each) for each in pictured]
    width = max(p.pool_index.shape[1] for each in pictured for p in each)
    index = np.full((len(pictured), max(counts), width), -1, np.int32)
    for row, each in enumerate(pictured):
        at = start = 0
        for p in each:
            moved = np.where(p.pool_index >= 0, p.pool_index + start * patches, -1)
            index[row, at : at + len(moved), : moved.shape[1]] = moved
            at, start = at + len(moved), start + len(p.images)
    model = model.clone(compressor={**model.compressor, "grid": (1, max(counts))})
    slots = [np.arange(count) for count in counts]
    extras = extras.replace(pool_index=index)
    return model, images, mask, extras, slots, [None] * len(pictured)


def copy_settings(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and processor settings; config.json and weights stay."""
    for path in sorted(source.iterdir()):
        # Code goes along, unread: config.json of models outside transformers names it.
        is_text = path.suffix in (".json", ".jinja", ".txt", ".model", ".py")
        ours = path.name in ("config.json", "dtypes.json") or path.name.endswith(".index.json")
        if path.is_file() and is_text and not ours:
            (target / path.name).write_bytes(path.read_bytes())


def from_pretrained(
    path: str | os.PathLike,
    *,
    compressor: Mapping[str, Any] | None = None,
    dtype: Any = "float32",
    param_dtype: Any = None,
    sharding: Callable | None = None,
    check: bool = True,
    **picture_options: Any,
) -> Pretrained:
    """Loads a published model.

    Args:
      path: a directory with config.json and safetensors (one file, or shards with an index), or
        what `efficient-vlm import` wrote.
      compressor: name, budget and options, such as dict(name="visionzip", budget=64); None for all
        visual tokens.
      dtype: of activations, "float32" or "bfloat16".
      param_dtype: of parameters; None for that of activations, "stored" for those of the files.
      sharding: see `load.load_parameters`.
      check: read all values once, and refuse NaN and infinity.
      **picture_options: of the family's picture processor, such as max_pixels (Qwen).

    Raises:
      UserError: no such model, a damaged file, or a compressor that this model cannot have.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(
            f"{path}: no such directory",
            fix="download the model's files first; names on a hub are not resolved",
        )
    for name, given in (("dtype", dtype), ("param_dtype", param_dtype or dtype)):
        if str(given) not in (*DTYPES, *(["stored"] if name == "param_dtype" else [])):
            raise UserError(f"{name}: {given!r}", allowed=", ".join(DTYPES))
    if compressor is not None and not isinstance(compressor, Mapping):
        raise UserError(
            f"compressor: {compressor!r} is not a mapping", fix='dict(name="visionzip", budget=64)'
        )
    config = read_config(directory)
    family = family_of(config)
    model = build_model(config, dtype=jnp.dtype(dtype), compressor=compressor)
    check_compressor(model, family.variable)
    kind = None if param_dtype == "stored" else param_dtype or dtype
    params, carried = open_weights(
        directory, family, config, model, dtype=kind, sharding=sharding, check=check
    )
    return Pretrained(model, params, family, config, directory, picture_options, carried)
