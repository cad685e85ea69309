"""A published directory asked in words: the tiny SmolVLM of tests/samples, tokenizer and all."""

import base64
import functools
import io
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import efficient_vlm as evlm
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.cli import main as cli
from efficient_vlm.errors import UserError
from efficient_vlm.families import load
from efficient_vlm.families.imported import import_model
from efficient_vlm.inference.generate import generate
from efficient_vlm.processing.conversation import prompt_ids

TESTS = Path(__file__).parents[1]
SAMPLE = TESTS / "samples" / "smolvlm"
PHOTOS = [TESTS / "samples" / "llava" / f"{i:02}.jpg" for i in range(2)]


def main(words):
    """The command line; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["efficient-vlm", *words])
        return cli.main()


@pytest.fixture(scope="module")
def vlm():
    return evlm.from_pretrained(SAMPLE)


def test_a_batch_answers_as_each_alone(vlm):
    """Rows with one, two and no picture, of different lengths."""
    questions, photos = ["What is this?", "And these two, then?", "Hm"], [PHOTOS[:1], PHOTOS, []]
    together = vlm.generate(questions, images=photos, max_new_tokens=6)
    alone = [
        vlm.generate(question, images=row, max_new_tokens=6)
        for question, row in zip(questions, photos, strict=True)
    ]
    assert together == alone


def test_pictures_named_in_messages(vlm):
    """In any form, beside some that are given; and what has nothing to name them with says so."""
    data = PHOTOS[0].read_bytes()
    address = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    text = {"type": "text", "text": "Which?", "image": None, "image_url": {"url": None}}

    def asked(*parts, images=()):
        messages = [{"role": "user", "content": [*parts, text], "name": None}]
        return vlm.request([messages], [list(images)])

    given = asked({"type": "image"}, {"type": "image"}, images=PHOTOS).inputs
    named = [
        asked({"type": "image", "image": PHOTOS[0]}, {"type": "image", "path": str(PHOTOS[1])}),
        asked({"type": "image", "image": data}, {"type": "image"}, images=[PHOTOS[1].open("rb")]),
        asked({"type": "image"}, {"type": "image", "image": PHOTOS[1]}, images=[io.BytesIO(data)]),
        asked({"type": "image_url", "image_url": {"url": address}}, {"image": str(PHOTOS[1])}),
        asked({"type": "input_image", "image_url": address}, {"image": Image.open(PHOTOS[1])}),
    ]
    for request in named:
        jax.tree.map(np.testing.assert_array_equal, request.inputs, given)
    for parts, images, words in (
        ([{"type": "image", "image": PHOTOS[0]}], PHOTOS[:1], "not named"),
        ([{"type": "image"}, {"type": "image"}], PHOTOS[:1], "images: 1 for 2"),
        ([{"type": "image", "url": "https://example.org/a.png"}], [], "nothing is fetched"),
        ([{"type": "image_url", "image_url": {"url": address[:-9] + "!"}}], [], "damaged base64"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            asked(*parts, images=images)
        assert len(str(caught.value)) < 500 and len(str(caught.value).splitlines()) <= 3


def test_an_answer_that_was_begun_goes_on(vlm):
    """No second header, and no end of the turn."""
    asked = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is"}]
    begun = vlm.request([asked]).inputs
    assert vlm.tokenizer.decode(begun.text[0, : begun.lengths[0]]) == "User: Why?\nAssistant: It is"


def test_a_stream_is_the_answer(vlm):
    parts = []
    answer = vlm.generate("Why?", images=PHOTOS[:1], max_new_tokens=8, stream=parts.append)
    assert "".join(parts) == answer


def test_no_new_program_for_another_question(vlm):
    """Prompts of one length bucket share their programs."""
    from efficient_vlm.inference import generate as module

    programs = (
        module.encode_stage,
        module.compress_stage,
        module.prefill_stage,
        module.decode_stage,
    )
    vlm.generate("What is this?", images=PHOTOS[:1], max_new_tokens=4)
    before = [program._cache_size() for program in programs]
    vlm.generate("What else is here?", images=PHOTOS[:1], max_new_tokens=4)
    assert [program._cache_size() for program in programs] == before


def test_adapters_of_a_fine_tune_are_fields(vlm):
    with pytest.raises(UserError, match="adapt: 'lora' is not a mapping"):
        vlm.finetune([{}], steps=1, adapt="lora")


@pytest.mark.parametrize("name", ["fastv", "dart", "pyramiddrop", "divprune"])
def test_a_question_without_a_picture(vlm, name):
    options = {"pyramiddrop": dict(layers=(1,), keep=(4,)), "divprune": dict(budget=4)}
    short = vlm.with_compressor(name, **options.get(name, dict(layer=1, keep=4)))
    assert short.generate("Hm?", max_new_tokens=4) == vlm.generate("Hm?", max_new_tokens=4)


def test_more_to_keep_than_a_prompt_has(vlm):
    """How many tokens there are depends on the tiles of its pictures."""
    whole = vlm.with_compressor("fastv", layer=1, keep=5000)
    asked = dict(images=PHOTOS[:1], max_new_tokens=4)
    assert whole.generate("Hm?", **asked) == vlm.generate("Hm?", **asked)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("visionzip", dict(budget=3, attention="column_mean")),
        ("hiprune", dict(budget=3, layer=-1, middle_layer=-2)),
        ("position_pool", dict(budget=3)),
        ("divprune", dict(budget=50)),  # More than the small one has.
        ("fastv", dict(layer=1, keep=50)),
    ],
)
def test_a_small_picture_beside_a_large_one(name, options):
    """What is kept of it, and what is answered, is as if it were alone."""
    qwen = evlm.from_pretrained(TESTS / "golden" / "qwen2_vl", max_pixels=4000)
    qwen, token = qwen.with_compressor(name, **options), qwen.family.image_token(qwen.config)
    rng = np.random.default_rng(0)
    pictures = [
        qwen.pictures(rng.integers(0, 255, (*size, 3), np.uint8)) for size in ((40, 60), (90, 30))
    ]

    def asked(pictures):
        counts = [int(p.grids.prod(axis=1).sum()) for p in pictures]
        ids = [[1, *[token] * count, 5, 6] for count in counts]
        request = qwen.place(ids, [(p,) for p in pictures])
        found = generate(request.model, qwen.fused, request.inputs, new_tokens=4, eos_id=-1)
        live = np.asarray(found.visual.mask)[0]
        return found.tokens[0].tolist(), np.asarray(found.visual.position)[0][live]

    (answer, kept), (alone, kept_alone) = asked(pictures), asked(pictures[:1])
    assert answer == alone
    np.testing.assert_allclose(kept, kept_alone, atol=1e-4)


def test_weights_are_not_saved_as_what_cannot_hold_them(vlm, tmp_path):
    with pytest.raises(UserError, match="dtype: 'int8'\n.*bfloat16"):
        vlm.save(tmp_path / "one", dtype="int8")
    large = vlm.with_params(jax.tree.map(lambda p: p * 1e7, vlm.params))
    with pytest.raises(UserError, match="beyond the range of float16"):
        large.save(tmp_path / "two", dtype="float16")


@pytest.mark.parametrize("pictures", [PHOTOS[:1], []])
def test_repetition_penalty(vlm, pictures, tmp_path):
    """Each token by whole forward passes, with the formula on their logits in float64."""
    prompt, penalty = "What is this? What is this?", 3.0
    request = vlm.request([prompt], [pictures])
    pictured = request.pictured[0]
    text = request.inputs.text[0][: request.inputs.lengths[0]]
    token = vlm.family.image_token(vlm.config)
    how = (vlm.family.prompt_style(vlm.config), vlm.template, vlm.tokenizer)
    ids = prompt_ids(*how, prompt, pictured)
    assert [i for i in ids if i != token] == list(text)
    found = vlm.run([prompt], [pictures], max_new_tokens=10, repetition_penalty=penalty)
    for chosen in found.tokens[0, 0]:
        whole = vlm.place([ids], [pictured])
        logits = np.asarray(vlm.logits(whole), np.float64)[0, int(whole.inputs.lengths[0]) - 1]
        seen = np.unique(ids)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        assert chosen == logits.argmax()
        ids.append(int(chosen))
    plain = vlm.run([prompt], [pictures], max_new_tokens=10)
    assert plain.tokens.tolist() != found.tokens.tolist()
    # What the model's own files ask for.
    shutil.copytree(SAMPLE, tmp_path / "own")
    settings = {"repetition_penalty": penalty, "no_repeat_ngram_size": 2, "num_beams": 1}
    (tmp_path / "own" / "generation_config.json").write_text(json.dumps(settings))
    own = evlm.from_pretrained(tmp_path / "own")
    with pytest.warns(UserWarning, match=r"no_repeat_ngram_size: not applied"):
        again = own.run([prompt], [pictures], max_new_tokens=10)
    assert again.tokens.tolist() == found.tokens.tolist()
    with pytest.raises(UserError, match="repetition_penalty: 0\n.*above 0"):
        own.run([prompt], [pictures], repetition_penalty=0)


def test_as_many_tokens_as_the_table_has_positions():
    """Padding to a length that programs share needs none; each token as a forward pass gives it."""
    gpt = evlm.from_pretrained(TESTS / "golden" / "gpt_neo")
    ids = list(np.random.default_rng(0).integers(1, 60, 60))
    request = gpt.place([ids], [()])
    found = generate(request.model, gpt.fused, request.inputs, new_tokens=5, eos_id=-1)
    for token in found.tokens[0, 0]:
        request = gpt.place([ids], [()])
        assert token == gpt.logits(request)[0, len(ids) - 1].argmax()
        ids.append(int(token))
    with pytest.raises(UserError, match="65 tokens\n.*64"):
        gpt.place([ids], [()])
    with pytest.raises(UserError, match="token 64, but the model has 64"):
        gpt.place([[3, 64]], [()])
    longest = gpt.place([ids[:60]], [()]).inputs
    with pytest.raises(UserError, match="new_tokens: 6, but learned positions end 4 tokens.*\n.*5"):
        generate(gpt.model, gpt.fused, longest, new_tokens=6, eos_id=-1)


@pytest.mark.parametrize("options", [dict(name="divprune", budget=4), dict(name="vtw", layer=1)])
def test_full_budget_and_less(vlm, options):
    request = vlm.request(["What?"], [PHOTOS[:1]])
    plain = vlm.logits(request)[0, : request.inputs.lengths[0]]
    other = vlm.with_compressor(**options)
    logits = other.logits(other.request(["What?"], [PHOTOS[:1]]))[0, : len(plain)]
    # All four tokens of a tile are its full budget; vtw drops what it drops.
    same = np.allclose(logits, plain, atol=1e-5 * np.abs(plain).max())
    assert same is (options["name"] == "divprune")
    fewer = vlm.with_compressor("divprune", 2).run(["What?"], [PHOTOS[:1]], max_new_tokens=2)
    whole = vlm.run(["What?"], [PHOTOS[:1]], max_new_tokens=2)
    assert np.asarray(whole.visual.mask).sum() == 2 * np.asarray(fewer.visual.mask).sum()
    assert fewer.kv_bytes < whole.kv_bytes


def test_other_weights_leave_and_come_back(vlm, tmp_path):
    changed = vlm.with_params(jax.tree.map(lambda p: p * 1.5, vlm.params))
    changed.save(tmp_path / "out")
    again = evlm.from_pretrained(tmp_path / "out")
    request = vlm.request(["What?"], [PHOTOS[:1]])
    np.testing.assert_array_equal(changed.logits(request), again.logits(request))
    assert not np.allclose(changed.logits(request), vlm.logits(request))
    assert again.generate("Hm", max_new_tokens=2) == changed.generate("Hm", max_new_tokens=2)
    with pytest.raises(UserError, match="came from there"):
        vlm.save(SAMPLE)
    changed.save(tmp_path / "out")  # Again, as after more steps.
    before = {path.name: path.read_bytes() for path in (TESTS / "golden" / "llava").iterdir()}
    shutil.copytree(TESTS / "golden" / "llava", tmp_path / "llava")
    with pytest.raises(UserError, match="llava: holds another checkpoint"):
        changed.save(tmp_path / "llava")
    assert {path.name: path.read_bytes() for path in (tmp_path / "llava").iterdir()} == before


def test_weights_that_are_not_those_of_the_model(vlm, tmp_path):
    fewer = {name: value for name, value in vlm.params.items() if name != "language"}
    odd = ({"language": {"layers": {}}}, {"language": {"layers": {"x": np.array(1)}}}, {1: [2]})
    for params in ({}, None, fewer, {**vlm.params, "more": np.zeros(3)}, *odd):
        with pytest.raises(UserError, match="params: .* do not fit") as error:
            vlm.with_params(params)
        assert len(str(error.value).splitlines()) <= 3
    broken = vlm.with_params(jax.tree.map(lambda p: p * np.nan, vlm.params))
    with pytest.raises(UserError, match="NaN or infinite"):
        broken.save(tmp_path)


def test_import_verify_export(tmp_path, capsys):
    golden = TESTS / "golden" / "llava"
    imported, back = tmp_path / "imported", tmp_path / "back"
    assert main(["import", str(golden), str(imported), f"--verify={golden / 'io.npz'}"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["family"] == "llava" and report["greedy_match"] is True
    assert report["max_abs_error"] < 1e-4
    assert main(["export", str(imported), str(back)]) == 0
    before, after = Checkpoint.open(golden), Checkpoint.open(back)
    assert report["params"] == sum(before.read(name).size for name in before.names)
    assert all(np.array_equal(before.read(n), after.read(n)) for n in before.names)
    # Other outputs than those of these weights: told, and the exit code says so.
    with np.load(golden / "io.npz") as file:
        arrays = {key: file[key] for key in file}
    arrays["out/logits"] = arrays["out/logits"] * 1.01
    np.savez(tmp_path / "other.npz", **arrays)
    other = ["import", str(golden), str(tmp_path / "two"), f"--verify={tmp_path / 'other.npz'}"]
    assert main(other) == 1


def test_an_import_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    """Nothing that is on the disk is read again; weights that changed meanwhile start it over."""
    source = shutil.copytree(TESTS / "golden" / "llava", tmp_path / "source")
    target, real, read = tmp_path / "out", load.FamilyCheckpoint.read, []

    def dies(self, path, *args, after, **options):
        if len(read) == after:
            raise KeyboardInterrupt
        read.append(path)
        return real(self, path, *args, **options)

    for after in (5, 20):
        monkeypatch.setattr(
            load.FamilyCheckpoint, "read", functools.partialmethod(dies, after=after)
        )
        with pytest.raises(KeyboardInterrupt):
            import_model(source, target)
    (target / "under_way" / "journal.jsonl").open("a").write('{"part": "lang')  # Half a line.
    monkeypatch.setattr(load.FamilyCheckpoint, "read", functools.partialmethod(dies, after=-1))
    _, params = import_model(source, target)
    assert len(read) == len(set(read))
    count = len(read)
    whole = flatten_dict(evlm.from_pretrained(source).params, sep="/")
    assert count == len(whole)
    again = flatten_dict(evlm.from_pretrained(target).params, sep="/")
    assert all(np.array_equal(whole[path], again[path]) for path in whole)
    assert sorted(path.name for path in target.iterdir()) == sorted(
        {"carried", "checkpoints", "dtypes.json", *(path.name for path in source.glob("*.json"))}
    )

    read.clear()
    monkeypatch.setattr(load.FamilyCheckpoint, "read", functools.partialmethod(dies, after=5))
    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "two")
    os.utime(source / "model.safetensors", (1, 1))
    monkeypatch.setattr(load.FamilyCheckpoint, "read", functools.partialmethod(dies, after=-1))
    import_model(source, tmp_path / "two")
    assert len(read) == 5 + len(whole)


def test_stored_dtypes_survive_an_import(tmp_path):
    assert main(["import", str(SAMPLE), str(tmp_path / "one")]) == 0
    assert main(["export", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    before, after = Checkpoint.open(SAMPLE), Checkpoint.open(tmp_path / "two")
    for name in before.names:
        assert before.dtype(name) == after.dtype(name)
        assert before.read(name).tobytes() == after.read(name).tobytes()


def spoiled(tmp_path, **changes):
    """A copy of the sample with another config.json."""
    folder = tmp_path / "spoiled"
    shutil.copytree(SAMPLE, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "nowhere", "Hm"], "no such directory"),
        (["generate", "{sample}", "Hm", "--image=nowhere.jpg"], "nowhere.jpg"),
        (["generate", "{sample}", "Hm", "--max-new-tokens=0"], "max_new_tokens"),
        (["generate", "{sample}", "Hm", "--compressor=visionzzip"], "visionzip"),
        (
            ["generate", "{sample}", "Hm", "--compressor=resampler", "--compressor.budget=2"],
            "weights",
        ),
        (
            ["generate", "{sample}", "Hm", "--compressor=encoder_exit", "--compressor.layer=9"],
            "layer",
        ),
        (["generate", "{sample}", "Hm", "--compressor=fastv", "--compressor.layer=9"], "layer"),
        (["generate", "{sample}", "Hm", "--compressor.budget=2"], "no method"),
        (["generate", "{sample}", "Hm", f"--seed={2**64}"], "--seed"),
        (["generate", "{sample}", "Hm", "--points=here.png"], "one picture"),
        (["generate", "nowhere", "Hm", "--image=a.jpg", "--points=here.foo"], "here.foo"),
        (["generate", "nowhere", "Hm", "--image=a.jpg", "--points={out}/a.png"], "no directory"),
        (["import", "{sample}", "{out}", "--verify=nowhere.npz"], "nowhere.npz"),
        (["import", "{sample}/config.json", "{out}"], "config.json"),
        (["export", "{sample}", "{sample}"], "came from there"),
    ],
)
def test_mistakes_are_told_in_three_lines(arguments, message, tmp_path, capsys):
    names = dict(sample=SAMPLE, out=tmp_path / "out")
    assert main([word.format(**names) for word in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") <= 3
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "smolvlmm"}, "smolvlm"),
        ({"model_type": None}, "model_type"),
        ({"scale_factor": 4}, "shape"),
        ({"text_config": {}}, "missing"),
    ],
)
def test_another_config_than_that_of_the_weights(changes, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        evlm.from_pretrained(spoiled(tmp_path, **changes))
    assert str(caught.value).count("\n") <= 2
