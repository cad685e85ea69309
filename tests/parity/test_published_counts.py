"""Published models: the table's numbers against transformers and against shapes by formula."""

import functools
import json
import math

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from efficient_vlm.errors import UserError  # noqa: E402
from efficient_vlm.families import published  # noqa: E402

pytestmark = pytest.mark.parity

# Counted apart from this table with transformers 5.23, molmo-7b-d from the bytes of its hub index.
TOTALS = {
    "llava-1.5-7b": 7_063_427_072,
    "llava-1.5-13b": 13_351_494_656,
    "smolvlm-256m": 256_484_928,
    "smolvlm-500m": 507_482_304,
    "smolvlm2-2.2b": 2_246_784_880,
    "idefics3-8b": 8_462_086_384,
    "paligemma-3b-224": 2_923_466_480,
    "paligemma-3b-448": 2_924_351_216,
    "paligemma-3b-896": 2_927_890_160,
    "paligemma2-3b": 3_032_242_416,
    "paligemma2-10b": 9_662_638_832,
    "paligemma2-28b": 27_650_487_024,
    "molmoe-1b": 7_221_875_712,
    "molmo-7b-o": 7_665_032_192,
    "molmo-7b-d": 32_084_101_120 // 4,
    "molmo-72b": 73_308_285_952,
    "molmo2-4b": 4_850_869_200,
    "molmo2-8b": 8_661_703_120,
    "molmo2-o-7b": 7_760_786_896,
    "gemma-3-4b": 4_300_079_472,
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 8_291_375_616,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-2b": 2_127_532_032,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "internvl3-1b": 938_193_024,
    "internvl3-2b": 2_088_957_440,
    "olmoe-1b-7b": 6_919_161_856,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-neo-125m": 125_198_592,
    "gpt-neo-1.3b": 1_315_575_808,
    "gpt-neo-2.7b": 2_651_307_520,
}
ACTIVE = {
    "molmoe-1b": 1_584_731_136,
    "olmoe-1b-7b": 1_282_017_280,
    "mixtral-8x7b": 12_879_925_248,
}
NO_CLASS = ("molmo", "mobilevlm")  # Model types that transformers does not have.
# Keys of transformers that decide neither a shape nor a value of a forward pass at inference.
INERT = {
    "output_router_logits",
    "initializer_factor",
    "initializer_range",
    "use_cache",
    "pretraining_tp",
    "resid_pdrop",
    "embd_pdrop",
    "max_window_layers",
    "_sliding_window_pattern",  # layer_types are given.
    "attention_layers",  # attention_types are given.
    "num_image_tokens",  # PaliGemma derives it.
    "_pad_token_id",
    "projection_dim",  # Of CLIP's contrastive head.
}
VISION_PARTS = ("vision_tower", "vision_model", "visual", "image_vit")


WITH_PICTURES = [name for name in published.names() if published.get(name)["visual_tokens"]]


