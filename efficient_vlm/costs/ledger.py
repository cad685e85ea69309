"""The ledger of one configuration: tokens in and out of every layer, FLOPs, KV bytes, a bound.

Definitions, since published budgets differ in them ("192 tokens" of SparseVLM process 206.5):

* layer l processes `visual_in` tokens and hands on `visual_out`, what is left behind a cut directly
  behind it: `visual_out` of a layer is `visual_in` of the next;
* `mean_processed` is the mean of `visual_in` over the decoder's layers: what costs time;
* `mean_written` is the mean of `visual_out`: what SparseVLM and others report;
* `k2`, `k3`: FLOPs of the decoder's layers as papers count them, 4 n d^2 + 2 n^2 d + k n d m with a
  multiply-add once, n = visual + text tokens; grouped keys and head widths are not looked at, m is
  the width of the experts that a token meets;
* `full`: every matrix product, 2 per multiply-add, see `costs.flops`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_vlm.costs import flops
from efficient_vlm.costs.flops import Cost
from efficient_vlm.costs.products import published_layer_flops
from efficient_vlm.models.decoder import Decoder
from efficient_vlm.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One decoder layer in prefill: tokens that it processes and that it hands on."""

    layer: int
    segment: int
    visual_in: int
    visual_out: int
    text_in: int
    text_out: int


