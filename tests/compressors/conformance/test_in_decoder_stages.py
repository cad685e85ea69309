"""`stages`, `knobs` and mistakes of the methods inside the decoder: the numbers of the papers."""

import pytest
from decoder_states import random_case

from efficient_vlm.compressors import Signals, build, reachable
from efficient_vlm.compressors.in_decoder.fastv import FastV
from efficient_vlm.compressors.in_decoder.feather import Feather
from efficient_vlm.compressors.in_decoder.pyramiddrop import PyramidDrop
from efficient_vlm.compressors.in_decoder.v2drop import V2Drop
from efficient_vlm.compressors.in_decoder.vtw import VisualTokensWithdrawal
from efficient_vlm.errors import UserError

GRID = (3, 4)
ALL = (FastV, PyramidDrop, Feather, V2Drop, VisualTokensWithdrawal)


def schedule(module, num_layers=32, num_tokens=576):
    """Visual tokens processed by each layer."""
    counts, now, stages = [], num_tokens, dict()
    for stage in module.stages(num_layers, num_tokens):
        stages[stage.layer] = stage.module.budget
    for layer in range(num_layers):
        now = stages.get(layer, now)
        counts.append(now)
    return counts


def mean(module, **sizes):
    counts = schedule(module, **sizes)
    return sum(counts) / len(counts)


def teraflops(counts, factor):
    """The formula of the papers: a multiply-add once, visual tokens only."""
    d, m = 4096, 11008
    return sum(4 * n * d * d + 2 * n * n * d + factor * n * d * m for n in counts) / 1e12


def test_fastv_ledger():
    for keep, processed in ((192, 216), (128, 156), (64, 96), (166, 191.625), (98, 127.875)):
        assert mean(FastV(keep=keep)) == mean(FastV(budget=keep)) == processed
    whole = teraflops([612] * 32, 2)
    for layer, dropped, share in (
        (2, 0.25, 77.4),
        (2, 0.5, 55.2),
        (2, 0.75, 33.2),
        (2, 0.9, 20.1),  # 20.3 in the reference, with 57.6 tokens and 37 of text
        (3, 0.5, 56.7),
    ):
        module = FastV(layer=layer, keep=1 - dropped)
        ours = teraflops([n + 36 for n in schedule(module)], 2)
        assert 100 * ours / whole == pytest.approx(share, abs=0.05)


def test_pyramiddrop_ledger():
    assert teraflops([576] * 32, 3) == pytest.approx(3.817, abs=1e-3)
    module = PyramidDrop()
    assert [(s.layer, s.module.budget) for s in module.stages(32, 576)] == [
        (8, 288),
        (16, 144),
        (24, 72),
    ]
    for keep, cost in (
        ((0.5, 0.25), 2.134),
        ((0.5, 0.25, 0.125), 1.777),
        ((0.5, 0.25, 0.125, 0.0625), 1.391),
    ):
        assert teraflops(schedule(PyramidDrop(keep=keep)), 3) == pytest.approx(cost, abs=6e-4)
    assert schedule(PyramidDrop(), 8, 64) == [64, 64, 32, 32, 16, 16, 8, 8]
    assert mean(PyramidDrop(layers=(10, 20))) == mean(PyramidDrop(keep=(0.5, 0.25)))


def test_feather_ledger():
    """64 of the grid and int(.3 * 576) = 172 others; then int(.09 * 236)."""
    assert schedule(Feather()) == [576] * 8 + [236] * 8 + [21] * 16
    assert schedule(Feather(stride=0, keep=288)) == [576] * 8 + [288] * 8 + [72] * 16
    assert schedule(Feather(grid=(2, 6), keep=3), 4, 12) == [12, 5, 1, 1]
    first, second = Feather(stride=2).stages(8, 16)
    assert (first.layer, first.module.stride, second.layer, second.module.stride) == (2, 2, 4, 0)


def test_v2drop_and_vtw_ledger():
    assert schedule(V2Drop()) == [576] * 3 + [288] * 14 + [144] * 5 + [0] * 10
    assert schedule(V2Drop(keep=(0.5, 0.5, 1)))[-1] == 1  # what the official code leaves
    assert schedule(V2Drop(), 8, 64) == [64, 32, 32, 32, 16, 16, 0, 0]
    assert schedule(V2Drop(), 4, 1) == [1, 1, 1, 0]
    assert schedule(VisualTokensWithdrawal()) == [576] * 15 + [0] * 17
    assert schedule(VisualTokensWithdrawal(), 8, 64) == [64] * 4 + [0] * 4
    assert schedule(VisualTokensWithdrawal(layer=1), 2, 4) == [4, 0]


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize(("layers", "tokens"), [(8, 16), (32, 576)])
def test_knobs_go_from_fewest_to_most(method, layers, tokens):
    settings = list(method().knobs(layers, tokens))
    sums = [sum(schedule(method(**s), layers, tokens)) for s in settings]
    assert sums == sorted(sums)
    assert sums[0] < sums[-1]
    assert max(b - a for a, b in zip(sums, sums[1:], strict=False)) <= layers * tokens / 4


