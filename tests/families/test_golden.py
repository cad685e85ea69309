"""Every family against what its reference implementation gave, from files kept with the tests.

`tests/golden/README.md` says how they were made; live comparison: `pytest -m parity`.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from encoders import check_encoder
from flax.traverse_util import flatten_dict

from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.cli import verify
from efficient_vlm.families import architecture, load
from efficient_vlm.families import save as export
from efficient_vlm.families.table import family_of
from efficient_vlm.families.weights import FusedReader
from efficient_vlm.nn.fuse import fuse, unfuse
from efficient_vlm.nn.linear import Joined

GOLDEN = Path(__file__).parents[1] / "golden"
ENCODERS = ("clip_vision", "siglip_vision")
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir() and p.name not in ENCODERS)


def opened(name):
    config = architecture.read_config(GOLDEN / name)
    family, model = family_of(config), architecture.build_model(config)
    source = load.FamilyCheckpoint(Checkpoint.open(GOLDEN / name), family, config, model)
    return config, family, model, source


@pytest.mark.parametrize("name", CASES)
def test_logits_features_and_tokens_are_the_reference_s(name):
    config, family, model, source = opened(name)
    params = load.load_parameters(source)
    with np.load(GOLDEN / name / "io.npz") as io:
        report = verify.verify(family, config, model, params, io)
        assert report["greedy_match"] is (True if "gen/tokens" in io else None)
        if "out/image_features" in io:
            assert report["features_error"] is not None
    assert report["ok"], report


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_are_bitwise(name, tmp_path):
    config, family, model, source = opened(name)
    params = load.stacked(source)
    carried = {each: source.tensor(each) for each in source.carried}
    export.export(tmp_path, family, config, model, params, carried=carried)
    before, after = Checkpoint.open(GOLDEN / name), Checkpoint.open(tmp_path)
    assert set(before.names) == set(after.names)
    for each in before.names:
        assert before.dtype(each) == after.dtype(each)
        np.testing.assert_array_equal(before.read(each), after.read(each), each)


@pytest.mark.parametrize("name", CASES)
def test_joined_as_read_or_afterwards(name):
    """Threads that read into joined weights, against `fuse` of what is read one by one."""
    *_, source = opened(name)
    plain = load.load_parameters(source, dtype=None)
    reader = FusedReader(source, check=True)
    shapes, params = reader.abstract, reader.result()
    assert any(isinstance(leaf, Joined) for leaf in flatten_dict(params).values())
    joined = fuse(plain)
    assert jax.tree.structure(params) == jax.tree.structure(joined) == jax.tree.structure(shapes)
    jax.tree.map(np.testing.assert_array_equal, params, joined)
    jax.tree.map(np.testing.assert_array_equal, unfuse(params), plain)
    for leaf, shape in zip(jax.tree.leaves(params), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_its_tensor(name):
    """And no tensor is left: the counts agree, with what is only carried along."""
    *_, source = opened(name)
    checkpoint = source.checkpoint
    total = sum(int(np.prod(checkpoint.shape(each))) for each in checkpoint.names)
    ours = sum(int(np.prod(shape)) for shape in source.names.shapes.values())
    carried = sum(int(np.prod(checkpoint.shape(source.stored[each]))) for each in source.carried)
    assert ours + carried == total


def test_a_tied_head_that_is_stored_too(tmp_path):
    """Accepted if it repeats the table, and carried; another one contradicts the config."""
    from efficient_vlm.checkpoints import safetensors_write

    name = "llama_rope3_tied"
    config, family, model, source = opened(name)
    arrays = {each: source.tensor(each) for each in source.checkpoint.names}
    table = arrays["model.embed_tokens.weight"]
    for folder, head in (("same", table), ("other", table + 1)):
        held = {**arrays, "lm_head.weight": head}
        tensors = [(n, a.shape, a.dtype, lambda a=a: a) for n, a in held.items()]
        safetensors_write.write(tmp_path / folder, tensors)
    again = load.FamilyCheckpoint(Checkpoint.open(tmp_path / "same"), family, config, model)
    assert again.carried == ("lm_head.weight",)
    with pytest.raises(load.CheckpointError, match=r"lm_head\.weight"):
        load.FamilyCheckpoint(Checkpoint.open(tmp_path / "other"), family, config, model)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_alone(name):
    check_encoder(GOLDEN / name)