def molmo_shapes(config):
    """Every tensor of a released Molmo (2024), from its dimensions."""
    d, heads = config["d_model"], config["n_heads"]
    kv = config["n_kv_heads"] * (d // heads)
    ff = config.get("mlp_hidden_size", config.get("mlp_ratio", 0) * d) // 2
    tower = config["vision_backbone"]
    w, mlp, patch = tower["image_emb_dim"], tower["image_mlp_dim"], tower["image_patch_size"]
    vocab = config["embedding_size"]
    text = "model.transformer."
    shapes = {
        text + "wte.embedding": (vocab, d),
        text + "wte.new_embedding": (config["additional_vocab_size"], d),
        text + "ln_f": (d,),
        text + "ff_out": (vocab, d),
    }
    for i in range(config["n_layers"]):
        block = f"{text}blocks.{i}."
        shapes |= {block + "att_proj": (d + 2 * kv, d), block + "attn_out": (d, d)}
        shapes |= {block + "attn_norm": (d,), block + "ff_norm": (d,)}
        if config["qkv_bias"]:
            shapes[block + "att_proj.bias"] = (d + 2 * kv,)
        if config["attention_layer_norm"]:
            shapes |= {block + "q_norm": (d,), block + "k_norm": (kv,)}
        if config["block_type"] == "moe":
            experts = config["moe_num_experts"]
            shapes[block + "ffn.router.layer"] = (experts, d)
            shapes |= {f"{block}ffn.experts.mlp.{m}": (experts, ff, d) for m in ("w1", "v1", "w2")}
        else:
            shapes |= {block + "ff_proj": (2 * ff, d), block + "ff_out": (d, ff)}
    backbone = "model.vision_backbone."
    vit = backbone + "image_vit."
    shapes |= {
        backbone + "pad_embed": (2, 2 * w),
        vit + "class_embedding": (w,),
        vit + "positional_embedding": (tower["image_num_pos"], w),
        vit + "patch_embedding": (w, 3 * patch**2),
        vit + "pre_ln": (2, w),  # Scale and shift.
    }
    for i in range(tower["image_num_layers"]):
        block = f"{vit}transformer.resblocks.{i}."
        shapes |= {f"{block}attention.w{m}": (w, w + 1) for m in "qkvo"}  # With the bias.
        shapes |= {block + "w1": (mlp, w + 1), block + "w2": (w, mlp + 1)}
        shapes |= {block + "attention_norm": (2, w), block + "ffn_norm": (2, w)}
    pool = backbone + "image_pooling_2d."
    shapes |= {f"{pool}w{m}": (w, 2 * w + 1) for m in "qkv"} | {pool + "wo": (w, w + 1)}
    project = backbone + "image_projector."
    shapes |= {project + "w1": (ff, w), project + "w3": (ff, w), project + "w2": (d, ff)}
    return shapes


def inverted_residual(d):
    """Depthwise, norm, squeeze, excite, pointwise, norm: MobileNet v3's block without expansion."""
    nn = torch.nn
    depthwise, pointwise = nn.Conv2d(d, d, 3, groups=d, bias=False), nn.Conv2d(d, d, 1, bias=False)
    squeeze, excite = nn.Conv2d(d, d // 4, 1), nn.Conv2d(d // 4, d, 1)
    return [depthwise, nn.LayerNorm(d), squeeze, excite, pointwise, nn.LayerNorm(d)]


def mobilevlm_parts(config):
    """MobileVLM's language model, CLIP and projector (arXiv 2312.16886 and 2402.03766)."""
    nn = torch.nn
    width, d = config["vision_config"]["hidden_size"], config["text_config"]["hidden_size"]
    mlp = [nn.Linear(width, d), nn.GELU(), nn.Linear(d, d)]
    if config["mm_projector_type"] == "ldpnetv2":
        rest = [nn.Conv2d(d, d, 3, groups=d)]
    else:
        rest = [layer for _ in range(2) for layer in inverted_residual(d)]
    text = transformers.LlamaConfig.from_dict(config["text_config"])
    clip = transformers.CLIPVisionConfig.from_dict(config["vision_config"])
    parts = {"language_model": transformers.LlamaForCausalLM(text)}
    parts |= {"vision_tower": transformers.CLIPVisionModel(clip)}
    return nn.ModuleDict(parts | {"mm_projector": nn.Sequential(*mlp, *rest)})


def transformers_config(config):
    model_class = getattr(transformers, config["architectures"][0])
    return model_class, model_class.config_class.from_dict(json.loads(json.dumps(config)))


@functools.cache
def sizes(name):
    """Tensor name -> number of values; a table used twice appears once."""
    config = published.get(name)["config"]
    if config["model_type"] == "molmo":
        return {key: math.prod(shape) for key, shape in molmo_shapes(config).items()}
    with torch.device("meta"):
        if config["model_type"] == "mobilevlm":
            model = mobilevlm_parts(config)
        else:
            model_class, built = transformers_config(config)
            model = model_class(built)
    return {key: value.numel() for key, value in model.named_parameters()}


def of_vision(name):
    return {k: n for k, n in sizes(name).items() if any(part in k for part in VISION_PARTS)}


@pytest.mark.parametrize("name", published.names())
def test_parameters(name):
    entry = published.get(name)
    assert sum(sizes(name).values()) == entry["params"] == TOTALS.get(name, entry["params"])
    assert (sum(of_vision(name).values()) or None) == entry["params_vision"]


def test_every_known_total_is_in_the_table():
    assert set(TOTALS) <= set(published.names())
    assert [n for n in published.names() if published.get(n)["params_active"]] == sorted(ACTIVE)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    entry = published.get(name)
    config = entry["config"]
    keys = ("num_experts", "num_local_experts", "moe_num_experts")
    experts = next(config[key] for key in keys if key in config)
    top_k = config.get("num_experts_per_tok", config.get("moe_top_k"))
    in_experts = sum(n for key, n in sizes(name).items() if ".experts." in key)
    active = entry["params"] - in_experts * (experts - top_k) // experts
    assert active == entry["params_active"] == ACTIVE[name]


def left_to_defaults(ours, theirs):
    """Keys that `theirs` has and `ours` has not, at any depth, and values that differ."""
    common = set(transformers.PreTrainedConfig().to_dict()) | INERT
    for key, value in theirs.items():
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            yield from (f"{key}.{k}" for k in left_to_defaults(ours[key], value))
        elif key in ours:
            if ours[key] != value:
                yield key
        elif key not in common and "dropout" not in key:
            yield key


@pytest.mark.parametrize("name", published.names())
def test_no_default_of_a_class_is_needed(name):
    config = published.get(name)["config"]
    if config["model_type"] in NO_CLASS:
        pytest.skip("transformers has no class for it")
    _, built = transformers_config(config)
    assert not list(left_to_defaults(config, built.to_dict()))


@pytest.mark.parametrize("name", [n for n in published.names() if published.get(n)["unused"]])
def test_unused_parameters(name):
    """A block and a norm: a model whose features come from in front of them gives the same."""
    entry = published.get(name)
    parts = of_vision(name)
    found = {p: sum(n for key, n in parts.items() if p in key) for p in entry["unused"]}
    assert found == entry["unused"]
    vision = entry["config"]["vision_config"]
    last = vision["num_hidden_layers"] + 1 + entry["config"]["vision_feature_layer"]
    assert [p for p in found if p.startswith("encoder")] == [f"encoder.layers.{last}."]
    small = {"num_hidden_layers": 3, "hidden_size": 8, "intermediate_size": 8, "image_size": 28}
    tower = transformers.AutoModel.from_config(
        transformers.AutoConfig.for_model(**{**vision, **small, "num_attention_heads": 2})
    )
    features = tower(torch.ones(1, 3, 28, 28), output_hidden_states=True).hidden_states
    features[entry["config"]["vision_feature_layer"]].sum().backward()
    unread = {key for key, value in tower.named_parameters() if value.grad is None}
    parts = ("encoder.layers.2.", "post_layernorm.", "head.")
    assert unread == {k for k, _ in tower.named_parameters() if any(p in k for p in parts)}


def molmo_grid(height, width, crop, window, limit):
    """Rows and columns of crops: the least enlargement, or the least shrinking where none is."""
    grids = [(r, c) for r in range(1, limit + 1) for c in range(1, limit + 1) if r * c <= limit]
    margin = crop - window
    wanted = (height - margin) / window, (width - margin) / window
    scale = {g: min(g[0] / wanted[0], g[1] / wanted[1]) for g in grids}
    enlarging = [g for g in grids if scale[g] >= 1]
    if enlarging:
        return min(enlarging, key=lambda g: (scale[g], g[0] * g[1]))
    return max(grids, key=lambda g: (scale[g], -g[0] * g[1]))


def molmo_tokens(entry):
    """Visual tokens, tokens with their marks, and crops of a picture of 768 x 1024 pixels."""
    old = entry["config"]["model_type"] == "molmo"
    settings = entry["image_processor"]
    patch, side = (14, 24) if old else (settings["patch_size"], 27)
    margin = sum(settings["overlap_margins"])
    window = side - margin
    grid = molmo_grid(768, 1024, side * patch, window * patch, settings["max_crops"])
    rows, columns = (-(-(n * window + margin) // 2) for n in grid)
    whole = -(-side // 2)  # Rows and columns of the whole picture, pooled 2 x 2.
    visual = whole**2 + rows * columns
    marks = 4 + rows + (whole if old else 0)  # Molmo 2 marks no rows of the whole picture.
    return visual, visual + marks, math.prod(grid) + 1


def processed_tokens(entry):
    """Visual tokens and images that transformers' processor makes of a black picture."""
    settings, config = dict(entry["image_processor"]), entry["config"]
    processor = getattr(transformers, settings.pop("image_processor_type") + "Pil")(**settings)
    picture = Image.fromarray(np.zeros((768, 1024, 3), np.uint8))
    out = processor(picture, return_tensors="np")
    if "image_grid_thw" in out:
        merge = config["vision_config"]["spatial_merge_size"]
        return int(np.prod(out["image_grid_thw"])) // merge**2, 1
    pixels = out["pixel_values"]
    pixels = pixels.reshape(-1, *pixels.shape[-3:])
    images, _, height, width = pixels.shape
    patch = np.ravel(config["vision_config"]["patch_size"])[0]
    tokens = (height // patch) * (width // patch)
    if "mm_tokens_per_image" in config:
        tokens = config["mm_tokens_per_image"]
    elif "mm_projector_type" in config:
        tokens //= 4
    tokens = tokens // config.get("scale_factor", 1) ** 2
    return int(images * tokens * config.get("downsample_ratio", 1) ** 2), images


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_visual_tokens(name):
    entry = published.get(name)
    expected = entry["visual_tokens"]
    if entry["config"]["model_type"].startswith("molmo"):
        found = molmo_tokens(entry)
        assert found == (expected["tokens"], expected["sequence"], expected["images"])
    else:
        assert processed_tokens(entry) == (expected["tokens"], expected["images"])


def test_an_entry_is_a_copy():
    published.get("molmo-7b-d")["config"]["d_model"] = 1
    assert published.get("molmo-7b-d")["config"]["d_model"] == 3584


@pytest.mark.parametrize("name", ["llava-1.5-7", "../published/llava-1.5-7b", None])
def test_unknown_name(name):
    with pytest.raises(UserError) as caught:
        published.get(name)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 3
    assert name != "llava-1.5-7" or "did you mean 'llava-1.5-7b'" in lines[-1]