@dataclasses.dataclass(frozen=True)
class Bound:
    """Amdahl's law with FLOPs for time: an estimate, for compute-bound work (prefill).

    Attributes:
      touched: the decoder, and every other stage that the method makes cheaper; so `speedup` never
        exceeds `bound`.
      share: of these stages in all FLOPs without the method, up to the last generated token.
      bound: largest end-to-end speed-up, were these stages free.
      speedup: all FLOPs without the method over all FLOPs with it.
      prefill_speedup: the same for the decoder's prefill and the first logits alone.
    """

    touched: tuple[str, ...]
    share: float
    bound: float
    speedup: float
    prefill_speedup: float


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What one question about one picture costs.

    Attributes:
      compressor: name and options, as configured.
      layers: of the decoder, in order.
      entering: visual tokens that enter the decoder.
      mean_written, mean_processed: see the module.
      k2, k3: FLOPs of all decoder layers, as papers count them.
      full: FLOPs by stage up to the first generated token, as we count them.
      decode_flops: of each further token.
      kv_bytes: keys and values of all layers, room for generated tokens included.
      encoder_layers: tokens in the attention of each encoder layer, CLS included, one image.
      encoder_out: tokens that leave the encoder, CLS included, one image.
      amdahl: against the same model without the method.
    """

    compressor: Mapping[str, Any]
    layers: tuple[LayerRow, ...]
    entering: int
    mean_written: float
    mean_processed: float
    k2: int
    k3: int
    full: Mapping[str, int]
    decode_flops: int
    kv_bytes: int
    encoder_layers: tuple[int, ...]
    encoder_out: int
    amdahl: Bound

    @property
    def total(self) -> int:
        """FLOPs of all stages up to the first generated token."""
        return sum(self.full.values())

    def to_json(self) -> dict[str, Any]:
        """Plain types under the names that `efficient-vlm audit --json` prints."""
        return {
            "compressor": dict(self.compressor),
            "layers": [dataclasses.asdict(row) for row in self.layers],
            "visual_tokens": {
                "entering": self.entering,
                "mean_written": self.mean_written,
                "mean_processed": self.mean_processed,
            },
            "flops": {
                "k2": self.k2,
                "k3": self.k3,
                "full": dict(self.full),
                "total": self.total,
                "decode_per_token": self.decode_flops,
            },
            "kv_bytes": self.kv_bytes,
            "encoder_layers": list(self.encoder_layers),
            "encoder_out": self.encoder_out,
            "amdahl": {**dataclasses.asdict(self.amdahl), "touched": list(self.amdahl.touched)},
        }


def build(
    model: VisionLanguageModel,
    *,
    text_tokens: int,
    new_tokens: int = 1,
    images: int = 1,
    pooled: int | None = None,
    baseline: Cost | None = None,
) -> Ledger:
    """The ledger of a model; nothing is initialised, traced or allocated.

    It reads fields and does not run the model: whether the model accepts them (widths that fit,
    options of trained methods) is for `costs.dry_run`.

    Args:
      model: any configuration.
      text_tokens: of the prompt; 0 counts visual tokens only, as PyramidDrop and FitPrune do.
      new_tokens: generated tokens.
      images: of one question (tiles, crops).
      pooled: see `flops.model_cost`.
      baseline: cost without the method; None for the same model with the compressor "none".

    Raises:
      UserError: a budget, layer or grid that the method cannot have in this model.
    """
    sizes = dict(text_tokens=text_tokens, new_tokens=new_tokens, images=images, pooled=pooled)
    cost = flops.model_cost(model, **sizes)
    if baseline is None:
        baseline = flops.model_cost(without(model), **sizes)
    rows = _rows(cost)
    decoder = model.make_decoder()
    count = max(len(rows), 1)
    ends = cost.encoder_layers[-1].mlp if cost.encoder_layers else 0
    return Ledger(
        compressor=dict(model.compressor),
        layers=rows,
        entering=cost.visual_tokens,
        mean_written=sum(row.visual_out for row in rows) / count,
        mean_processed=cost.mean_visual_tokens,
        k2=_published(decoder, rows, 2),
        k3=_published(decoder, rows, 3),
        full=cost.flops,
        decode_flops=cost.decode_flops,
        kv_bytes=cost.kv_bytes,
        encoder_layers=tuple(layer.attention for layer in cost.encoder_layers),
        encoder_out=ends,
        amdahl=_bound(cost, baseline, max(new_tokens - 1, 0)),
    )


def without(model: VisionLanguageModel) -> VisionLanguageModel:
    """The same model with no compression at all, inside the decoder neither."""
    segments = tuple({"layers": s["layers"]} for s in model.decoder["segments"])
    decoder = {**model.decoder, "segments": segments, "compressor": None}
    connector = model.connector
    if model.projector is None:  # An identity only fits a compressor that is the projector.
        connector = {**connector, "identity": False}
    plain = dict(compressor={"name": "none"}, in_place=False)
    return model.clone(**plain, decoder=decoder, connector=connector)


def _rows(cost: Cost) -> tuple[LayerRow, ...]:
    """Pairs each layer with the tokens of the next; behind the last, with what leaves it."""
    after = [layer.visual for layer in cost.layers[1:]] + [cost.left]
    return tuple(
        LayerRow(index, here.segment, here.visual, out, here.text, here.text)
        for index, (here, out) in enumerate(zip(cost.layers, after, strict=True))
    )


def _published(decoder: Decoder, rows: tuple[LayerRow, ...], matrices: int) -> int:
    moe, dense_layers = decoder.moe, tuple(decoder.dense_layers)

    def mlp_dim(layer: int) -> int:
        if moe is None or layer in dense_layers:
            return decoder.mlp_dim
        return moe["top_k"] * moe["expert_dim"] + (moe.get("shared_dim") or 0)

    return sum(
        published_layer_flops(
            row.visual_in + row.text_in, decoder.width, mlp_dim(row.layer), matrices
        )
        for row in rows
    )


def _bound(cost: Cost, baseline: Cost, further: int) -> Bound:
    """Amdahl's bound; `further` generated tokens are part of the whole, and of what is touched."""
    touched = [s for s, n in baseline.flops.items() if s == "decoder" or cost.flops[s] < n]
    before, after = (c.total + further * c.decode_flops for c in (baseline, cost))
    own = sum(baseline.flops[stage] for stage in touched) + further * baseline.decode_flops
    return Bound(
        touched=tuple(touched),
        share=own / before,
        bound=flops.amdahl(own / before),
        speedup=before / after,
        prefill_speedup=_prefill(baseline) / _prefill(cost),
    )


def _prefill(cost: Cost) -> int:
    return cost.flops["decoder"] + cost.flops["head"]
