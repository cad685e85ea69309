"""Greedy generation in four stages, each one program: encode, compress, prefill, decode.

The stages are separate programs because they are measured separately, and because they are shared:
two compressors with one budget use the same prefill and decode, all use the same encoder.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from efficient_vlm import sharding
from efficient_vlm.compressors import VisualTokens
from efficient_vlm.errors import UserError
from efficient_vlm.models.cache import KVCache, constrained
from efficient_vlm.models.inputs import Layout, ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel

STAGES = ("encode", "compress", "prefill", "decode")


@struct.dataclass
class Generated:
    """Answers to a batch of questions.

    Attributes:
      tokens: int32 [B, Q, new_tokens] (NumPy); behind the end token everything is the end token.
      visual: the visual tokens that enter the decoder for each question, leading axis B*Q.
      sources: for each run of decoder layers at one length, where every patch is: int32 [B*Q, N],
        the index of the token that holds it, -1 for none. The last is where it ended.
      kv_bytes: of the whole batch's cache.
      seconds: per stage; "decode" is a list, one entry per step.
    """

    tokens: np.ndarray
    visual: VisualTokens
    sources: tuple[jax.Array, ...]
    kv_bytes: int
    seconds: dict[str, Any] = struct.field(pytree_node=False)


class Programs(NamedTuple):
    """What decides which program of each stage runs: equal values share one.

    Attributes:
      encode: (model, patch grid of the image, signals asked for).
      compress, prefill, decode: models.
    """

    encode: tuple[VisionLanguageModel, Any, Any]
    compress: VisionLanguageModel
    prefill: VisionLanguageModel
    decode: VisionLanguageModel


def programs_of(model: VisionLanguageModel, layout: Layout) -> Programs:
    """The stages of a model, where a method does not touch one as those of the model without it.

    An encoder is the same on one grid with the same signals, prefill for tokens that come under one
    position policy, a further token behind caches of one shape in which text starts at one place.
    """
    patches = (layout.rows, layout.columns)
    count = patches[0] * patches[1]
    method, plain = model.make_compressor(), model.with_compressor("none", count)
    encode, prefill = (model, None, None), model
    if not method.in_encoder:
        asked = tuple(sorted(method.intermediates().items()))
        encode = (plain, method.image_grid(patches), asked)
    if not method.in_decoder:
        options = {"position_policy": method.position_policy}
        prefill = plain.with_compressor("none", count, **options)
    return Programs(encode, model, prefill, plain)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def encode_stage(model: VisionLanguageModel, grid, asked, params, pictures):
    options = {"grid": grid, "asked": None if asked is None else dict(asked)}
    return model.apply({"params": params}, pictures, method="encode", **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def compress_stage(
    model: VisionLanguageModel, layout: Layout, params, visual, signals, text: ModelInputs, rng
):
    given = (visual, signals, text, layout, rng)
    return model.apply({"params": params}, *given, method="compress")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prefill_stage(
    model,
    layout: Layout,
    new_tokens: int,
    params,
    visual,
    text: ModelInputs,
    rng,
    repeated=None,
):
    options = dict(new_tokens=new_tokens, rng=rng)
    logits, cache, sources = model.apply(
        {"params": params}, visual, text, layout, **options, method="prefill"
    )
    return _chosen(logits, repeated), constrained(cache), sources


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def decode_stage(model, params, tokens, cache: KVCache, repeated=None):
    logits, cache = model.apply({"params": params}, tokens, cache, method="decode")
    return _chosen(logits, repeated), constrained(cache)


def _chosen(logits: jax.Array, repeated: tuple[Any, Any] | None) -> jax.Array:
    """The most likely token of each row; with (ids that were there [R, L], penalty), those less."""
    if repeated is not None:
        seen, penalty = repeated
        logits, vocabulary = logits.astype(jnp.float32), logits.shape[-1]
        rows, columns = jnp.arange(len(logits))[:, None], jnp.where(seen < 0, vocabulary, seen)
        there = jnp.zeros(logits.shape, bool).at[rows, columns].set(True, mode="drop")
        less = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(there, less, logits)
    return sharding.replicated(jnp.argmax(logits, axis=-1).astype(jnp.int32))


def generate(
    model: VisionLanguageModel,
    params: Any,
    inputs: ModelInputs,
    *,
    new_tokens: int,
    eos_id: int,
    rng: jax.Array | None = None,
    on_token: Callable[[np.ndarray], None] | None = None,
    repetition_penalty: float = 1.0,
    seen: Any = None,
) -> Generated:
    """The most likely answer to each question, token by token.

    Args:
      model: the model at one budget.
      params: its parameters; faster on a CPU when split by `nn.stack.unstack`. They may lie on
        a mesh that is active (`sharding.active`), also of several processes, which then call this
        alike and each get all answers, and parts of `visual` and `sources`.
      inputs: R = B*Q prompts, one a row, padded on the right, about B rows of pictures (each about
        its own without any); NumPy. Empty rows are not answered.
      new_tokens: the most tokens to generate, at least 1.
      eos_id: the token, or the tokens, that end an answer.
      rng: key for random compressors.
      on_token: called with the tokens of each step, int32 [R].
      repetition_penalty: divides logits above 0, and multiplies those below, of tokens that were
        there before (arXiv 1909.05858, section 4.1).
      seen: int32 [R, N], those that were there in the prompts, -1 for none; None for all of them.

    Raises:
      UserError: inputs that do not belong together, several prompts in a row, a prompt that ends
        with an image, or an answer that would cross the position at
        which longrope changes all frequencies or a table of positions ends.
    """
    _check_prompts(model, inputs, new_tokens)
    seconds: dict[str, Any] = {"decode": []}
    pictures, layout = inputs.pictures, model.layout(inputs.pictures)
    text = inputs.replace(pictures=None, labels=None)
    if pictures is None:
        static = Programs((model, None, None), model, model, model)
        visual = model.no_pictures(len(text.text))
        seconds["encode"] = seconds["compress"] = 0.0
    else:
        static = programs_of(model, layout)
        visual, signals = _timed(seconds, "encode", encode_stage, *static.encode, params, pictures)
        given = (visual, signals, text.replace(placement=None), rng)
        visual = _timed(seconds, "compress", compress_stage, model, layout, params, *given)
    repeated = None
    if repetition_penalty != 1.0:
        if seen is None:
            seen = np.where(text.live, text.text, -1)
        given = np.shape(seen)[1]
        seen = np.pad(np.asarray(seen, np.int32), ((0, 0), (0, new_tokens)), constant_values=-1)
        repeated = (seen, np.float32(repetition_penalty))
    token, cache, sources = _timed(
        seconds,
        "prefill",
        prefill_stage,
        static.prefill,
        layout,
        new_tokens,
        params,
        visual,
        text,
        rng,
        repeated,
    )
    kv_bytes = cache.nbytes
    ends = np.atleast_1d(np.asarray(eos_id))
    answers = np.full((token.shape[0], new_tokens), ends[0], np.int32)
    done = np.asarray(text.lengths) == 0
    for step in range(new_tokens):
        chosen = np.where(done, ends[0], np.asarray(token)).astype(np.int32)
        answers[:, step] = chosen
        if on_token is not None:
            on_token(chosen)
        done |= np.isin(chosen, ends)
        if done.all() or step == new_tokens - 1:
            break
        if repeated is not None:
            seen[:, given + step] = chosen  # No program reads it now: each is waited for.
        token, cache = _timed(
            seconds, "decode", decode_stage, static.decode, params, chosen, cache, repeated
        )
    answers = answers.reshape(inputs.picture_rows, -1, new_tokens)
    return Generated(answers, visual, sources, kv_bytes, seconds)


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


def _timed(seconds: dict[str, Any], stage: str, function: Callable, *args: Any) -> Any:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    elapsed = time.perf_counter() - start
    if isinstance(seconds.get(stage), list):
        seconds[stage].append(elapsed)
    else:
        seconds[stage] = elapsed
    return result
