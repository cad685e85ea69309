"""`efficient-vlm audit`: what it prints, as a table and as JSON, and what it refuses."""

import json
import sys
import time

import pytest

from efficient_vlm.cli import main as cli
from efficient_vlm.cli import methods as command
from efficient_vlm.compressors import methods
from efficient_vlm.families import presets

# One of each way from a picture to tokens.
VISUAL = (
    "llava-1.5-7b",
    "tinyllava-phi-2-siglip-3.1b",
    "paligemma-3b-224",
    "smolvlm-256m",
    "internvl3-1b",
    "gemma-3-4b",
    "mobilevlm-v2-1.7b",
    "qwen2-vl-2b",
    "qwen2.5-vl-3b",
    "qwen3-vl-2b",
    "molmo-7b-d",
    "molmoe-1b",
    "molmo2-4b",
)
FASTV = ("--compressor=fastv", "--compressor.layer=2", "--compressor.keep=0.5")


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*words) -> (exit code, stdout, stderr) of `efficient-vlm audit words`."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["efficient-vlm", "audit", *words])
        capsys.readouterr()
        code = cli.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def audited(call):
    """audited(*words) -> the parsed JSON."""

    def run(*words):
        code, out, err = call(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def test_the_promised_command(audited):
    found = audited("--preset=llava-1.5-7b", *FASTV)
    assert found["preset"] == "llava-1.5-7b"
    assert found["compressor"] == {"name": "fastv", "layer": 2, "keep": 0.5}
    assert found["text_tokens"] == 64 and found["images"] == 1
    assert found["layers"][1] == dict(
        layer=1, segment=0, visual_in=576, visual_out=288, text_in=64, text_out=64
    )
    assert len(found["layers"]) == 32
    assert found["visual_tokens"] == dict(
        entering=576, mean_written=(576 + 31 * 288) / 32, mean_processed=306.0
    )
    assert set(found["flops"]) == {"k2", "k3", "full", "total", "decode_per_token"}
    assert list(found["flops"]["full"]) == ["encoder", "compressor", "decoder", "head"]
    assert found["kv_bytes"] == (2 * 641 + 30 * 353) * 2 * 4096 * 2
    assert found["encoder_layers"] == [577] * 23 and found["encoder_out"] == 577
    assert 1 < found["amdahl"]["speedup"] < found["amdahl"]["bound"]
    assert found["baseline"]["compressor"]["name"] == "none"


def test_text_new_and_images(audited):
    found = audited("--preset=smolvlm-256m", "--text=10", "--new=5", "--images=2")
    assert found["layers"][0]["visual_in"] == 128 and found["layers"][0]["text_in"] == 10
    assert found["kv_bytes"] == 30 * (128 + 10 + 5) * 2 * 3 * 64 * 2


def test_a_table_for_people(call):
    code, out, err = call("--preset=llava-1.5-7b", *FASTV)
    assert code == 0, err
    for text in ("fastv(layer=2, keep=0.5)", "2 to 31", "306 processed", "297 written", "k=2",
                 "Amdahl", "57.2"):  # fmt: skip
        assert text in out, out
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize("name", VISUAL)
def test_a_preset_as_published(call, name):
    start = time.monotonic()
    code, out, err = call(f"--preset={name}", "--json")
    assert code == 0, err
    found, preset = json.loads(out), presets.get(name)
    assert time.monotonic() - start < 20
    # Crops of Molmo overlap: all of their 144 tokens are computed.
    entering = 13 * 144 if preset["family"] == "molmo" else preset["visual_tokens"]
    assert found["visual_tokens"]["entering"] == entering
    assert found["images"] == preset["images"]
    assert found["baseline"]["flops"] == found["flops"]


def test_a_language_model_has_nothing_to_compress(call):
    code, out, err = call("--preset=qwen2-0.5b")
    assert code == 2 and not out
    assert "nothing to compress" in err and "llava-1.5-7b" in err
    assert len(err.strip().splitlines()) <= 3


def test_methods_in_the_decoder_act_behind_the_models_own_projector(audited, call):
    words = ("--preset=smolvlm-256m", "--compressor=fastv", "--compressor.keep=0.5")
    found = audited(*words)
    assert found["projector"]["name"] == "patch_merger"
    assert [row["visual_in"] for row in found["layers"]] == [832, 832] + [416] * 28
    assert found["baseline"]["visual_tokens"]["entering"] == 832
    assert "own projector: patch_merger" in call(*words)[1]


def test_methods_in_front_of_the_decoder_get_the_projectors_tokens(audited, call):
    words = ("--preset=smolvlm-256m", "--compressor=divprune")
    found = audited(*words, "--compressor.budget=32")
    assert found["visual_tokens"]["entering"] == 13 * 32
    base = found["baseline"]["flops"]["full"]
    assert found["flops"]["full"]["encoder"] == base["encoder"]
    # 64 tokens of 576 channels for each tile: the projector as before, and similarities of all to
    # all, then to each that is chosen.
    more = 13 * 2 * (64 + 32) * 64 * 576
    assert found["flops"]["full"]["compressor"] == base["compressor"] + more
    code, _, err = call(*words, "--compressor.budget=65")
    assert code == 2 and "1 to 64" in err


@pytest.mark.parametrize(
    ("preset", "r", "left"),
    [
        ("smolvlm-256m", 5, 13 * 5),  # Tiles of 64 blocks: 11 layers merge 5, the last 4 of 9.
        ("qwen2-vl-2b", 2, 27 * 37 - 32 * 2),
        ("llava-1.5-7b", 8, 576 - 23 * 8),
    ],
)
def test_merging_acts_on_the_blocks_that_a_projector_reads(audited, preset, r, left):
    found = audited(f"--preset={preset}", "--compressor=tome", f"--compressor.r={r}")
    assert found["visual_tokens"]["entering"] == left


@pytest.mark.parametrize(
    ("name", "entering"),
    [
        ("paligemma-3b-224", 32),
        ("qwen2-vl-2b", 32),
        ("molmo-7b-d", 13 * 32),
        ("molmo2-4b", 32),  # Of all crops together.
    ],
)
def test_methods_without_weights_run_on_published_models(audited, name, entering):
    words = (f"--preset={name}", "--compressor=visionzip,divprune,stride")
    words += ("--compressor.budget=32", "--compressor.visionzip.attention=column_mean")
    for method in audited(*words)["methods"]:
        assert method["visual_tokens"]["entering"] == entering
        assert 1 < method["amdahl"]["speedup"] < method["amdahl"]["bound"]


def test_several_methods_matched(audited, call, monkeypatch):
    monkeypatch.setattr(command, "dry_run", lambda *args: None)  # Seconds, for tome.
    words = ("--preset=llava-1.5-7b", "--compressor=fastv,stride", "--compressor=tome")
    found = audited(*words, "--match=mean_processed:128")
    reached = {m["compressor"]["name"]: m for m in found["methods"]}
    assert list(reached) == ["fastv", "stride", "tome"]
    assert reached["fastv"]["compressor"]["keep"] == 98
    assert reached["fastv"]["match"] == dict(
        measure="mean_processed",
        goal=128.0,
        reached=127.875,
        off=127.875 / 128 - 1,
        settings={"keep": 98},
    )
    assert reached["stride"]["compressor"]["budget"] == 128
    assert reached["tome"]["visual_tokens"]["entering"] == 128
    code, out, _ = call(*words, "--match=flops:0.5")
    assert code == 0
    assert out.count("asked for 4.447 T") == 3 and "speed-up" in out


WHOLE = {name for name, method in methods.METHODS.items() if method.whole_grid}


@pytest.mark.parametrize("name", sorted(WHOLE))
def test_methods_that_leave_all_tokens_match_flops(audited, monkeypatch, name):
    monkeypatch.setattr(command, "dry_run", lambda *args: None)
    found = audited("--preset=llava-1.5-7b", f"--compressor={name}", "--match=flops:0.97")
    assert abs(found["match"]["off"]) < 0.01


@pytest.mark.parametrize("name", sorted(set(methods.names()) - WHOLE))
def test_every_method_can_be_matched(audited, monkeypatch, name):
    # That the model runs with each method is for other tests, and takes longer.
    monkeypatch.setattr(command, "dry_run", lambda *args: None)
    found = audited("--preset=llava-1.5-7b", f"--compressor={name}", "--match=mean_processed:128")
    assert found["match"]["reached"] == found["visual_tokens"]["mean_processed"]


def test_what_is_not_matched_is_marked(call):
    words = ("--preset=llava-1.5-7b", "--match=mean_processed:128")
    code, out, err = call(*words, "--compressor=fastv,pyramiddrop")
    assert code == 0, err
    assert out.count("128 !") == 1
    assert "reached 144.75 (+13 %; ! more than 5 % off" in out.replace("\n", " ")
    assert "(-0.098 %)" in out
    assert "!" not in call(*words, "--compressor=fastv")[1]
    assert "! more than 5 % off" in call(*words, "--compressor=m3")[1].replace("\n", " ")


@pytest.mark.parametrize("name", ["llava-1.5-7b", "smolvlm-256m", "qwen2-vl-2b", "molmo-7b-d"])
def test_feather_knows_the_grid_of_one_image(audited, name):
    found = audited(f"--preset={name}", "--compressor=feather", "--compressor.keep=0.1")
    entering = found["visual_tokens"]["entering"]
    side = {"smolvlm-256m": (8, 8), "qwen2-vl-2b": (27, 37)}.get(name)
    if name.startswith("molmo"):
        side = 12, 12
    rows, columns = side or [int((entering / found["images"]) ** 0.5)] * 2
    spaced = found["images"] * -(-rows // 3) * -(-columns // 3)
    cut = min(row["visual_out"] for row in found["layers"] if row["visual_out"] > entering // 9)
    assert cut == spaced + int(0.1 * entering)


def test_a_count_with_several_images_is_explained(audited, call):
    words = ("--preset=molmo-7b-d", "--compressor=fastv")
    note = "keep=100 counts the tokens of all 13 images together"
    assert note in audited(*words, "--compressor.keep=100")["note"]
    assert note in call(*words, "--compressor.keep=100")[1].replace("\n", " ")
    assert "note" not in audited(*words, "--compressor.keep=0.5")
    assert "note" not in audited(*words, "--compressor.keep=100", "--images=1")
    between = ("--preset=molmo-7b-d", "--compressor=stride", "--compressor.budget=16")
    assert "note" not in audited(*between)
    matched = audited(*words, "--compressor=pyramiddrop", "--match=mean_processed:900")
    assert all("all 13 images" in method["note"] for method in matched["methods"])


CONFIG = """
import ml_collections

def get_config(arg):
    segments = [dict(layers=1), dict(layers=1)]
    name, *options = arg.split(",")
    options = dict(part.split("=") for part in options)
    if name == "segment":
        segments[1]["compressor"] = {k: int(v) if v.isdigit() else v for k, v in options.items()}
    return ml_collections.ConfigDict(dict(
        data=dict(source="token_bench"),
        model=dict(
            encoder=dict(image_size=32, patch_size=8, width=24, depth=1, num_heads=2, mlp_dim=32),
            compressor=dict(name="none", budget=16),
            connector=dict(identity=name == "identity"),
            decoder=dict(width=32, num_heads=2, mlp_dim=48, segments=segments),
        ),
    ))
"""


@pytest.mark.parametrize(
    ("arg", "words", "expected"),
    [
        ("identity", ("--compressor=stride", "--compressor.budget=4"), "width 24"),
        ("segment,name=fastv,keep=4", (), "compressor.budget: None"),
        ("segment,name=average_pool,budget=3", (), "cannot give 3"),
        ("segment,name=fastervlm,budget=4", (), "signals.attention_row"),
        ("segment,name=tome,budget=12", (), "tome"),
        (
            "plain",
            ("--compressor=tokenpacker", "--compressor.budget=4", "--compressor.num_heads=7"),
            "compressor.num_heads: 7",
        ),
        (
            "plain",
            ("--compressor=mqt", "--compressor.budget=4", "--compressor.num_heads=7"),
            "compressor.num_heads: 7",
        ),
    ],
)
def test_no_numbers_for_what_the_model_refuses(call, tmp_path, arg, words, expected):
    path = tmp_path / "refused.py"
    path.write_text(CONFIG)
    code, out, err = call(f"--config={path}:{arg}", *words)
    assert code == 2 and not out, out
    assert expected in err and len(err.strip().splitlines()) <= 3, err


def test_equal_flops(audited):
    found = audited("--preset=llava-1.5-7b", "--compressor=fastv,divprune", "--match=flops:0.5")
    for method in found["methods"]:
        assert method["flops"]["total"] / found["baseline"]["flops"]["total"] == pytest.approx(
            0.5, abs=0.002
        )


def test_options_of_one_method_and_of_all(audited):
    found = audited(
        "--preset=llava-1.5-7b",
        "--compressor=fastv,stride,random",
        "--compressor.fastv.layer=3",
        "--compressor.keep",
        "100",
        "--compressor.budget=64",
        "--compressor.fastv.budget=None",
    )
    fastv, stride, random = (m["compressor"] for m in found["methods"])
    assert fastv["layer"] == 3 and fastv["keep"] == 100
    assert stride["budget"] == random["budget"] == 64


def test_a_config(audited):
    found = audited("--config=configs/quickstart.py")
    assert found["config"] == "configs/quickstart.py"
    assert found["compressor"]["name"] == "text_topk" and found["visual_tokens"]["entering"] == 16
    assert found["baseline"]["visual_tokens"]["entering"] == 64
    other = audited(
        "--config=configs/quickstart.py",
        "--config.model.encoder.image_size=128",
        "--compressor=average_pool",
        "--compressor.budget=64",
    )
    assert other["encoder_layers"] == [256] and other["visual_tokens"]["entering"] == 64


def test_a_config_whose_data_have_no_path_yet(audited):
    assert audited("--config=configs/llava.py")["layers"][0]["text_in"] == 128


def test_fields_of_a_preset_can_be_changed(audited):
    found = audited("--preset=llava-1.5-7b", "--config.model.encoder.image_size=672",
                    "--compressor=stride", "--compressor.budget=576")  # fmt: skip
    assert found["encoder_layers"][0] == 48 * 48 + 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ("--preset", "--config")),
        (("--preset=llava-1.5-7b", "--config=configs/quickstart.py"), ("one of",)),
        (("--preset=llava-7b",), ("'llava-7b'", "did you mean 'llava-1.5-7b'")),
        (("--preset=llava-1.5-7b", "--compressor=fastw"), ("fastw", "did you mean 'fastv'")),
        (("--preset=llava-1.5-7b", "--compressor=stride"), ("--compressor.budget", "missing")),
        (
            ("--preset=llava-1.5-7b", "--compressor=stride", "--compressor.budget=577"),
            ("577", "1 to 576"),
        ),
        (
            ("--preset=llava-1.5-7b", "--compressor=average_pool", "--compressor.budget=100"),
            ("100", "144"),
        ),
        (
            ("--preset=llava-1.5-7b", "--compressor=fastv", "--compressor.keeep=0.5"),
            ("--compressor.keeep", "did you mean --compressor.keep"),
        ),
        (
            ("--preset=llava-1.5-7b", "--compressor=fastv", "--compressor.layer=deep"),
            ("--compressor.layer", "'deep'", "int"),
        ),
        (
            ("--preset=llava-1.5-7b", "--compressor=fastv", "--compressor.layer=32"),
            ("compressor.layer", "32", "1 to 31"),
        ),
        (
            ("--preset=paligemma-3b-224", "--compressor=fastervlm", "--compressor.budget=64"),
            ("no CLS token", "column_mean"),
        ),
        (
            ("--preset=llava-1.5-7b", *FASTV, "--match=mean_processed:128"),
            ("--compressor.keep", "--match"),
        ),
        (("--preset=llava-1.5-7b", "--match=tokens:3"), ("--match", "tokens")),
        (
            ("--preset=llava-1.5-7b", "--compressor=fastv,stride", "--compressor.r=4"),
            ("--compressor.r", "none of fastv, stride"),
        ),
        (
            ("--preset=llava-1.5-7b", "--compressor=stride", "--compressor.fastv.layer=4"),
            ("fastv", "not audited"),
        ),
        (("--preset=llava-1.5-7b", "--text=-1"), ("--text=-1",)),
        (("--preset=llava-1.5-7b", "--images=0"), ("--images=0",)),
        (("--preset=llava-1.5-7b", "--config.model.encoder.dept=2"), ("did you mean", "depth")),
        (("--preset=llava-1.5-7b", "--compressor.layer"), ("--compressor.layer", "no value")),
        (("--preset=llava-1.5-7b", "--prefix"), ("--prefix",)),
        (
            ("--preset=llava-1.5-7b", "--compressor=fastv", "--compressor.fastv.nope=3"),
            ("--compressor.nope", "fastv has no such option", "budget, ", "layer"),
        ),
        (
            ("--preset=llava-1.5-7b", "--compressor=fastv", "--compressor.name=stride"),
            ("--compressor.name=stride", "fix: --compressor=stride"),
        ),
        (("--preset=llava-1.5-7b", "--compressor="), ("--compressor=: no name", "commas")),
        (("--preset=llava-1.5-7b", "--compressor=fastv", "--compressor= ,"), ("no name",)),
        (
            ("--preset=llava-1.5-7b", "--compressor=pyramiddrop", "--compressor.layers=a,b"),
            ("--compressor.layers: 'a,b'", "numbers with commas, such as 8,16"),
        ),
        (
            (*("--preset=llava-1.5-7b", "--compressor=fastv"), "--match=entering:128"),
            ("--match=entering", "mean_processed, mean_written, flops, kv_bytes"),
        ),
    ],
)
def test_mistakes(call, words, expected):
    code, out, err = call(*words)
    assert code == 2, out
    assert "Traceback" not in err and len(err.strip().splitlines()) <= 3, err
    for word in expected:
        assert word in err, err


def test_options_of_compressors_are_for_audit(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["efficient-vlm", "doctor", "--compressor.layer=2"])
    assert cli.main() == 2
    assert "--compressor.layer=2" in capsys.readouterr().err
