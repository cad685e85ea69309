"""What released files leave out, against the defaults of the reference's own classes."""

import pytest

transformers = pytest.importorskip("transformers")

from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

from efficient_vlm.families import defaults  # noqa: E402
from efficient_vlm.families.text import rope  # noqa: E402

pytestmark = pytest.mark.parity

PARTS = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", "internvl"}


def reference(kind, part):
    """The default config of a class, as a mapping."""
    config = CONFIG_MAPPING[kind]
    if kind in PARTS:
        config = config.sub_configs[part]
    return config().to_dict()


def same(ours, theirs):
    for name, value in ours.items():
        if name == "rope_theta":
            assert rope(theirs)["rope_theta"] == value
            continue
        if name == "num_experts" and name not in theirs:
            name = "num_local_experts"
        found = theirs[name]
        if isinstance(found, list) and not isinstance(value, tuple):
            value = [value] * len(found)
        assert _lists(found) == _lists(value), name


def _lists(value):
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("kind", defaults.TEXTS)
def test_decoders(kind):
    ours, theirs = defaults.TEXTS[kind], reference(kind, "text_config")
    same(ours, theirs)
    flags = (bool(each.get("tie_word_embeddings")) for each in (ours, theirs))
    assert len(set(flags)) == 1


@pytest.mark.parametrize("kind", defaults.VISIONS)
def test_encoders(kind):
    same(defaults.VISIONS[kind], reference(kind, "vision_config"))


@pytest.mark.parametrize("kind", defaults.MODELS)
def test_models(kind):
    *_, own = defaults.MODELS[kind]
    theirs = CONFIG_MAPPING[kind]().to_dict()
    same(own, theirs)
    # An absent flag has the default of its place, see `families.heads`.
    assert own.get("tie_word_embeddings", False) is theirs["tie_word_embeddings"]
