"""A published model ready to be asked: weights, tokenizer, pictures and prompt in one object."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from efficient_vlm.adapt.build import is_adapted, merge
from efficient_vlm.checkpoints.safetensors_write import writing
from efficient_vlm.errors import UserError, first_line, short
from efficient_vlm.families import generation_config
from efficient_vlm.families.card import Card, copy_terms
from efficient_vlm.families.card_facts import of_model
from efficient_vlm.families.checks import check_compressor, check_parameters, refuse_own_weights
from efficient_vlm.families.load import known_dtype
from efficient_vlm.families.peft_read import load_adapter
from efficient_vlm.families.peft_write import save_adapter
from efficient_vlm.families.processor import Processor
from efficient_vlm.families.save import copy_settings, export
from efficient_vlm.families.weights import Arriving, Weights
from efficient_vlm.inference import answers
from efficient_vlm.inference.generate import Generated, generate
from efficient_vlm.inference.options import SamplingOptions, one_each
from efficient_vlm.inference.prepare import prepared
from efficient_vlm.inference.programs import bounded_jit
from efficient_vlm.inference.requests import Requests
from efficient_vlm.inference.sampling import Sampling
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.kv_cache import CacheOptions
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.conversation import Conversation, is_one
from efficient_vlm.processing.hub_tokenizer import read_json
from efficient_vlm.processing.request import Request


class Pretrained(Requests):
    """A published model. Made by `from_pretrained`.

    Attributes:
      model: a `VisionLanguageModel`; its compressor is the one in use.
      weights: its parameters, see `families.weights.Weights`.
      processor: tokenizer, chat template and pictures.
      family, config, directory: what it is, its config.json, and where it came from.
      source: where its files came from; see `hub.Source`.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        weights: Weights,
        processor: Processor,
        carried: Mapping[str, np.ndarray],
        changed: bool = False,
    ):
        self.model, self.weights, self.processor, self._carried = model, weights, processor, carried
        self.family, self.config = processor.family, processor.config
        self.directory = processor.directory
        self.source = processor.source
        self._changed = changed

    # --- parts that are read when they are needed ------------------------------------------------

    @property
    def params(self) -> Any:
        """Parameters in split form (`nn.stack.unstack`).

        On a CPU they are a copy of most weights, unless they are asked for before the first answer.
        """
        return self.weights.split

    @property
    def fused(self) -> Any:
        """Parameters as `generate` uses them: products of one input joined (`nn.fuse`)."""
        return self.weights.fused

    @property
    def _dtype(self) -> Any:
        """Of the parameters."""
        floating = (x.dtype for x in jax.tree.leaves(self.params))
        return next(kind for kind in floating if jnp.issubdtype(kind, jnp.floating))

    @functools.cached_property
    def _penalty(self) -> float:
        return generation_config.repetition_penalty(self.directory)

    # --- what a user does ------------------------------------------------------------------------

    def with_compressor(self, name: str, budget: int | None = None, **options: Any) -> "Pretrained":
        """The same weights with another compressor; see `compressors.build`."""
        compressor = {"name": name, **options}
        if budget is not None:
            compressor["budget"] = budget
        model = self.model.clone(compressor=compressor)
        # Files of a hub, which are read later, hold no weights of compressors.
        held = self.weights.split if self.weights.reader is None else {}
        check_compressor(model, self.family.variable, held)
        return self.with_model(model)

    def with_model(self, model: VisionLanguageModel) -> "Pretrained":
        """The same weights in a model with another compressor or dtype."""
        return Pretrained(model, self.weights, self.processor, self._carried, self._changed)

    def with_params(self, params: Any) -> "Pretrained":
        """The same model with other weights, for example after fine-tuning.

        Args:
          params: a tree like `params`, split (or stacked, as `init` gives it).

        Raises:
          UserError: parameters that are missing, unknown or of another shape.
        """
        params = nn.unbox(params)
        check_parameters(self.model, params)
        return Pretrained(self.model, Weights(params), self.processor, self._carried, True)

    def generate(
        self,
        prompt: Conversation | Sequence[Conversation],
        images: Any = None,
        *,
        max_new_tokens: int = 64,
        stream: Callable[[str], None] | None = None,
        rng: jax.Array | None = None,
        cache: Mapping[str, Any] | None = None,
        do_sample: bool | None = None,
        **sampling: Any,
    ) -> Any:
        """Answers a question, or several; unless told otherwise with the most likely next tokens.

        Args:
          prompt: a question, or a conversation: [{"role": "user", "content": [{"type": "image"},
            {"type": "text", "text": ...}]}, ...], see `messages.read_messages`; or a list of
            questions and conversations. A conversation that ends with the assistant's turn is
            continued: the answer goes on from its text.
          images: for one prompt a picture (a path, bytes, a Pillow image, a uint8 array [H, W, 3];
            see `pictures.base.load_picture`) or a list of them, in the order of the conversation;
            for several a list of lists. None for none, or where messages name them.
          max_new_tokens: the most tokens of an answer.
          stream: called with pieces of the answer to a single prompt as they come, never with a
            part of a stop string.
          rng: key for random compressors; `seed` is that of the answers.
          cache: kind, page and dtype of `kv_cache.CacheOptions`.
          do_sample: True takes temperature, top_k, top_p and min_p that are not given from
            generation_config.json, as transformers does; of which else only the repetition penalty
            and the tokens and strings that end an answer are taken. False allows no temperature.
          **sampling: fields of `SamplingOptions`: temperature, top_k, top_p, min_p,
            repetition_penalty, frequency_penalty, presence_penalty, logit_bias, seed, stop,
            stop_token_ids, logprobs. Each is one value, or a list with one for each prompt; see
            `options.one_each`. Prompts with one seed draw alike, whatever else is in the batch.
            `stop` replaces the stop_strings of generation_config.json, [] for none.

        Returns:
          The answer, or a list of answers: strings, or with `logprobs` for any of them `Answer`s,
          which have tokens and log-probabilities.

        Raises:
          UserError: a picture, a prompt or an option that cannot be used.
        """
        single = is_one(prompt)
        if stream is not None and not single:
            raise UserError(f"stream: {len(prompt)} prompts", fix="stream one prompt at a time")
        if single and images is not None:
            images = [images if isinstance(images, list | tuple) else [images]]
        prompts = [prompt] if single else list(prompt)
        options = self.sampling_options(len(prompts), do_sample, sampling)
        shared = dict(max_new_tokens=max_new_tokens, stream=stream, rng=rng, cache=cache)
        out = self._run(prompts, images, options, **shared)
        found: list[Any] = self.answers(out)
        if any(option.logprobs is not None for option in options):
            found = answers.answers(self.tokenizer, out, options)
        return found[0] if single else found

    def answers(self, out: Generated) -> list[str]:
        """The text of each answer up to its end."""
        return answers.texts(self.tokenizer, out)

    def run(
        self,
        questions: Sequence[Conversation],
        images: Sequence[Sequence[Any]] | None = None,
        *,
        max_new_tokens: int = 64,
        stream: Callable[[str], None] | None = None,
        rng: jax.Array | None = None,
        cache: Mapping[str, Any] | None = None,
        do_sample: bool | None = None,
        **sampling: Any,
    ) -> Generated:
        """As `generate` for several questions, with tokens, times and cache sizes."""
        options = self.sampling_options(len(questions), do_sample, sampling)
        shared = dict(max_new_tokens=max_new_tokens, stream=stream, rng=rng, cache=cache)
        return self._run(questions, images, options, **shared)

    # --- training --------------------------------------------------------------------------------

    def finetune(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        steps: int,
        learning_rate: float = 1e-4,
        adapt: Mapping[str, Any] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        data: Mapping[str, Any] | None = None,
        optimizer: Mapping[str, Any] | None = None,
        distil: Mapping[str, Any] | None = None,
        preference: Mapping[str, Any] | None = None,
        compressor: Mapping[str, Any] | None = None,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> "Pretrained":
        """A copy of this model that has learnt from conversations, with the compressor in use.

        Runs that are kept in files, resumed and spread over devices: `efficient-vlm train`.

        Args:
          rows: {"images": [...], "messages": [{"role", "content"}, ...]}, with "<image>" in the
            text or parts of type "image"; pictures as in `generate`. Several rows share a row of a
            batch where that changes nothing.
          steps: optimizer steps.
          learning_rate: its peak, after a warm-up of a tenth of the steps; then a cosine to 0.
          adapt: fields of `adapt.config.AdaptConfig`, such as dict(name="lora", rank=8); None
            trains all parameters.
          batch_size: rows of a batch, of about `pack_tokens` tokens each.
          seed: of initial values and of the order of the rows.
          data: fields of `data.config.DataConfig`: max_length, max_images, pack, pack_tokens.
          optimizer: fields of `train.optimizer.OptimizerConfig`.
          distil: fields of `train.objective.DistilConfig`, such as dict(kind="forward_kl"):
            with the compressor in use adapters learn what this model says of all visual tokens; or,
            with teacher=VLM (a loaded model, a directory or a name on a hub) and any `adapt`, what
            another one with the same tokenizer says.
          preference: fields of `train.objective.PreferenceConfig`, such as dict(name="dpo"): rows
            are {"images": [...], "prompt", "chosen", "rejected"}, see `data.preference_rows`.
          compressor: name, budget and options, in place of the one in use; a trained one, such as
            dict(name="visionselector", budget=64), starts with fresh weights.
          log: called with each step's number and metrics in place of a progress bar.

        Returns:
          The trained model; with adapters, which `merge` makes part of the weights.

        Raises:
          UserError: rows or settings that cannot be used, or a loss that is not finite.
        """
        given = dict(data=data or {}, optimizer=optimizer or {}, distil=distil or {}, log=log)
        given |= dict(seed=seed, preference=preference or {}, compressor=compressor)
        given |= dict(steps=steps, learning_rate=learning_rate, batch_size=batch_size, adapt=adapt)
        from efficient_vlm.inference.finetune import finetune

        model, params = finetune(self, rows, **given)
        return Pretrained(model, Weights(unstack(params)), self.processor, self._carried, True)

    def merge(self) -> "Pretrained":
        """The same model with its adapters as part of the weights, and quantised weights plain."""
        if not is_adapted(self.params):
            return self
        return self.with_params(merge(self.params, self._dtype))

    def with_adapter(self, directory: str | os.PathLike) -> "Pretrained":
        """The model with an adapter that PEFT has written; see `peft_read.load_adapter`."""
        parts = (self.family, self.config, self.model, self.params)
        params = load_adapter(directory, *parts)
        return Pretrained(self.model, Weights(params), self.processor, self._carried, True)

    def save_adapter(self, directory: str | os.PathLike) -> tuple[Path, ...]:
        """Writes the adapters alone, as PEFT does; see `peft_write.save_adapter`."""
        refuse_own_weights(self.model)
        Path(directory).mkdir(parents=True, exist_ok=True)
        name = self.source.name or str(self.directory)
        parts = (self.family, self.config, self.model, self.params)
        return save_adapter(directory, *parts, base_name=name)

    def loss(self, rows: Sequence[Mapping[str, Any]], **data: Any) -> float:
        """Mean loss per target token, in nats.

        Args:
          rows: see `finetune`; a row that cannot be used is an error.
          **data: fields of `data.config.DataConfig`: batch_size, max_length, pack_tokens.
        """
        from efficient_vlm.inference.finetune import loss

        return loss(self, rows, data)

    def sampling_options(
        self, count: int, do_sample: bool | None, given: Mapping[str, Any]
    ) -> list[SamplingOptions]:
        """What each of `count` prompts asks of sampling; see `generate`."""
        if do_sample not in (None, True, False):
            raise UserError(f"do_sample: {do_sample!r:.40}", allowed="True, False")
        given = {name: value for name, value in given.items() if value is not None}
        files = generation_config.sampling(self.directory) if do_sample else {}
        files = {name: value for name, value in files.items() if name not in given}
        if "stop" not in given:
            files["stop"] = generation_config.stop_strings(self.directory)
        try:
            SamplingOptions(**files)
        except UserError as error:
            raise UserError(
                f"{self.directory / 'generation_config.json'}: {first_line(error)}",
                fix="correct it there, or give a value here, which comes first",
            ) from None
        options = one_each(count, {"repetition_penalty": self._penalty, **files, **given})
        if do_sample is False and any(option.temperature > 0 for option in options):
            raise UserError("do_sample: False, but a temperature is given", fix="leave one out")
        return options

    def _run(self, questions, images, options, *, max_new_tokens, stream, rng, cache) -> Generated:
        whole = isinstance(max_new_tokens, int | np.integer) and max_new_tokens is not True
        if not whole or max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {short(max_new_tokens)}", allowed="1, 2, 3, ...")
        cache = CacheOptions.of(cache)
        request = self.request(questions, images)
        vocabulary = self.model.decoder.get("head_size") or self.model.vocab_size
        sampling = Sampling.of(options, vocabulary)
        watch = answers.Watch(self.tokenizer, options, stream)
        given = dict(
            new_tokens=int(max_new_tokens),
            rng=rng,
            # Where nothing changes the likeliest token, nothing of it is in the program.
            sampling=sampling if jax.tree.leaves(sampling) else None,
            seen=self._seen(request),
            logprobs=max((o.logprobs for o in options if o.logprobs is not None), default=None),
            cache=cache,
        )
        model, inputs, reader = request.model, request.inputs, self.weights.reader
        ends = dict(eos_id=self.tokenizer.eos_ids or (-1,), on_token=watch)
        if reader is None:
            return watch.finish(generate(model, self.fused, inputs, **given, **ends))
        # The encoder runs while the decoder is read and its programs are prepared.
        with prepared(model, reader.abstract, inputs, **given) as ready:
            out = generate(model, Arriving(reader), inputs, ready=ready, **given, **ends)
        self.weights.finish()
        return watch.finish(out)

    def logits(self, request: Request, rng: jax.Array | None = None) -> jax.Array:
        """Next-token logits behind each text token of a request: float32 [R, S, vocab]."""
        return _logits(request.model, self.fused, request.inputs, rng)

    def save(
        self,
        directory: str | os.PathLike,
        *,
        card: Card | None = None,
        command: str | None = None,
        **options: Any,
    ) -> tuple[Path, ...]:
        """Writes the model in Hugging Face's layout, with tokenizer and settings beside it.

        README.md is its model card; that of the base becomes README_base.md.

        Args:
          directory: to write to, not the one it came from.
          card: what is known of the model; None for what the model itself knows.
          command: that made it, for a card of its own.
          **options: dtype and max_shard_bytes of `save.export`.
        """
        directory = Path(directory)
        refuse_own_weights(self.model)
        if directory.resolve() == self.directory.resolve():
            raise UserError(f"{directory}: the checkpoint came from there", fix="name another one")
        files = export(
            directory,
            self.family,
            # As it was read: without the defaults that were filled in.
            read_json(self.directory / "config.json"),
            self.model,
            self.params,
            carried=self._carried,
            **options,
        )
        with writing(directory):
            copy_settings(self.directory, directory)
            copy_terms(self.directory, directory)
            (card or self._card(command, options.get("dtype"))).write(directory)
        return files

    def _card(self, command: str | None, dtype: Any) -> Card:
        leaves = jax.tree.leaves(self.params)
        kinds = sorted({str(leaf.dtype) for leaf in leaves})
        return of_model(
            self.source,
            self.family,
            self.model,
            changed=self._changed,
            params=sum(leaf.size for leaf in [*leaves, *self._carried.values()]),
            dtype=", ".join(kinds) if dtype is None else str(known_dtype("dtype", dtype)),
            command=command,
        )


@bounded_jit(1)
def _logits(model, params, inputs, rng):
    return model.apply({"params": params}, inputs, rng=rng).logits
