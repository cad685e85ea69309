"""Live: every case of make_fixtures through our loader, and back into the reference library.

pip install -e '.[test,parity]' && pytest -m parity
"""

import os

import jax
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from encoders import check_encoder  # noqa: E402
from make_fixtures import CASES, EAGER, forward  # noqa: E402

from efficient_vlm.checkpoints.safetensors_read import Checkpoint  # noqa: E402
from efficient_vlm.cli import verify  # noqa: E402
from efficient_vlm.families import architecture, load  # noqa: E402
from efficient_vlm.families import save as export  # noqa: E402
from efficient_vlm.families.table import family_of  # noqa: E402
from efficient_vlm.nn.stack import unstack  # noqa: E402

pytestmark = pytest.mark.parity

# LFM2-VL needs a decoder, and NaFlex an encoder, that are not built.
NOT_BUILT = [name for name in CASES if name.split("__")[0] in ("lfm2_vl", "siglip2_naflex_vision")]
ENCODERS = [name for name in CASES if "vision" in name.split("__")[0] and name not in NOT_BUILT]
NAMES = [name for name in CASES if name not in ENCODERS + NOT_BUILT]
BACK = [name for name in NAMES if "__" not in name]


def opened(folder):
    config = architecture.read_config(folder)
    family, model = family_of(config), architecture.build_model(config)
    source = load.FamilyCheckpoint(Checkpoint.open(folder), family, config, model)
    with np.load(folder / "io.npz") as file:
        io = dict(file)
    return config, family, model, source, io


@pytest.mark.parametrize("name", NAMES)
def test_ours_equals_the_reference(name, live_case):
    config, family, model, source, io = opened(live_case(name))
    report = verify.verify(family, config, model, load.load_parameters(source), io)
    assert report["ok"], report
    assert report["greedy_match"] is (True if "gen/tokens" in io else None)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_alone(name, live_case):
    check_encoder(live_case(name))


@pytest.mark.parametrize("name", ["gemma3", "smolvlm", "qwen2_5_vl", "paligemma", "gpt_neo"])
def test_rows_of_a_batch_continue_as_the_reference_s(name, live_case):
    """Greedily and together, where `verify` continues each row alone."""
    config, family, model, source, io = opened(live_case(name))
    params = load.load_parameters(source)
    inputs = verify.read_inputs(family, config, model, io)
    keys = [f"gen/tokens_{row}" if row else "gen/tokens" for row in range(len(inputs.prompts))]
    counts = [len(prompt.ids) for prompt in inputs.prompts]
    wanted = [io[key].reshape(-1)[n:] for key, n in zip(keys, counts, strict=True)]
    # As generated: all that is given is prompt.
    inputs = inputs._replace(prompts=[p._replace(types=None) for p in inputs.prompts])
    ours = verify.greedy(inputs, params, len(wanted[0]))
    np.testing.assert_array_equal(ours, np.stack(wanted))


@pytest.mark.parametrize("name", BACK)
def test_what_was_changed_here_loads_there(name, live_case, tmp_path):
    """As after fine-tuning: other weights, exported, give the same logits in the reference."""
    config, family, model, source, io = opened(live_case(name))
    rng = np.random.default_rng(0)
    changed = jax.tree.map(
        lambda p: (p * (1 + 0.1 * rng.standard_normal(p.shape))).astype(np.float32),
        load.stacked(source, np.float32),
    )
    carried = {each: source.tensor(each) for each in source.carried}
    export.export(tmp_path, family, config, model, changed, carried=carried)
    cls = getattr(transformers, config["architectures"][0])
    theirs = cls.from_pretrained(tmp_path, **EAGER)
    given = {key[3:]: torch.from_numpy(io[key]) for key in io if key.startswith("in/")}
    wanted = forward(theirs.eval(), given).logits.numpy()
    inputs = verify.read_inputs(family, config, model, io)

    mask, token = io["in/attention_mask"].astype(bool), inputs.place["image_token"]
    for row, ours in enumerate(verify.logits(inputs, unstack(changed))):
        text = wanted[row][mask[row]][inputs.prompts[row].ids != token]
        np.testing.assert_allclose(
            ours[:, : text.shape[1]], text, atol=verify.TOLERANCE * np.abs(text).max()
        )
