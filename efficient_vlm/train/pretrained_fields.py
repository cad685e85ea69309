"""What a config says of the published model that a run starts from; importing this is cheap."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_vlm.checks import flag, one_of
from efficient_vlm.errors import UserError, short
from efficient_vlm.nn.stack import rematerialised

__all__ = ["PretrainedFields"]

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class PretrainedFields:
    """The section "model" of a run that starts from a published model.

    Attributes:
      pretrained: its directory, or its name on a hub.
      revision: on the hub: a branch, a tag or a commit.
      compressor: name, budget and options; all visual tokens by default.
      pooled_start: whether a trained compressor behind the model's own projector starts as pooling,
        with what it makes behind a gate, see `connector.PooledStart`.
      in_place: whether it takes the place of the model's own projector and connector, see
        `in_place.in_place`.
      dtype: of activations, "float32" or "bfloat16".
      param_dtype: of parameters; None for float32.
      pictures: options of its picture processor, see `from_pretrained`.
      remat: what the backward pass recomputes in encoder and decoder: "none", "dots" or "full".
    """

    pretrained: str
    revision: str | None = None
    compressor: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"name": "none"})
    pooled_start: bool = True
    in_place: bool = False
    dtype: str = "float32"
    param_dtype: str | None = None
    pictures: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remat: str = "dots"

    def __post_init__(self):
        if not isinstance(self.pretrained, str) or not self.pretrained:
            raise UserError(
                f"model.pretrained: {short(self.pretrained)}",
                allowed="the directory of a published model, or its name on a hub",
            )
        one_of("model.dtype", self.dtype, DTYPES)
        if self.param_dtype is not None:
            one_of("model.param_dtype", self.param_dtype, DTYPES)
        rematerialised(lambda: None, self.remat)
        flag("model.pooled_start", self.pooled_start)
        flag("model.in_place", self.in_place)
