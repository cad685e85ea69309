"""Adapted models say what their merged weights say; only what is trained has gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tiny_models import MOE

from efficient_vlm.adapt.build import combine, is_adapted, merge, partition, prepare
from efficient_vlm.adapt.config import AdaptConfig
from efficient_vlm.adapt.forms import DoRA, LoRA
from efficient_vlm.adapt.places import is_form
from efficient_vlm.adapt.prompts import Extended, soft_ids
from efficient_vlm.adapt.quantised import NF4, Int8
from efficient_vlm.errors import UserError
from efficient_vlm.families import presets
from efficient_vlm.families.checks import check_parameters
from efficient_vlm.fields import construct
from efficient_vlm.inference.generate import generate
from efficient_vlm.kernels.attention import make_mask
from efficient_vlm.models.init import boxed_parameters, init_params
from efficient_vlm.models.inputs import ModelInputs
from efficient_vlm.models.vlm import VisionLanguageModel
from efficient_vlm.nn.attention import PREFIX, Attention
from efficient_vlm.nn.fuse import fuse
from efficient_vlm.nn.linear import Joined
from efficient_vlm.nn.stack import unstack
from efficient_vlm.processing.batch import question_inputs
from efficient_vlm.sharding import RULES, is_box, logical_axes, path_of
from efficient_vlm.train.optimizer import OptimizerConfig, make_optimizer


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(
        connector=dict(hidden_dim=24), decoder=dict(segments=[dict(layers=2)], qkv_bias=True)
    )


@pytest.fixture(scope="module")
def params(model, init):
    """Biases are zero and norms one at first."""
    noise = lambda p: p + 0.02 * jnp.sin(jnp.arange(p.size)).reshape(p.shape)  # noqa: E731
    return jax.tree.map(noise, init(model))


@pytest.fixture(scope="module")
def batch(make_batch, inputs):
    return inputs(make_batch())


@pytest.fixture(scope="module")
def logits(model, batch):
    return jax.jit(lambda params: model.apply({"params": params}, batch).logits)


def moved(adapted, scale=0.05):
    """Adapted parameters after a step: what is trained has other values."""
    trained, frozen = partition(*adapted)
    for i, (path, leaf) in enumerate(sorted(trained.items())):
        trained[path] = leaf + scale * jnp.cos(i + jnp.arange(leaf.size)).reshape(leaf.shape)
    return combine(trained, frozen, adapted.params)


def forms_of(params):
    """Path -> form of each parameter that is one."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_form)
    return {path_of(path): leaf for path, leaf in leaves if is_form(leaf)}


