"""Programs prepared while weights are read and earlier programs run."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from efficient_vlm.inference.generate import until_first_token
from efficient_vlm.inference.sampling import Sampling
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.kv_cache import CacheOptions
from efficient_vlm.runtime import paused_collection


@contextlib.contextmanager
def prepared(
    model: VisionLanguageModel,
    params: Any,
    inputs: ModelInputs,
    *,
    new_tokens: int,
    rng: jax.Array | None = None,
    sampling: Sampling | None = None,
    seen: Any = None,
    logprobs: int | None = None,
    cache: CacheOptions | Mapping[str, Any] | None = None,
) -> Iterator[Callable[[str], None]]:
    """Traces and compiles, or loads, the programs that `generate` runs up to the first token.

    One thread traces them in their order, others compile or load each while the next one is traced;
    `generate` then finds them in JAX's caches. Arguments as in `generate`, but `params` may be
    shapes and dtypes.

    Yields:
      A function that waits until the program of a stage ("encode", "compress", "prefill") is there.
      What goes wrong with a program is told when `generate` runs it.
    """
    traced = {stage: Future() for stage in ("encode", "compress", "prefill")}
    options = dict(logprobs=logprobs, cache_options=CacheOptions.of(cache))
    given = (model, params, inputs, new_tokens, rng, sampling, seen)

    def lower(stage: str, program: Callable, *args: Any, **options: Any) -> Any:
        lowered = program.lower(*args, **options)
        traced[stage].set_result(pool.submit(lowered.compile))
        return jax.tree.map(_shape, lowered.out_info)

    def trace() -> None:
        try:
            until_first_token(lower, *given, **options)
        finally:
            for program in traced.values():
                if not program.done():
                    program.set_result(None)

    def ready(stage: str) -> None:
        program = traced[stage].result()
        wait([program] if program else [])

    with ThreadPoolExecutor() as pool, paused_collection():
        pool.submit(trace)
        yield ready


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
