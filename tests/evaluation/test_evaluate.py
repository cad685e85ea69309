"""Evaluation: answers are scored by hand-checkable rules, and controls sit at chance."""

import collections
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import stats

from efficient_vlm.errors import UserError
from efficient_vlm.evaluation import protocol as evaluation
from efficient_vlm.evaluation import settings
from efficient_vlm.evaluation.run import evaluate_run
from efficient_vlm.evaluation.token_maps import read_maps
from efficient_vlm.inference.generate import Generated
from efficient_vlm.models import variants
from efficient_vlm.models.init import abstract_parameters


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def accuracy(results, task, compressor="none"):
    (row,) = [r for r in results["eval"] if (r["task"], r["compressor"]) == (task, compressor)]
    return row


# ---- controls ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def controls(finished_run):
    """control -> results of the trained tiny model on the same questions about 64 images."""
    methods = [dict(name="none", budgets=[16])]
    return {
        control: evaluate_run(
            finished_run[0], methods=methods, images=64, control=control, say=lambda line: None
        )
        for control in (None, "blank", "shuffled")
    }


def test_the_model_has_learned_something_that_controls_can_lose(controls):
    row = accuracy(controls[None], "global")
    assert row["accuracy"] > 0.9 and row["ci95"][0] > 0.7


@pytest.mark.parametrize("control", ["blank", "shuffled"])
def test_controls_sit_at_chance(controls, control):
    """Eight background colours: chance is 1/8, whatever the model knows about colours.

    Questions about one image share their answer, so images are what is counted.
    """
    row = accuracy(controls[control], "global")
    # A blank image gets one answer everywhere; it is right for that colour's share of 64 images.
    assert row["n"] == accuracy(controls[None], "global")["n"] >= 30
    images = min(row["n"], 64)
    assert row["accuracy"] * images <= stats.binom.isf(1e-3, images, 1 / 8)
    assert row["ci95"][0] <= 1 / 8
    assert row["accuracy"] < accuracy(controls[None], "global")["accuracy"] / 2


def test_unknown_controls_are_named(finished_run):
    with pytest.raises(UserError, match="did you mean 'blank'"):
        evaluate_run(finished_run[0], control="blanc", say=lambda line: None)


def test_shuffled_answers_come_from_other_images_and_keep_their_numbers():
    class Data:
        answers = [[f"{row}-{slot}" for slot in range(3)] for row in range(5)]
        batches = [{"task": np.array([[0, 1, 0]] * 5)}]

    shuffled = evaluation._shuffled([list(row) for row in Data.answers], Data)
    for row, answers in enumerate(shuffled):
        for slot, answer in enumerate(answers):
            other, place = map(int, answer.split("-"))
            assert other != row
            assert (place == 1) == (slot == 1)  # An answer to the same kind of question.
    everything = [answer for row in shuffled for answer in row]
    assert sorted(everything) == sorted(answer for row in Data.answers for answer in row)


# ---- scoring -------------------------------------------------------------------------------------


def test_exact_match_is_what_a_person_would_count():
    assert evaluation.normalise("  Row 3,\tcolumn 4 \n") == "row 3, column 4"
    assert evaluation.normalise("Red") == evaluation.normalise("red ") != "reds"
    predictions = [
        dict(task="count", index=i // 2, correct=c)
        for i, c in enumerate([True, True, False, True, False, False])
    ] + [dict(task="needle", index=9, correct=True)]
    rows = evaluation.score(predictions, ("needle", "point", "count"))
    assert [(r["task"], r["n"], r["accuracy"]) for r in rows] == [
        ("needle", 1, 1.0),
        ("count", 6, 0.5),
    ]
    for row in rows:
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]


