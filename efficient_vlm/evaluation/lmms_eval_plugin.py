"""Our models in lmms-eval: `lmms-eval --model efficient_vlm --model_args pretrained=DIR,...`.

An entry point of the group "lmms_eval.models" makes the model known there. Arguments: `pretrained`
(a folder), `compressor` and `budget`, `dtype`; others are options of the family's pictures, such as
`split=false`. Needs lmms-eval, which this package does not install.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from efficient_vlm.errors import UserError, short
from efficient_vlm.inference.load import from_pretrained

MANIFEST = ModelManifest("efficient_vlm", simple_class_path=f"{__name__}.EfficientVLM")
# Where a task says nothing, as most models of lmms-eval do.
_NEW_TOKENS = 1024
_SAMPLING = ("temperature", "top_p", "top_k")


class EfficientVLM(lmms):
    """A published model with a compressor, as lmms-eval runs models."""

    def __init__(
        self,
        pretrained: str,
        compressor: str | None = None,
        budget: int | str | None = None,
        dtype: str = "float32",
        batch_size: int | str = 1,
        device: str | None = None,
        seed: int = 0,
        **pictures: Any,
    ):
        """Loads the model.

        Args:
          pretrained: folder with config.json and weights.
          compressor, budget: method and visual tokens; None for all tokens.
          dtype: "float32" or "bfloat16".
          batch_size: questions at once.
          device: ignored; JAX decides.
          seed: of answers that a task wants drawn.
          **pictures: options of the family's picture processor.
        """
        super().__init__()
        del device
        self._batch_size, self._seed = int(batch_size), int(seed)
        options = {name: _literal(value) for name, value in pictures.items() if value is not None}
        self._vlm = from_pretrained(pretrained, dtype=dtype, **options)
        if compressor is not None:
            count = None if budget is None else int(budget)
            self._vlm = self._vlm.with_compressor(compressor, count)

    @property
    def batch_size(self) -> int:
        """Questions at once."""
        return self._batch_size

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; those with equal settings run together."""
        answers: list[str | None] = [None] * len(requests)
        for batch in self._batches(requests):
            asked = [requests[k].args for k in batch]
            questions, images = zip(*(self._asked(*args) for args in asked), strict=True)
            found = self._vlm.generate(
                list(questions), list(images), **_generation(asked[0][1], self._seed)
            )
            for k, args, answer in zip(batch, asked, found, strict=True):
                answers[k] = answer
                self.cache_hook.add_partial("generate_until", (args[0], args[1]), answer)
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Raises UserError: tasks that compare likelihoods are not served."""
        raise UserError(
            "lmms-eval: this task compares likelihoods of given answers, which is not served",
            fix="take a task that generates (output_type: generate_until)",
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Raises UserError: tasks of several rounds are not served."""
        raise UserError(
            "lmms-eval: this task asks in several rounds, which is not served",
            fix="take a task that generates (output_type: generate_until)",
        )

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Places of requests with equal settings, those of alike length beside each other."""
        alike: dict[str, list[int]] = {}
        for k, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(k)
        for places in alike.values():
            places.sort(key=lambda k: len(requests[k].args[0]))
            for start in range(0, len(places), self._batch_size):
                yield places[start : start + self._batch_size]

    def _asked(self, context, settings, visuals_of, doc_id, task, split) -> tuple[Any, list[Any]]:
        """The question, and its pictures in order."""
        del settings
        visuals = visuals_of(self.task_dict[task][split][doc_id]) or []
        images = [each for each in (visuals if isinstance(visuals, list) else [visuals]) if each]
        strange = [each for each in images if not isinstance(each, Image.Image | str)]
        if strange:
            raise UserError(f"lmms-eval: a visual {short(strange[0])}", allowed="pictures")
        return context.replace("<image>", "").strip(), images


def _generation(settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Options of `Pretrained.generate` from the generation_kwargs of a task."""
    found: dict[str, Any] = {"max_new_tokens": int(settings.get("max_new_tokens") or _NEW_TOKENS)}
    until = settings.get("until")
    if until:
        found["stop"] = [until] if isinstance(until, str) else list(until)
    if settings.get("do_sample") or (settings.get("temperature") or 0) > 0:
        given = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        found |= {"seed": seed, **given}
        found["do_sample"] = True
    return found


def _literal(value: Any) -> Any:
    """A number or a truth value that a command line wrote as text."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    with contextlib.suppress(ValueError):
        return int(value)
    return value
