"""`efficient-vlm compress` and the heat maps: what is drawn is what the method did."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficient_vlm.cli import main as cli
from efficient_vlm.cli import pixel_signals
from efficient_vlm.cli.methods import method_fields
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.errors import UserError
from efficient_vlm.evaluation import heat
from efficient_vlm.inference.generate import generate
from efficient_vlm.processing.batch import question_inputs


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A JPEG, wider than high: a bright disc before a dark gradient."""
    y, x = np.mgrid[:90, :130]
    pixels = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    pixels[(x - 100) ** 2 + (y - 30) ** 2 < 300] = (250, 240, 90)
    path = tmp_path_factory.mktemp("images") / "photo.jpg"
    Image.fromarray(pixels).save(path, quality=95)
    return str(path)


@pytest.fixture
def call(photo, tmp_path, capsys):
    """call(*options) -> (JSON, pixels) of `compress photo --json`."""

    def run(*options, image=photo):
        out = tmp_path / "map.png"
        assert cli.run(["compress", image, f"--out={out}", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out), np.asarray(Image.open(out).convert("RGB"))

    return run


# ---- where patches went --------------------------------------------------------------------------


def test_counts_and_sizes():
    source = np.array([0, 0, -1, 2, 1, 2, 2, -1, 4])
    assert heat.counts(source) == heat.Counts(4, kept=2, merged=5, merged_into=2, dropped=2)
    np.testing.assert_array_equal(heat.token_sizes(source), [2, 2, np.nan, 3, 1, 3, 3, np.nan, 1])
    assert heat.token_sizes(np.arange(4)) is None  # Nothing is merged,
    assert heat.token_sizes(np.arange(8) // 2) is None  # or all alike.
    assert heat.counts(np.full(3, -1)) == heat.Counts(0, 0, 0, 0, 3)
    assert heat.token_sizes(np.full(3, -1)) is None


def test_runs_of_the_decoder():
    runs = [np.array([0, 1, 2, 3]), np.array([0, -1, 1, -1]), np.full(4, -1)]
    np.testing.assert_array_equal(heat.where_ended(runs), runs[1])
    np.testing.assert_array_equal(heat.where_ended(runs[:1]), runs[0])
    np.testing.assert_array_equal(heat.where_ended(runs[2:]), runs[2])
    np.testing.assert_array_equal(heat.layers_survived([3, 2, 9], runs), [5, 3, 5, 3])


@pytest.fixture(scope="module")
def marked(make_model, make_batch, init):
    """marked(name, budget, **options) -> (sources of one question, its heat map)."""
    batch = make_batch(1, 1, seed=3)
    trained = make_model("text_topk", 5)
    params = init(trained)
    inputs = question_inputs({**batch, "prompt_lengths": batch["lengths"]})

    def run(name, budget=None, **options):
        model = trained.with_compressor(name, budget, **options)
        out = generate(model, params, inputs, new_tokens=1, eos_id=1)
        sources = [np.asarray(source[0]) for source in out.sources]
        return sources, heat.heat(model, params, inputs, sources)

    return run


def best(scores, count):
    return set(np.argsort(-scores, kind="stable")[:count])


def test_attention_is_what_the_method_ranked_by(marked):
    sources, found = marked("fastervlm", 5, attention="column_mean", layer=0)
    assert found.meaning == "attention from all patches, layer 0"
    assert set(np.flatnonzero(sources[0] >= 0)) == best(found.scores, 5)


def test_relevance_is_what_text_topk_ranked_by(marked):
    sources, found = marked("text_topk", 5)
    assert found.meaning == "relevance to the question"
    assert set(np.flatnonzero(sources[0] >= 0)) == best(found.scores, 5)


def test_decoder_layers_survived(marked):
    sources, found = marked("fastv", layer=1, keep=4)
    assert found.meaning == heat.LAYERS
    kept = heat.where_ended(sources) >= 0
    assert kept.sum() == 4
    np.testing.assert_array_equal(found.scores, np.where(kept, 2, 1))
    sources, found = marked("vtw", layer=1)
    np.testing.assert_array_equal(found.scores, np.ones(16))
    np.testing.assert_array_equal(heat.where_ended(sources), np.arange(16))


def test_methods_without_numbers_have_no_heat(marked):
    assert marked("stride", 4)[1] is None
    sources, found = marked("tome", r=3, layers=1)
    assert found.meaning == "patches in its token"
    np.testing.assert_array_equal(found.scores, np.bincount(sources[0])[sources[0]])


# ---- pixels in place of an encoder ---------------------------------------------------------------


def test_descriptors_tell_patches_apart():
    image = np.full((56, 56, 3), 90, np.uint8)
    assert not pixel_signals.describe(image, (4, 4)).any()
    image[14:28, 28:42] = (240, 30, 30)
    found = pixel_signals.describe(image, (4, 4))
    assert found.shape == (16, 16) and found.dtype == np.float32
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    given = pixel_signals.signals(found, (4, 4))
    for row in (given.attention_row, given.middle_row):
        assert row.shape == (1, 16) and row.sum() == pytest.approx(1, abs=1e-5)
        assert row.argmax() == 6
    assert set(np.unique(found.round(4), axis=0, return_counts=True)[1]) == {1, 15}


def test_one_method_without_a_run(call):
    found, pixels = call("--compressor=visionzip", "--compressor.budget", "6", "--grid=4x6")
    assert found["seen_by"] == "pixel statistics, no trained encoder"
    assert found["grid"] == [4, 6] and found["left_out"] == []
    (row,) = found["maps"]
    source = np.array(row["source"])
    assert (row["tokens"], row["dropped"], row["kept"]) == (6, 0, 5)
    assert row["merged"] == 19 and row["merged_into"] == 1
    assert len(row["scores"]) == 24 and "contrast" in row["heat"]
    dominant = np.flatnonzero(np.bincount(source)[source] == 1)
    assert set(dominant) == best(np.array(row["scores"]), 5)
    # Three pictures in the shape of the photograph, of whole pixels per patch.
    assert pixels.shape[1] > 3 * 600 and pixels.shape[0] > 440
    again, same = call("--compressor=visionzip", "--compressor.budget=6", "--grid=4x6")
    assert again == found
    np.testing.assert_array_equal(pixels, same)


def test_tome_without_an_encoder(call):
    found, _ = call("--compressor=tome", "--compressor.r=3", "--compressor.layers=0,5", "--grid=4")
    (row,) = found["maps"]
    assert (row["tokens"], row["budget"], row["dropped"]) == (10, 10, 0)  # 16 - 2 x 3
    assert row["heat"] == "patches in its token"


def test_all_methods_on_one_sheet(call):
    found, pixels = call("--compressor=all", "--compressor.budget=5", "--grid=4")
    drawn = {row["compressor"]: row for row in found["maps"]}
    left = {row["compressor"]: row["reason"] for row in found["left_out"]}
    assert set(drawn) | set(left) == set(METHODS) and not set(drawn) & set(left)
    for name in ("random", "divprune", "scope", "vispruner", "prumerge", "hiprune", "pool", "tome"):
        assert drawn[name]["budget"] == drawn[name]["tokens"] == 5, name
    assert drawn["average_pool"]["budget"] == drawn["m3"]["budget"] == 4  # The nearest.
    assert drawn["none"]["budget"] == 16
    assert "trained parameters" in left["resampler"] and "decoder" in left["fastv"]
    assert "text" in left["cdpruner"]
    assert pixels.shape[1] < 2500 and (pixels[:40] == 255).mean() > 0.5


def test_words_say_what_became_of_patches(photo, tmp_path, capsys):
    out = tmp_path / "a.png"
    options = ["--compressor=stride", "--compressor.budget", "3", "--grid=3", f"--out={out}"]
    cli.run(["compress", *options, photo])  # The 3 is no file.
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "stride at 3: 3 patches kept, 6 dropped",
        "Seen by: pixel statistics, no trained encoder",
        f"Map: {out}",
    ]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
def test_kinds_of_files(call, tmp_path, kind):
    path = tmp_path / f"tiny.{kind}"
    Image.new("RGBA" if kind in ("PNG", "WEBP") else "RGB", (1, 300)).save(path, kind)
    found, pixels = call(
        "--compressor=stride", "--compressor.budget=2", "--grid=2", image=str(path)
    )
    assert found["maps"][0]["tokens"] == 2
    assert pixels.shape[0] < 1500  # Even of a line.


# ---- with a run ----------------------------------------------------------------------------------


def test_with_a_run(call, finished_run):
    run = f"--workdir={finished_run[0]}"
    options = "--compressor=fastervlm", "--compressor.attention=column_mean"
    question = "--question=what background colour"
    found, _ = call(run, *options, "--compressor.budget=4", question)
    assert str(finished_run[0]) in found["seen_by"] and found["grid"] == [4, 4]
    assert found["question"] == "what background colour"
    (row,) = found["maps"]
    assert row["tokens"] == 4 and row["options"] == {"attention": "column_mean"}
    assert set(np.flatnonzero(np.array(row["source"]) >= 0)) == best(np.array(row["scores"]), 4)
    assert row["answer"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compressor=fastv", "--compressor.layer=1"], ["fastv", "1 layer"]),
        (["--compressor=fastervlm", "--compressor.budget=4"], ["cls", "column_mean"]),
        (["--compressor=resampler", "--compressor.budget=4"], ["resampler", "no trained"]),
        (["--compressor=stride"], ["budget", "missing"]),
        (["--compressor=stride", "--compressor.budget=17"], ["17", "1 to 16"]),
        (["--compressor=none", "--grid=4"], ["--grid", "encoder"]),
        (["--compressor=none", "--question=" + 40 * "a "], ["--question", "at most"]),
    ],
)
def test_what_a_run_cannot_do(photo, finished_run, options, words):
    refused(photo, f"--workdir={finished_run[0]}", *options, words=words)


