"""The table of methods and families in docs/families.md: python tests/families/method_table.py"""

import functools
from pathlib import Path

from method_matrix import (
    BLOCKS,
    GOLDEN,
    OF_ONE_SIZE,
    REFUSED,
    TRAINING_FREE,
    golden_models,
    looks_at_class_token,
)

from efficient_vlm.families import architecture

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
START, END = "## Which method runs on which family", "<!-- end of the table of methods -->"
HEAD = f"""{START}

Written by `python tests/families/method_table.py`; `pytest -m matrix tests/families/test_matrix.py`
runs every cell on the tiny models of `tests/golden`: two rows with different numbers of pictures,
under both position policies, with about half of the tokens (finite logits, fewer tokens in the
decoder, text in front of the pictures unchanged) and with all of them (logits equal to those
without a compressor, to 1e-5 of the largest). Methods not in the table are trained.
"""
NOTES = f"""
* **attn**: yes, with `attention=column_mean`: the default is the attention of a CLS token, which
  this encoder does not have.
* **size**: yes, where all pictures (or tiles) of a batch have one size and no padding, as the tiles
  of SmolVLM's processor do, and pictures of one shape for Qwen.
* **no (1)**: not built. The method removes patches inside the encoder, but the projector reads
  blocks of them (`encoder_cut` removes whole blocks) or the whole grid (MobileVLM): they would have
  to be put back first, which saves time in the encoder but tokens nowhere.
* **no (2)**: the method makes the picture smaller, or removes patches of it; here tokens read
  patches across crops.
* `vtw` drops all tokens, so it has no setting that changes nothing.
* Budgets are per picture, or per tile or crop where the model cuts pictures up; for Molmo2 they are
  of all pictures of a row, whose tokens are one row of a grid (`pool`, `hiprune` and the grid of
  `feather` then work along it). Counts and shares of methods inside the decoder are of all visual
  tokens of a row, its own: rows with fewer pictures, or smaller ones, keep what they keep alone.
* Methods inside the decoder compute attention again, without a soft cap (Gemma 2), local windows
  (Gemma 3) and blocks of tokens that see each other (PaliGemma, Gemma 3, Molmo2). Text judges from
  behind all pictures, so it sees them all in any case; in the rows of visual tokens (`fitprune`,
  `fastv` with `row=mean`) this is an approximation. The model itself computes exactly.

{END}
"""


def cell(method: str, name: str) -> str:
    """One entry of the table."""
    if name in REFUSED.get(method, {}):
        if name in OF_ONE_SIZE.get(method, ()):
            return "size"
        return "no (1)" if REFUSED[method][name] == BLOCKS else "no (2)"
    return "attn" if looks_at_class_token(method) and not has_class_token(name) else "yes"


@functools.cache
def has_class_token(name: str) -> bool:
    """Whether the encoder of a golden model has a CLS token."""
    encoder = architecture.build_model(architecture.read_config(GOLDEN / name)).encoder
    return bool(encoder.get("class_token"))


def section() -> str:
    """The section of docs/families.md."""
    names = golden_models()
    lines = [f"| method | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method in TRAINING_FREE:
        lines.append(f"| `{method}` | {' | '.join(cell(method, name) for name in names)} |")
    return "\n".join([HEAD, *lines, NOTES])


def write() -> None:
    """Puts the section into the document, in place of the one before."""
    text = DOCS.read_text(encoding="utf-8") if DOCS.exists() else "# Families\n\n"
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(f"{END}\n")
    DOCS.write_text(before + section() + after, encoding="utf-8")


if __name__ == "__main__":
    write()
