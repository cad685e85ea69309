"""Configs and overrides: values get the type of their field, mistakes are named."""

import textwrap

import pytest

from efficient_vlm.cli import config_file as configs
from efficient_vlm.cli import published
from efficient_vlm.errors import UserError
from efficient_vlm.fields import to_dict

FILE = """
import ml_collections


def get_config(arg="small"):
    if arg not in ("small", "large"):
        raise ValueError(f"small or large, not {arg!r}")
    config = ml_collections.ConfigDict()
    config.data = dict(source="token_bench", tasks=("needle", "global"), batch_size=8)
    config.model = dict(
        encoder=dict(image_size=32, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32),
        compressor=dict(name="resampler", budget=4),
        decoder=dict(width=16, num_heads=2, segments=[dict(layers=1)], moe=dict(num_experts=2)),
    )
    config.train = dict(steps=10 if arg == "small" else 1000, optimizer=dict(learning_rate=0.1))
    config.eval = dict(methods=[dict(name="none", budgets=[16])])
    config.notes = dict(rate=0.5, anything=None)
    return config
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    return str(file)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=20", 20),
        ("train.optimizer.learning_rate=3e-4", 3e-4),
        ("train.optimizer.learning_rate=1", 1.0),
        ("train.optimizer.clip_norm=None", None),  # A field that the file does not name.
        ("train.optimizer.clip_norm=2", 2.0),
        ("train.ema=0.99", 0.99),
        ("train.ema=null", None),
        ("train.init_from=runs/other", "runs/other"),
        ("train.init_from=123", "123"),
        ("train.tensorboard=True", True),
        ("train.tensorboard=true", True),
        ("data.tasks=needle,count", ["needle", "count"]),
        ('data.tasks=["point"]', ["point"]),
        ("data.image_size=128", 128),
        ("data.image_size=64,128", [64, 128]),
        ("data.path=my file.json", "my file.json"),
        ("data.path=5", "5"),
        ("model.dtype=bfloat16", "bfloat16"),
        ("model.decoder.moe=None", None),
        ("model.decoder.moe.top_k=2", 2),
        ("model.decoder.num_kv_heads=1", 1),
        ("model.compressor.num_queries=8", 8),  # A field of the compressor that is named.
        ("model.compressor.name=none", "none"),
        ('train.elastic=[{"name": "none", "budget": 16}]', [{"name": "none", "budget": 16}]),
        ("notes.rate=2", 2.0),  # A section of one's own: the type of the value there.
        ("notes.anything=[1, 2]", [1, 2]),
    ],
)
def test_overrides_have_the_type_of_their_field(path, override, value):
    config = configs.load(path, [override])
    found = config
    for name in override.split("=")[0].split("."):
        found = found[name]
    found = list(found) if isinstance(found, tuple) else found
    assert found == value and type(found) is type(value)
    assert to_dict(config)  # Everything can be stored.


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stps=5", ["train.stps", "--config.train.steps?"]),
        ("trian.steps=5", ["trian", "--config.train?"]),
        ("train.optimizer.learnin_rate=5", ["--config.train.optimizer.learning_rate?"]),
        ("train.optimizer.zzz=5", ["zzz", "warmup_steps"]),
        ("model.encoder.dept=5", ["--config.model.encoder.depth?"]),
        ("model.compressor.num_querys=5", ["--config.model.compressor.num_queries?"]),
        ("train.steps.more=5", ["train.steps is a value"]),
        ("train.steps", ["no value"]),
        ("train.steps=many", ["'many'", "int"]),
        ("train.steps=2.5", ["'2.5'", "int"]),
        ("train.steps=True", ["'True'", "int"]),
        ("train.steps=None", ["'None'", "int"]),
        ("train.tensorboard=1", ["'1'", "bool"]),
        ("train.ema=often", ["'often'", "float | None"]),
        ("train.elastic=5", ["train.elastic"]),
        ("train.elastic=none", ["train.elastic", "Mapping"]),
        ("train.optimizer=adamw", ["train.optimizer"]),
        ("train.optimizer.learning_rate=fast", ["'fast'", "float"]),
        ("model.decoder.moe=4", ["model.decoder.moe"]),
        ("eval.methods=random", ["eval.methods"]),
        ("data.image_size=None", ["data.image_size"]),
        ("data.batch_size=None", ["data.batch_size", "int"]),
        ("notes.rate=high", ["'high'", "float"]),
    ],
)
def test_wrong_overrides_are_named(path, override, words):
    with pytest.raises(UserError) as caught:
        configs.load(path, [override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 3


def test_wrong_types_in_the_file_are_named_too(tmp_path):
    for old, new, field in (
        ("steps=10 if", "steps='10' if", "train.steps"),
        ("width=16, depth", "width=16.5, depth", "model.encoder.width"),
        ("learning_rate=0.1", "learning_rate='fast'", "train.optimizer.learning_rate"),
        ("num_experts=2", "num_experts=None", "model.decoder.moe.num_experts"),
    ):
        assert old in FILE
        (tmp_path / "mine.py").write_text(FILE.replace(old, new))
        with pytest.raises(UserError, match=field) as caught:
            configs.load(str(tmp_path / "mine.py"))
        assert len(str(caught.value).splitlines()) <= 3


def test_the_argument_reaches_the_file(path, tmp_path):
    assert configs.load(path).train.steps == 10
    assert configs.load(f"{path}:large").train.steps == 1000
    with pytest.raises(UserError, match="small or large, not 'huge'"):
        configs.load(f"{path}:huge")
    plain = tmp_path / "plain.py"
    plain.write_text("def get_config():\n    return {'train': {'steps': 3}}\n")
    assert configs.load(str(plain)).train.steps == 3
    with pytest.raises(UserError, match="takes no argument"):
        configs.load(f"{plain}:large")
    needs = tmp_path / "needs.py"
    needs.write_text("def get_config(arg):\n    return {'train': {'steps': int(arg or 7)}}\n")
    assert configs.load(str(needs)).train.steps == 7
    assert configs.load(f"{needs}:9").train.steps == 9


def test_a_config_may_build_on_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text(FILE)
    text = """
        import neighbour_of_mine


        def get_config(arg="large"):
            return neighbour_of_mine.get_config(arg)
        """
    (tmp_path / "mine.py").write_text(textwrap.dedent(text))
    assert configs.load(str(tmp_path / "mine.py")).train.steps == 1000


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mine.py", "x = 1\n", "no function get_config"),
        ("mine.py", "def get_config(:\n    pass\n", "line 1"),
        ("mine.txt", "x = 1\n", "not a Python file"),
    ],
)
def test_files_that_are_no_configs(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        configs.load(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) <= 3


def test_a_missing_file_is_told_with_the_nearest_name(path):
    with pytest.raises(UserError, match=r"mine\.py") as caught:
        configs.load(path.replace("mine", "mime"))
    assert "mime.py" in str(caught.value)
    with pytest.raises(UserError, match="no file"):
        configs.load("nowhere/config.py")


@pytest.mark.parametrize("order", [1, -1])
def test_one_option_moves_both_seeds(path, order):
    """Whatever sets one of them by itself goes before it, in any order."""
    assert [dict(configs.load(path).train).get("seed"), configs.load(path).data.get("seed")] == [
        None
    ] * 2
    config = configs.load(path, ["seed=7"])
    assert (config.train.seed, config.data.seed) == (7, 7) and "seed" not in config
    config = configs.load(path, ["seed=7", "data.seed=1"][::order])
    assert (config.train.seed, config.data.seed) == (7, 1)
    with pytest.raises(UserError, match="seed: 'x' is not of type int"):
        configs.load(path, ["seed=x"])


def test_a_file_may_have_a_seed_of_its_own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(FILE.replace("    config.notes", "    config.seed = 3\n    config.notes"))
    config = configs.load(str(file), ["seed=7"])
    assert config.seed == 7 and "seed" not in config.train


def test_sections_that_only_fine_tuning_has(request, path):
    """They may be left out of its configs, and are none of others."""
    own = request.config.rootpath / "configs" / "finetune.py"
    config = configs.load(str(own), ["distil.kind=forward_kl"])
    assert config.distil.kind == "forward_kl"
    with pytest.raises(UserError, match="distil"):
        configs.load(str(path), ["distil.kind=forward_kl"])


def test_a_picture_at_home(monkeypatch):
    """Shells leave "~" as it is in --image=~/a.png; a picture as text stays as it is."""
    monkeypatch.setenv("HOME", "/somewhere")
    assert published._at_home("~/a.png") == "/somewhere/a.png"
    assert published._at_home("data:,~/a") == "data:,~/a"


@pytest.mark.parametrize("text", ["[-1, 0]", "(-1, 0)", "-1,0"])
def test_a_list_as_an_error_shows_it(text):
    """What an error shows, "such as (-1,)", can be typed."""
    config = configs.load("configs/distil_quarter.py", [f"distil.layers={text}"])
    assert list(config.distil.layers) == [-1, 0]
    config = configs.load("configs/distil_quarter.py", ["distil.layers=(-1,)"])
    assert list(config.distil.layers) == [-1]


def test_the_teacher_s_compressor_is_a_section():
    given = ["distil.compressor.name=divprune", "distil.compressor.budget=9"]
    config = configs.load("configs/distil_quarter.py", given)
    assert config.distil.compressor.to_dict() == dict(name="divprune", budget=9)
    with pytest.raises(UserError, match="did you mean --config.distil.compressor.budget"):
        configs.load("configs/distil_quarter.py", ["distil.compressor.bugdet=9"])