@pytest.mark.parametrize("method", ALL)
def test_stages_hold_unbound_one_cut_forms(method):
    module = method(position_policy="reindex")
    stages = module.stages(16, 64)
    for stage in stages:
        assert isinstance(stage.module, method)
        assert stage.module.position_policy == "reindex"
        assert stage.module.parent is None
    assert all(a.layer < b.layer for a, b in zip(stages, stages[1:], strict=False))


def test_a_keep_of_one_as_a_fraction_keeps_all():
    for module in (FastV(keep=1.0), PyramidDrop(keep=(1.0, 1.0)), Feather(keep=1.0)):
        assert module.stages(8, 16) == ()
    assert schedule(PyramidDrop(keep=(1.0, 0.5)), 6, 16) == [16, 16, 16, 16, 8, 8]
    assert schedule(V2Drop(keep=(0.5, 1.0, 1)), 8, 64) == [64] + [32] * 5 + [1] * 2
    assert schedule(FastV(keep=1), 4, 16) == [16, 16, 1, 1]


def test_names():
    for method in ALL:
        assert type(build(method.label, parent=None)) is method
        assert method().where == "decoder"
        zero = method.min_budget == 0
        assert reachable(method.label, GRID)[-1] == (0 if zero else 1)


def test_lists_of_a_config_become_tuples():
    module = build("pyramiddrop", layers=[2, 4], keep=[0.5, 3], parent=None)
    assert (module.layers, module.keep) == ((2, 4), (0.5, 3))
    assert hash(module) == hash(PyramidDrop(layers=(2, 4), keep=(0.5, 3), parent=None))


def test_policies_and_looks():
    assert [m().position_policy for m in ALL] == ["retain", "reindex", "retain", "retain", "retain"]
    assert [m.looks for m in ALL] == ["previous", "next", "previous", "previous", "previous"]
    assert not VisualTokensWithdrawal.needs


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (lambda: FastV(layer=0).stages(8, 16), "1 to 7"),
        (lambda: FastV(layer=8).stages(8, 16), "compressor.layer: 8"),
        (lambda: FastV(keep=17).stages(8, 16), "cannot keep 17 of 16"),
        (lambda: FastV(keep=0), "compressor.keep"),
        (lambda: FastV(keep=1.5), "1.0 keeps all; 1 is one token"),
        (lambda: FastV(budget=17).stages(8, 16), "compressor.budget: fastv cannot keep 17 of 16"),
        (lambda: FastV(keep=True), "compressor.keep"),
        (lambda: FastV(keep="half"), "compressor.keep"),
        (lambda: FastV(budget=0), "compressor.budget"),
        (lambda: FastV(budget=4, keep=0.5).stages(8, 16), "one of the two"),
        (lambda: FastV(row="first"), "did you mean|choose one"),
        (lambda: FastV(keep=4).apply({}, random_case(0)[0], Signals()), "compressor.budget: None"),
        (lambda: FastV(budget=4).apply({}, random_case(0)[0], Signals()), "signals.decoder"),
        (lambda: FastV(budget=13).apply({}, *random_case(0)), "cannot give 13"),
        (lambda: PyramidDrop(budget=4).stages(8, 16), "match=mean_processed"),
        (lambda: PyramidDrop(layers=(2, 4)).clone(keep=(0.5,)), "one number for each"),
        (lambda: PyramidDrop(keep=(0.25, 0.5)), "do not come back"),
        (lambda: PyramidDrop(layers=(4, 2)).stages(8, 16), "increasing"),
        (lambda: PyramidDrop().stages(3, 16), "1 to 2"),
        (lambda: PyramidDrop(layers="8,16"), "compressor.layers"),
        (lambda: PyramidDrop(keep=()), "compressor.keep"),
        (lambda: Feather(stride=-1), "compressor.stride"),
        (lambda: Feather(layers=(2,)), "two stages"),
        (lambda: Feather(softmax="text"), "compressor.softmax"),
        (lambda: Feather().stages(8, 15), "compressor.grid"),
        (lambda: Feather(keep=20).stages(8, 16), "cannot keep 20"),
        (lambda: V2Drop(keep=(0.5, 0.5)), "one number for each"),
        (lambda: V2Drop().stages(2, 16), "compressor.layers"),
        (lambda: VisualTokensWithdrawal(budget=4).stages(8, 16), "0 or None"),
        (lambda: VisualTokensWithdrawal(layer=8).stages(8, 16), "1 to 7"),
    ],
)
def test_mistakes(mistake, words):
    with pytest.raises(UserError, match=words) as error:
        mistake()
    assert len(str(error.value).splitlines()) <= 3
