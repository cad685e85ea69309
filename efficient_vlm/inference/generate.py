"""Generation, token by token: the programs of `inference.stages` and the loop that runs them."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import struct

from efficient_vlm.compressors import VisualTokens
from efficient_vlm.errors import UserError
from efficient_vlm.inference.sampling import Sampling
from efficient_vlm.inference.stages import (
    Chosen,
    Programs,
    TokenLogprobs,
    compress_stage,
    decode_stage,
    encode_stage,
    prefill_stage,
    programs_of,
)
from efficient_vlm.models.cache import KVCache
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.kv_cache import CacheOptions

__all__ = ["Generated", "generate", "until_first_token"]


@struct.dataclass
class Generated:
    """Answers to a batch of questions.

    Attributes:
      tokens: int32 [B, Q, new_tokens] (NumPy); after the end of an answer all are the end token.
      visual: the visual tokens that enter the decoder for each question, leading axis B*Q.
      sources: for each run of decoder layers at one length, where every patch is: int32 [B*Q, N],
        the index of the token that holds it, -1 for none. The last is where it ended.
      kv_bytes: of the whole batch's cache.
      seconds: per stage; "decode" is a list, one entry per step.
      lengths: int32 [B, Q] (NumPy), tokens of each answer without the end token.
      logprobs: of each token, [B, Q, new_tokens] (NumPy), including the end token; NaN and -1 after
        it. None if not requested.
      stopped: what ended each row in `Pretrained.run`: a stop string, a stop token, or None.
    """

    tokens: np.ndarray
    visual: VisualTokens
    sources: tuple[jax.Array, ...]
    kv_bytes: int
    seconds: dict[str, Any] = struct.field(pytree_node=False)
    lengths: np.ndarray | None = None
    logprobs: TokenLogprobs | None = None
    stopped: tuple[str | int | None, ...] | None = struct.field(pytree_node=False, default=None)


def generate(
    model: VisionLanguageModel,
    params: Any,
    inputs: ModelInputs,
    *,
    new_tokens: int,
    eos_id: int,
    rng: jax.Array | None = None,
    on_token: Callable[[np.ndarray], np.ndarray | None] | None = None,
    sampling: Sampling | None = None,
    seen: Any = None,
    logprobs: int | None = None,
    cache: CacheOptions | Mapping[str, Any] | None = None,
    ready: Callable[[str], None] | None = None,
) -> Generated:
    """An answer to each question, token by token: by default the most likely one.

    Args:
      model: the model at one budget.
      params: its parameters, of which those outside the decoder ("language") are needed first;
        faster on a CPU when split by `nn.stack.unstack`. They may lie on
        a mesh that is active (`sharding.active`), also of several processes, which then call this
        alike and each get all answers, and parts of `visual` and `sources`.
      inputs: R = B*Q prompts, one a row, padded on the right, about B rows of pictures (each about
        its own without any); NumPy. Empty rows are not answered.
      new_tokens: the most tokens to generate, at least 1.
      eos_id: the token, or the tokens, that end an answer.
      rng: key for random compressors.
      on_token: called with the tokens of each step, int32 [R]; may return bool [R], the answers
        that end with these tokens.
      sampling: settings of R rows, see `Sampling.of`; None for the most likely token.
      seen: int32 [R, N], tokens of the prompts that penalties count, -1 for none; None for all.
      logprobs: the number of alternatives to list for each token, with log-probabilities; None for
        no log-probabilities.
      cache: how keys and values are stored, see `kv_cache.CacheOptions`.
      ready: called before a stage up to the first token, with its name; see `prepare.prepared`.

    Raises:
      UserError: inputs that do not belong together, several prompts in a row, a prompt that ends
        with an image, an answer that would cross the position at which longrope changes all
        frequencies or a table of positions ends, or an unknown kind of cache.
    """
    cache_options = CacheOptions.of(cache)
    seconds: dict[str, Any] = {"encode": 0.0, "compress": 0.0, "decode": []}
    options = dict(logprobs=logprobs, cache_options=cache_options)
    visual, (chosen, cache, sources), decoder = until_first_token(
        functools.partial(_timed, seconds, ready=ready),
        *(model, params, inputs, new_tokens, rng, sampling, seen),
        **options,
    )
    kv_bytes, params = cache.nbytes, dict(params)
    answers = _Answers(np.atleast_1d(np.asarray(eos_id)), inputs.lengths, new_tokens, on_token)
    while not answers.add(chosen):
        given = (decoder, params, answers.last, cache, chosen.draws)
        chosen, cache = _timed(seconds, "decode", decode_stage, *given, logprobs=logprobs)
    rest = dict(visual=visual, sources=sources, kv_bytes=kv_bytes, seconds=seconds)
    rows = inputs.picture_rows
    return answers.generated((rows, len(inputs.text) // rows), **rest)


def until_first_token(
    call: Callable[..., Any],
    model: VisionLanguageModel,
    params: Any,
    inputs: ModelInputs,
    new_tokens: int,
    rng: jax.Array | None,
    sampling: Sampling | None,
    seen: Any,
    **options: Any,
) -> tuple[VisualTokens, tuple[Chosen, KVCache, tuple[jax.Array, ...]], VisionLanguageModel]:
    """The programs up to the first token, in order; arguments as in `generate`.

    Args:
      call: (stage, program, *arguments, **options) -> its results: runs a program, or only prepares
        it (`prepare.prepare`).
      **options: of `prefill_stage`.

    Returns:
      What enters the decoder, the results of prefill, and the model of `decode_stage`.
    """
    _check_prompts(model, inputs, new_tokens)
    pictures, layout = inputs.pictures, model.layout(inputs.pictures)
    text = inputs.replace(pictures=None, labels=None)
    if pictures is None:
        static = Programs((model, None, None), model, model, model)
        visual = model.no_pictures(len(text.text))
    else:
        static = programs_of(model, layout)
        visible = {name: params[name] for name in params if name != "language"}
        visual, signals = call("encode", encode_stage, *static.encode, visible, pictures)
        given = (visual, signals, text.replace(placement=None), rng)
        params = dict(params)
        visual = call("compress", compress_stage, model, layout, params, *given)
    if sampling is None or not sampling.needs_history:
        seen = None
    elif seen is None:
        seen = np.where(text.live, text.text, -1)
    given = (layout, new_tokens, dict(params), visual, text, rng, sampling, seen)
    return visual, call("prefill", prefill_stage, static.prefill, *given, **options), static.decode


class _Answers:
    """The answers of R rows as they grow, and which of them have ended.

    Attributes:
      last: int32 [R], the newest tokens; the end token of rows that have ended.
    """

    def __init__(self, ends: np.ndarray, lengths: Any, new_tokens: int, on_token: Callable | None):
        self._ends, self._on_token = ends, on_token
        self._done = np.asarray(lengths) == 0
        self._tokens = np.full((len(self._done), new_tokens), ends[0], np.int32)
        self._lengths = np.zeros(len(self._done), np.int32)
        self._step, self._logprobs = 0, []
        self.last = self._tokens[:, 0]

    def add(self, chosen: Chosen) -> bool:
        """Adds one token to each row; returns whether that was the last."""
        if chosen.logprobs is not None:
            self._logprobs.append(jax.tree.map(self._blank, chosen.logprobs))
        self.last = np.where(self._done, self._ends[0], np.asarray(chosen.tokens)).astype(np.int32)
        self._tokens[:, self._step] = self.last
        ended = None if self._on_token is None else self._on_token(self.last)
        self._done |= np.isin(self.last, self._ends)
        self._lengths += ~self._done
        # The token that completes a stop string belongs to the answer.
        self._done |= False if ended is None else ended
        self._step += 1
        return self._done.all() or self._step == self._tokens.shape[1]

    def _blank(self, x: jax.Array) -> np.ndarray:
        """x [R, ...] with NaN or -1 in rows that have ended."""
        x = np.asarray(x)
        done = self._done.reshape(-1, *(1,) * (x.ndim - 1))
        return np.where(done, np.nan if x.dtype.kind == "f" else -1, x).astype(x.dtype)

    def generated(self, shape: tuple[int, int], **more: Any) -> Generated:
        """All answers with axes `shape` for the rows; `more` are the other fields."""
        logprobs = None
        if self._logprobs:
            # Steps that were not needed, because all answers had ended.
            self._done[:] = True
            blank = jax.tree.map(self._blank, self._logprobs[0])
            missing = [blank] * (self._tokens.shape[1] - self._step)

            def together(*steps: np.ndarray) -> np.ndarray:
                x = np.stack(steps, axis=1)
                return x.reshape(*shape, *x.shape[1:])

            logprobs = jax.tree.map(together, *self._logprobs, *missing)
        tokens = self._tokens.reshape(*shape, self._tokens.shape[1])
        return Generated(tokens, lengths=self._lengths.reshape(shape), logprobs=logprobs, **more)


def _check_prompts(model, inputs: ModelInputs, new_tokens: int) -> None:
    inputs.check(model.layout(inputs.pictures))
    if inputs.questions > 1:
        raise UserError(
            f"inputs: {inputs.questions} questions packed in a row, but each answer needs its own",
            fix="inputs.unpacked()",
        )
    placement, lengths = inputs.placement, np.asarray(inputs.lengths)
    if placement is None:
        return
    rows = np.flatnonzero(lengths)
    last = np.asarray(placement.text_index)[rows, lengths[rows] - 1]
    ends = np.asarray(placement.next_index)[rows]
    if (last + 1 != ends).any():
        raise UserError(
            f"prompt {rows[(last + 1 != ends).argmax()]}: ends with an image",
            fix="put text behind it, such as the beginning of the answer",
        )
    longest = int(np.asarray(placement.next_position)[rows].max(initial=0))
    if model.decoder.get("position") == "learned":
        _check_room(model.decoder["max_positions"] - longest, new_tokens, "learned positions")
    scaling = model.decoder.get("rope_scaling")
    if scaling is not None and scaling["type"] == "longrope":
        # Keys in the cache have turned by the frequencies of a short text.
        room = scaling["original_length"] - longest
        closes_gaps = model.make_compressor().position_policy == "reindex"
        if room >= 0 or closes_gaps:
            short = "longrope's frequencies of short texts"
            _check_room(room, new_tokens, short, ", or a longer prompt")


def _check_room(room: int, new_tokens: int, what: str, more: str = "") -> None:
    """The last token of an answer is never read, so it needs no place."""
    if room < new_tokens - 1:
        raise UserError(
            f"new_tokens: {new_tokens}, but {what} end {room} tokens behind this prompt",
            allowed=f"up to {room + 1}{more}",
        )


def _timed(
    seconds: dict[str, Any],
    stage: str,
    function: Callable,
    *args: Any,
    ready: Callable[[str], None] | None = None,
    **options: Any,
) -> Any:
    if ready is not None:
        ready(stage)
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args, **options))
    elapsed = time.perf_counter() - start
    if isinstance(seconds.get(stage), list):
        seconds[stage].append(elapsed)
    else:
        seconds[stage] = elapsed
    return result
