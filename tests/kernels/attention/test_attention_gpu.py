"""The Hopper kernels: the contract on a GPU, lowering for CUDA everywhere; cuDNN and its fold."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_contract import AttentionContract

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention, cudnn, dispatch, platforms


def is_hopper() -> bool:
    """Whether the kernels can run here."""
    device = jax.devices()[0]
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")) == "9.0"


@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
class TestGpu(AttentionContract):
    """Contract, in 16 bits."""

    implementation = "gpu"
    dtypes = ("bfloat16", "float16")
    head_dims = (64, 72, 80, 128)
    precise = "float16"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there may be one")
def test_a_cpu_has_no_cudnn():
    assert not cudnn.available()


@pytest.mark.parametrize("asked", ["out", "lse", "sparse", "odd", "none there"])
@pytest.mark.parametrize("backward", [False, True])
def test_what_a_hopper_gets_by_default(asked, backward, monkeypatch):
    """cuDNN where nothing is sparse, and then no kernel of ours that nobody asked for."""
    taken = []

    def stand_in(q, k, v, **options):
        taken.append(options)
        return attention(q, k, v, implementation="reference", **options).out

    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    monkeypatch.setattr(cudnn, "attend", stand_in)
    monkeypatch.setattr(cudnn, "available", lambda: asked != "none there")
    # cuDNN has no gradients for odd lengths, such as 577 of an encoder with a class token.
    q = jax.ShapeDtypeStruct((1, 8, 1025 if asked == "odd" else 1024, 64), jnp.bfloat16)
    weights = jnp.ones((1, 1024)) if asked == "sparse" else None

    def loss(q, k, v):
        found = attention(q, k, v, causal=True, importance_weights=weights)
        parts = {"out": found.out, "lse": found.lse, "sparse": found.importance}
        return sum(parts[name].astype(jnp.float32).sum() for name in {"out", asked} & {*parts})

    function = jax.grad(loss, (0, 1, 2)) if backward else loss
    text = jax.jit(function).trace(q, q, q).lower(lowering_platforms=("cuda",)).as_text()
    kernels = {name for name in KERNELS if f"attention_{name}" in text}
    dense = asked in ("out", "lse")
    assert taken == ([dict(scale=0.125, causal=True)] if dense else [])
    expected = set() if asked == "out" else {"forward"}
    if backward:  # The value of importance is no part of its gradient.
        expected |= {"backward_q", "backward_kv"} if expected else set()
    elif asked == "sparse":
        expected.add("importance")
    assert kernels == expected


@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("biased", [False, True])
def test_the_default_on_a_hopper(biased):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in cases.arrays((1, 8, 8, 600, 600, 64, 64)))
    bias = jnp.ones((1, 600)) if biased else None

    def outputs(implementation):
        def loss(q, k, v):
            given = dict(causal=True, key_bias=bias, implementation=implementation)
            return attention(q, k, v, **given).out.astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for one, two in zip(outputs(None), outputs("reference"), strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), two.astype(jnp.float32), atol=3e-2)


@pytest.mark.skipif(not is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_on_a_gpu(causal):
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in cases.arrays((2, 4, 2, 150, 280, 64, 64)))
    given = dict(causal=causal, kv_lengths=np.array([280, 90], np.int32))
    given["key_bias"] = cases.options(("bias",), (2, 4, 2, 150, 280, 64, 64))["key_bias"]
    one = attention(q, k, v, implementation="cudnn", **given).out
    two = attention(q, k, v, implementation="reference", **given).out
    np.testing.assert_allclose(one.astype(jnp.float32), two.astype(jnp.float32), atol=2e-2)


KERNELS = ("forward", "importance", "backward_q", "backward_kv")
FEATURES = [("plain",), ("causal", "bias", "softcap", "lengths", "segments", "window", "prefix")]


@pytest.mark.parametrize("features", FEATURES, ids=["plain", "all"])
@pytest.mark.parametrize(("dim", "dtype"), [(64, "bfloat16"), (80, "float16"), (128, "bfloat16")])
def test_lowers_for_cuda(features, dim, dtype):
    """Forward, importance and the gradients of both: Mosaic's checks of shapes, layouts, SMEM."""
    shape = (2, 4, 2, 150, 280, dim, dim)
    q, k = (jax.ShapeDtypeStruct((2, h, n, dim), dtype) for h, n in ((4, 150), (2, 280)))
    given = cases.options(features, shape)
    bias = given.pop("key_bias", None)

    def loss(q, k, v, weights):
        options = dict(key_bias=bias, importance_weights=weights, implementation="gpu", **given)
        found = attention(q, k, v, **options)
        return jnp.sum(found.out.astype(jnp.float32)) + jnp.sum(found.importance**2)

    # JAX promises nothing for this custom call between versions; nothing is kept here.
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    export = jax.export.export(
        jax.jit(jax.grad(loss, (0, 1, 2, 3))), platforms=["cuda"], disabled_checks=unchecked
    )
    text = export(q, k, k, jax.ShapeDtypeStruct((2, 150), jnp.float32)).mlir_module()
    # Forward, importance, u = P g; dq; dk and dv, apart with a cap and a wide head.
    apart = "softcap" in features and dim > 64
    assert text.count("mosaic_gpu_v2") >= (6 if apart else 5)


