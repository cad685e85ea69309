"""The joined model: packing, caches, segments, policies, published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from tiny_models import MOE

from efficient_vlm.errors import UserError
from efficient_vlm.inference.generate import generate
from efficient_vlm.models.decoder import Decoder
from efficient_vlm.models.encoder import ViT
from efficient_vlm.nn.patch_positions import _resample as resample
from efficient_vlm.train.losses import ratio, token_cross_entropy

SHORTER = [dict(layers=1), dict(layers=1, compressor=dict(name="stride", budget=4))]


def split_questions(batch):
    """One row per question, in the same order."""
    questions = batch["tokens"].shape[1]
    rows = {k: np.repeat(batch[k], questions, axis=0) for k in ("images", "image_mask", "index")}
    flat = ("tokens", "lengths", "prompt_lengths", "loss_mask", "task")
    return rows | {k: batch[k].reshape(-1, 1, *batch[k].shape[2:]) for k in flat}


def labels_of(batch):
    """[B, Q, L - 1], the token to predict, -1 for none."""
    return np.where(batch["loss_mask"], batch["tokens"], -1)[..., 1:]


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("name", ["none", "average_pool"])
def test_packed_equals_unpacked(make_model, make_batch, init, logits_of, name, moe):
    """Questions behind one copy of the visual tokens see what they would see alone."""
    model = make_model(name, 16 if name == "none" else 4, moe=moe)
    batch = make_batch()
    params = init(model)
    packed = logits_of(model, params, batch)
    alone = logits_of(model, params, split_questions(batch))
    valid = np.arange(6) < batch["lengths"][..., None]
    np.testing.assert_allclose(packed[valid], alone.reshape(packed.shape)[valid], atol=2e-5)
    losses = [
        ratio(token_cross_entropy(out[..., :-1, :], labels_of(b))["loss"])
        for out, b in ((packed, batch), (alone, split_questions(batch)))
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_questions_do_not_see_each_other(make_model, make_batch, init, logits_of):
    model, batch = make_model(), make_batch()
    params = init(model)
    before = logits_of(model, params, batch)
    batch["tokens"] = batch["tokens"].copy()
    batch["tokens"][:, 1] = (batch["tokens"][:, 1] + 3) % 20
    after = logits_of(model, params, batch)
    np.testing.assert_array_equal(before[:, 0], after[:, 0])
    assert not np.allclose(before[:, 1], after[:, 1])


VARIANTS = {
    "dense": dict(),
    "moe": dict(moe=MOE),
    "segments": dict(decoder=dict(segments=SHORTER)),
    "segments reindexed": dict(decoder=dict(segments=SHORTER, position_policy="reindex")),
    "text top-k": dict(name="text_topk", budget=4),
    "tied, causal image": dict(decoder=dict(tie_embeddings=True, bidirectional_visual=False)),
    "two images": dict(name="average_pool", budget=4),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_cache_equals_without(
    make_model, make_batch, init, logits_of, prompts, variant
):
    """Greedy decoding through the cache against running the whole text again for each token."""
    fields = dict(VARIANTS[variant])
    model = make_model(fields.pop("name", "none"), fields.pop("budget", 16), **fields)
    batch = make_batch(images=2 if variant == "two images" else 1)
    batch["image_mask"][0, -1] = False
    params = init(model)
    new = 4
    lengths = batch["prompt_lengths"]
    out = generate(model, params, prompts(batch), new_tokens=new, eos_id=-1)
    tokens = np.zeros((3, 2, 6 + new), np.int32)
    tokens[..., :6] = np.where(np.arange(6) < lengths[..., None], batch["tokens"], 0)
    for step in range(new):
        whole = {**batch, "tokens": tokens, "lengths": lengths + step}
        logits = np.asarray(logits_of(model, params, whole))
        for b, q in np.ndindex(3, 2):
            place = lengths[b, q] + step
            tokens[b, q, place] = logits[b, q, place - 1].argmax()
            assert tokens[b, q, place] == out.tokens[b, q, step], (b, q, step)


def test_segments_shorten_the_cache(make_model, make_batch, init, prompts):
    """Dropping tokens between segments saves cache for real: 16 + 4 visual slots, not 32."""
    batch = make_batch()
    sizes = []
    for segments in ([dict(layers=2)], SHORTER):
        model = make_model(decoder=dict(segments=segments))
        out = generate(model, init(model), prompts(batch), new_tokens=2, eos_id=-1)
        sizes.append(out.kv_bytes)
    per_slot = 2 * 6 * 2 * 8 * 4  # keys and values, rows, kv heads, head dim, float32
    assert sizes == [2 * (16 + 6 + 2) * per_slot, (16 + 4 + 2 * (6 + 2)) * per_slot]


def test_empty_questions_and_missing_images_stay_finite(make_model, make_batch, init, inputs):
    model, batch = make_model(moe=MOE), make_batch()
    batch["lengths"][0, 1] = batch["prompt_lengths"][0, 1] = 0
    batch["loss_mask"][0, 1] = False
    batch["image_mask"][1] = False
    params = init(model)

    def loss(p):
        given = inputs(batch)
        logits = model.apply({"params": p}, given).logits
        return ratio(token_cross_entropy(logits, given.labels)["loss"])

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_missing_image_is_no_image(make_model, make_batch, init, logits_of):
    """What is in a masked image changes nothing."""
    model, batch = make_model(), make_batch()
    batch["image_mask"][:] = False
    params = init(model)
    before = logits_of(model, params, batch)
    batch["images"] = 255 - batch["images"]
    after = logits_of(model, params, batch)
    valid = np.arange(6) < batch["lengths"][..., None]
    np.testing.assert_array_equal(before[valid], after[valid])


@pytest.mark.parametrize("where", ["encoder", "decoder"])
def test_scan_equals_unrolled_and_rematerialised(make_model, make_batch, init, inputs, where):
    batch = make_batch()
    model = make_model(moe=MOE, **{where: dict(scan_unroll=1)})
    params = init(model)

    def gradient(m):
        def loss(p):
            return (m.apply({"params": p}, inputs(batch)).logits ** 2).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    base = gradient(model)
    for options in (dict(scan_unroll=2), dict(remat="full"), dict(remat="dots")):
        other = gradient(make_model(moe=MOE, **{where: options}))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), base, other
        )


def test_bfloat16_is_close_and_parameters_stay_float32(make_model, make_batch, init, logits_of):
    batch = make_batch()
    model = make_model()
    params = init(model)
    half = make_model(dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(init(half))} == {jnp.dtype("float32")}
    exact = logits_of(model, params, batch)
    low = logits_of(half, params, batch)
    assert low.dtype == jnp.float32
    assert np.abs(low - exact).max() < 0.05 * np.abs(exact).max()


def test_every_parameter_has_logical_axes(make_model, make_batch, inputs):
    for fields in (
        dict(moe=MOE),
        dict(encoder=dict(stem_dim=16)),
        dict(name="text_topk", budget=4),
        dict(name="resampler", budget=4),
        dict(name="pixel_shuffle", budget=4),
    ):
        model = make_model(**fields)
        shapes = jax.eval_shape(lambda m=model: m.init(jax.random.key(0), inputs(make_batch())))
        boxes = jax.tree.leaves(shapes["params"], is_leaf=lambda x: isinstance(x, nn.Partitioned))
        for box in boxes:
            assert isinstance(box, nn.Partitioned), box
            assert len(box.names) == box.value.ndim


def test_budgets_share_parameters(make_model, init):
    shapes = [
        jax.tree.map(jnp.shape, init(make_model("text_topk", budget))) for budget in (16, 4, 1)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_reindex_differs_from_retain(make_model, make_batch, init, logits_of):
    """The policies place kept tokens differently, and agree when all tokens are kept."""
    batch = make_batch()
    for budget, same in ((16, True), (4, False)):
        out = []
        for policy in ("retain", "reindex"):
            model = make_model("stride", budget, decoder=dict(position_policy=policy))
            out.append(logits_of(model, init(model), batch))
        assert np.allclose(*out, atol=1e-5) == same


# Published totals: transformers' LlamaForCausalLM at Llama-2-7B size has 6,738,415,616 parameters,
# Mixtral-8x7B 46,702,792,704.
LLAMA_7B = dict(
    vocab_size=32_000, width=4096, num_heads=32, segments=[dict(layers=32)], mlp_dim=11_008
)
MIXTRAL = dict(
    vocab_size=32_000,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    segments=[dict(layers=32)],
    moe=dict(num_experts=8, top_k=2, expert_dim=14_336),
)


@pytest.mark.parametrize(
    ("fields", "count"),
    [(LLAMA_7B, 6_738_415_616), (MIXTRAL, 46_702_792_704)],
    ids=["llama", "mixtral"],
)
def test_published_parameter_counts(fields, count):
    from efficient_vlm.compressors import Signals, VisualTokens

    def init():
        visual = VisualTokens.from_grid(jnp.zeros((1, 4, 4096)), (2, 2))
        decoder = Decoder(**fields)
        call = decoder.init(
            jax.random.key(0),
            visual,
            jnp.zeros((1, 3, 4096)),
            jnp.zeros((1, 3), jnp.int32),
            jnp.ones((1, 3), jnp.int32),
            columns=2,
            signals=Signals(),
            method=lambda m, *a, **k: m.logits(m(*a, **k)[0]),
        )
        return call["params"]

    shapes = nn.unbox(jax.eval_shape(init))
    assert sum(np.prod(x.shape, dtype=np.int64) for x in jax.tree.leaves(shapes)) == count


VIT = dict(image_size=32, patch_size=8, width=24, depth=3, num_heads=2, mlp_dim=32)


@pytest.mark.parametrize("class_token", [False, True])
def test_encoder_intermediates(class_token):
    """Rows and means against a whole attention map in float64, from the queries and keys."""
    vit = ViT(**VIT, class_token=class_token)
    images = jax.random.randint(jax.random.key(0), (2, 32, 32, 3), 0, 256).astype(jnp.uint8)
    params = nn.unbox(vit.init(jax.random.key(1), images))
    rows = ["cls_row", "cls_row_full"] if class_token else []
    rows += ["mean_query_row", "column_mean"]
    names = ("features/0", "features/-1", "keys/1", *(f"{row}/1" for row in rows))
    out, found = jax.jit(lambda p: vit.apply(p, images, intermediates=names))(params)
    assert {k: v.shape for k, v in found.items()} == {
        "features/0": (2, 16, 24),
        "features/-1": (2, 16, 24),
        "keys/1": (2, 16, 2, 12),
        **{f"{row}/1": (2, 16) for row in rows},
    }
    last = np.asarray(found["features/-1"], np.float64)
    np.testing.assert_allclose(
        out, last / np.sqrt((last**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-4, atol=1e-5
    )
    plain = vit.apply(params, images)[0]
    np.testing.assert_allclose(out, plain, rtol=1e-4, atol=1e-5)
    if not class_token:
        np.testing.assert_allclose(found["column_mean/1"].sum(-1), 1, rtol=1e-5)
        x = np.float64(found["features/0"])
        layer = jax.tree.map(lambda p: np.float64(p[1]), params["params"]["layers"])
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * layer["attention_norm"]["scale"]
        q = np.einsum("bnd,dhe->bnhe", x, layer["attention"]["query"]["kernel"])
        k = np.einsum("bnd,dhe->bnhe", x, layer["attention"]["key"]["kernel"])
        np.testing.assert_allclose(found["keys/1"], k, rtol=1e-4, atol=1e-5)

        def softmax(logits):
            e = np.exp(logits - logits.max(-1, keepdims=True))
            return e / e.sum(-1, keepdims=True)

        everything = softmax(np.einsum("bqhe,bkhe->bhqk", q, k) * 12**-0.5)
        np.testing.assert_allclose(found["column_mean/1"], everything.mean((1, 2)), rtol=1e-4)
        one = softmax(np.einsum("bhe,bkhe->bhk", q.mean(1), k) * 12**-0.5).mean(1)
        np.testing.assert_allclose(found["mean_query_row/1"], one, rtol=1e-4)
        with pytest.raises(UserError, match="no CLS token") as caught:
            vit.apply(params, images, intermediates=("cls_row/-1",))
        assert "column_mean" in str(caught.value)
    else:
        assert (found["cls_row/1"].sum(-1) < 1).all()
    with pytest.raises(UserError, match="did you mean 'keys'"):
        vit.apply(params, images, intermediates=("key/0",))
    with pytest.raises(UserError, match="no layer of this encoder"):
        vit.apply(params, images, intermediates=("keys/3",))


@pytest.mark.parametrize("position", ["factorised", "learned"])
def test_encoder_takes_other_image_sizes(position):
    """Position tables are resampled to the grid of the image at hand."""
    fields = dict(image_size=32, patch_size=8, width=8, depth=1, num_heads=2, mlp_dim=8)
    vit = ViT(**fields, position=position)
    params = nn.unbox(vit.init(jax.random.key(1), jnp.zeros((1, 32, 32, 3), jnp.uint8)))
    assert vit.apply(params, jnp.zeros((1, 16, 16, 3), jnp.uint8))[0].shape == (1, 4, 8)
    assert vit.apply(params, jnp.zeros((1, 16, 48, 3), jnp.uint8))[0].shape == (1, 12, 8)
    # A rising table of four rows read at two: symmetric about the middle, and still rising.
    rows = np.asarray(resample(jnp.tile(jnp.arange(4.0)[:, None], (1, 8)), 0, 2))[:, 0]
    assert rows.sum() == pytest.approx(3.0, abs=1e-5)
    assert 0.3 < rows[0] < 1 < 2 < rows[1] < 2.7


def test_wrong_fields_are_named(make_model):
    with pytest.raises(UserError, match="did you mean 'num_heads'"):
        make_model(encoder=dict(num_head=2)).make_encoder()
    with pytest.raises(UserError, match=r"model\.decoder\.position_policy"):
        make_model(decoder=dict(position_policy="keep")).make_decoder().init(
            jax.random.key(0), jnp.zeros(1, jnp.int32), method="embed"
        )


def test_selector_learns_from_the_decoder_and_teaches_it_nothing(
    make_model, make_batch, init, inputs
):
    """KL of teacher and student by hand; its gradient reaches the selector's parameters alone."""
    model, batch = make_model("text_topk", 16, moe=MOE), make_batch(images=2)
    batch["image_mask"][0, 1] = False
    batch["lengths"][1, 1] = batch["prompt_lengths"][1, 1] = 0
    params = init(model)

    def selector(p):
        total, count = model.apply({"params": p}, inputs(batch)).stats["selector"]
        return total / count, count

    (value, count), grads = jax.value_and_grad(selector, has_aux=True)(params)
    assert count == 5
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        inside = path[0].key == "reduce"
        assert (np.abs(leaf).max() > 0) == inside, path
    # A step against the gradient brings the scores nearer to the attention.
    nearer = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert 0 < selector(nearer)[0] < value

    def parts(m):
        given = inputs(batch)
        patches, _ = m.encode(given.pictures)
        text = m.instruction(given)
        uniform = jnp.ones((2, 3, 2, 32)) / 32
        asked = jnp.ones((3, 2), bool)
        loss = m.reduce.imitation_loss(patches, text, uniform, asked, 2)
        return loss, m.reduce.scores(patches, jnp.repeat(text, 2, axis=0))

    (total, _), scores = model.apply({"params": params}, method=parts)
    scores = np.asarray(scores, np.float64).reshape(3, 2, 2, 16)
    expected = 0.0
    for b, q in np.ndindex(3, 2):
        real = [m for m in range(2) if batch["image_mask"][b, m]]
        row = np.concatenate([scores[b, m, q] for m in real])
        student = np.exp(row) / np.exp(row).sum()
        expected += np.sum(1 / 32 * (np.log(1 / 32) - np.log(student)))
    assert float(total) == pytest.approx(expected, rel=1e-4)


WITHIN = [dict(layers=1), dict(layers=1, compressor=dict(name="text_topk", budget=4))]
MERGER = dict(name="minicpm_merger", budget=1, options=dict(layer=1, num_heads=2))


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (dict(name="tome", budget=8), set()),
        (MERGER, {"vit/minicpm_window", "vit/minicpm_final"}),
        (dict(decoder=dict(segments=WITHIN)), {"language/reducers_1"}),
    ],
    ids=["in the encoder", "in the encoder, trained", "in the decoder, trained"],
)
def test_parameters_are_those_of_layers_that_run(make_model, init, method, more):
    """Without a method among the layers `init` does not run them; with one it does."""
    plain, other = (
        flatten_dict(init(model), sep="/") for model in (make_model(), make_model(**method))
    )
    assert {"/".join(path.split("/")[:2]) for path in set(other) - set(plain)} == more
    for path, value in plain.items():
        np.testing.assert_array_equal(value, other[path], path)
