"""Weights in other forms, and whether every product says where it is in the tree of modules."""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import linen as nn
from flax import struct

from efficient_vlm.nn.fuse import fuse, unfuse
from efficient_vlm.nn.linear import Joined, Linear, WeightForm, product, together
from efficient_vlm.nn.stack import unstack

DECODER_PRODUCTS = {"attention/query", "attention/key", "attention/value", "attention/out"}
DECODER_PRODUCTS |= {"mlp/gate", "mlp/up", "mlp/down"}
ENCODER_PRODUCTS = {"attention/query", "attention/key", "attention/value", "attention/out"}
ENCODER_PRODUCTS |= {"up", "down"}


def paths_of(run):
    """Paths of the modules `Linear` that `run()` calls."""
    paths = []

    def look(call, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            paths.append("/".join(context.module.path))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        run()
    return paths


def split_model(model):
    """The model whose layers are created one by one."""
    encoder, decoder = ({**part, "stacked": False} for part in (model.encoder, model.decoder))
    return model.clone(encoder=encoder, decoder=decoder)


def expected_paths(encoder_layers, decoder_layers):
    """Paths of the products of all layers, of stacked ones without a number."""
    layers = [f"vit/layers{i}/{name}" for i in encoder_layers for name in ENCODER_PRODUCTS]
    return layers + [
        f"language/layers{i}/{name}" for i in decoder_layers for name in DECODER_PRODUCTS
    ]


@pytest.fixture
def dense(make_model):
    return make_model(encoder=dict(depth=2), decoder=dict(mlp_dim=48, segments=[dict(layers=3)]))


def layers_among(paths):
    return {path for path in paths if "/layers" in path}


def test_products_have_their_paths(dense, make_batch, init, inputs):
    """At `init` and `apply` alike, of stacked and of split layers, encoder and decoder apart."""
    batch = inputs(make_batch())
    params = init(dense)
    stacked, split = (
        set(expected_paths([""], [""])),
        set(expected_paths(["/0", "/1"], ["/0", "/1", "/2"])),
    )
    apply = lambda params: lambda: jax.eval_shape(dense.apply, {"params": params}, batch)  # noqa: E731
    assert layers_among(paths_of(apply(params))) == stacked
    called = paths_of(apply(unstack(params)))
    assert layers_among(called) == split
    counts = [called.count(path) for path in split]
    assert counts == [1] * len(split)
    key = jax.random.key(0)
    assert layers_among(paths_of(lambda: jax.eval_shape(dense.init, key, batch))) == stacked
    other = split_model(dense)
    assert layers_among(paths_of(lambda: jax.eval_shape(other.init, key, batch))) == split
    # Each path is where the parameters of the product lie.
    for path in called:
        tree = unstack(params)
        for name in path.split("/"):
            tree = tree[name]
        assert "kernel" in tree


def test_layers_created_one_by_one_are_those_of_unstack(dense, init):
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    assert shapes(init(split_model(dense))) == shapes(unstack(init(dense)))


def test_looking_changes_nothing(dense, make_batch, init, inputs):
    """One by one, as somebody looks on, and all alike: the same logits."""
    params, batch = unstack(init(dense)), inputs(make_batch())
    plain = dense.apply({"params": params}, batch).logits
    with nn.intercept_methods(lambda call, args, kwargs, context: call(*args, **kwargs)):
        watched = dense.apply({"params": params}, batch).logits
    np.testing.assert_allclose(watched, plain, atol=1e-5)


def test_joined_weights_are_one_product():
    x, keys = (
        jax.random.normal(jax.random.key(0), (2, 3, 8)),
        jax.random.split(jax.random.key(1), 2),
    )
    kernels = [jax.random.normal(keys[0], (8, 2, 4)), jax.random.normal(keys[1], (8, 6))]
    joined = Joined(jnp.concatenate([k.reshape(8, -1) for k in kernels], axis=1), ((2, 4), (6,)))
    parts = joined.split(product(x, joined, jnp.float32))
    for part, kernel in zip(parts, kernels, strict=True):
        np.testing.assert_allclose(part, jnp.tensordot(x, kernel, 1), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_say_the_same(make_model, make_batch, init, inputs, bias):
    """Attention and gated layers of encoder and decoder, with and without biases."""
    decoder = dict(mlp_dim=48, qkv_bias=bias, mlp_bias=bias)
    model = make_model(encoder=dict(bias=bias, mlp_gated=True), decoder=decoder)
    params, batch = init(model), inputs(make_batch())
    # Biases are zero at first.
    params = jax.tree.map(lambda p: p + 0.01 * jnp.arange(p.size).reshape(p.shape) / p.size, params)
    joined = fuse(params)
    assert isinstance(joined["vit"]["layers"]["0"]["gate"]["kernel"], Joined)
    apart = unfuse(joined)
    jax.tree.map(np.testing.assert_array_equal, apart, unstack(params))
    found = model.apply({"params": joined}, batch).logits
    np.testing.assert_allclose(found, model.apply({"params": params}, batch).logits, atol=1e-4)


@struct.dataclass
class Halves(WeightForm):
    """A weight that is the sum of two: a form that the package does not know."""

    one: jax.Array
    two: jax.Array

    def dot(self, x, contracted, dtype):
        return product(x, self.one, dtype, contracted) + product(x, self.two, dtype, contracted)


def test_a_new_form_needs_no_change_elsewhere(dense, make_batch, init, inputs):
    """Encoder, connector, decoder and head: stacked, split, jitted, with gradients."""
    params, batch = init(dense), inputs(make_batch())

    def halved(path, leaf):
        is_kernel = path[-1].key == "kernel"
        return Halves(0.25 * leaf, 0.75 * leaf) if is_kernel else leaf

    changed = jax.tree_util.tree_map_with_path(halved, params)
    expected = dense.apply({"params": params}, batch).logits

    def loss(params):
        logits = dense.apply({"params": params}, batch).logits
        return logits.sum(), logits

    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(changed)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    forms = jax.tree.leaves(gradient, is_leaf=lambda leaf: isinstance(leaf, Halves))
    forms = [form for form in forms if isinstance(form, Halves)]
    assert forms
    for form in forms:
        np.testing.assert_allclose(form.one, form.two, atol=1e-5)
    split = dense.apply({"params": unstack(changed)}, batch).logits
    np.testing.assert_allclose(split, expected, atol=1e-4)


def test_several_products_of_one_input_one_by_one():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            first, second = (Linear(("a",), (n,), ("b",), name=f"to_{n}") for n in (3, 4))
            return together(x, first, second)

    x = jnp.ones((2, 5))
    variables = Two().init(jax.random.key(0), x)
    first, second = Two().apply(variables, x)
    kernels = nn.unbox(variables["params"])
    np.testing.assert_allclose(first, x @ kernels["to_3"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(second, x @ kernels["to_4"]["kernel"], rtol=1e-6)


# --- qwix -----------------------------------------------------------------------------------------


def changed_paths(before, after):
    """Paths of parameters that have another type, or that are new."""
    is_leaf = lambda leaf: isinstance(leaf, qwix.QArray) or hasattr(leaf, "how")  # noqa: E731

    def flat(tree):
        leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(tree), is_leaf=is_leaf)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): type(v) for p, v in leaves}

    before, after = flat(before), flat(after)
    return {path for path in after if after[path] != before.get(path)}


MLPS = "language/.*/mlp/(gate|up|down)"


def test_qwix_trains_only_the_products_that_a_rule_names(dense, make_batch, init, inputs):
    """Fake quantisation of the decoder's MLPs: they alone see rounded numbers."""
    params, batch = unstack(init(dense)), inputs(make_batch())

    def logits(pattern):
        provider = qwix.QtProvider([qwix.QtRule(module_path=pattern, weight_qtype="int8")])
        model = qwix.quantize_model(dense, provider)
        return model.apply({"params": params}, batch).logits, provider.get_unused_rules()

    plain = dense.apply({"params": params}, batch).logits
    quantised, unused = logits(MLPS)
    assert unused == []

    def rounded(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/mlp/" not in name or not name.endswith("kernel") or not name.startswith("language"):
            return leaf
        scale = jnp.abs(leaf).max(axis=0, keepdims=True) / 127.5
        return jnp.clip(jnp.round(leaf / scale), -128, 127) * scale

    by_hand = jax.tree_util.tree_map_with_path(rounded, params)
    expected = dense.apply({"params": by_hand}, batch).logits
    np.testing.assert_allclose(quantised, expected, atol=1e-4)
    assert float(jnp.abs(quantised - plain).max()) > 1e-3
    # A rule whose pattern names nothing changes nothing, and is told.
    same, unused = logits("decoder/.*")
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert len(unused) == 1


def test_qwix_stores_only_the_products_that_a_rule_names(dense, make_batch, init, inputs):
    """Post-training quantisation of the decoder's MLPs: int8 among the parameters, no others."""
    batch, model = inputs(make_batch()), split_model(dense)
    params = nn.unbox(model.init(jax.random.key(0), batch)["params"])
    provider = qwix.PtqProvider([qwix.QuantizationRule(module_path=MLPS, weight_qtype="int8")])
    quantised = qwix.quantize_model(model, provider)
    shapes = jax.eval_shape(lambda: quantised.init(jax.random.key(0), batch)["params"])
    stored = qwix.quantize_params(params, nn.unbox(shapes))
    names = ("gate", "up", "down")
    wanted = {f"language/layers/{i}/mlp/{name}/kernel" for i in range(3) for name in names}
    assert changed_paths(params, stored) == wanted
    assert provider.get_unused_rules() == []
    plain = model.apply({"params": params}, batch).logits
    found = quantised.apply({"params": stored}, batch).logits
    error = float(jnp.abs(found - plain).max())
    assert 1e-4 < error < 0.1 * float(jnp.abs(plain).max())


def test_qwix_adapts_only_the_connector(make_model, make_batch, inputs):
    """LoRA of the connector alone, of a model with stacked layers: nothing else is new."""
    batch = inputs(make_batch())
    model = make_model(connector=dict(hidden_dim=24))
    provider = qwix.LoraProvider(module_path="connect/.*", rank=2, alpha=4.0)
    adapted = qwix.apply_lora_to_model(model, provider)
    params = nn.unbox(model.init(jax.random.key(0), batch)["params"])
    both = nn.unbox(adapted.init(jax.random.key(0), batch)["params"])
    new = changed_paths(params, both)
    assert new == {f"connect/{name}/kernel_lora_{part}" for name in ("up", "out") for part in "ab"}
    assert provider.get_unused_rules() == []
    # At first an adapter changes nothing, since b is zero; then as the formula says.
    plain = adapted.apply({"params": both}, batch).logits
    both["connect"]["out"]["kernel_lora_b"] += 0.5
    lora = both["connect"]["out"]
    merged = lora["kernel"] + 2.0 * lora["kernel_lora_a"] @ lora["kernel_lora_b"]
    expected = {**params, "connect": {**params["connect"]}}
    for name in ("up", "out"):
        expected["connect"][name] = {"kernel": both["connect"][name]["kernel"]}
    expected = {**both, "connect": {n: dict(expected["connect"][n]) for n in ("up", "out")}}
    before = model.apply({"params": expected}, batch).logits
    np.testing.assert_allclose(plain, before, atol=1e-5)
    expected["connect"]["out"]["kernel"] = merged
    found = adapted.apply({"params": both}, batch).logits
    np.testing.assert_allclose(found, model.apply({"params": expected}, batch).logits, atol=1e-4)
    assert float(jnp.abs(found - plain).max()) > 1e-3


# --- one place for products -----------------------------------------------------------------------

ROOT = pathlib.Path(__file__).parents[2] / "efficient_vlm"
WRITTEN_BY_HAND = {"matmul", "dot", "dot_general", "tensordot", "Dense", "DenseGeneral", "Einsum"}
# Products of NumPy arrays, of which no weight is a part.
NO_WEIGHTS = {"compressors/tokens.py"}


def test_no_module_multiplies_with_weights_by_hand():
    """Products written with `@`, `matmul`, `dot` or a layer of Flax would miss forms of weights."""
    by_hand = []
    for room in ("nn", "compressors", "models"):
        for path in (ROOT / room).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if name in NO_WEIGHTS | {"nn/linear.py"}:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                operator = isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
                called = isinstance(node, ast.Attribute) and node.attr in WRITTEN_BY_HAND
                if operator or called:
                    by_hand.append(f"{name}:{node.lineno}")
    assert by_hand == []
