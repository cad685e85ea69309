"""Model cards: read back with the hub's own reader, and against the files that they tell of."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from efficient_vlm.errors import UserError
from efficient_vlm.families.card import (
    Base,
    Card,
    Data,
    copy_terms,
    read_base,
    read_header,
)
from efficient_vlm.families.card_facts import of_workdir
from efficient_vlm.families.hub import Source, of_folder

WORKDIR = Path(__file__).parents[1] / "samples" / "old_workdir"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FULL = Card(
    base=Base("org/base", "main", COMMIT, license="apache-2.0", folder="snapshot"),
    trained={"steps": 200, "adapter": {"name": "lora", "rank": 8}},
    relation="finetune",
    data=[
        Data("my.jsonl", sha256="a" * 64, license="CC-BY-4.0", rows=1000, skipped={"missing": 3}),
        Data("shards", hub="org/data"),
    ],
    params=1234567,
    compressor={"name": "visionzip", "budget": 64},
    budgets=[64, 16],
    results=[{"task": "docs", "metric": "anls", "budget": 64, "value": 0.5, "ci95": [0.4, 0.6]}],
    energy={"joules": 12.5, "kind": "measured"},
    command="efficient-vlm export a b",
    versions={"jax": "0.10.2"},
    tags=["visionzip"],
)


def tables_of(text):
    """Tables of a Markdown text: lists of rows, the heads first."""
    tables, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            rows.append([each.strip() for each in line.strip("|").split(" | ")])
        elif rows:
            tables, rows = [*tables, [rows[0], *rows[2:]]], []
    return tables


def test_the_hub_reads_the_header(tmp_path):
    card = ModelCard.load(FULL.write(tmp_path))
    assert card.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "base_model_revision": COMMIT,
        "license": "apache-2.0",
        "datasets": ["org/data"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["efficient_vlm", "visionzip"],
    }
    assert read_header(tmp_path / "README.md") == card.data.to_dict()
    for words in ("1,234,567", "name lora, rank 8", "3: missing", "CC-BY-4.0", "a" * 64):
        assert words in card.text
    for words in ("joules: 12.5", "    efficient-vlm export a b", "jax: 0.10.2", "64, 16"):
        assert words in card.text
    data, results = tables_of(card.text)
    assert data[2] == ["`shards` (`org/data`)", *["not recorded", "none stated"], *data[2][3:]]
    assert results[1] == ["docs", "64", "anls", "0.5", "0.4 to 0.6", "not recorded"]


def test_nothing_is_invented():
    """Without facts there is nothing but what every card is."""
    card = ModelCard(Card().text())
    fixed = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    assert card.data.to_dict() == {**fixed, "tags": ["efficient_vlm"]}
    assert not tables_of(card.text)
    for section in ("Compressor", "Results", "Cost", "Energy"):
        assert f"## {section}\n\nnot recorded\n" in card.text
    assert "Command: not recorded" in card.text and "licence" in card.text
    assert not any(letter.isdigit() for letter in card.text)
    # Weights that somebody changed: how, with which data, and with which base is not known.
    changed = ModelCard(Card(trained={}, base=Base(folder="here"), relation="finetune").text())
    assert changed.data.to_dict() == card.data.to_dict()
    for section in ("Training", "Data"):
        assert f"## {section}\n\nnot recorded\n" in changed.text
    # Each field that is given is told.
    for field in dataclasses.fields(Card):
        value = getattr(FULL, field.name)
        if value != getattr(Card(), field.name):
            assert dataclasses.replace(
                FULL, **{field.name: getattr(Card(), field.name)}
            ).text() != (FULL.text())


@pytest.mark.parametrize(
    "odd",
    ["a: b", "'\"", "# no comment", "---", "&a *a !!python/none", "yes", "1.0", "ä🙂", "x" * 300]
    + ["a\n---\n# Fake", "[x](y) | <b>", "`", "- a", "{a: 1}", "null", " "],
)
def test_every_text_is_a_text_in_yaml_and_in_markdown(odd, tmp_path):
    base = Base("org/base", odd, COMMIT, license="other", license_name=odd, license_link=odd)
    rows = [{"task": odd, "metric": odd, "value": 1.0}]
    card = dataclasses.replace(
        FULL,
        **dict(base=base, trained={odd: odd}, command=odd, protocol=odd, results=rows),
        **dict(data=[Data(odd, hub="org/data", license=odd, skipped={odd: 1})], energy={odd: odd}),
        **dict(compressor={"name": odd}, versions={odd: odd}),
    )
    read = ModelCard.load(card.write(tmp_path))
    assert (read.data.license_name, read.data.license_link) == (odd, odd)
    plain = [line for line in FULL.text().splitlines() if line.startswith("#")]
    assert [line for line in card.text().splitlines() if line.startswith("#")] == plain
    assert [len(rows) for rows in tables_of(read.text)] == [2, 2]
    assert all(len(row) in (6,) for rows in tables_of(read.text)[:1] for row in rows)


# ---- the base's own card -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\nText", ("apache-2.0", None, None)),
        (
            "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
            ("other", "own", "LICENSE"),
        ),
        ("\ufeff---\r\nlicense: [mit, gpl-3.0]\r\n---\r\n", (["mit", "gpl-3.0"], None, None)),
        ("---\nlicense: 3\nlicense_name: {a: b}\n---\n", (None, None, None)),
        ("---\nlicense: [mit, 3]\n---\n", (None, None, None)),
        ("---\nlicense: 'mit\n---\n", (None, None, None)),
        ("---\n- license\n---\n", (None, None, None)),
        ("---\nlicense: !!python/name:os.system\n---\n", (None, None, None)),
        ("# No header\nlicense: mit", (None, None, None)),
        ("", (None, None, None)),
        (None, (None, None, None)),
    ],
)
def test_licences_come_from_the_card_of_the_base(readme, licence, tmp_path):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme, newline="")
    base = read_base(Source(tmp_path, "org/base", "v1", COMMIT))
    assert base == Base("org/base", "v1", COMMIT, *licence, folder=tmp_path.name)
    text = Card(base=base).text()
    assert ModelCard(text).data.to_dict().get("license") == licence[0]
    assert ("card states it: not recorded" in text) is (licence[0] is None)


def test_the_terms_of_the_base_go_along(tmp_path):
    """From export to export: the first base's card, and its licence."""
    base, first, second = (tmp_path / name for name in ("base", "first", "second"))
    for folder in (base, first, second):
        folder.mkdir()
    own = "---\nlicense: mit\n---\nOf the base."
    (base / "README.md").write_text(own)
    (base / "LICENSE.md").write_text("terms")
    copy_terms(base, first)
    Card(base=read_base(Source(base, "org/base", None, COMMIT))).write(first)
    copy_terms(first, second)
    Card(base=read_base(of_folder(first))).write(second)
    for folder in (first, second):
        assert (folder / "README_base.md").read_text() == own
        assert (folder / "LICENSE.md").read_text() == "terms"
        header = read_header(folder / "README.md")
        assert (header["base_model"], header["license"]) == ("org/base", "mit")
        assert header["base_model_revision"] == COMMIT


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    (tmp_path / "README.md").write_text("My own words.")
    for params in (1, 2):  # Ours are written anew.
        Card(params=params).write(tmp_path)
        assert (tmp_path / "README_old.md").read_text() == "My own words."
    assert "parameters: 2" in (tmp_path / "README.md").read_text()


