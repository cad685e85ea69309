"""MobileVLM: the two ends against the reference library, the projector against float64 in torch.

See `mobilevlm_reference`.
"""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import numpy as np
from mobilevlm_reference import NAMES, make
from tiny_torch import ODD

from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.cli import verify
from efficient_vlm.errors import UserError
from efficient_vlm.families import architecture, load
from efficient_vlm.families import save as export
from efficient_vlm.families.table import family_of

pytestmark = pytest.mark.parity


def opened(config, folder):
    family, model = family_of(config), architecture.build_model(config)
    return family, model, load.FamilyCheckpoint(Checkpoint.open(folder), family, config, model)


@pytest.mark.parametrize(
    ("kind", "flat"), [("ldpnet", False), ("ldpnetv2", False), ("ldpnetv2", True)]
)
def test_ours_equals_the_reference(kind, flat, tmp_path):
    config, io = make(kind, tmp_path, flat)
    family, model, source = opened(config, tmp_path)
    report = verify.verify(family, config, model, load.load_parameters(source), io)
    assert report["ok"], report
    assert report["features_error"] is not None
    assert report["greedy_match"] is True
    assert source.carried == tuple(
        f"model.vision_tower.vision_tower.vision_model.post_layernorm.{part}"
        for part in ("bias", "weight")
    )


@pytest.mark.parametrize("kind", NAMES)
def test_there_and_back_bit_for_bit(kind, tmp_path):
    config, _ = make(kind, tmp_path)
    family, model, source = opened(config, tmp_path)
    export.export(tmp_path / "back", family, config, model, load.stacked(source))
    again = Checkpoint.open(tmp_path / "back")
    assert set(again.names) == set(source.checkpoint.names) - set(source.carried)
    for name in again.names:
        np.testing.assert_array_equal(again.read(name), source.checkpoint.read(name))


def test_what_it_cannot_be_is_said():
    config = dict(model_type="mobilevlm", hidden_size=8, mm_projector_type="mlp2x_gelu")
    config |= ODD.text()
    with pytest.raises(UserError, match="mm_projector_type"):
        architecture.build_model(config)
    with pytest.raises(UserError, match="mm_vision_tower"):
        architecture.build_model(
            config | dict(mm_projector_type="ldpnet", mm_vision_tower="a/eva-clip")
        )
