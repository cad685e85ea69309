"""FLOPs from fields against the traced program, XLA's own count, and published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.costs import flops
from efficient_vlm.costs.encoder_flops import INTERMEDIATE_FLOPS, encoder_cost
from efficient_vlm.costs.products import published_layer_flops
from efficient_vlm.costs.traced import traced_flops
from efficient_vlm.errors import UserError
from efficient_vlm.models.init import boxed_parameters, example_shapes
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.intermediates import INTERMEDIATES

PROMPT, NEW = 10, 3
MOE = {"num_experts": 8, "top_k": 2, "expert_dim": 96, "shared_dim": 64}
ENCODER = {
    "image_size": 64,
    "patch_size": 8,
    "width": 128,
    "depth": 2,
    "num_heads": 4,
    "mlp_dim": 512,
    "stem_dim": 256,
}


def build(compressor=None, segments=None, encoder=(), connector=None, projector=None, **decoder):
    return VisionLanguageModel(
        vocab_size=97,
        projector=projector,
        encoder={**ENCODER, **dict(encoder)},
        compressor=compressor or {"name": "average_pool", "budget": 16},
        connector=connector or {},
        decoder={
            "width": 128,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 48,
            "mlp_dim": 320,
            "segments": segments or [{"layers": 3}],
            **decoder,
        },
    )


def shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def stages(model, images=1):
    """The real stages with abstract parameters and inputs: {name: (function, arguments)}."""
    inputs = example_shapes(model, pictures=images, text=PROMPT)
    params = {"params": boxed_parameters(model)}
    layout = model.layout(inputs.pictures)

    def call(method):
        return lambda params, *args: model.apply(params, *args, method=method)

    def compress(module, tokens, signals, text):
        return module.compress(tokens, signals, text, layout, jax.random.key(0))

    def prefill(module, visual, text):
        keywords = {"new_tokens": NEW, "rng": jax.random.key(0)}
        return module.prefill(visual, text, layout, **keywords)

    text = inputs.replace(pictures=None)
    encode = (call("encode"), (params, inputs.pictures))
    tokens, signals = jax.eval_shape(encode[0], *encode[1])
    join = (call(compress), (params, tokens, signals, text))
    visual = jax.eval_shape(join[0], *join[1])
    fill = (call(prefill), (params, visual, text))
    _, cache, *_ = jax.eval_shape(fill[0], *fill[1])
    step = (call("decode"), (params, jnp.zeros((1,), jnp.int32), cache))
    return {"encode": encode, "compress": join, "prefill": fill, "decode": step}, cache


def router_statistics(model, layer, tokens):
    """Products of an MoE layer that only feed its statistics, left out of the closed form."""
    moe = model.decoder.get("moe")
    if moe is None or layer in model.decoder.get("dense_layers", ()):
        return 0
    dropped = 0 if moe.get("capacity") is None else 2 * tokens
    return 2 * 2 * tokens * moe["num_experts"] + dropped


CASES = {
    "dense": build(),
    "one_product_stem": build(encoder={"stem_dim": None}),
    "moe": build(moe=MOE, mlp_dim=None),
    "moe_without_shared": build(moe={"num_experts": 4, "top_k": 1, "expert_dim": 64}),
    "moe_up_to_a_capacity": build(moe={**MOE, "capacity": 0.75}, mlp_dim=None),
    "moe_with_dense_layers": build(moe=MOE, dense_layers=(0, 2)),
    "plain_mlp_and_smaller_head": build(mlp_gated=False, head_size=90),
    "multi_head_and_mlp_connector": build(
        num_kv_heads=None, head_dim=None, connector={"hidden_dim": 200}
    ),
    "downsample": build({"name": "downsample", "budget": 16}),
    "downsample_and_padding": build({"name": "downsample", "budget": 12}),
    "none": build({"name": "none", "budget": 64}),
    "text_topk": build({"name": "text_topk", "budget": 16}),
    "two_segments": build(
        {"name": "none", "budget": 64},
        [{"layers": 1}, {"layers": 2, "compressor": {"name": "stride", "budget": 16}}],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_traced_program(name):
    model = CASES[name]
    cost = flops.model_cost(model, text_tokens=PROMPT, new_tokens=NEW)
    programs, cache = stages(model)
    traced = {k: traced_flops(f, *args) for k, (f, args) in programs.items()}
    layers = list(enumerate(cost.layers))
    extra = sum(router_statistics(model, i, t.visual + t.text) for i, t in layers)
    # The only products left out of the encoder resize images and position tables.
    resizing = traced["encode"] - cost.flops["encoder"]
    if name.startswith("downsample"):
        assert 0 <= resizing < 0.1 * traced["encode"]
    else:
        assert resizing == 0
    if name == "text_topk":  # Gathers by one-hot products are no part of the method's cost.
        assert cost.flops["compressor"] <= traced["compress"]
    else:
        connector = cost.flops["compressor"]
        assert connector <= traced["compress"] <= connector + 64 * 16 * 2 * 200
    assert cost.flops["decoder"] + cost.flops["head"] == traced["prefill"] - extra
    steps = sum(router_statistics(model, i, 1) for i, _ in layers)
    assert cost.decode_flops == traced["decode"] - steps
    assert cost.kv_bytes == sum(4 * x.size for s in cache.segments for x in s.parts)


NONE, IDENTITY = {"name": "none"}, {"identity": True}
MERGER = dict(
    projector={"name": "patch_merger", "side": 2, "hidden_dim": 72, "norm": "rms"},
    connector=IDENTITY,
)
POOL = {"name": "attention_pool", "hidden_dim": 80, "num_heads": 4, "head_dim": 24}
# Of published models: what their encoders and projectors have that ours alone do not.
PUBLISHED_PARTS = dict(
    clip={"encoder": {"class_token": True, "feature_layers": (-2,), "depth": 3}},
    two_layers={"encoder": {"feature_layers": (-2, 0), "depth": 4}},
    gated_windows={"encoder": {"mlp_gated": True, "window": 4, "full_layers": (1,)}},
    frames={"encoder": {"temporal_patch": 2, "stem_dim": None}},
    merger=MERGER,
    one_product={"projector": {"name": "patch_merger", "side": 4}, "connector": IDENTITY},
    deepstack={
        **MERGER,
        "projector": {**MERGER["projector"], "deepstack": 1},
        "encoder": {"feature_layers": (0, -1)},
        "deepstack": 1,
    },
    average_pool={"projector": {"name": "average_pool", "side": 2}},
    attention_pool={
        "projector": POOL,
        "connector": IDENTITY,
        "encoder": {"feature_layers": (0, 1)},
    },
    attention_pool_past_the_edge={"projector": {**POOL, "side": 3}, "connector": IDENTITY},
    ldp={"projector": {"name": "method", "method": "ldp"}, "connector": IDENTITY},
    ldpv2={"projector": {"name": "method", "method": "ldpv2"}, "connector": IDENTITY},
)
CLS, PLAIN_HEADS = {"class_token": True}, {"head_dim": None}
STAGED = {
    "class_token": build({"name": "none", "budget": 64}, encoder=CLS),
    "fastv": build({"name": "fastv", "layer": 1, "keep": 16}),
    "fastv_mean": build({"name": "fastv", "layer": 1, "keep": 16, "row": "mean"}),
    "pyramiddrop": build({"name": "pyramiddrop", "layers": (1, 2)}),
    "feather": build({"name": "feather", "layers": (1, 2)}),
    "v2drop": build({"name": "v2drop", "layers": (1, 2), "keep": (0.5, 0)}),
    "vtw": build({"name": "vtw", "layer": 1}),
    "fitprune": build({"name": "fitprune", "rate": 0.5}),
    "dart": build({"name": "dart", "layer": 1}, **PLAIN_HEADS),
    "tome": build({"name": "tome", "r": 8}, encoder=CLS),
    "tome_without_class_token": build({"name": "tome", "budget": 49}),
    "tome_of_units": build({"name": "tome", "r": 3}, **MERGER),
    "tofu_of_units": build({"name": "tofu", "r": 3, "prune_layers": 0}, **MERGER),
    "encoder_cut": build({"name": "encoder_cut", "layers": (1,), "keep": (0.5,)}, **MERGER),
    "encoder_cut_diversity": build(
        {"name": "encoder_cut", "layers": (1,), "keep": (0.5,), "score": "diversity"}
    ),
    "encoder_cut_neighbours": build(
        {"name": "encoder_cut", "layers": (0, 1), "keep": (0.5, 0.25), "score": "neighbours"}
    ),
    "pixelprune": build({"name": "pixelprune", "budget": 8}, **MERGER),
    "ipcv": build({"name": "ipcv", "layer": 1, "stabilised": 0}),
    "ipcv_stabilised": build(
        {"name": "ipcv", "layer": 1, "budget": 20},
        encoder={"class_token": True, "feature_layers": (0, -1)},
    ),
    "encoder_exit": build({"name": "encoder_exit", "layer": 1}, **MERGER),
    "minicpm_merger": build({"name": "minicpm_merger", "budget": 16, "layer": 1}),
    "projected": build({"name": "divprune", "budget": 16}, connector={"hidden_dim": 200}),
    "cls_row": build({"name": "fastervlm", "budget": 16}, encoder=CLS),
    "cls_row_full": build({"name": "prumerge", "budget": 16}, encoder=CLS),
    "column_mean": build({"name": "fastervlm", "budget": 16, "attention": "column_mean"}),
    "mean_query": build({"name": "fastervlm", "budget": 16, "attention": "mean_query"}),
    **{name: build(NONE, **fields) for name, fields in PUBLISHED_PARTS.items()},
    "projector_fastv": build({"name": "fastv", "layer": 1, "keep": 8}, **MERGER),
    "projector_divprune": build({"name": "divprune", "budget": 8}, **MERGER),
    "projector_cls_row": build(
        {"name": "fastervlm", "budget": 8}, **{**MERGER, "encoder": {"class_token": True}}
    ),
    "identity_connector": build(
        {"name": "pixel_shuffle", "budget": 16, "features": 128}, connector={"identity": True}
    ),
}


@pytest.mark.parametrize("name", STAGED)
def test_methods_inside_the_model_equal_the_traced_program(name):
    """Scorers run inside the encoder's and decoder's programs; the ledger books them apart."""
    model = STAGED[name]
    cost = flops.model_cost(model, text_tokens=PROMPT, new_tokens=NEW)
    programs, cache = stages(model)
    traced = {k: traced_flops(f, *args) for k, (f, args) in programs.items()}
    assert cost.total == traced["encode"] + traced["compress"] + traced["prefill"]
    assert cost.flops["encoder"] <= traced["encode"]
    assert cost.flops["decoder"] + cost.flops["head"] <= traced["prefill"]
    assert cost.decode_flops == traced["decode"]
    assert cost.kv_bytes == sum(4 * x.size for s in cache.segments for x in s.parts)


def test_tokens_pooled_across_images():
    """Molmo2: 21 tokens read patches of three crops; a budget is of all of them together."""
    images, pooled = 3, 21
    for method in ({"name": "none"}, {"name": "divprune", "budget": 5}):
        model = build({"grid": (1, pooled), **method}, projector=POOL, connector=IDENTITY)
        inputs = example_shapes(model, pictures=images, text=PROMPT, pooled=pooled)

        def run(params, inputs, model=model):
            return model.apply({"params": params}, inputs).logits

        params = boxed_parameters(model)
        cost = flops.model_cost(model, text_tokens=PROMPT, images=images, pooled=pooled)
        assert cost.visual_tokens == method.get("budget", pooled)
        logits = PROMPT * cost.flops["head"]  # Of all of the prompt, not of its end alone.
        traced = traced_flops(run, params, inputs)
        assert cost.total - cost.flops["head"] + logits == traced


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_close_to_what_xla_counts(name):
    """XLA also counts element-wise work, and a loop body once: depth 1, and a few per cent."""
    model = CASES[name].clone(encoder={**ENCODER, "depth": 1})
    model = model.clone(decoder={**model.decoder, "segments": [{"layers": 1}]})
    cost = flops.model_cost(model, text_tokens=PROMPT, new_tokens=NEW)
    programs, _ = stages(model)
    expected = {"encode": cost.flops["encoder"]}
    if name == "dense":  # On the CPU the blocks of grouped products are padded.
        expected["prefill"] = cost.flops["decoder"] + cost.flops["head"]
    for stage, count in expected.items():
        function, arguments = programs[stage]
        lowered = jax.jit(function).lower(*arguments)
        analysis = lowered.compile().cost_analysis()
        analysis = analysis[0] if isinstance(analysis, list) else analysis
        assert 1 <= analysis["flops"] / count < 1.12


def llama_7b(budget, segments):
    return VisionLanguageModel(
        vocab_size=32_000,
        encoder={**ENCODER, "image_size": 336, "patch_size": 14, "width": 1024, "num_heads": 16},
        compressor={"name": "none", "budget": 576} if budget == 576 else
        {"name": "stride", "budget": budget},
        decoder={"width": 4096, "num_heads": 32, "mlp_dim": 11_008, "segments": segments},
    )  # fmt: skip


def test_llama_7b_as_pyramiddrop_counts_it():
    """arXiv 2410.17247v2, ablation: 3.82 T multiply-adds at 576 tokens, 1.78 T in four stages."""
    one = 4 * 576 * 4096**2 + 2 * 576**2 * 4096 + 3 * 576 * 4096 * 11_008
    assert published_layer_flops(576, 4096, 11_008, 3) == one
    vanilla = flops.model_cost(llama_7b(576, [{"layers": 32}]), text_tokens=0)
    assert vanilla.flops["decoder"] == 2 * 32 * one
    assert vanilla.flops["decoder"] / 2e12 == pytest.approx(3.82, abs=0.005)
    halves = [{"layers": 8}] + [
        {"layers": 8, "compressor": {"name": "stride", "budget": b}} for b in (288, 144, 72)
    ]
    staged = flops.model_cost(llama_7b(576, halves), text_tokens=0)
    assert staged.flops["decoder"] / 2e12 == pytest.approx(1.78, abs=0.005)
    assert [layer.visual for layer in staged.layers[::8]] == [576, 288, 144, 72]
    assert staged.mean_visual_tokens == 270


def test_downsample_hands_on_its_budget():
    """9 patches of a smaller image in the encoder, 12 slots in the decoder."""
    cost = flops.model_cost(CASES["downsample_and_padding"], text_tokens=PROMPT)
    assert cost.encoder_layers[0].attention == 9
    assert cost.visual_tokens == cost.layers[0].visual == cost.left == 12
    with pytest.raises(UserError, match="cannot give 65 tokens"):
        flops.model_cost(build({"name": "downsample", "budget": 65}), text_tokens=PROMPT)


def test_downsample_in_front_of_a_projector():
    """4 tokens of 4 x 4 patches: the encoder gets an image of 32 x 32 pixels, not of 64."""
    model = build({"name": "downsample", "budget": 4}, **MERGER)
    cost = flops.model_cost(model, text_tokens=PROMPT, new_tokens=NEW)
    assert cost.visual_tokens == 4 and cost.encoder_layers[0].attention == 16
    programs, _ = stages(model)
    traced = sum(traced_flops(*programs[k][:1], *programs[k][1])
                 for k in ("encode", "compress", "prefill"))  # fmt: skip
    # Not counted, by convention: resizing the image and the two position tables.
    resizing = 2 * 3 * (32 * 64 * 64 + 32 * 32 * 64) + 2 * 2 * 4 * 8 * 128
    assert traced == cost.total + resizing


def test_every_intermediate_has_a_price():
    assert INTERMEDIATE_FLOPS.keys() == INTERMEDIATES.keys()


def test_kv_cache_of_llama_7b():
    """2 x 32 layers x 4096 x 2 bytes = 512 KiB a token, the known figure in half precision."""
    model = llama_7b(576, [{"layers": 32}]).clone(dtype=jnp.bfloat16)
    cost = flops.model_cost(model, text_tokens=23, new_tokens=1)
    assert cost.kv_bytes == 600 * 512 * 1024


def test_several_images_share_one_question():
    single = flops.model_cost(CASES["dense"], text_tokens=PROMPT, new_tokens=NEW)
    double = flops.model_cost(CASES["dense"], text_tokens=PROMPT, new_tokens=NEW, images=2)
    assert double.visual_tokens == 2 * single.visual_tokens
    assert double.flops["encoder"] == 2 * single.flops["encoder"]
    programs, _ = stages(CASES["dense"], images=2)
    function, arguments = programs["prefill"]
    assert double.flops["decoder"] + double.flops["head"] == traced_flops(function, *arguments)


def test_total_and_image_size():
    cost = flops.model_cost(CASES["dense"], text_tokens=PROMPT)
    assert cost.total == sum(cost.flops.values())
    assert tuple(cost.flops) == flops.STAGES
    model = build({"name": "stride", "budget": 16})
    wide = flops.model_cost(model.clone(compressor={**model.compressor, "grid": (8, 16)}),
                            text_tokens=1, image_size=(64, 128))  # fmt: skip
    assert wide.flops["encoder"] == encoder_cost(model.make_encoder(), 128).flops


def test_amdahl():
    assert flops.amdahl(0.5) == 2
    assert flops.amdahl(0.75, 3) == 2
    assert flops.amdahl(0) == 1
    assert flops.amdahl(1) == np.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda: flops.amdahl(1.5),
        lambda: flops.amdahl(0.5, 0),
        lambda: flops.model_cost(CASES["dense"], text_tokens=-1),
        lambda: flops.model_cost(CASES["dense"], text_tokens=1, image_size=63),
    ],
)
def test_bad_input_is_a_clear_error(call):
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value).splitlines()) <= 3


def test_traced_flops_of_known_programs():
    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))

    def layers(x, w):
        return jax.lax.scan(lambda c, k: (jax.nn.relu(c @ k), None), x, w)[0]

    assert traced_flops(layers, x, w) == 5 * 2 * 8 * 16 * 16
    assert traced_flops(jax.jit(jax.checkpoint(layers)), x, w) == 5 * 2 * 8 * 16 * 16
    sizes = jnp.zeros(5, jnp.int32)
    assert traced_flops(jax.lax.ragged_dot, x, w, sizes) == 2 * 8 * 16 * 16
    image, kernel = jnp.ones((1, 3, 10, 10)), jnp.ones((7, 3, 2, 2))
    conv = traced_flops(lambda a, b: jax.lax.conv(a, b, (1, 1), "VALID"), image, kernel)
    assert conv == 2 * 9 * 9 * 7 * 3 * 2 * 2
    branches = traced_flops(
        lambda p: jax.lax.cond(p, lambda: x @ w[0], lambda: (x @ w[0]) @ w[1]), True
    )
    assert branches == 2 * 2 * 8 * 16 * 16