@pytest.mark.parametrize(
    ("implementation", "change", "words"),
    [
        ("gpu", dict(dtype=jnp.float32), "float32 (bfloat16 and float16 only)"),
        ("gpu", dict(dim=256), "head dim 256 (at most 128)"),
        ("cudnn", dict(softcap=2.0), "softcap"),
        ("cudnn", dict(prefix_length=3, causal=True), "prefix_length"),
        ("cudnn", dict(importance_weights=np.ones((1, 8), np.float32)), "importance"),
    ],
)
def test_what_they_lack_is_named(implementation, change, words):
    change = dict(change)
    x = jnp.zeros((1, 1, 8, change.pop("dim", 64)), change.pop("dtype", jnp.bfloat16))
    with pytest.raises(UserError) as error:
        attention(x, x, x, implementation=implementation, **change)
    text = str(error.value)
    assert f"{implementation!r} has no {words}" in text and len(text.splitlines()) <= 3
    assert "reference, xla" in text


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_with_the_bias_folded_in(causal, monkeypatch):
    """Everything but the library: another implementation stands in for it."""
    real = jax.nn.dot_product_attention

    def stand_in(q, k, v, *, implementation, **options):
        assert implementation == "cudnn" and q.shape[-1] % 8 == 0
        return real(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    shape = (2, 4, 2, 21, 27, 16, 16)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in cases.arrays(shape))
    given = cases.options(("bias",), shape)
    given |= dict(kv_lengths=np.array([27, 9], np.int32), q_lengths=np.array([21, 5], np.int32))
    given |= dict(window=6, causal=True) if causal else {}

    def loss(implementation):
        def function(q, k, v):
            with platforms.interpreted():  # The stand-in is for any platform.
                out = attention(q, k, v, implementation=implementation, **given).out
            return jnp.sum(out.astype(jnp.float32) ** 2), out

        return jax.value_and_grad(function, (0, 1, 2), has_aux=True)(q, k, v)

    ours, theirs = loss("cudnn"), loss("reference")
    for one, two in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, two = (np.asarray(x, np.float32) for x in (one, two))
        scale = max(1.0, np.abs(two).max())
        np.testing.assert_allclose(one / scale, two / scale, atol=2e-2)


def test_the_fold_is_exact():
    """To the last bits of float32, where one column of bfloat16 would be off by 4e-3."""
    q, k, _ = cases.arrays((1, 1, 1, 5, 7, 8, 8))
    bias = np.log(np.arange(1, 8))[None].astype(np.float32)
    wide = cudnn.folded(*(jnp.asarray(x, jnp.bfloat16) for x in (q, k)), bias, 0.25)
    q, k = (np.asarray(x, np.float64) for x in wide)
    extra = q[..., 8:] @ k[..., 8:].swapaxes(2, 3)
    np.testing.assert_allclose(0.25 * extra[0, 0], np.broadcast_to(bias, (5, 7)), atol=2e-5)
