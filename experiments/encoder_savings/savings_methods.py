"""What is compared: one row for each method and budget. A new method is one more row."""

import dataclasses
from collections.abc import Mapping
from typing import Any

TOKENS = 64  # Of a whole picture, 2 x 2 patches each.
LAYERS = (2,)  # Cuts lie behind the second of six layers.
DRAWS = 10  # Seeds of a choice by chance that are evaluated.
TAUGHT = range(DRAWS, DRAWS + 4)  # Others that a model is fine-tuned with.


@dataclasses.dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
      label: its name here and in the names of files.
      options: of the compressor, as in a config.
      kind: "whole" (nothing is dropped), "encoder" (patches leave the encoder), "pixels" (they
        never enter it), "behind" (all run through it) or "picture" (it is made smaller).
      drawn: whether the option `seed` decides, alike for all pictures: then it has `DRAWS` values.
    """

    label: str
    options: Mapping[str, Any]
    kind: str
    drawn: bool = False

    def evaluated(self) -> list[dict[str, Any]]:
        """Its lines in `eval.methods`, of which the scores are pooled."""
        return self._with(range(DRAWS))

    def taught(self) -> list[dict[str, Any]]:
        """Its lines in `train.elastic`."""
        return self._with(TAUGHT)

    def _with(self, seeds) -> list[dict[str, Any]]:
        seeds = [dict(seed=seed) for seed in seeds] if self.drawn else [{}]
        return [{**self.options, **seed} for seed in seeds]


def _cut(score: str, keep: float) -> Row:
    options = dict(name="encoder_cut", layers=LAYERS, keep=(keep,), score=score)
    return Row(f"cut_{score}_{keep}", options, "encoder", drawn=score == "random")


SCORES = ("attention", "change", "norm", "neighbours", "diversity", "random", "stride")
# A picture that is made smaller has a square grid: 32 tokens are not among them, 25 and 36 are.
SMALLER = (49, 36, 25, 16, 9, 4)

ROWS = (
    Row("none", dict(name="none"), "whole"),
    *(Row(f"downsample_{t}", dict(name="downsample", budget=t), "picture") for t in SMALLER),
    *(_cut(score, keep) for keep in (0.5, 0.25) for score in SCORES),
    *(
        Row(f"ipcv_{keep}", dict(name="ipcv", keep=keep, layer=2, stabilised=1), "encoder")
        for keep in (0.5, 0.25)
    ),
    *(Row(f"tome_{budget}", dict(name="tome", budget=budget), "encoder") for budget in (32, 16)),
    *(Row(f"exit_{n}", dict(name="encoder_exit", layer=n), "encoder") for n in (4, 3, 2)),
    # As much room as a batch needs; a fixed room keeps the units that are predicted worst.
    *(Row(f"pixelprune_{tau}", dict(name="pixelprune", tau=tau), "pixels") for tau in (0.0, 1.0)),
    *(
        Row(f"pixelprune_{room}", dict(name="pixelprune", tau=1.0, budget=room), "pixels")
        for room in (32, 16)
    ),
    *(
        Row(f"{name}_{budget}", dict(name=name, budget=budget), "behind")
        for budget in (32, 16)
        for name in ("divprune", "stride", "random")
    ),
)
QUICK = ("none", "downsample_36", "downsample_16", "cut_attention_0.5", "pixelprune_1.0")
QUICK += ("divprune_32", "cut_random_0.25", "random_16")


def rows(labels: str | None = None, quick: bool = False) -> list[Row]:
    """The rows of labels joined by ","; of none, all.

    Raises:
      SystemExit: a label that is none.
    """
    known = {row.label: row for row in ROWS}
    chosen = labels.split(",") if labels else QUICK if quick else list(known)
    if unknown := set(chosen) - set(known):
        raise SystemExit(f"error: --methods: {', '.join(sorted(unknown))}; see savings_methods.py")
    return [row for row in ROWS if row.label in chosen]