def test_all_methods_that_a_run_can_do(finished_run):
    """The settings alone; drawing them is the same as above."""
    from efficient_vlm.cli.one_image import WithRun

    seen = WithRun(np.zeros((40, 30, 3), np.uint8), finished_run[0], None)
    assert seen.question == "which digit is red"
    nearest = {}
    for name in ("stride", "average_pool", "visionzip", "hiprune", "tome"):
        nearest[name] = seen.nearest({"name": name}, 5)
    assert nearest["stride"] == {"name": "stride", "budget": 5}
    assert nearest["average_pool"]["budget"] == 4
    assert nearest["visionzip"]["attention"] == "column_mean"  # This encoder has no CLS.
    assert nearest["hiprune"]["middle_layer"] == 9 / 24
    assert nearest["tome"]["budget"] == 8  # One layer merges half at most.
    with pytest.raises(UserError, match="layer"):
        seen.nearest({"name": "fastv"}, 5)


# ---- mistakes ------------------------------------------------------------------------------------


def refused(*words_of_call, words):
    with pytest.raises(UserError) as caught:
        cli.run(["compress", *words_of_call])
    text = str(caught.value)
    assert len(text.splitlines()) <= 3
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--compressor is missing", "all, none"]),
        (["--compressor=visionzp"], ["did you mean 'visionzip'"]),
        (["--compressor=stride"], ["budget: missing", "576 patches"]),
        (["--compressor=stride", "--compressor.budget=0"], ["budget", "0"]),
        (["--compressor=stride", "--compressor.budget=many"], ["budget", "many"]),
        (["--compressor=stride", "--compressor.budgt=4"], ["--compressor.budget"]),
        (["--compressor=stride", "--compressor.budget=5", "--grid=2"], ["5", "1 to 4"]),
        (["--compressor=all", "--compressor.budget=5", "--grid=2"], ["budget=5", "1 to 4"]),
        (["--compressor=stride", "--compressor.budget"], ["no value"]),
        (["--compressor=fastv"], ["decoder", "--workdir"]),
        (["--compressor=resampler", "--compressor.budget=4"], ["parameters", "--workdir"]),
        (["--compressor=minicpm_merger", "--compressor.budget=36"], ["minicpm_merger"]),
        (["--compressor=text_topk", "--compressor.budget=4"], ["text", "--workdir"]),
        (["--compressor=none", "--grid=0"], ["--grid=0", "1 to 64"]),
        (["--compressor=none", "--grid=2x3x4"], ["--grid=2x3x4"]),
        (["--compressor=none", "--question=what"], ["--question", "--workdir"]),
        (["--compressor=none", "--out=no/such/folder.png"], ["--out", "folder"]),
        (["--compressor=none", "--workdir=never"], ["never", "train first"]),
        (["--compressor=none", "--config.data.size=3"], ["takes no config"]),
    ],
)
def test_mistakes(photo, options, words):
    refused(photo, *options, words=words)


def test_files_that_are_no_image(photo, tmp_path):
    text, half = tmp_path / "a.txt", tmp_path / "half.jpg"
    text.write_text("not an image")
    half.write_bytes(Path(photo).read_bytes()[:300])
    for path, word in ((text, "not an image"), (half, "damaged"), (tmp_path, "not found")):
        refused(str(path), "--compressor=none", words=[path.name, word])


def test_methods_of_a_command_line():
    read = method_fields(["fastv,stride"], ["fastv.layer=3", "keep=0.5", "budget=4"])
    assert read == [
        {"name": "fastv", "layer": 3, "keep": 0.5, "budget": 4},
        {"name": "stride", "budget": 4},
    ]
