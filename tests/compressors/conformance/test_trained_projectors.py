"""The trained projectors against plain float64 loops (`projector_loops`), and their own rules."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import projector_loops as loops
import pytest

from efficient_vlm.compressors import VisualTokens
from efficient_vlm.compressors.projectors.cell import TokenPacker
from efficient_vlm.compressors.projectors.conv import LDP, CAbstractor, LDPv2
from efficient_vlm.compressors.projectors.mlp import Deco, Mlp, adaptive_grids
from efficient_vlm.compressors.projectors.query import Perceiver, QFormer
from efficient_vlm.costs.traced import traced_flops
from efficient_vlm.errors import UserError

WIDTH = 8
FIELDS = ("embed", "position", "size", "mask", "source")
SQUARE, WIDE = (4, 4), (2, 6)


@dataclasses.dataclass(frozen=True)
class Case:
    """A method on a grid, and the cells (or, for queries, the number) that it gives."""

    method: type
    loop: object
    grid: tuple[int, int]
    result: tuple[int, int] | int
    options: tuple = ()  # of the module
    settings: tuple = ()  # of the loop

    @property
    def budget(self):
        return int(np.prod(self.result))

    def __str__(self):
        return f"{self.method.label}-{self.grid[0]}x{self.grid[1]}-{self.budget}"

    def module(self, **changes):
        return self.method(
            **{"budget": self.budget, "grid": self.grid, **dict(self.options), **changes}
        )


def pair(method, loop, grid, result, options=None, settings=None):
    case = Case(
        method, loop, grid, result, tuple((options or {}).items()), tuple((settings or {}).items())
    )
    return pytest.param(case, id=str(case))


HONEYBEE = {"depth": 2, "mlp_depth": 1}
IDEFICS = {"num_heads": 2, "depth": 2, "style": "idefics2"}
FLAMINGO = {**IDEFICS, "style": "flamingo"}
CASES = [
    pair(Mlp, loops.mlp, WIDE, WIDE, {"features": 5}),
    pair(Deco, loops.deco, SQUARE, (2, 2)),
    pair(Deco, loops.deco, SQUARE, (3, 3), {"features": 5}),
    pair(Deco, loops.deco, WIDE, (2, 5)),
    pair(Deco, loops.deco, SQUARE, SQUARE),
    pair(CAbstractor, loops.c_abstractor, SQUARE, (2, 2), HONEYBEE, HONEYBEE),
    pair(
        CAbstractor,
        loops.c_abstractor,
        WIDE,
        (2, 5),
        {"depth": 1, "mlp_depth": 3, "hidden": 12, "features": 5},
        {"depth": 1, "mlp_depth": 3},
    ),
    pair(LDP, loops.ldp, SQUARE, (2, 2)),
    pair(LDP, loops.ldp, WIDE, (1, 3), {"features": 5}),
    pair(LDP, loops.ldp, WIDE, WIDE),
    pair(LDPv2, loops.ldpv2, SQUARE, (3, 3)),
    pair(LDPv2, loops.ldpv2, WIDE, (1, 3), {"features": 5}),
    pair(TokenPacker, loops.tokenpacker, SQUARE, (2, 2), {"num_heads": 2}, {"heads": 2}),
    pair(TokenPacker, loops.tokenpacker, SQUARE, (1, 1), {}, {"heads": 8}),
    pair(TokenPacker, loops.tokenpacker, (3, 6), (1, 2), {"features": 5}, {"heads": 8}),
    pair(TokenPacker, loops.tokenpacker, WIDE, WIDE, {"num_heads": 4}, {"heads": 4}),
    *(
        pair(
            TokenPacker,
            loops.tokenpacker,
            grid,
            cells,
            {"num_heads": 2, "style": "official", "features": features},
            {"heads": 2, "style": "official"},
        )
        for grid, cells, features in ((SQUARE, (2, 2), None), ((3, 6), (1, 2), 5))
    ),
    *(
        pair(
            Perceiver,
            loops.perceiver,
            grid,
            budget,
            {**options, "num_queries": 7},
            {"heads": 2, "depth": 2, "style": options["style"]},
        )
        for grid, budget, options in ((SQUARE, 6, IDEFICS), (WIDE, 1, IDEFICS), (WIDE, 3, FLAMINGO))
    ),
    *(
        pair(
            QFormer,
            loops.qformer,
            grid,
            budget,
            {"num_queries": 7, "num_heads": heads, "depth": depth},
            {"heads": heads, "depth": depth},
        )
        for grid, budget, heads, depth in ((SQUARE, 6, 2, 3), (WIDE, 1, 4, 1))
    ),
]
EVERY = pytest.mark.parametrize("case", CASES)
# The longest of each method: what does not depend on grid and budget is tested on one.
ONE_EACH = [c for c in CASES if (c.values[0].grid, c.values[0].budget) != (WIDE, 12)]
ONE_EACH = list({c.values[0].method: c for c in reversed(ONE_EACH)}.values())
ONE_EACH += [c for c in CASES if c.values[0].method is Mlp]
SOME = pytest.mark.parametrize("case", ONE_EACH)


def tokens_of(case, embed, mask=None, dtype=jnp.float32):
    mask = None if mask is None else jnp.asarray(mask)
    return VisualTokens.from_grid(jnp.asarray(embed, dtype), case.grid, mask=mask)


def parameters(case):
    """Random float32 parameters of the right shapes; biases and scales as well."""
    tokens = tokens_of(case, np.zeros((1, case.grid[0] * case.grid[1], WIDTH)))
    shapes = jax.eval_shape(case.module().init, jax.random.key(0), tokens)
    rng = np.random.default_rng(3)

    def draw(x):
        fan_in = x.shape[0] if len(x.shape) == 2 else 4
        return (rng.normal(size=x.shape) * fan_in**-0.5).astype(np.float32)

    return jax.tree.map(draw, nn.unbox(shapes)["params"])


@functools.cache
def compiled(case, dtype):
    """The program of a case for batches of four, compiled once and cheaply, and its parameters."""
    module, params = case.module(), parameters(case)

    def forward(params, embed, mask):
        return module.apply({"params": params}, tokens_of(case, embed, mask, dtype))

    embed, mask = next(batches(case))
    lowered = jax.jit(forward).lower(params, embed, mask)
    return params, lowered.compile({"xla_backend_optimization_level": 0})


def run(case, embed, mask, dtype="float32"):
    params, function = compiled(case, dtype)
    return jax.tree.map(np.asarray, function(params, embed, mask))


def batches(case):
    """Rows all, most, little and not real; random, coarse and equal tokens, blocks of padding."""
    num_tokens = case.grid[0] * case.grid[1]
    share = np.array([[1.1], [0.7], [0.25], [-1.0]])
    for seed in range(3):
        rng = np.random.default_rng(seed)
        mask = rng.random((4, num_tokens)) < share
        embed = rng.normal(size=(4, num_tokens, WIDTH))
        if seed == 1:
            embed = rng.integers(-1, 2, embed.shape) + 0.25 * rng.normal(size=WIDTH)
        if seed == 2:
            embed = np.repeat(embed[:, :1], num_tokens, axis=1)
            mask = np.ones((4, *case.grid), bool)
            mask[1, case.grid[0] // 2 :] = False
            mask[2, :, case.grid[1] // 2 :] = False
            mask[3, 0, 0] = mask[3, :, 1:] = False
            mask = mask.reshape(4, num_tokens)
        yield embed.astype(np.float32), mask


@EVERY
def test_equals_the_plain_loop(case):
    params = {
        k.removeprefix(f"{case.method.label}_"): np.float64(v) for k, v in parameters(case).items()
    }
    for embed, mask in batches(case):
        out = run(case, embed, mask)
        for row in range(len(mask)):
            expected = case.loop(
                np.float64(embed[row]),
                mask[row],
                case.grid,
                case.result,
                params,
                **dict(case.settings),
            )
            for field in FIELDS:
                if field == "source" and case.method in (Perceiver, QFormer):
                    assert_holders(out, row, expected)
                    continue
                np.testing.assert_allclose(
                    getattr(out, field)[row],
                    expected[field],
                    rtol=2e-4,
                    atol=2e-4 if field == "embed" else 2e-5,
                    err_msg=f"{field}, row {row}",
                )


def assert_holders(out, row, expected):
    """Where all queries look at all patches alike, up to rounding, any real one may hold them."""
    actual = out.source[row]
    assert ((actual >= 0) == (expected["source"] >= 0)).all()
    assert out.mask[row][actual[actual >= 0]].all()
    if not np.allclose(expected["size"][expected["mask"]], out.size[row].mean(), atol=1e-3):
        assert (actual == expected["source"]).mean() > 0.9


@EVERY
def test_nothing_of_padding_gets_through(case):
    embed, mask = next(batches(case))
    clean = run(case, embed, mask)
    for poison in (np.nan, np.inf, 1e30):
        out = run(case, np.where(mask[..., None], embed, np.float32(poison)), mask)
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(out, field), getattr(clean, field), field)
    for field in ("embed", "position", "size"):
        assert not getattr(clean, field)[~clean.mask].any(), field


@EVERY
def test_sizes_and_sources_are_a_ledger(case):
    for embed, mask in batches(case):
        out = run(case, embed, mask)
        np.testing.assert_allclose(out.size.sum(axis=1), mask.sum(axis=1), rtol=1e-5)
        assert ((out.source >= 0) == mask).all()
        assert ((out.size > 0) == out.mask).all()
        for row in range(len(mask)):
            assert out.mask[row][out.source[row][mask[row]]].all()


@EVERY
def test_flops_are_those_of_the_program(case):
    tokens = tokens_of(case, np.zeros((1, case.grid[0] * case.grid[1], WIDTH)))
    module = case.module()
    traced = traced_flops(module.apply, {"params": parameters(case)}, tokens)
    assert module.flops(case.grid[0] * case.grid[1], WIDTH) == traced


@pytest.mark.parametrize(
    "case", [c for c in ONE_EACH if c.values[0].method in (Deco, LDPv2, TokenPacker, Perceiver)]
)
def test_bfloat16(case):
    embed, mask = next(batches(case))
    exact = run(case, embed, mask)
    out = run(case, embed, mask, "bfloat16")
    assert out.embed.dtype == jnp.bfloat16
    assert (out.position.dtype, out.size.dtype) == (np.float32, np.float32)
    scale = np.abs(exact.embed).max()
    np.testing.assert_allclose(np.float32(out.embed), exact.embed, atol=0.1 * scale)
    np.testing.assert_array_equal(out.mask, exact.mask)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.values[0].method is TokenPacker and c.values[0].result == (2, 2)],
)
def test_a_bias_of_the_tokens_is_added_to_the_logits(case):
    embed, mask = next(batches(case))
    bias = np.random.default_rng(0).normal(size=mask.shape).astype(np.float32) * 3
    params, module = parameters(case), case.module()

    def forward(embed, mask, bias):
        tokens = tokens_of(case, embed, mask).replace(bias=bias)
        return module.apply({"params": params}, tokens)

    out = jax.jit(forward)(embed, mask, np.where(mask, bias, np.nan))
    assert out.bias is None
    plain = {k.removeprefix("tokenpacker_"): np.float64(v) for k, v in params.items()}
    for row in range(len(mask)):
        where = mask[row], case.grid, case.result, plain
        expected = case.loop(embed[row], *where, bias=bias[row], **dict(case.settings))
        np.testing.assert_allclose(out.embed[row], expected["embed"], rtol=2e-4, atol=2e-4)


@SOME
def test_one_checkpoint_serves_every_budget(case):
    num_tokens = case.grid[0] * case.grid[1]
    tokens = tokens_of(case, np.zeros((1, num_tokens, WIDTH)))
    shapes = set()
    for budget in case.module().reachable(case.grid):
        boxed = jax.eval_shape(case.module(budget=budget).init, jax.random.key(0), tokens)
        shapes.add(str(jax.tree.map(lambda x: x.shape, nn.unbox(boxed))))
        leaves = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda x: hasattr(x, "names"))
        for path, leaf in leaves[0]:
            assert len(leaf.names) == len(leaf.value.shape)
            assert path[1].key.startswith(f"{case.method.label}_")
            assert len(set(leaf.names)) == len(leaf.names), "one axis twice"
    assert len(shapes) == 1


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.values[0].method in (Perceiver, QFormer) and c.values[0].budget == 6],
)
class TestQueries:
    def test_full_budget_is_the_identity_and_free(self, case):
        full = dataclasses.replace(case, result=16)
        tokens = tokens_of(full, *next(batches(full)))
        out = full.module().apply({"params": parameters(full)}, tokens)
        assert all(getattr(out, f) is getattr(tokens, f) for f in FIELDS)
        assert full.module().flops(16, WIDTH) == 0

    def test_a_short_row_equals_a_small_budget(self, case):
        """Three real patches and six queries give the row of budget three."""
        embed = next(batches(case))[0]
        mask = np.zeros((4, 16), bool)
        mask[:, [2, 5, 11]] = True
        long, short = run(case, embed, mask), run(dataclasses.replace(case, result=3), embed, mask)
        for field in ("embed", "position", "size"):
            np.testing.assert_allclose(
                getattr(long, field)[:, :3], getattr(short, field), rtol=1e-5, atol=1e-5
            )
        np.testing.assert_array_equal(long.source, short.source)


@pytest.mark.parametrize("method", [CAbstractor, LDP, LDPv2])
def test_padding_is_the_outside_of_the_image(method):
    """A 2 x 4 image in a 4 x 4 grid gives what it gives on its own."""
    options = (("depth", 1),) if method is CAbstractor else ()
    large = Case(method, None, SQUARE, (2, 2), options)
    small = Case(method, None, (2, 4), (1, 2), options)
    embed = np.random.default_rng(0).normal(size=(1, 16, WIDTH)).astype(np.float32)
    params = parameters(large)
    cut = {k: v[:2] if k == "c_abstractor_position" else v for k, v in params.items()}

    def both(embed):
        padded = tokens_of(large, embed, jnp.arange(16)[None] < 8)
        alone = tokens_of(small, embed[:, :8])
        padded = large.module().apply({"params": params}, padded)
        return padded, small.module().apply({"params": cut}, alone)

    cheaply = {"xla_backend_optimization_level": 0}
    padded, alone = jax.jit(both).lower(embed).compile(cheaply)(embed)
    np.testing.assert_allclose(padded.embed[:, :2], alone.embed, rtol=1e-4, atol=1e-5)
    assert not np.asarray(padded.embed[:, 2:]).any()


def test_published_geometry():
    """24 x 24 patches: the budgets of the papers, the parameters of LDPv2 in MobileVLM 1.7B."""
    assert {144, 100, 64, 1} <= set(Deco(budget=1).reachable((24, 24)))
    assert LDP(budget=144).reachable((24, 24)) == (576, 144)
    assert {144, 64, 36} <= set(TokenPacker(budget=1).reachable((24, 24)))
    tokens = jax.eval_shape(lambda: VisualTokens.from_grid(jnp.zeros((1, 576, 1024)), (24, 24)))
    module = LDPv2(budget=144, features=2048)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
    count = sum(x.size for x in jax.tree.leaves(nn.unbox(shapes)))
    assert count == (1024 + 1) * 2048 + (2048 + 1) * 2048 + (9 + 1) * 2048  # 6.3 million


def test_adaptive_grids():
    assert list(adaptive_grids((4, 4))) == [16, 9, 4, 1]
    wide = adaptive_grids((2, 6))
    assert wide == {
        12: (2, 6), 10: (2, 5), 6: (1, 6), 4: (2, 2), 3: (1, 3), 2: (1, 2), 1: (1, 1),
    }  # fmt: skip
    for grid in ((3, 5), (7, 2), (1, 9)):
        for budget, (h, w) in adaptive_grids(grid).items():
            assert h * w == budget
            assert h <= grid[0]
            assert w <= grid[1]


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Deco(budget=4, features=0), "features"),
        (lambda: Mlp(features="wide"), "features"),
        (lambda: CAbstractor(budget=4, hidden=-1), "hidden"),
        (lambda: CAbstractor(budget=4, depth=0), "depth"),
        (lambda: CAbstractor(budget=4, mlp_depth=1.5), "mlp_depth"),
        (lambda: TokenPacker(budget=4, num_heads=0), "num_heads"),
        (lambda: TokenPacker(budget=4, features=0), "features"),
        (lambda: TokenPacker(budget=4, style="offical"), "style"),
        (lambda: Perceiver(budget=4, num_queries=0), "num_queries"),
        (lambda: Perceiver(budget=4, style="flamenco"), "style"),
        (lambda: QFormer(budget=4, depth=None), "depth"),
    ],
)
def test_wrong_options(build, field):
    with pytest.raises(UserError, match=f"compressor.{field}"):
        build()


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Mlp(budget=4), "mlp cannot give 4"),
        (Deco(budget=5), "deco cannot give 5(.|\n)*1, 4, 9, 16"),
        (CAbstractor(budget=3), "c_abstractor cannot give 3"),
        (LDP(budget=1), "ldp cannot give 1(.|\n)*4, 16"),
        (LDPv2(budget=17), "ldpv2 cannot give 17"),
        (TokenPacker(budget=9, num_heads=2), "tokenpacker cannot give 9"),
        (TokenPacker(budget=4, num_heads=3), "num_heads: 3 does not divide"),
        (Perceiver(budget=8, num_queries=7), "perceiver cannot give 8"),
        (QFormer(budget=4, num_heads=3), "num_heads: 3 does not divide"),
    ],
)
def test_wrong_for_the_input(module, match):
    tokens = VisualTokens.from_grid(jnp.zeros((1, 16, WIDTH)), SQUARE)
    with pytest.raises(UserError, match=match):
        jax.eval_shape(module.init, jax.random.key(0), tokens)