# ---- runs ----------------------------------------------------------------------------------------


def test_the_card_of_a_run_tells_its_results():
    stored = json.loads((WORKDIR / "results.json").read_text())
    base = Base("org/base", None, COMMIT, license="mit")
    fingerprint = {"content": "f" * 64, "seed": 0}
    card = of_workdir(WORKDIR, base, fingerprint=fingerprint, command="efficient-vlm train x")
    text = ModelCard(card.text()).text
    data, results, controls, costs = tables_of(text)
    assert data[1][:2] == ["`token_bench`", f"`{'f' * 64}`"]
    for table, rows in ((results, stored["eval"]), (controls, stored["controls"])):
        assert len(table) == len(rows) + 1
        for cells, row in zip(table[1:], rows, strict=True):
            told = dict(zip(table[0], cells, strict=True))
            assert (told["task"], told["compressor"]) == (row["task"], row["compressor"])
            assert (int(told["budget"]), int(told["questions"])) == (row["budget"], row["n"])
            assert float(told["accuracy"]) == row["accuracy"]
            low, high = map(float, told["95 % interval"].split(" to "))
            np.testing.assert_allclose([low, high], row["ci95"], atol=5e-5)
    for cells, row in zip(costs[1:], stored["cost"], strict=True):
        numbers = [float(each.replace(",", "")) for each in cells[1:]]
        expected = [row["budget"], row["visual_tokens"], sum(row["flops"].values())]
        expected += [row["decode_flops"], row["kv_bytes"], *row["ms"].values()]
        np.testing.assert_allclose(numbers, expected, rtol=1e-3)
    assert "## Energy\n\nnot recorded" in text and stored["protocol"] in text
    assert "steps: 6" in text and "budgets (visual tokens): 16, 4" in text
    assert card.header()["base_model_relation"] == "finetune"


def test_data_of_a_run_and_what_it_left_out(tmp_path):
    config = {"data": {"source": "llava_json", "path": "/home/me/secret/my.json"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (card,) = of_workdir(tmp_path).data
    assert card == Data("my.json") and "secret" not in of_workdir(tmp_path).text()
    assert of_workdir(tmp_path).header()["library_name"] == "efficient_vlm"
    results = {"train": {"samples": 90, "skipped_samples": {"markers": 2, "missing": 1}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert of_workdir(tmp_path).data == [
        Data("my.json", rows=90, skipped={"markers": 2, "missing": 1})
    ]
    rows = [{"name": "a", "sha256": "b" * 64, "license": "mit", "used": 5, "weight": 0.5}]
    (tmp_path / "results.json").write_text(json.dumps({**results, "data": rows}))
    assert of_workdir(tmp_path).data == [Data("a", sha256="b" * 64, license="mit", used=5)]


@pytest.mark.parametrize("name", ["config.json", "results.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_run_is_told(name, text, tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        of_workdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=name):
        of_workdir(tmp_path)
