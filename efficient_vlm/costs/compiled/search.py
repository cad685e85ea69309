"""The best plan that fits: over meshes, batches, remat and budgets, each tried by compiling it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from efficient_vlm import sharding
from efficient_vlm.costs.compiled.compiled import Answer
from efficient_vlm.costs.compiled.programs import Work
from efficient_vlm.errors import UserError

__all__ = ["Tried", "best", "meshes", "most_plans", "search"]

_TENSOR = (1, 2, 4, 8)
_EXPERT = (1, 4, 8)
# From what is computed once to what is computed twice, which needs the least memory.
_REMAT = ("none", "dots", "full")


@dataclasses.dataclass
class Tried:
    """One plan, and what its compiler said.

    Attributes:
      label: of its compressor.
      answer: None for a plan that did not compile, and then `error` says why.
    """

    label: str
    work: Work
    sizes: dict[str, int]
    answer: Answer | None
    error: UserError | None = None

    @property
    def fits(self) -> bool:
        return self.answer is not None and self.answer.fits

    @property
    def rate(self) -> float:
        """Pictures in a second, an upper bound; 0 for what does not fit."""
        seconds = self.answer.estimated_seconds if self.fits else None
        return self.work.batch / seconds if seconds else 0.0


def meshes(work: Work, devices: int) -> list[dict[str, int]]:
    """Meshes worth trying: heads and experts divide, rows as well.

    In training what is not cut over width is cut over `fsdp`, whole or in groups of 16; in
    inference it is `data`, since parameters would be gathered for every token.
    """
    decoder = work.model.make_decoder()
    experts = (work.model.decoder.get("moe") or {}).get("num_experts", 1)
    found = []
    for tensor in _TENSOR:
        for expert in _EXPERT:
            rest, odd = divmod(devices, tensor * expert)
            if odd or decoder.num_heads % tensor or (expert > 1 and experts % expert):
                continue
            if work.batch % (rest * expert):
                continue
            cuts = [{"data": rest}] if work.task != "train" else [{"fsdp": rest}]
            if work.task == "train" and rest > 16 and rest % 16 == 0:
                cuts.append({"data": rest // 16, "fsdp": 16})
            one = dict.fromkeys(sharding.AXES, 1)
            found += [{**one, "tensor": tensor, "expert": expert, **cut} for cut in cuts]
    return found


def most_plans(works: Sequence[Work], batches: Sequence[int], devices: int) -> int:
    """How many plans `search` tries if none fits with the first remat."""
    sized = [dataclasses.replace(work, batch=batch) for work in works for batch in batches]
    return sum(
        len(meshes(work, devices)) * (len(_REMAT) if work.task == "train" else 1) for work in sized
    )


def search(
    works: Sequence[tuple[str, Work]],
    batches: Sequence[int],
    devices: int,
    compile_one: Callable[[Work, Mapping[str, int]], Answer],
) -> Iterator[Tried]:
    """Tries plans, and yields each when it is compiled.

    Of a mesh and a batch the first remat that fits is the fastest, so the others are left out, and
    a batch that fits with none of them ends the larger ones of that mesh. A plan that does not
    compile is one of the answers.

    Args:
      works: (label, what is to be done) for each compressor, at any batch.
      batches: from the smallest.
      devices: of the topology.
      compile_one: see `compiled.compile_plan`.

    Raises:
      UserError: no mesh divides any batch, or no plan compiles.
    """
    some, answered, error = False, False, None
    for label, work in works:
        full: list[dict[str, int]] = []
        for batch in sorted(batches):
            work = dataclasses.replace(work, batch=batch)
            for sizes in meshes(work, devices):
                some = True
                if sizes in full:
                    continue
                for remat in _REMAT if work.task == "train" else _REMAT[:1]:
                    one = dataclasses.replace(work, remat=remat)
                    try:
                        tried = Tried(label, one, sizes, compile_one(one, sizes))
                        answered = True
                    except UserError as found:
                        tried = Tried(label, one, sizes, None, error := found)
                    yield tried
                    if tried.fits:
                        break
                else:
                    if tried.answer is not None:
                        full.append(sizes)
    if error is not None and not answered:
        raise error
    if not some:
        raise UserError(
            f"--batch={','.join(map(str, batches))}: no mesh of {devices} devices divides it",
            allowed=f"multiples of {devices}, or of what tensor leaves of them",
        )


def best(tried: Sequence[Tried]) -> dict[str, Tried]:
    """Of each compressor the plan with the most pictures in a second, if one fits."""
    found: dict[str, Tried] = {}
    for one in tried:
        if one.rate > (found[one.label].rate if one.label in found else 0.0):
            found[one.label] = one
    return found
