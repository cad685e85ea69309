"""The settings of an adaptation."""

import dataclasses
import math

from efficient_vlm import checks
from efficient_vlm.adapt.select import Patterns, as_patterns
from efficient_vlm.errors import UserError, short

__all__ = ["BASES", "METHODS", "AdaptConfig"]

_LOW_RANK = ("lora", "rslora", "dora", "qlora")
METHODS = ("full", *_LOW_RANK, "prompt", "prefix", "bias")
BASES = ("int8", "nf4")


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
    """How a model is adapted, and so what is trained.

    Attributes:
      name: "full" (parameters themselves), "lora" (arXiv 2106.09685), "rslora" (2312.03732), "dora"
        (2402.09353), "qlora" (2305.14314: LoRA on a base of 4 bits), "prompt" (2104.08691),
        "prefix" (2101.00190) or "bias" (2106.10199).
      rank: r of low-rank adapters.
      alpha: their product is scaled by alpha / r, by alpha / sqrt(r) in rsLoRA.
      targets: products that get an adapter: presets of `select.TARGETS`, or regular expressions
        found in paths.
      train: parameters that are trained themselves, whatever the method: presets of
        `select.TRAINED`, or regular expressions; they get no adapter. Empty for none, and with
        "full" for all. What a run makes afresh (weights of a trained compressor, `reduce/...`) is
        trained in any case.
      base: form of the frozen products of the decoder and of all targets: None for plain, "int8"
        (a scale for each output channel) or "nf4" (blocks of 64); "qlora" means "nf4".
      double: whether the constants of "nf4" are quantised as well.
      tokens: learned tokens of "prompt", and keys and values in each layer of "prefix".
      seed: of the initial values.
    """

    name: str = "lora"
    rank: int = 16
    alpha: float = 32.0
    targets: Patterns = "decoder"
    train: Patterns = ()
    base: str | None = None
    double: bool = True
    tokens: int = 16
    seed: int = 0

    def __post_init__(self):
        checks.one_of("adapt.name", self.name, METHODS)
        checks.number_fields(self, "adapt", "rank", "tokens")
        checks.number_fields(self, "adapt", "alpha", above=0)
        checks.number_fields(self, "adapt", "seed", low=0)
        checks.flag("adapt.double", self.double)
        if self.base is not None:
            checks.one_of("adapt.base", self.base, BASES)
        for name in ("targets", "train"):
            self._check_patterns(name)
        if self.low_rank and not as_patterns(self.targets):
            raise UserError("adapt.targets: empty", fix="name a preset, such as decoder")
        if self.base and not self.low_rank:
            raise UserError(
                f"adapt.base: {self.base} with name={self.name}",
                allowed=f"None, or with {', '.join(_LOW_RANK)}",
                fix="adapt.base=None",
            )

    def _check_patterns(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            return
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise UserError(f"adapt.{name}: {short(value)}", allowed="a text, or several")

    @property
    def low_rank(self) -> bool:
        """Whether products get factors."""
        return self.name in _LOW_RANK

    @property
    def keeps_base(self) -> bool:
        """Whether the model that was adapted is still among the parameters: adapters alone."""
        return self.low_rank and not self.train

    @property
    def scale(self) -> float:
        """The factor of the product of the factors."""
        return self.alpha / (math.sqrt(self.rank) if self.name == "rslora" else self.rank)

    @property
    def base_form(self) -> str | None:
        """`base`, with the default of "qlora"."""
        return "nf4" if self.name == "qlora" and self.base is None else self.base

    @property
    def trained(self) -> tuple[str, ...]:
        """Patterns of what is trained itself."""
        patterns = as_patterns(self.train)
        if self.name == "bias":
            return (*patterns, "bias")
        return patterns or (("all",) if self.name == "full" else ())
