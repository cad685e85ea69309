"""What a user may ask of one request's sampling, checked, and a batch of that as arrays."""

import dataclasses
import math
import numbers
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_vlm import checks
from efficient_vlm.errors import UserError
from efficient_vlm.inference.stopping import stop_strings, stop_tokens

__all__ = ["SamplingOptions", "columns", "one_each"]

MAX_BIASES = 1024
MAX_LOGPROBS = 20  # As OpenAI's and vLLM's.
_FREQUENCY = dict(low=-2, high=2, fix="0 changes nothing; above 0 repeats less")
# Field -> limits and fix, see `checks.number` and `checks.whole`.
_NUMBERS = {
    "temperature": dict(low=0, high=100, fix="0 takes the likeliest token, 1 draws as trained"),
    "top_p": dict(above=0, high=1, fix="1 turns it off; top_k=1 keeps one token"),
    "min_p": dict(low=0, high=1, fix="0 turns it off; 0.05 is usual"),
    "repetition_penalty": dict(above=0, below=1e30, fix="1 changes nothing; above 1 repeats less"),
    "frequency_penalty": _FREQUENCY,
    "presence_penalty": _FREQUENCY,
}
_WHOLE = {
    "top_k": dict(low=0, high=2**31 - 1, fix="0 turns it off"),
    "seed": dict(low=0, high=2**32 - 1, fix="leave it out for another answer each time"),
    "logprobs": dict(low=0, high=MAX_LOGPROBS, fix="leave it out for none"),
}


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How one answer is drawn and where it ends; see `inference.sampling` for the order of steps.

    None stands for the default of a field. The penalties and the bias change greedy answers, too.

    Attributes:
      temperature: 0 for the most likely token; others divide the logits.
      top_k: draws from the k most likely tokens; 0 for all.
      top_p: draws from the smallest set of most likely tokens as likely as this; 1 for all.
      min_p: draws from tokens at least this times as likely as the most likely one; 0 for all.
      repetition_penalty: divides logits above 0, and multiplies others, of tokens that came before.
      frequency_penalty: taken from a token's logit for each time that it was generated.
      presence_penalty: taken from the logits of all tokens that were generated.
      logit_bias: added to logits, id -> number; -inf for never.
      seed: of the draws; None for another one each time.
      stop: strings that end the answer and are no part of it; becomes a tuple.
      stop_token_ids: tokens that do, beside the model's own; becomes a tuple.
      logprobs: how many alternatives are listed for each token; None for no log-probabilities.

    Raises:
      UserError: a value that is not allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    # A mapping cannot be hashed; requests that differ in it alone may share a hash.
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None

    def __post_init__(self):
        neutral = {field.name: field.default for field in dataclasses.fields(self)}
        checked = {
            "logit_bias": _logit_bias(self.logit_bias),
            "stop": stop_strings(self.stop),
            "stop_token_ids": stop_tokens(self.stop_token_ids),
        }
        for name, limits in (_NUMBERS | _WHOLE).items():
            check = checks.whole if name in _WHOLE else checks.number
            value = check(name, getattr(self, name), none=True, **limits)
            checked[name] = neutral[name] if value is None else value
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def columns(options: Sequence[SamplingOptions], vocab_size: int) -> dict[str, np.ndarray]:
    """The fields of `Sampling` that a batch of requests uses, one row each, in their order.

    A row that draws and has no seed gets one from the operating system.

    Raises:
      UserError: a bias for, or a stop at, a token that the vocabulary does not have.
    """
    for option in options:
        _check_ids("logit_bias", option.logit_bias, vocab_size)
        _check_ids("stop_token_ids", option.stop_token_ids, vocab_size)
    found: dict[str, np.ndarray] = {}
    for name, default in ((f.name, f.default) for f in dataclasses.fields(SamplingOptions)):
        if name not in _NUMBERS and name != "top_k":
            continue
        # A greedy row draws nothing: what it says of drawing must not make the others sort.
        draws = name in ("top_k", "top_p", "min_p")
        row = [default if draws and o.temperature == 0 else getattr(o, name) for o in options]
        if any(value != default for value in row):
            found[name] = np.asarray(row, np.float32)
    if "top_k" in found:
        row = [min(o.top_k, vocab_size) if o.temperature > 0 else 0 for o in options]
        found["top_k"] = np.asarray(row, np.int32)
    if "temperature" in found:
        seeds = [secrets.randbits(32) if o.seed is None else o.seed for o in options]
        found["seed"] = np.asarray(seeds, np.uint32)
    return found | _biases(options)


def one_each(count: int, given: Mapping[str, Any]) -> list[SamplingOptions]:
    """The options of each of `count` requests.

    Args:
      count: of requests.
      given: fields of `SamplingOptions`: each one value for all, or a list or tuple with one for
        each. A list of strings as `stop`, or of ids as `stop_token_ids`, is for all; of lists, it
        is for each.

    Raises:
      UserError: an unknown field, another number of values, or a value that is not allowed.
    """
    names = [field.name for field in dataclasses.fields(SamplingOptions)]
    checks.known_fields("sampling", given, names)
    rows = [{} for _ in range(count)]
    for name, value in given.items():
        for row, own in zip(rows, _spread(name, value, count), strict=True):
            row[name] = own
    return [SamplingOptions(**row) for row in rows]


def _spread(name: str, value: Any, count: int) -> Sequence[Any]:
    lists = (list, tuple, np.ndarray)
    several = isinstance(value, lists)
    if several and name in ("stop", "stop_token_ids"):
        several = any(one is None or isinstance(one, lists) for one in value)
    if not several:
        return [value] * count
    if len(value) != count:
        raise UserError(
            f"{name}: {len(value)} values for {count} prompts",
            allowed="one value for all, or a list with one for each prompt",
        )
    return list(value)


def _biases(options: Sequence[SamplingOptions]) -> dict[str, np.ndarray]:
    longest = max((len(o.logit_bias) for o in options), default=0)
    if not longest:
        return {}
    # A power of two: requests with a few more or less share a program.
    shape = (len(options), 1 << (longest - 1).bit_length())
    ids, values = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for row, option in enumerate(options):
        count = len(option.logit_bias)
        ids[row, :count] = list(option.logit_bias)
        values[row, :count] = list(option.logit_bias.values())
    return {"bias_ids": ids, "bias_values": values}


def _logit_bias(given: Any) -> dict[int, float]:
    allowed = "ids, whole numbers from 0, each with a number from -1e30 to 1e30, or -inf"
    fix = "-100 all but bans a token, 100 all but forces it"
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"logit_bias: {given!r:.40}", allowed=allowed, fix="{17: -100} bans 17")
    if len(given or ()) > MAX_BIASES:
        raise UserError(
            f"logit_bias: {len(given)} tokens",
            allowed=f"up to {MAX_BIASES}",
            fix="leave out those that change the answer least",
        )
    for token, value in (given or {}).items():
        id_like = isinstance(token, numbers.Integral) and not isinstance(token, bool)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        in_range = number and (-1e30 <= value <= 1e30 or value == -math.inf)
        if not id_like or not 0 <= token < 2**31 or not in_range:
            problem = f"logit_bias: {value!r:.40} for {token!r:.40}"
            raise UserError(problem, allowed=allowed, fix=fix)
    return {int(token): float(value) for token, value in (given or {}).items()}


def _check_ids(field: str, ids: Any, vocab_size: int) -> None:
    for token in ids:
        if token >= vocab_size:
            raise UserError(
                f"{field}: {token}",
                allowed=f"ids below {vocab_size}, the model's vocabulary",
                fix="look the id up in the model's own tokenizer",
            )
