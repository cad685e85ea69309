"""Programs prepared while weights are read."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from efficient_vlm.inference.generate import until_first_token
from efficient_vlm.inference.sampling import Sampling
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.kv_cache import CacheOptions
from efficient_vlm.runtime import paused_collection


def prepare(
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
) -> None:
    """Traces and compiles, or loads, the programs that `generate` runs up to the first token.

    A thread compiles or loads each program while the next one is traced; `generate` then finds them
    in JAX's caches. Arguments as in `generate`, but `params` may be shapes and dtypes.

    Raises:
      UserError: as `generate`.
    """
    loading: list[Future] = []
    with ThreadPoolExecutor() as pool, paused_collection():

        def lower(stage: str, program: Callable, *args: Any, **options: Any) -> Any:
            lowered = program.lower(*args, **options)
            loading.append(pool.submit(lowered.compile))
            return jax.tree.map(_shape, lowered.out_info)

        given = (model, params, inputs, new_tokens, rng, sampling, seen)
        options = dict(logprobs=logprobs, cache_options=CacheOptions.of(cache))
        until_first_token(lower, *given, **options)
        for program in loading:
            program.result()


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
