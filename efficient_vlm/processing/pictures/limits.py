"""The most visual tokens of a picture, which a user sets in place of a family's own settings."""

import dataclasses
from typing import ClassVar

from efficient_vlm import checks
from efficient_vlm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limited:
    """What the picture processors of all families share.

    Each family keeps its own rule and chooses by it among what fits, so that a limit is never
    exceeded and a picture that needs less is what it is without one.

    Attributes:
      max_visual_tokens: the most visual tokens of one picture as they enter the decoder, before a
        compressor; tokens that mark rows and tiles are text. None: what the other settings give.
    """

    max_visual_tokens: int | None = None
    # What has as many visual tokens as `least`, for errors.
    _least: ClassVar[str] = "every picture has as many"

    def __post_init__(self):
        limit = checks.whole("max_visual_tokens", self.max_visual_tokens, none=True)
        if not self.fits(self.least):
            raise UserError(
                f"max_visual_tokens: {limit}",
                allowed=f"{self.least} or more: {self._least}",
                fix=f"max_visual_tokens={self.least}, and a compressor for fewer",
            )

    @property
    def least(self) -> int:
        """The fewest visual tokens that any picture can have with these settings."""
        raise NotImplementedError

    def fits(self, tokens: int) -> bool:
        """Whether a picture may have so many visual tokens."""
        return self.max_visual_tokens is None or tokens <= self.max_visual_tokens