def test_answers_are_compared_with_their_own_questions(finished_run, monkeypatch):
    """A generate() that gives the right answer to every question of even number, else nothing."""
    config = ConfigDict(json.loads((finished_run[0] / "config.json").read_text()))
    seen = []

    def oracle(model, params, inputs, *, new_tokens, eos_id, rng):
        batch = data.batches[len(seen)]
        lengths = inputs.lengths.reshape(batch["lengths"].shape)
        prompts = inputs.text.reshape(*lengths.shape, -1)
        tokens = np.full((*lengths.shape, new_tokens), eos_id, np.int32)
        seen.append(lengths)
        for b, q in zip(*np.nonzero(lengths), strict=True):
            start, end = batch["prompt_lengths"][b, q], batch["lengths"][b, q]
            if (b + q) % 2 == 0:
                tokens[b, q, : end - start] = batch["tokens"][b, q, start:end]
            # The question is given without its answer.
            assert lengths[b, q] == start and not prompts[b, q, start:].any()
        source = np.zeros((lengths.size, 16), np.int32)
        visual = ConfigDict(dict(source=source))
        return Generated(
            tokens, visual, (source,), 0, dict(encode=0, compress=0, prefill=0, decode=[0])
        )

    from efficient_vlm.data.config import DataConfig
    from efficient_vlm.data.evalset import make_eval
    from efficient_vlm.train import loop

    data = make_eval(DataConfig.from_mapping({**config.data.to_dict(), "batch_size": 16}), limit=24)
    model = loop.make_model(config, data.tokenizer.vocab_size)
    shapes = abstract_parameters(model)
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    monkeypatch.setattr(evaluation, "generate", oracle)
    fields = settings.EvalConfig(batch_size=16, new_tokens=2)
    results = evaluation.evaluate(model, params, data, fields, say=lambda line: None)
    expected, total = collections.Counter(), collections.Counter()
    for row, answers in enumerate(data.answers):
        for slot in range(len(answers)):
            task = data.tasks[data.batches[row // 16]["task"][row % 16, slot]]
            total[task] += 1
            expected[task] += (row % 16 + slot) % 2 == 0
    assert sum(total.values()) == 48  # The last batch is filled up with rows that do not count.
    assert len(seen) == 2
    for row in results["eval"]:
        assert row["n"] == total[row["task"]]
        assert row["accuracy"] == pytest.approx(expected[row["task"]] / row["n"], abs=1e-4)


def test_predictions_give_the_accuracies_of_the_results(finished_run):
    """From the dumped text alone, by a rule written here."""
    workdir, results = finished_run
    for row in results["eval"]:
        name = f"{row['compressor']}-{row['budget']}.jsonl"
        predictions = read_jsonl(workdir / "predictions" / name)
        of_task = [p for p in predictions if p["task"] == row["task"]]
        right = [p["prediction"].strip().lower() == p["answer"].strip().lower() for p in of_task]
        assert [p["correct"] for p in of_task] == right
        assert row["n"] == len(of_task) > 0
        assert row["accuracy"] == pytest.approx(sum(right) / len(right), abs=1e-4)
        assert all(p["question"] and p["index"] >= 0 for p in of_task)


def test_random_is_pooled_over_its_draws(finished_run, monkeypatch):
    """Two seeds: each question counts twice, with different tokens but one cluster per image."""
    workdir, _ = finished_run
    rows = read_jsonl(workdir / "predictions" / "random-4.jsonl")
    full = read_jsonl(workdir / "predictions" / "none-16.jsonl")
    keys = collections.Counter((p["index"], p["slot"]) for p in rows)
    assert set(keys) == {(p["index"], p["slot"]) for p in full} and set(keys.values()) == {2}
    assert {p["seed"] for p in rows} == {0, 1} and "seed" not in full[0]
    kept = set()

    def watched(*args, **options):
        answers = evaluation_generate(*args, **options)
        kept.add(np.asarray(answers.sources[0]).tobytes())
        return answers

    evaluation_generate = evaluation.generate
    monkeypatch.setattr(evaluation, "generate", watched)
    again = evaluate_run(workdir, methods=[dict(name="random", budgets=[4])], say=lambda line: None)
    stored = [r for r in finished_run[1]["eval"] if r["compressor"] == "random"]
    assert again["eval"] == stored
    # Answers of so small a model may be equal, what was kept is not; 48 images are three batches.
    assert len(kept) == 2 * 3


# ---- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([dict(name="resampler", budgets=[4])], "no trained parameters.*reduce"),
        ([dict(name="average_pool", budgets=[5])], "average_pool"),
        ([dict(name="averag_pool", budgets=[4])], "did you mean 'average_pool'"),
        ([dict(budgets=[4])], "name"),
        ([dict(name="random", budgets=[4], sed=1)], "seed"),
        (["random"], r"eval.methods\[1\]"),
    ],
)
def test_methods_that_cannot_be_evaluated(finished_run, methods, words):
    said = []
    good = dict(name="none", budgets=[16])  # It is not even begun.
    with pytest.raises(UserError, match=f"(?s){words}") as caught:
        evaluate_run(finished_run[0], methods=[good, *methods], say=said.append)
    assert len(str(caught.value).splitlines()) <= 3
    assert not any("none at" in line for line in said)


