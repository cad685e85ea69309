"""A trained compressor in place of a published model's own projector and connector."""

from collections.abc import Mapping
from typing import Any

from efficient_vlm.compressors.methods import find, options
from efficient_vlm.errors import UserError
from efficient_vlm.models.vlm import VisionLanguageModel

__all__ = ["in_place", "taken_over"]

# Methods that begin with the perceptron of LLaVA-1.5: `connect/up` and `connect/out` fit there.
_PERCEPTRON = ("mlp", "deco", "ldpv2")


def in_place(model: VisionLanguageModel) -> VisionLanguageModel:
    """The model whose compressor reads the patches and gives the decoder its tokens.

    Methods with an option `features` give the decoder's width themselves; behind others (resampler,
    perceiver, qformer) there is one fresh product.

    Args:
      model: published, with the compressor.

    Raises:
      UserError: a compressor or a model that this is not made for.
    """
    name, projector = model.compressor["name"], model.projector or {}
    if model.encoder is None:
        raise UserError("model.in_place: this model sees no images", fix="model.in_place=False")
    if projector.get("name") == "attention_pool" or projector.get("deepstack"):
        raise UserError(
            f"model.in_place: {name} in place of a projector that reads patches across crops or "
            "of several layers",
            allowed="families whose projector reads one grid: SmolVLM, Qwen2.5-VL, InternVL, ...",
            fix="model.in_place=False: the compressor then stands behind the projector",
        )
    method = find(name)
    if not (method.makes_tokens and method.between):
        raise UserError(
            f"model.in_place: {name} makes no tokens in place of a projector",
            allowed="mlp, deco, ldpv2, tokenpacker, mqt, resampler, perceiver, qformer, ...",
            fix="model.in_place=False: it then stands behind the projector",
        )
    widens = "features" in options(name)
    if not projector and not widens:
        raise UserError(
            f"model.in_place: {name} keeps the width of the patches, so the model's own connector "
            "serves behind it as it is",
            allowed="mlp, deco, ldp, ldpv2, c_abstractor, tokenpacker, mqt, ...",
            fix="model.in_place=False",
        )
    compressor = dict(model.compressor)
    if widens:
        compressor["features"] = model.decoder["width"]
    connector = {"identity": True} if widens else {}
    return model.clone(in_place=True, compressor=compressor, connector=connector)


def taken_over(
    flat: Mapping[str, Any], published: VisionLanguageModel, model: VisionLanguageModel
) -> dict[str, Any]:
    """What of a published model's parameters the model in `in_place` form has.

    A method that begins with the perceptron that the model has as its connector starts with its
    weights: `mlp` is then what it was, `deco` is pooling in front of it.

    Args:
      flat: path -> array or shape, of the published model.
      published, model: before and after `in_place`.
    """
    kept = {p: v for p, v in flat.items() if p.split("/")[0] not in ("connect", "project")}
    name, connector = model.compressor["name"], published.connector
    same = (connector.get("hidden_dim"), connector.get("activation"), connector.get("bias"))
    if name in _PERCEPTRON and same == (model.decoder["width"], "gelu_erf", True):
        for ours, theirs in (("up", "up"), ("down", "out")):
            for part in ("kernel", "bias"):
                kept[f"reduce/{name}_{ours}_{part}"] = flat[f"connect/{theirs}/{part}"]
    return kept
