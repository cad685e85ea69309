"""Distillation on the student's own answers: prompts, draws, what is learnt from them."""

import jax
import numpy as np
import pytest
from tuned_models import golden_with_words, png, row, tuning_config, write_rows

import efficient_vlm as evlm
from efficient_vlm.cli import run
from efficient_vlm.data.chat import ChatPipeline
from efficient_vlm.data.config import DataConfig
from efficient_vlm.data.row_source import Reading, RowSource
from efficient_vlm.data.tables.memory import MemoryTable
from efficient_vlm.errors import UserError
from efficient_vlm.inference.generate import generate
from efficient_vlm.inference.on_policy import prompts_of
from efficient_vlm.processing.gather import fitted
from efficient_vlm.train import published
from efficient_vlm.train.objective import DistilConfig

LORA = dict(name="lora", rank=4, targets="decoder")
PICTURES = [png(n, 32, 32) for n in range(2)]
QUESTIONS = ["<image> what is this ?", "what is 3 ?"]
ROWS = [
    row(PICTURES[:1], QUESTIONS[0], "it is 5 ."),
    row([], QUESTIONS[1], "number 4 ."),
]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "molmo_olmoe"])
def vlm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / request.param
    return evlm.from_pretrained(golden_with_words(request.param, folder))


def batch_of(vlm, rows):
    """A training batch, each row a sample."""
    config = DataConfig.from_mapping(
        dict(path="rows.json", batch_size=len(rows), pack=False, num_threads=0, max_images=4)
    )
    source = RowSource(MemoryTable(rows, config.max_image_bytes), Reading(max_bytes=10**6))
    model = vlm.processor.seeing(vlm.model)
    return next(iter(ChatPipeline(config, source, vlm.processor, [model]).epoch()))


def test_prompts_of_training_rows_are_those_of_questions(vlm):
    """Greedy answers to them are those of `run`, which makes prompts in another way."""
    batch = batch_of(vlm, ROWS)
    asked = prompts_of(batch.inputs)
    model = fitted(vlm.processor.seeing(vlm.model), asked.pictures, vlm.family.variable)
    out = generate(model, vlm.params, asked, new_tokens=4, eos_id=-1)
    found = out.tokens.reshape(len(ROWS), -1)
    for place, samples in enumerate(batch.conversations):
        ((number, _),) = samples
        pictures = [PICTURES[:1], []][number]
        question = QUESTIONS[number].replace("<image> ", "")
        alone = vlm.request([question], [pictures])
        expected = generate(alone.model, vlm.fused, alone.inputs, new_tokens=4, eos_id=-1)
        np.testing.assert_array_equal(found[place], expected.tokens.reshape(-1))


def test_answers_of_the_data_count_nothing(vlm):
    """With every step on the student's own answers, other labels give the same loss; it falls."""
    curves = []
    for answer in ("it is 5 .", "number 7 ."):
        seen = []
        rows = [row(PICTURES[:1], QUESTIONS[0], answer)]
        vlm.finetune(
            rows,
            adapt=LORA,
            compressor=dict(name="divprune", budget=1),
            steps=1 if curves else 10,
            learning_rate=1e-2,
            batch_size=1,
            distil=dict(kind="reverse_kl", on_policy=1.0, new_tokens=8),
            log=lambda step, metrics, seen=seen: seen.append(metrics),
        )
        assert all(each["on_policy"] == 1 for each in seen)
        curves.append([each["distillation"] for each in seen])
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-5)
    assert np.mean(curves[0][-3:]) < 0.5 * np.mean(curves[0][:3])
    jax.clear_caches()


def test_settings(vlm, tmp_path, monkeypatch):
    if vlm.family.name != "molmo":  # Several turns, which it does not take: the first is answered.
        two = dict(images=[], messages=[*ROWS[1]["messages"], *ROWS[1]["messages"]])
        asked, alone = (prompts_of(batch_of(vlm, [r]).inputs) for r in (two, ROWS[1]))
        assert asked.lengths[0] == alone.lengths[0] > 0
    packed = batch_of(vlm, ROWS[1:]).inputs
    with pytest.raises(UserError, match="2 conversations in a row"):
        prompts_of(packed.replace(segments=packed.segments + 1))
    with pytest.raises(UserError, match="another one has not seen these answers"):
        DistilConfig(kind="forward_kl", teacher="other", on_policy=0.5)
    with pytest.raises(UserError, match="distil.on_policy"):
        DistilConfig(kind="forward_kl", on_policy=1.5)
    config = tuning_config(vlm.directory, write_rows(tmp_path / "rows.jsonl", ROWS[1:]), adapt=LORA)
    config.distil = dict(kind="forward_kl", on_policy=0.5)
    # Before the base, which may be large, is read.
    monkeypatch.setattr(published, "open_base", lambda fields: pytest.fail("the base was read"))
    with pytest.raises(UserError, match="data.pack=True") as error:
        run.fit(config, tmp_path / "run", say=lambda line: None)
    assert len(str(error.value).splitlines()) <= 3
    config.data.pack, config.train.elastic_all = False, True
    config.train.elastic = [dict(name="visionzip", budget=n) for n in (2, 4)]
    with pytest.raises(UserError, match="one device, and one budget a step"):
        run.fit(config, tmp_path / "other", say=lambda line: None)