def test_parameters_of_another_shape_are_named(make_model):
    """Trained with 8 queries, asked with 4."""
    trained = make_model("resampler", 4, options=dict(num_queries=8))
    given = settings.parameter_shapes(abstract_parameters(trained))
    assert given["reduce/queries"] == (8, 24)
    settings.check_trained([trained, trained.with_compressor("resampler", 2)], given)
    other = trained.with_compressor("resampler", 4, num_queries=4)
    with pytest.raises(UserError, match=r"reduce/queries has shape \(4, 24\).*\(8, 24\)"):
        settings.check_trained([other], given)


def test_the_default_is_the_models_own_compressor(make_model):
    model = make_model("stride", 4)
    (only,) = settings.settings_of(settings.EvalConfig(), model)
    assert dict(only.compressor) == dict(model.compressor)
    config = settings.EvalConfig(
        methods=[dict(name="none", budgets=[16]), dict(name="stride", budgets=[4, 1])]
    )
    found = [
        (v.compressor["name"], v.compressor["budget"]) for v in settings.settings_of(config, model)
    ]
    assert found == [("none", 16), ("stride", 4), ("stride", 1)]


def test_a_method_without_a_budget_is_called_by_what_its_layers_process(make_model):
    """16 patches in 4 layers; counted by hand."""
    deep = dict(segments=[dict(layers=4)])

    def label(name, budget=None, **options):
        return variants.setting_of(
            make_model("none", 16, decoder=deep).with_compressor(name, budget, **options)
        )

    assert label("none") == ("none", 16)
    assert label("stride", 5) == ("stride", 5)
    assert label("fastv", layer=1, keep=4) == ("fastv", 7)  # 16, 4, 4, 4
    assert label("fastv", layer=3, keep=0.25) == ("fastv", 13)  # 16, 16, 16, 4
    assert label("pyramiddrop") == ("pyramiddrop", 8)  # 16, 8, 4, 2: 7.5, to even
    assert label("vtw", layer=2) == ("vtw", 8)  # 16, 16, 0, 0
    assert label("tome", r=4) == ("tome", 8)  # Two encoder layers: 12, then 8 in all of them.
    assert label("sparsevlm", 7) == ("sparsevlm", 7)  # A given budget is the name.
    two = variants.setting_of(
        make_model("none", 16, decoder=deep).with_compressor("fastv", layer=1, keep=0.25), 32
    )
    assert two == ("fastv", 14)  # Two images: 32, 8, 8, 8.
    with pytest.raises(UserError, match="layer"):
        label("fastv", layer=4, keep=4)


def test_settings_of_one_label_are_told_apart_or_refused(make_model):
    model = make_model("none", 16)

    def labels(*methods):
        return settings.labels_of(settings.settings_of(settings.EvalConfig(methods=methods), model))

    plain = dict(name="visionzip", budgets=[4, 2], attention="column_mean")
    assert labels(plain) == [("visionzip", 4), ("visionzip", 2)]
    assert labels(plain, {**plain, "contextual": 0}) == [
        *(("visionzip", 4), ("visionzip", 2)),
        *(("visionzip contextual=0", 4), ("visionzip contextual=0", 2)),
    ]
    three = labels(*({**plain, "budgets": [4], "contextual": c} for c in (0, 1, 2)))
    assert three == [(f"visionzip contextual={c}", 4) for c in (0, 1, 2)]
    drops = labels(*(dict(name="pyramiddrop", layers=[1], keep=[k]) for k in (4, 0.25)))
    assert drops == [("pyramiddrop keep=4", 10), ("pyramiddrop keep=0.25", 10)]
    with pytest.raises(UserError, match="stride at 4 twice"):
        labels(dict(name="stride", budgets=[4]), dict(name="stride", budgets=[1, 4]))


