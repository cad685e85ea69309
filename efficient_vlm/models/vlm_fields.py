"""The fields of the whole model, and the parts that they describe."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
from flax import linen as nn

from efficient_vlm import compressors
from efficient_vlm.checks import flag, number_fields, whole
from efficient_vlm.compressors import Stage
from efficient_vlm.compressors.methods import METHODS, find
from efficient_vlm.errors import UserError, short
from efficient_vlm.fields import construct, frozen
from efficient_vlm.models.decoder import Decoder
from efficient_vlm.models.encoder import ViT
from efficient_vlm.models.inputs import NO_PICTURES, Layout, Pictures
from efficient_vlm.models.projectors import make_projector
from efficient_vlm.nn.linear import Dtype


class VisionLanguageFields(nn.Module):
    """What a `vlm.VisionLanguageModel` is made of, and the parts that its fields describe.

    Attributes:
      vocab_size: entries of the tokenizer.
      encoder: fields of `encoder.ViT`; None for a language model without images.
      projector: name and fields of one of `projectors.PROJECTORS`: the model's own way from patches
        to tokens, before any compressor; None for models whose patches are the tokens.
      padding_embedding: whether features of patches that show padding get a learned vector added,
        see `Pictures.padding_share` (Molmo).
      slot_token: id of the text token whose embedding is added to visual tokens (Molmo); None where
        they stand in its place.
      compressor: name, budget (visual tokens per image) and options of `compressors.build`.
      decoder: fields of `decoder.Decoder`.
      connector: fields of `Connector`.
      pooled_start: whether a compressor that makes new tokens starts as pooling, see
        `connector.PooledStart`: for models that already read the tokens in front of it.
      in_place: whether such a compressor reads what the encoder gives and stands in place of
        `projector`, which then only says what slots pictures have in a prompt, see
        `visual_stages.patch_tokens`.
      dtype: of activations ("bfloat16" for mixed precision); parameters, norms, logits and softmax
        stay float32.
    """

    vocab_size: int
    encoder: Mapping[str, Any] | None
    compressor: Mapping[str, Any]
    decoder: Mapping[str, Any]
    connector: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    projector: Mapping[str, Any] | None = None
    padding_embedding: bool = False
    slot_token: int | None = None
    pooled_start: bool = False
    in_place: bool = False
    dtype: Dtype = jnp.float32

    def __post_init__(self):
        for name in ("encoder", "compressor", "decoder", "connector", "projector"):
            object.__setattr__(self, name, frozen(getattr(self, name)))
        for name in ("pooled_start", "in_place"):
            flag(f"model.{name}", getattr(self, name))
        try:
            jnp.dtype(self.dtype)
        except TypeError:
            raise UserError(
                f"model.dtype: {short(self.dtype)}", allowed="float32, bfloat16, float16"
            ) from None
        super().__post_init__()

    def make_projector(self) -> nn.Module:
        """The projector of this configuration, unbound."""
        fields = {}
        if self.projector.get("name") != "average_pool":
            fields["features"] = self.decoder["width"]
        return make_projector(self.projector, **fields, dtype=self.dtype, parent=None)

    @property
    def slot_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens that an image of the encoder's size becomes."""
        vit = self.make_encoder()
        grid = vit.feature_grid(vit.grid)
        return grid if self.projector is None else self.make_projector().cells(grid)

    @property
    def compressed_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of an image in front of a compressor between the stages."""
        rows, columns = self.slot_grid
        side = self.make_projector().side if self.in_place and self.projector is not None else 1
        return rows * side, columns * side

    def make_encoder(self) -> ViT:
        """The encoder of this configuration, unbound."""
        if self.encoder is None:
            raise UserError("model.encoder: None, this is a language model without images")
        vit = construct(ViT, self.encoder, "model.encoder", dtype=self.dtype, parent=None)
        names = ("patch_size", "width", "depth", "num_heads", "mlp_dim", "stem_dim")
        number_fields(vit, "model.encoder", *names)
        return vit

    def make_decoder(self) -> Decoder:
        """The decoder of this configuration, unbound."""
        fields = {"vocab_size": self.vocab_size, "dtype": self.dtype, "parent": None}
        if self.make_compressor().in_decoder:
            fields["compressor"] = {"grid": self.slot_grid, **self.compressor}
        decoder = construct(Decoder, self.decoder, "model.decoder", **fields)
        names = ("width", "num_heads", "num_kv_heads", "head_dim", "mlp_dim")
        number_fields(decoder, "model.decoder", *names)
        for i, segment in enumerate(decoder.segments):
            whole(f"model.decoder.segments[{i}].layers", segment.get("layers"))
        return decoder

    def make_compressor(self) -> nn.Module:
        """The compressor of this configuration, unbound."""
        options = dict(self.compressor)
        if "name" not in options:
            raise UserError("model.compressor.name: missing", fix="set it in the config")
        name = options.pop("name")
        if "budget" not in options and not find(name).optional_budget:
            raise UserError("model.compressor.budget: missing", fix="set it in the config")
        if self.encoder is not None:
            options.setdefault("grid", self.compressed_grid)
        return compressors.build(name, parent=None, **options)

    def encoder_stages(self, patches: tuple[int, int]) -> tuple[Stage, ...]:
        """Where the compressor acts inside the encoder, on a picture of so many patches."""
        method, vit = self.make_compressor(), self.make_encoder()
        if not method.in_encoder:
            return ()
        units = dict(patches=patches, side=self.unit_side) if method.of_units else {}
        count = patches[0] * patches[1]
        return method.stages(vit.layers_run, count, class_token=vit.class_token, **units)

    @property
    def unit_side(self) -> int:
        """Patches along a side of the blocks that leave the encoder together."""
        return 1 if self.projector is None else self.make_projector().side

    def with_compressor(self, name: str, budget: int | None = None, **options: Any) -> Self:
        """The same model with another compressor; parameters carry over where shapes agree."""
        if name == self.compressor["name"]:
            options = {**self.compressor, **options}
        options = {**options, "name": name, "budget": budget}
        if budget is None:
            del options["budget"]
        return self.clone(compressor=options)

    def in_training(self) -> Self:
        """The same model with the form that its compressor has while it is trained."""
        options = {} if self.encoder is None else self.make_compressor().training_options()
        return self.clone(compressor={**self.compressor, **options}) if options else self

    def sized(self, height: int, width: int) -> Self:
        """The same model for images of this many pixels; position tables keep their size."""
        vit = self.make_encoder()
        grid = tuple(vit.position_grid or vit.grid)
        size = (int(height), int(width))
        return self.clone(encoder={**self.encoder, "image_size": size, "position_grid": grid})

    @property
    def selects_by_text(self) -> bool:
        """Whether different questions about one image get different visual tokens."""
        method = self.make_compressor()
        rows, columns = (0, 0) if self.encoder is None else method.grid
        if method.text_guided and (not method.between or method.budget < rows * columns):
            return True
        inner = [s["compressor"]["name"] for s in self.decoder["segments"] if s.get("compressor")]
        return any(METHODS[name].text_guided for name in inner if name in METHODS)

    def _position_policy(self) -> str | None:
        """The policy that the compressor states, if it has chosen the tokens that enter."""
        method = self.make_compressor()
        return None if method.in_decoder else method.position_policy

    def layout(self, pictures: Pictures | None) -> Layout:
        """The layout of pictures, arrays or shapes of them; None for text alone."""
        if pictures is None:
            return NO_PICTURES
        if pictures.pool_index is not None:
            return Layout(1, 1, pictures.pool_index.shape[1])
        vit = self.make_encoder()
        sides = pictures.pixels.shape[-3:-1]
        grid = vit.feature_grid(tuple(side // vit.patch_size for side in sides))
        cells = grid if self.projector is None else self.make_projector().cells(grid)
        return Layout(pictures.pixels.shape[1], *cells)
