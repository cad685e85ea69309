"""Our models as lmms-eval runs them, where it is installed."""

import functools
import io
from pathlib import Path

import pytest
from PIL import Image

from efficient_vlm.errors import UserError
from efficient_vlm.inference.load import from_pretrained

pytestmark = pytest.mark.parity
pytest.importorskip("lmms_eval.api.model")
instance = pytest.importorskip("lmms_eval.api.instance")
registry_v2 = pytest.importorskip("lmms_eval.models.registry_v2")
lmms_eval_plugin = pytest.importorskip("efficient_vlm.evaluation.lmms_eval_plugin")

SAMPLES = Path(__file__).resolve().parents[1] / "samples"
QUESTIONS = ("What is it?", "<image>\nWhich colour has the thing?", "Where?")


@pytest.fixture(scope="module")
def model():
    registry = registry_v2.ModelRegistryV2()
    registry.register_manifest(lmms_eval_plugin.MANIFEST)
    kind = registry.get_model_class("efficient_vlm")
    arguments = f"pretrained={SAMPLES / 'smolvlm'},compressor=divprune,budget=1,split=false"
    return kind.create_from_arg_string(arguments, {"batch_size": 2, "device": "cuda:0"})


@pytest.fixture(scope="module")
def picture():
    image = Image.open(io.BytesIO((SAMPLES / "llava" / "00.jpg").read_bytes()))
    return image.convert("RGB")


@pytest.fixture
def ask(model, picture):
    """ask(questions, settings) -> answers of generate_until."""

    def run(questions, settings, visuals=lambda row: [row["image"]]):
        model.task_dict = {"task": {"test": [{"image": picture}] * len(questions)}}
        requests = [
            instance.Instance(
                "generate_until",
                (text, dict(settings), visuals, k, "task", "test"),
                k,
                {"task": "task", "doc_id": k, "repeats": 1},
            )
            for k, text in enumerate(questions)
        ]
        return model.generate_until(requests)

    return run


def test_answers_are_ours_in_the_order_of_the_requests(ask, picture):
    vlm = from_pretrained(SAMPLES / "smolvlm", split=False).with_compressor("divprune", 1)
    generate = functools.partial(vlm.generate, images=picture, max_new_tokens=4)
    plain = [text.replace("<image>\n", "") for text in QUESTIONS]
    settings = {"max_new_tokens": 4, "temperature": 0, "do_sample": False}
    assert ask(QUESTIONS, settings) == [generate(text) for text in plain]
    whole = generate(plain[0])
    stop = next(letter for letter in whole if letter.isascii())
    assert ask(QUESTIONS[:1], {**settings, "until": [stop]}) == [whole.split(stop)[0]]


def test_tasks_that_are_not_served_say_so(model, ask):
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(UserError, match="output_type: generate_until"):
            method([])
    with pytest.raises(UserError, match="a visual"):
        ask(QUESTIONS[:1], {}, visuals=lambda row: [{"array": 1}])