def test_settings_with_one_budget_keep_their_own_files(finished_run, tmp_path):
    """Both rows and both prediction files are there, and the maps say what they show."""
    import shutil

    workdir = tmp_path / "run"
    shutil.copytree(finished_run[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["eval"]["methods"] = [
        dict(name="fastervlm", budgets=[4], attention=kind)
        for kind in ("column_mean", "mean_query")
    ] + [dict(name="visionzip", budgets=[4], attention="column_mean")]
    config["eval"].update(images=16)
    trained, data = _trained_and_data(ConfigDict(config), workdir)
    fields = settings.EvalConfig(**config["eval"])
    quiet = dict(say=lambda line: None)
    found = evaluation.evaluate(*trained, data, fields, workdir=workdir, **quiet)
    names = ["fastervlm attention=column_mean", "fastervlm attention=mean_query", "visionzip"]
    assert [row["compressor"] for row in found["cost"]] == names
    for name in names:
        rows = read_jsonl(workdir / "predictions" / f"{name.replace(' ', '_')}-4.jsonl")
        assert {(row["compressor"], row["budget"]) for row in rows} == {(name, 4)}
    for question in json.loads((workdir / "maps" / "maps.json").read_text()):
        assert [cell["compressor"] for cell in question["maps"]] == names
        assert [cell["meaning"] for cell in question["maps"]] == [
            "attention from all patches, layer -1",
            "attention from the mean query, layer -1",
            "attention from all patches, layer -1",
        ]
    for example in read_maps(workdir):
        # One image of 16 patches, of each of which every method has a number.
        assert [cell.grid for cell in example.cells] == [(4, 4)] * 3
        assert all(
            np.isfinite(cell.scores).all() and cell.scores.size == 16 for cell in example.cells
        )


def _trained_and_data(config, workdir):
    from efficient_vlm.data.config import DataConfig
    from efficient_vlm.data.evalset import make_eval
    from efficient_vlm.data.pipeline import make_train
    from efficient_vlm.train.trained import restore

    fields = config.data.to_dict()
    pipeline = make_train(DataConfig.from_mapping(fields), workdir=workdir)
    trained = restore(config, workdir, pipeline)
    data = make_eval(DataConfig.from_mapping({**fields, "batch_size": 16}), limit=16)
    return (trained.model, trained.params), data


@pytest.mark.parametrize("field", ["batch_size", "new_tokens", "seeds", "images", "map_questions"])
def test_wrong_sizes_are_named(field):
    with pytest.raises(UserError, match=f"eval.{field}"):
        settings.EvalConfig(**{field: -1})


def test_a_stop_between_batches_ends_the_evaluation(finished_run):
    from efficient_vlm.train.loop import Stopped

    config = ConfigDict(json.loads((finished_run[0] / "config.json").read_text()))
    calls = []

    def check_stop():
        calls.append(1)
        if len(calls) == 2:
            raise Stopped(143, 150)

    from efficient_vlm.data.config import DataConfig
    from efficient_vlm.data.evalset import make_eval
    from efficient_vlm.train import loop

    fields = {**config.data.to_dict(), "batch_size": 16}
    data = make_eval(DataConfig.from_mapping(fields), limit=48)
    model = loop.make_model(config, data.tokenizer.vocab_size)
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), abstract_parameters(model))
    with pytest.raises(Stopped):
        evaluation.evaluate(
            *(model, params, data, settings.EvalConfig(batch_size=16, new_tokens=2)),
            say=lambda line: None,
            check_stop=check_stop,
        )
    assert len(calls) == 2


def test_eval_takes_options_and_does_without_a_budget(finished_run, capsys):
    """`tome` by its rate: 16 patches, 3 fewer behind the one encoder layer."""
    from efficient_vlm.cli import main as cli

    run = ["eval", f"--workdir={finished_run[0]}", "--images=4", "--json"]
    assert cli.run([*run, "--compressor=tome", "--compressor.r=3"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert {(row["compressor"], row["budget"]) for row in results["eval"]} == {("tome", 13)}
    assert results["cost"][0]["visual_tokens"] == 13
    for wrong, words in (
        (["--compressor.r=3"], "goes with --compressor"),
        (["--compressor=stride"], "--budget: missing"),
        (["--compressor=stride", "--compressor.r=3"], "compressor.r"),
        (["--compressor=fastv", "--compressor.layer=1"], "compressor.layer: 1"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            cli.run([*run, *wrong])
        assert len(str(caught.value).splitlines()) <= 3
