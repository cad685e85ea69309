"""What every implementation of attention must hold: one class, subclassed for each of them."""

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_vlm.errors import UserError
from efficient_vlm.kernels.attention import attention, make_mask

SETS = [(name,) for name in cases.FEATURES] + [
    ("causal", "softcap", "bias", "importance"),
    ("prefix", "window", "positions", "bias"),
    ("segments", "causal", "importance"),
    ("lengths", "causal", "softcap", "bias", "importance"),
    ("lengths", "two-sided window", "importance"),
]
LARGE = (2, 4, 2, 150, 280, 64, 64)  # Several blocks of every implementation.
DTYPES = {"float32": 1.0, "bfloat16": 800.0, "float16": 100.0}  # Tolerances, in units of 1e-5.


class AttentionContract:
    """Subclasses set `implementation`, and may override what they cannot do."""

    implementation: str
    head_dims = (64, 72, 80, 128, 256)
    dtypes = tuple(DTYPES)
    precise = "float32"  # The dtype in which features are compared.

    def attention(self, *args, **options):
        return attention(*args, implementation=self.implementation, **options)

    def run(self, q, k, v, **options):
        return jax.jit(lambda q, k, v: self.attention(q, k, v, **options))(q, k, v)

    def both(self, q, k, v, given, seed=0):
        """Outputs and gradients of this implementation and of the reference, in the same order."""
        rng = np.random.default_rng(seed)
        bias, weights = (given.get(name) for name in ("key_bias", "importance_weights"))
        rest = {k: x for k, x in given.items() if k not in ("key_bias", "importance_weights")}
        shape = (*q.shape[:3], v.shape[-1])
        ways = [rng.normal(size=s).astype(np.float32) for s in (shape, shape[:3])]
        ways.append(None if weights is None else rng.normal(size=(len(q), k.shape[2])))

        def of(implementation, exact):
            def function(q, k, v, bias, weights):
                found = attention(
                    *(q, k, v),
                    key_bias=bias,
                    importance_weights=weights,
                    implementation=implementation,
                    **rest,
                )
                lse = jnp.where(jnp.isfinite(found.lse), found.lse, 0)
                parts = (found.out, lse, found.importance)
                return sum(
                    jnp.sum(x.astype(jnp.float32) * way)
                    for x, way in zip(parts, ways, strict=True)
                    if way is not None
                ), found

            x = [jnp.asarray(a, jnp.float32) if exact else a for a in (q, k, v)]
            gradient = jax.jit(jax.grad(function, (0, 1, 2, 3, 4), has_aux=True))
            gradients, found = gradient(*x, bias, weights)
            return (*found, *gradients)

        return of(self.implementation, False), of("reference", True)

    def compare(self, ours, reference, tolerance):
        names = ("out", "lse", "importance", "dq", "dk", "dv", "d bias", "d weights")
        for name, one, two in zip(names, ours, reference, strict=True):
            assert (one is None) == (two is None), name
            if two is None:
                continue
            one, two = (np.asarray(x, np.float64) for x in (one, two))
            np.testing.assert_array_equal(np.isfinite(one), np.isfinite(two), err_msg=name)
            one, two = (np.nan_to_num(x, posinf=0) for x in (one, two))
            scale = max(1.0, np.abs(two).max())
            np.testing.assert_allclose(one / scale, two / scale, atol=tolerance, err_msg=name)

    def refused(self, q, k, v, feature):
        """What an implementation cannot do is named, with those that can."""
        with pytest.raises(UserError, match=f"(?s){feature}.*xla"):
            self.run(q, k, v)

    @pytest.mark.parametrize("features", SETS, ids=" + ".join)
    def test_features(self, features):
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(LARGE))
        given = cases.options(features, LARGE)
        tolerance = 1e-5 * DTYPES[self.precise]
        self.compare(*self.both(q, k, v, given), tolerance)

    def test_masks_of_models(self):
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(LARGE))
        given = cases.options(("bias", "importance"), LARGE) | {
            "mask": cases.mask_of_models(150, 280)
        }
        self.compare(*self.both(q, k, v, given), 1e-5 * DTYPES[self.precise])

    @pytest.mark.parametrize("value_dim", [1, 65])
    def test_values_of_another_width(self, value_dim):
        shape = (2, 4, 2, 33, 140, 64, value_dim)
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(shape))
        given = cases.options(("causal", "importance"), shape)
        self.compare(*self.both(q, k, v, given), 1e-5 * DTYPES[self.precise])

    @pytest.mark.parametrize("features", [("plain",), ("prefix", "bias", "lengths")], ids=str)
    def test_against_loops(self, features):
        """Independent of the reference as well."""
        shape = (2, 4, 2, 21, 27, 64, 64)
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(shape))
        given = cases.options(features, shape)
        for one, two in zip(self.run(q, k, v, **given), cases.by_hand(q, k, v, **given)):
            if two is not None:
                np.testing.assert_allclose(
                    np.asarray(one, np.float64), two, atol=2e-5 * DTYPES[self.precise]
                )

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, dtype):
        q, k, v = (jnp.asarray(x, dtype) for x in cases.arrays(LARGE))
        if dtype not in self.dtypes:
            self.refused(q, k, v, dtype)
            return
        given = cases.options(("causal", "bias"), LARGE)
        ours, reference = self.both(q, k, v, given)
        assert ours[0].dtype == ours[3].dtype == q.dtype
        assert ours[1].dtype == jnp.float32
        self.compare(ours, reference, 1e-5 * DTYPES[dtype])

    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_groups_of_heads(self, groups):
        shape = (1, 8, 8 // groups, 130, 140, 64, 64)
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(shape))
        given = cases.options(("causal", "bias"), shape)
        self.compare(*self.both(q, k, v, given), 1e-5 * DTYPES[self.precise])

    @pytest.mark.parametrize("dim", [64, 72, 80, 128, 256])
    def test_head_dims(self, dim):
        shape = (1, 2, 1, 33, 140, dim, dim)
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(shape))
        if dim not in self.head_dims:
            self.refused(q, k, v, str(dim))
            return
        self.compare(*self.both(q, k, v, {}), 1e-5 * DTYPES[self.precise])

    def test_nothing_to_see(self):
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(LARGE))
        ours, _ = self.both(q, k, v, dict(kv_lengths=np.array([0, 0])))
        out, lse, _, *gradients = ours
        assert not np.any(out) and np.all(np.isposinf(lse))
        assert not any(np.any(g) for g in gradients if g is not None)

    def test_nan_stays(self):
        """It is no row that sees nothing: a run that diverged is seen, whatever its size."""
        q, k, v = (np.array(x) for x in cases.arrays(LARGE))
        q[0, 1, 7], k[1, 0, 3] = np.nan, np.nan
        found = self.run(*(jnp.asarray(x, self.precise) for x in (q, k, v)), causal=True)
        lost = np.zeros(q.shape[:3], bool)
        # Of both heads that share the key: queries from its place on, counted from the first key.
        lost[0, 1, 7], lost[1, :2, 3:] = True, True
        for x in (found.out[..., 0], found.lse):
            np.testing.assert_array_equal(np.isnan(np.asarray(x, np.float64)), lost)

    def test_deterministic(self):
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(LARGE))
        given = cases.options(("causal", "bias", "importance"), LARGE)
        one, two = (self.both(q, k, v, given)[0] for _ in range(2))
        for a, b in zip(one, two):
            if a is not None:
                np.testing.assert_array_equal(a, b)

    # --- identities ------------------------------------------------------------------------------

    def identity(self, one, two, atol=None):
        atol = 1e-5 * DTYPES[self.precise] if atol is None else atol
        for a, b in zip(one, two):
            if a is not None and b is not None:
                a, b = (np.asarray(x, np.float64) for x in (a, b))
                np.testing.assert_allclose(a, b, atol=atol)

    def test_log_size_equals_copies(self):
        """A merged token of bias log n is n copies of it (arXiv 2210.09461, equation 1)."""
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays((1, 2, 2, 40, 30, 64, 64)))
        sizes = np.random.default_rng(1).integers(1, 6, 30)
        bias = np.log(sizes)[None].astype(np.float32)
        copied = [np.repeat(np.asarray(x), sizes, axis=2) for x in (k, v)]
        self.identity(self.run(q, k, v, key_bias=bias), self.run(q, *copied))

    def test_lengths_are_slices(self):
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(LARGE))
        short = self.run(q, k[:, :, :131], v[:, :, :131])
        self.identity(self.run(q, k, v, kv_lengths=np.array([131, 131])), short)

    def test_importance_sums_to_the_weights(self):
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(LARGE))
        given = cases.options(("causal", "importance"), LARGE)
        found = self.run(q, k, v, **given).importance
        np.testing.assert_allclose(found.sum(1), given["importance_weights"].sum(1), rtol=5e-3)

    def test_importance_of_a_few_rows(self):
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays(LARGE))
        given = cases.options(("causal", "bias"), LARGE)
        rows = np.array([[3, 149], [20, 64]])
        some = np.array([[1.0, 0.5], [0.25, 2.0]], np.float32)
        every = np.zeros((2, 150), np.float32)
        np.put_along_axis(every, rows, some, axis=1)
        one = self.run(q, k, v, importance_weights=some, importance_rows=rows, **given)
        two = self.run(q, k, v, importance_weights=every, **given)
        self.identity(one[2:], two[2:])

    def test_prefix_is_causal_or_block(self):
        q, k, v = (jnp.asarray(x, self.precise) for x in cases.arrays((2, 2, 2, 150, 150, 64, 64)))
        prefix = np.array([17, 140])
        one = self.run(q, k, v, causal=True, prefix_length=prefix)
        inside = (np.arange(150) < prefix[:, None]).astype(np.int32)
        blocks = dict(q_blocks=inside, kv_blocks=inside)
        mask = make_mask(150, 150, causal=True, **blocks)
        self.identity(one, self.run(q, k, v, mask=mask))