CASES = [
    dict(name="lora"),
    dict(name="rslora", targets="all-linear"),
    dict(name="dora", targets=("attention", "connector"), base="int8"),
    dict(name="qlora", targets=r"language/.*/(query|down)/", train="norms"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_an_adapted_model_says_what_its_merged_weights_say(model, params, logits, case):
    """Stacked and split alike, and nothing at first; both before and after a step."""
    config = AdaptConfig(rank=2, alpha=3.0, **case)
    adapted = prepare(params, config, model)
    first = logits(adapted.params)
    assert is_adapted(adapted.params)
    if config.base_form is None:
        np.testing.assert_allclose(first, logits(params), atol=1e-5)
    else:
        error = float(jnp.abs(first - logits(params)).max())
        assert 1e-4 < error < 0.3 * float(jnp.abs(first).max())
    changed = moved(adapted)
    found = logits(changed)
    assert float(jnp.abs(found - first).max()) > 1e-2
    plain = merge(changed)
    assert not is_adapted(plain)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(logits(plain), found, atol=2e-4)
    np.testing.assert_allclose(logits(unstack(changed)), found, atol=2e-4)


def test_split_parameters_are_adapted_as_stacked_ones(model, params):
    config = AdaptConfig(rank=2, name="dora", targets="all-linear")
    stacked, split = prepare(params, config, model), prepare(unstack(params), config, model)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    assert shapes(split.params) == shapes(unstack(stacked.params))
    assert split.trainable == unstack_flags(stacked.trainable, stacked.params)


def unstack_flags(flags, params):
    """`unstack` of a tree of truth values."""
    arrays = jax.tree.map(lambda flag, leaf: jnp.full(leaf.shape, flag), flags, params)
    return jax.tree.map(lambda leaf: bool(leaf.all()), unstack(arrays))


def test_experts_are_adapted(make_model, init, make_batch, inputs):
    """Dropless and with a capacity, on plain and quantised experts."""
    batch = inputs(make_batch())
    for capacity, case in ((None, dict(name="qlora")), (1.0, dict(name="dora"))):
        model = make_model(moe={**MOE, "capacity": capacity})
        params = init(model)
        config = AdaptConfig(rank=2, targets=("experts", "decoder"), **case)
        changed = moved(prepare(params, config, model))
        forms = forms_of(changed)
        assert isinstance(forms["language/layers/moe/gate"], LoRA | DoRA)
        assert isinstance(forms["language/layers/moe/shared/up/kernel"], LoRA | DoRA)
        assert "language/layers/moe/router/kernel" not in forms
        apply = jax.jit(lambda p, m=model: m.apply({"params": p}, batch).logits)
        np.testing.assert_allclose(apply(changed), apply(merge(changed)), atol=3e-4)


def test_generation_takes_adapted_weights(model, params, make_batch):
    """`fuse` joins what is plain (the encoder) and leaves adapted groups alone."""
    adapted = moved(prepare(params, AdaptConfig(rank=2, targets=r"language/.*/query/"), model))
    fused = fuse(adapted)
    layer = fused["language"]["layers"]["0"]
    assert isinstance(layer["attention"]["query"]["kernel"], LoRA)
    assert not isinstance(layer["attention"]["key"]["kernel"], Joined)
    assert layer["attention"]["key"]["bias"].shape == (2, 8)
    assert isinstance(layer["mlp"]["gate"]["kernel"], Joined)
    assert isinstance(fused["vit"]["layers"]["0"]["attention"]["query"]["kernel"], Joined)
    inputs = question_inputs(make_batch())
    answers = [
        generate(model, weights, inputs, new_tokens=3, eos_id=1).tokens
        for weights in (fused, merge(adapted), params)
    ]
    np.testing.assert_array_equal(answers[0], answers[1])
    assert (answers[0] != answers[2]).any()


def test_generation_sees_the_prefix(model, params, make_batch):
    """Tokens chosen with a cache, one by one, are those of one pass without a cache."""
    adapted = moved(prepare(params, AdaptConfig(name="prefix", tokens=3), model), 1.0)
    inputs = question_inputs(make_batch(questions=1))
    found = generate(model, fuse(adapted), inputs, new_tokens=3, eos_id=-2).tokens[:, 0]
    lengths, text = inputs.lengths, np.pad(inputs.text, ((0, 0), (0, 3)))
    for row, length in enumerate(lengths):
        text[row, length : length + 3] = found[row]
    whole = ModelInputs.of_rows(text, lengths + 3, pictures=inputs.pictures)
    apply = jax.jit(lambda p, given: model.apply({"params": p}, given).logits)
    for tree, same in ((adapted, True), (params, False)):
        chosen = np.argmax(apply(tree, whole), axis=-1)
        rows = [chosen[row, n - 1 : n + 2] for row, n in enumerate(lengths)]
        assert np.array_equal(rows, found) == same


def test_only_what_is_trained_has_gradients_and_moments(model, params, batch):
    config = AdaptConfig(rank=2, name="qlora", train="connector")
    adapted = prepare(params, config, model)
    trained, frozen = partition(*adapted)
    assert not set(trained) & set(frozen)
    names = re.compile(r"^connect/.*/(kernel|bias)$|^language/.*/kernel/(a|b)$")
    assert all(names.search(path) for path in trained)
    assert {"connect/up/kernel", "language/layers/mlp/up/kernel/b"} <= set(trained)
    assert any(leaf.dtype == jnp.uint8 for leaf in frozen.values())
    assert all(leaf.dtype == jnp.float32 for leaf in trained.values())
    back = combine(trained, frozen, adapted.params)
    jax.tree.map(np.testing.assert_array_equal, back, adapted.params)

    @jax.jit
    def step(trained, frozen):
        def loss(trained):
            whole = combine(trained, frozen, adapted.params)
            return jnp.mean(model.apply({"params": whole}, batch).logits ** 2)

        return jax.value_and_grad(loss)(trained)

    _, gradient = step(trained, frozen)
    assert set(gradient) == set(trained)
    assert all(float(jnp.abs(g).max()) > 0 for path, g in gradient.items() if path[-2:] != "/a")
    boxed = prepare(boxed_parameters(model), config)
    tx = make_optimizer(OptimizerConfig(), 10, partition(*boxed)[0])
    state = tx.init(trained)
    arrays = [leaf for leaf in jax.tree.leaves(state) if getattr(leaf, "ndim", 0)]
    assert sum(leaf.size for leaf in arrays) == 2 * sum(leaf.size for leaf in trained.values())
    updates, _ = tx.update(gradient, state, trained)
    assert set(optax.apply_updates(trained, updates)) == set(trained)


@pytest.mark.parametrize("case", [*CASES[2:], dict(name="prompt"), dict(name="prefix")], ids=str)
def test_shapes_alone_and_logical_axes(make_model, case):
    """Planned without memory; new arrays have the axes of the inputs and outputs they belong to."""
    model = make_model(connector=dict(hidden_dim=24), moe=MOE)
    case = {**case, "targets": ("experts", "all-linear")} if case["name"] == "qlora" else case
    config = AdaptConfig(rank=2, tokens=3, **case)
    planned = prepare(boxed_parameters(model), config)
    key = jax.random.key(0)
    fresh = jax.jit(functools.partial(init_params, model))(key)
    real, boxed = prepare(nn.unbox(fresh), config, model), prepare(fresh, config)
    shape = lambda leaf: (leaf.shape, str(leaf.dtype))  # noqa: E731
    for tree in (planned.params, boxed.params):
        assert jax.tree.map(shape, nn.unbox(tree)) == jax.tree.map(shape, real.params)
    assert planned.trainable == boxed.trainable == real.trainable
    for path, leaf in jax.tree_util.tree_leaves_with_path(planned.params, is_leaf=is_box):
        names, array = logical_axes(leaf), nn.unbox(leaf)
        assert len(names) == len(array.shape), path_of(path)
        meshed = [axis for name in names for axis in RULES.get(name or "", ())]
        assert len(meshed) == len(set(meshed)), (path_of(path), names)
    if config.low_rank:
        leaf = planned.params["language"]["layers"]["attention"]["query"]["kernel"]
        assert leaf.a.names == ("layers", "embed", None)
        assert leaf.b.names == ("layers", None, "heads", "head_dim")


def test_methods_without_factors(model, params, logits):
    adapted = prepare(params, AdaptConfig(name="bias"), model)
    trained, _ = partition(*adapted)
    assert trained and all(path.endswith("bias") for path in trained)
    assert adapted.params is not None and not is_adapted(adapted.params)
    whole, rest = partition(*prepare(params, AdaptConfig(name="full"), model))
    assert not rest and len(whole) == len(jax.tree.leaves(params))
    some, _ = partition(*prepare(params, AdaptConfig(name="full", train="connector"), model))
    assert {path.split("/")[0] for path in some} == {"connect"}


def test_learned_tokens_in_front_of_a_prompt(model, params, make_batch, inputs):
    """Rows that equal those of ordinary tokens say what these tokens say."""
    adapted = prepare(params, AdaptConfig(name="prompt", tokens=2), model)
    assert set(partition(*adapted)[0]) == {"language/embedding/rows"}
    table = adapted.params["language"]["embedding"]
    assert isinstance(table, Extended)
    vocab = table.shape[0]
    assert soft_ids(adapted.params) == (vocab, vocab + 1) and soft_ids(params) == ()
    same = jax.tree.map(lambda x: x, adapted.params)
    same["language"]["embedding"] = table.replace(rows=table.base[jnp.asarray([7, 5])])
    batch = inputs(make_batch(questions=1))
    apply = jax.jit(lambda p, text: model.apply({"params": p}, batch.replace(text=text)).logits)
    text = jnp.asarray(batch.text) % vocab
    expected = apply(params, text.at[:, :2].set(jnp.asarray([7, 5])))
    learned = text.at[:, :2].set(jnp.asarray(soft_ids(adapted.params)))
    np.testing.assert_allclose(apply(same, learned), expected, atol=1e-5)
    assert expected.shape[-1] == vocab


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_prefix_is_more_keys_and_values(softcap):
    """Against float64 attention over prefix and tokens together."""
    module = Attention(width=8, num_heads=4, num_kv_heads=2, head_dim=6, softcap=softcap)
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    mask = make_mask(5, 5, causal=True)
    params = nn.unbox(module.init(jax.random.key(1), x, mask=mask)["params"])
    more = [jax.random.normal(jax.random.key(i), (3, 2, 6)) for i in (2, 3)]
    adapted = {**params, **dict(zip(PREFIX, more, strict=True))}
    found, inner = module.apply({"params": adapted}, x, mask=mask)

    kernel = lambda name: np.asarray(params[name]["kernel"], np.float64)  # noqa: E731
    q, k, v = (
        np.einsum("bsd,dhe->bshe", np.asarray(x), kernel(n)) for n in ("query", "key", "value")
    )
    k, v = (
        np.concatenate([np.broadcast_to(p, (2, 3, 2, 6)), part], axis=1)
        for p, part in zip(more, (k, v), strict=True)
    )
    k, v = (np.repeat(part, 2, axis=2) for part in (k, v))
    scores = 6**-0.5 * np.einsum("bqhe,bkhe->bhqk", q, k)
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    seen = np.concatenate([np.ones((5, 3)), np.tri(5)], axis=1) > 0
    weights = np.where(seen, np.exp(scores), 0)
    np.testing.assert_allclose(inner["lse"], np.log(weights.sum(axis=-1)), atol=1e-5)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhqk,bkhe,hed->bqd", weights, v, kernel("out"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "rank", "count"),
    [
        # What PEFT prints for Llama-2-7B with query and value, and with all seven products.
        (r"language/.*/(query|value)/kernel", 8, 4_194_304),
        ("decoder", 16, 39_976_960),
    ],
)
def test_published_counts(targets, rank, count):
    """LLaVA-1.5-7B, planned without memory: an adapter of its decoder, a Llama of 7B."""
    model = VisionLanguageModel(**presets.get("llava-1.5-7b")["model"])
    boxed = prepare(boxed_parameters(model), AdaptConfig(targets=targets, rank=rank))
    trained, frozen = partition(*boxed)
    sizes = [sum(nn.unbox(leaf).size for leaf in part.values()) for part in (trained, frozen)]
    assert sizes[0] == count and sizes[1] > 7e9


@pytest.mark.parametrize("name", ["lora", "qlora", "prompt", "prefix"])
def test_adapted_parameters_are_those_of_the_model(model, params, name):
    """So a published model takes them (`Pretrained.with_params`), and refuses those of others."""
    adapted = prepare(params, AdaptConfig(name=name, tokens=2), model)
    check_parameters(model, adapted.params)
    with pytest.raises(UserError, match="do not fit"):
        check_parameters(model, {**adapted.params, "connect": {}})


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(name="lorra"), "did you mean 'lora'?"),
        (dict(rank=0), "adapt.rank: 0"),
        (dict(alpha=float("nan")), "adapt.alpha"),
        (dict(base="int4"), "adapt.base: unknown name 'int4'"),
        (dict(name="bias", base="nf4"), "adapt.base: nf4 with name=bias"),
        (dict(targets=3), "adapt.targets: 3"),
        (dict(targets=()), "adapt.targets: empty"),
        (dict(double=1), "adapt.double: 1"),
        (dict(ranks=3), "did you mean 'rank'?"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(UserError) as error:
        construct(AdaptConfig, settings, "adapt")
    assert words in str(error.value) and str(error.value).count("\n") <= 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(targets="language/layers/atention/query"), "language/layers/attention/query/kernel"),
        (dict(targets="x" * 500), "matches no parameter"),
        (dict(targets="experts"), "adapt.targets: 'experts' matches no parameter"),
        (dict(targets="(query"), "adapt.targets: '(query'"),
        (dict(train="conector"), "did you mean connector?"),
        (dict(targets="connector", train="connector"), "all of them are in adapt.train"),
    ],
)
def test_patterns_that_match_nothing(model, params, settings, words):
    with pytest.raises(UserError) as error:
        prepare(params, AdaptConfig(**settings), model)
    text = str(error.value)
    assert words in text and text.count("\n") <= 2 and len(text) < 600


def test_adapted_twice(model, params):
    once = prepare(params, AdaptConfig(), model)
    with pytest.raises(UserError, match="adapted already"):
        prepare(once.params, AdaptConfig(), model)


def test_codes_are_of_the_decoder_and_the_targets(model, params):
    """A frozen base of 4 bits is about a seventh of the decoder's products in float32."""
    adapted = prepare(params, AdaptConfig(name="qlora", targets="connector"), model)
    forms = forms_of(adapted.params)
    assert isinstance(forms["language/layers/mlp/up/kernel"], NF4)
    assert isinstance(forms["connect/up/kernel"].base, NF4)
    assert "vit/layers/up/kernel" not in forms
    eight = prepare(params, AdaptConfig(base="int8"), model)
    assert isinstance(forms_of(eight.params)["language/layers/mlp/up/kernel"].base, Int8)
