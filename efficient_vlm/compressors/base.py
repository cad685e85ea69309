"""The base class of all compressors: the fields they share and what models ask of them.

A compressor is a Linen module called as `module(tokens, signals, rng=key)`. It runs under `jit`,
takes batches whose rows are padded differently, and always returns `budget` tokens:

* kept tokens in source order, merged tokens in the order of their cells or queries;
* the input unchanged if it has `budget` tokens already;
* padding (mask False, size 0, in no patch's `source`) where a row has too few real tokens;
* values that do not depend on what the input's padding holds; neither do the gradients.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
from jaxtyping import PRNGKeyArray

from efficient_vlm import checks
from efficient_vlm.compressors import grids
from efficient_vlm.compressors.signals import NO_SIGNALS, Signals
from efficient_vlm.compressors.tokens import VisualTokens
from efficient_vlm.errors import UserError, short, unknown

POLICIES = ("retain", "reindex")
PLACES = ("between", "encoder", "decoder")


def as_tuple(field: str, value: Any) -> tuple:
    """A list from a config, or one number, as a tuple; UserError if it is empty or a text."""
    items = (value,) if isinstance(value, int | float) else value
    if isinstance(items, str) or not isinstance(items, Sequence):
        raise UserError(
            f"{field}: {short(value)} is not a list of numbers", allowed="(1,2,3), or 1"
        )
    if not items:
        raise UserError(f"{field}: empty", allowed="one number or more; None for the default")
    return tuple(items)


def describe(budgets: tuple[int, ...]) -> str:
    """Budgets in an error message: `1 to 64` or `1, 4, 16`, shortened if there are many."""
    budgets = tuple(sorted(budgets))
    parts, start = [], 0
    for i in range(1, len(budgets) + 1):
        if i == len(budgets) or budgets[i] != budgets[i - 1] + 1:
            run = budgets[start:i]
            parts.extend([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))
            start = i
    if len(parts) > 12:
        parts = [*parts[:5], "...", *parts[-6:]]
    return ", ".join(parts)


class Stage(NamedTuple):
    """One point at which a method inside the encoder or decoder acts.

    Attributes:
      layer: number of layers that run before it; 0 acts before the first layer.
      module: an unbound compressor whose `budget` is the number of tokens it leaves.
      inside: acts between attention and feed-forward of layer `layer` (ToMe), not before it.
    """

    layer: int
    module: "Compressor"
    inside: bool = False


class Compressor(nn.Module):
    """Base class. Subclasses define `__call__`, and `reachable` if some budgets are impossible.

    Attributes:
      budget: T, the static number of tokens to return.
      grid: static (rows, columns) of the source image's patches; None for a square.
      position_policy: decoder positions of the kept tokens: "retain" (their index in the source
        grid), "reindex" (0, 1, 2, ...), or None for the decoder's own policy.

    Class attributes:
      label: the method's name in configs.
      needs: names of the Signals that `__call__` reads.
      where: "between" encoder and decoder, inside the "encoder", or inside the "decoder": one of
        PLACES. Models ask for it as `between`, `in_encoder` and `in_decoder`.
      projected: whether it compresses tokens after the connector (decoder width) or before it.
      text_guided: whether different questions about one image keep different tokens.
      draws: whether the choice is drawn with `rng`: each question gets a draw of its own, and an
        evaluation averages over several.
      text_scores: whether it has `scores(tokens, text)`, which attention of the decoder can teach
        (`imitation_loss(...)`, see `selectors.TextTopK`).
      makes_tokens: whether it makes new tokens with weights of its own, as a connector does, in
        whose place it can stand.
      of_units: for methods inside the encoder, whether what they leave are whole blocks of patches
        that the model's projector can read.
      whole_grid: likewise, whether the whole grid leaves the encoder all the same, and any
        projector can read it.
      ends_encoder: likewise, whether the encoder ends at its stage.
      optional_budget: whether `budget` may be None because other options set the token count.
      min_budget: 0 for methods that can drop every token.
      internal: fields that `stages` sets on the modules it creates; not options of the method.
    """

    budget: int | None
    grid: grids.Grid | None = None
    position_policy: str | None = None

    label = ""
    needs = frozenset()
    where = "between"
    between, in_encoder, in_decoder = True, False, False
    projected = False
    text_guided = False
    draws = False
    text_scores = False
    makes_tokens = False
    of_units = False
    whole_grid = False
    ends_encoder = False
    optional_budget = False
    min_budget = 1
    internal = frozenset()

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        cls.between, cls.in_encoder, cls.in_decoder = (cls.where == place for place in PLACES)

    def __post_init__(self):
        # Before Linen's own, which freezes the module: lists from a config file become tuples.
        if self.budget is None and not self.optional_budget:
            raise UserError(
                "compressor.budget: missing",
                allowed=f"the number of tokens that {self.label} returns, from 1",
                fix="for example compressor.budget=16",
            )
        if self.budget is not None:
            whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
            if not (whole and self.budget == self.min_budget == 0):
                object.__setattr__(self, "budget", checks.whole("compressor.budget", self.budget))
        if self.grid is not None:
            object.__setattr__(self, "grid", grids.as_grid("compressor.grid", self.grid))
        if self.position_policy not in (None, *POLICIES):
            raise unknown("compressor.position_policy", str(self.position_policy), POLICIES)
        super().__post_init__()
        self.check_options()

    @nn.nowrap
    def check_options(self) -> None:
        """Raises UserError for an option that is wrong for every input."""

    @nn.nowrap
    def reachable(self, grid: grids.Grid) -> tuple[int, ...]:
        """The budgets that this method supports on a grid of patches, largest first."""
        return tuple(range(grid[0] * grid[1], 0, -1))

    @nn.nowrap
    def image_grid(self, grid: grids.Grid) -> grids.Grid:
        """The patch grid at which the encoder should run for an image of `grid` patches."""
        return tuple(grid)

    @nn.nowrap
    def intermediates(self) -> Mapping[str, str]:
        """Signal -> the encoder intermediate "name/layer" that provides it, see `encoder.ViT`."""
        return {}

    @property
    def observes(self) -> Mapping[str, str]:
        """Signal -> the intermediate that gives it, of the encoder layer in front of a stage."""
        return {}

    @nn.nowrap
    def stages(
        self, num_layers: int, num_tokens: int, *, class_token: bool = False, **units: Any
    ) -> tuple[Stage, ...]:
        """The points at which a method inside the encoder or decoder acts, in order.

        Args:
          num_layers: of the encoder or decoder.
          num_tokens: visual tokens that enter its first layer.
          class_token: whether the encoder carries a CLS token beside them.
          **units: for methods `of_units`: `patches`, rows and columns of them, and `side` of the
            blocks that the model's projector reads.

        Raises:
          UserError: a layer outside the model, or an impossible token count.
        """
        raise NotImplementedError(f"{self.label} does not act inside a model")

    @nn.nowrap
    def training_options(self) -> Mapping[str, Any]:
        """Options that take the place of its own while it is trained, for methods whose training
        has a form of its own; the trainer sets them (`VisionLanguageModel.in_training`)."""
        return {}

    @nn.nowrap
    def knobs(self, num_layers: int, num_tokens: int) -> Iterable[Mapping[str, Any]]:
        """Option settings from the fewest tokens to the most, for matching costs."""
        grid = grids.resolve(self.grid, num_tokens)
        return [{"budget": budget} for budget in reversed(self.reachable(grid))]

    @nn.nowrap
    def flops(self, num_tokens: int, width: int, text_width: int = 0) -> int:
        """Matmul FLOPs for one image: 2 per multiply-add, projections and dot products.

        Norms, softmax, sorting, gathers and the additions of pooling count as 0.

        Args:
          num_tokens: tokens that enter the compressor.
          width: D, their width.
          text_width: Dt, width of `Signals.text`.
        """
        del num_tokens, width, text_width
        return 0

    @nn.nowrap
    def check_call(self, tokens: VisualTokens, signals: Signals, *, needs_grid: bool) -> grids.Grid:
        """Checks budget and signals against the input, at trace time.

        Returns:
          The grid of the input; (1, T) if `needs_grid` is False.

        Raises:
          UserError: the budget is impossible for this input, or a signal is missing.
        """
        num_tokens = tokens.embed.shape[1]
        grid = grids.resolve(self.grid, num_tokens) if needs_grid else (1, num_tokens)
        if self.budget not in (reachable := self.reachable(grid)):
            where = f"on a {grid[0]} x {grid[1]} grid" if needs_grid else f"of {num_tokens} tokens"
            raise UserError(
                f"compressor.budget: {self.label} cannot give {self.budget} tokens {where}",
                allowed=describe(reachable),
                fix=f"compressor.budget={min(reachable, key=lambda b: (abs(b - self.budget), b))}",
            )
        for name in sorted(self.needs):
            if getattr(signals, name) is None:
                raise UserError(
                    f"signals.{name}: None, but {self.label} needs it",
                    allowed="an array; the module's `needs` names what the model has to compute",
                    fix="pass the signal, or use a compressor without needs, such as average_pool",
                )
        return grid

    def __call__(
        self,
        tokens: VisualTokens,
        signals: Signals = NO_SIGNALS,
        *,
        rng: PRNGKeyArray | None = None,
    ) -> VisualTokens:
        """Compresses [B, T, D] tokens to [B, budget, D]; only methods that draw use `rng`."""
        raise NotImplementedError(f"{type(self).__name__}.__call__")
