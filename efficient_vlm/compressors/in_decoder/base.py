"""The base class of methods inside the decoder: where they cut and how many tokens they keep.

A method has two forms. The configured form lists, by `stages`, the layers after which it cuts and
how many visual tokens remain. Each stage holds the one-cut form, the same module with only `budget`
set, which performs a single cut.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from efficient_vlm.compressors import fold, select
from efficient_vlm.compressors.base import Compressor, Stage
from efficient_vlm.compressors.signals import NO_SIGNALS, DecoderState, Signals
from efficient_vlm.compressors.tokens import VisualTokens
from efficient_vlm.errors import UserError, short
from efficient_vlm.shapes import Array

Keep = int | float  # A count, or a fraction up to 1.0, which keeps all tokens.


def check_keep(field: str, keep: Keep, *, zero: bool = False) -> Keep:
    """`keep` if it is a count or a fraction, else a UserError; `zero`: whether 0 is one."""
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    whole = isinstance(keep, int) and keep >= 1
    if not (number and (whole or 0 < keep <= 1 or (zero and keep == 0))):
        raise UserError(
            f"{field}: {short(keep)} is neither a fraction nor a count of tokens",
            allowed="a fraction up to 1.0, or a count from 1 (1.0 keeps all; 1 is one token)"
            + ("; 0 keeps none" if zero else ""),
            fix=f"for example {field}=0.5",
        )
    return keep


def check_falling(field: str, keeps: Sequence[Keep]) -> None:
    """UserError if fractions of the same whole, or counts, increase between stages."""
    for kind in (int, float):
        same = [k for k in keeps if isinstance(k, kind)]
        if same != sorted(same, reverse=True):
            raise UserError(
                f"{field}: {tuple(keeps)} increases; dropped tokens do not come back",
                allowed="numbers that do not increase",
                fix=f"{field}={tuple(sorted(same, reverse=True))}",
            )


def count_of(keep: Keep, total: int) -> int:
    """The number of tokens that a count, or a fraction of `total`, keeps.

    A fraction is rounded down, as in the official codes, but keeps at least one token; 0 keeps
    none. (The small term corrects products such as 0.29 * 100 = 28.999...)
    """
    if isinstance(keep, int) or keep == 0:
        return int(keep)
    return max(1, math.floor(keep * total + 1e-9))


class InDecoder(Compressor):
    """Base class of methods between layers of the decoder.

    `budget` belongs to the one-cut form; methods with a single stage read it as a count to keep.

    In the decoder the images of a row are one run of tokens, which is cut as a whole. Counts (in
    `budget`, `keep` or `counts`) are therefore of the visual tokens of ALL images of a row, and
    fractions refer to that total; budgets of methods before the decoder are per image.

    The total is the row's own, not that of the padded batch: stages have the length of a full row,
    and rows with fewer tokens keep what they would keep alone; the other slots are padding.

    Attributes:
      uneven: set by models: rows have different numbers of tokens, of which a shorter one may keep
        more than a full one (a schedule for a mean of 192 drops none of 192 tokens).
      row_counts: set by `cuts`: `row_counts(N)[n]` is what this cut leaves of a row with n of at
        most N tokens; None for `budget`.

    Class attributes:
      knob: name of the field that sets the number of tokens, for error messages.
      looks: the layer whose queries and keys `signals.decoder` holds: "previous", the one before
        the cut, or "next", the one after it.
    """

    budget: int | None = None
    uneven: bool = False
    row_counts: Callable[[int], np.ndarray] | None = None

    needs = frozenset({"decoder"})
    where = "decoder"
    projected = True
    optional_budget = True
    looks = "previous"
    knob = "keep"
    internal = frozenset({"uneven", "row_counts"})

    @nn.nowrap
    def reachable(self, grid):
        return tuple(range(grid[0] * grid[1], self.min_budget - 1, -1))

    @nn.nowrap
    def check_layers(self, field: str, layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
        """`layers` if they increase within 1..num_layers - 1, else a UserError."""
        inside = all(
            isinstance(k, int) and not isinstance(k, bool) and 1 <= k < num_layers for k in layers
        )
        if not inside or list(layers) != sorted(set(layers)):
            shown = layers[0] if len(layers) == 1 else tuple(layers)
            raise UserError(
                f"{field}: {shown} for {self.label} in a decoder of {num_layers} layers",
                allowed=f"layers before the cut, 1 to {num_layers - 1}"
                + (", increasing" if len(layers) > 1 else ""),
                fix="give layers inside the decoder, or a deeper decoder",
            )
        return tuple(layers)

    @nn.nowrap
    def scaled(self, layers: Sequence[int], depth: int, num_layers: int) -> tuple[int, ...]:
        """Published cuts of a decoder with `depth` layers, rescaled to `num_layers`.

        Each keeps its relative depth, rounded, and comes at least one layer after the previous one.
        """
        moved = []
        for layer in layers:
            nearest = math.floor(layer * num_layers / depth + 0.5)
            moved.append(max(nearest, moved[-1] + 1 if moved else 1))
        return self.check_layers("compressor.layers", moved, num_layers)

    @nn.nowrap
    def no_budget(self, knob: str) -> None:
        """UserError if the configured form of a method with several stages has a `budget`."""
        if self.budget is not None:
            raise UserError(
                f"compressor.budget: {self.budget}, but {self.label} has several stages",
                allowed=f"compressor.budget=None; {knob} sets its tokens",
                fix="omit budget, or use --match=mean_processed:T for a mean of T tokens",
            )

    @nn.nowrap
    def cuts(
        self,
        layers: Sequence[int],
        counts: Sequence[int],
        num_tokens: int,
        /,
        *,
        rows: Callable[[int], Sequence[int]] | None = None,
        **fields,
    ):
        """Stages that leave `counts` tokens; stages that drop nothing are omitted.

        Args:
          layers: number of layers before each cut.
          counts: visual tokens after each cut.
          num_tokens: visual tokens before the first cut.
          rows: `counts` for any number of tokens, for rows with fewer of them; more than there are
            means all. None for `counts` in all rows.
          **fields: lists with one value per stage for fields of the one-cut form.

        Raises:
          UserError: a count above the number of remaining tokens.
        """
        table = None if rows is None else row_table(rows)
        if self.uneven and table is not None:
            return self._uneven_cuts(layers, num_tokens, table, fields)
        stages, now = [], num_tokens
        for i, (layer, count) in enumerate(zip(layers, counts, strict=True)):
            if count > now:
                field = self.knob if self.budget is None else "budget"
                raise UserError(
                    f"compressor.{field}: {self.label} cannot keep {count} of {now} tokens",
                    allowed=f"{self.min_budget} to {now} after layer {layer}",
                    fix=f"compressor.budget={now}" if field == "budget" else "a smaller count",
                )
            if count < now:
                stages.append(Stage(layer, self._one_cut(i, count, table, fields)))
            now = count
        return tuple(stages)

    @nn.nowrap
    def _uneven_cuts(self, layers, num_tokens, table, fields) -> tuple[Stage, ...]:
        """Stages with room for what rows of any number of tokens keep."""
        left = table(num_tokens)
        before = np.concatenate([np.arange(num_tokens + 1)[:, None], left[:, :-1]], axis=1)
        return tuple(
            Stage(layer, self._one_cut(i, int(left[:, i].max()), table, fields))
            for i, layer in enumerate(layers)
            if (left[:, i] < before[:, i]).any()
        )

    @nn.nowrap
    def _one_cut(self, index: int, count: int, table, fields) -> "InDecoder":
        chosen = {name: values[index] for name, values in fields.items()}
        if table is not None:
            chosen["row_counts"] = functools.partial(_column, table, index)
        return self.clone(parent=None, name=None, budget=count, **chosen)

    @nn.nowrap
    def flops(self, num_tokens, width, text_width=0, *, num_text=0):
        """Matmul FLOPs of one cut for one image.

        Args:
          num_tokens: T, visual tokens before the cut.
          width: H x Dh, of all query heads together: usually the decoder's width.
          text_width: unused.
          num_text: L, text positions; attention rows span T + L keys.
        """
        del text_width
        if self.budget in (num_tokens, 0):
            return 0
        return self.score_flops(num_tokens + num_text, width)

    @nn.nowrap
    def score_flops(self, num_places: int, width: int) -> int:
        """Matmul FLOPs of `scores` for one image over S = `num_places` positions."""
        raise NotImplementedError(f"{type(self).__name__}.score_flops")

    @nn.nowrap
    def scores(self, tokens: VisualTokens, state: DecoderState) -> Float[Array, "B T"]:
        """float32 [B, T]; the highest are kept, and those of padding are ignored."""
        raise NotImplementedError(f"{type(self).__name__}.scores")

    def __call__(self, tokens, signals=NO_SIGNALS, *, rng=None):
        """The one-cut form: the `budget` tokens with the highest scores, in source order."""
        self.check_cut(tokens, signals)
        if self.keeps_all(tokens):
            return tokens
        return fold.drop(tokens, self.selection(tokens, signals))

    @nn.nowrap
    def keeps_all(self, tokens: VisualTokens) -> bool:
        """Whether the cut leaves every row as it is."""
        return self.budget == tokens.mask.shape[1] and self.row_counts is None

    @nn.nowrap
    def row_budget(self, tokens: VisualTokens, state: DecoderState) -> Int[Array, " B"] | None:
        """int [B], tokens that each row keeps, at most `budget`; None for `budget` in all."""
        if self.row_counts is None:
            return None
        counts = jnp.asarray(self.row_counts(state.first_live.shape[1]), jnp.int32)
        return jnp.minimum(counts[jnp.sum(state.first_live, axis=1)], self.budget)

    @nn.nowrap
    def check_cut(self, tokens: VisualTokens, signals: Signals) -> None:
        """`check_call` of the one-cut form; UserError if it has no budget."""
        if self.budget is None:
            raise UserError(
                f"compressor.budget: None; {self.label} acts between layers of the decoder",
                allowed="the modules of `stages(num_layers, num_tokens)`, each with its budget",
            )
        self.check_call(tokens, signals, needs_grid=False)

    @nn.nowrap
    def selection(self, tokens: VisualTokens, signals: Signals) -> select.Selection:
        """The `budget` best tokens; a selection has no gradient, so neither do its scores."""
        if self.budget == 0:
            return select.top_k(jnp.zeros(tokens.mask.shape), tokens.mask, 0)
        state = jax.lax.stop_gradient(signals.decoder)
        count = self.row_budget(tokens, state)
        return select.top_k(self.scores(tokens, state), tokens.mask, self.budget, count)


def row_table(rows: Callable[[int], Sequence[int]]) -> Callable[[int], np.ndarray]:
    """N -> int [N + 1, cuts]: `rows(n)` for all n up to N, none above what the cut before leaves.

    It is computed where a program is traced, once for all cuts.
    """

    @functools.lru_cache(maxsize=2)
    def table(most: int) -> np.ndarray:
        counts = np.array([rows(n) for n in range(1, most + 1)]).reshape(most, -1)
        counts = np.minimum(np.minimum.accumulate(counts, axis=1), np.arange(1, most + 1)[:, None])
        return np.concatenate([np.zeros_like(counts[:1]), counts])

    return table


def _column(table: Callable[[int], np.ndarray], index: int, most: int) -> np.ndarray:
    return table(most)[:, index]
