"""A method of one's own on the command line: trained, evaluated, drawn and audited, without a row
in the package's table."""

import json

import ml_collections
import pytest
from PIL import Image

from efficient_vlm import fit
from efficient_vlm.cli import run
from efficient_vlm.compressors.methods import METHODS
from efficient_vlm.errors import UserError
from efficient_vlm.fields import to_dict

METHOD = """
import jax.numpy as jnp

from efficient_vlm import compressors
from efficient_vlm.compressors import fold, select


@compressors.register
class Corner(compressors.Compressor):
    '''`corner`: the tokens nearest to one corner of the image.

    Attributes:
      right: whether it is the right one.
    '''

    right: bool = False
    label = "corner"

    def __call__(self, tokens, signals=None, *, rng=None):
        if self.budget == tokens.mask.shape[1]:
            return tokens
        row, column = tokens.position[..., 0], tokens.position[..., 1]
        scores = column - row if self.right else -column - row
        return fold.drop(tokens, select.top_k(scores, tokens.mask, self.budget))
"""


@pytest.fixture
def method_file(tmp_path):
    path = tmp_path / "my_method.py"
    path.write_text(METHOD)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.effect_mandelbrot((48, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(path)
    return path


def test_the_life_of_a_run(command, new_process, method_file, photo, tiny_config, tmp_path):
    own = dict(name="corner", budget=4, right=True)
    tiny_config.train.update(steps=2, elastic=[dict(name="none", budget=16), own])
    tiny_config.eval.update(images=4, methods=[dict(name="corner", budgets=[4], right=True)])
    config = tmp_path / "tiny.py"
    config.write_text(f"def get_config():\n    return {tiny_config.to_dict()!r}\n")
    workdir = tmp_path / "run"
    words = ("train", f"--config={config}", f"--workdir={workdir}")
    code, _, err = command(*words)
    assert code == 2 and "'corner'" in err and "--import=FILE.py" in err and not workdir.exists()

    code, _, err = command(*words, f"--import={method_file}")
    assert code == 0, err
    results = json.loads((workdir / "results.json").read_text())
    assert {(row["compressor"], row["budget"]) for row in results["cost"]} == {("corner", 4)}
    assert json.loads((workdir / "config.json").read_text())["imports"] == [str(method_file)]

    new_process()
    run = f"--workdir={workdir}"
    code, out, err = command("eval", run, "--images=4", "--json")  # The config's methods,
    assert code == 0, err
    assert {row["compressor"] for row in json.loads(out)["eval"]} == {"corner"}
    new_process()
    picked = ("--compressor=corner", "--compressor.right=true", "--compressor.budget=4")
    code, _, err = command("eval", run, "--images=4", *picked)  # or named,
    assert code == 0, err
    new_process()
    drawn = ("compress", photo, run, f"--out={tmp_path / 'map.png'}", "--json")
    code, out, err = command(*drawn, *picked)
    assert code == 0, err
    # The right half of the upper row, and what is as near to that corner.
    kept = [patch for patch, token in enumerate(json.loads(out)["maps"][0]["source"]) if token >= 0]
    assert set(kept) <= {1, 2, 3, 7, 11} and 3 in kept and len(kept) == 4
    assert command("report", run)[0] == 0

    moved = method_file.rename(tmp_path / "moved.py")
    new_process()
    code, _, err = command("eval", run, "--images=4")
    assert code == 2 and len(err.splitlines()) <= 3 and "--import=PATH/my_method.py" in err
    code, _, err = command("eval", run, "--images=4", f"--import={moved}")
    assert code == 0, err


def test_audits_compress_and_methods_take_it(command, new_process, method_file, photo, tmp_path):
    given = f"--import={method_file}"
    words = ("--preset=llava-1.5-7b", "--compressor=corner", "--compressor.budget=64", given)
    code, out, err = command("audit", *words, "--json")
    assert code == 0, err
    assert json.loads(out)["visual_tokens"]["entering"] == 64
    new_process()
    code, out, err = command("audit", "sharding", *words, "--mesh=fsdp:2")
    assert code == 0 and "fsdp 2" in out, err
    new_process()
    code, out, err = command("methods", "corner", given, "--json")
    found = json.loads(out)
    assert code == 0 and found["summary"] == "the tokens nearest to one corner of the image"
    assert found["options"][-1]["meaning"] == "whether it is the right one."
    assert found["trained"] is False
    new_process()
    for name in set(METHODS) - {"none", "stride"}:  # "all" would take a while.
        del METHODS[name]
    out_file = tmp_path / "map.png"
    words = ("compress", photo, "--compressor=all", f"--out={out_file}", "--grid=4", "--json")
    code, out, err = command(*words, given)
    assert code == 0, err
    assert {row["compressor"] for row in json.loads(out)["maps"]} == {"none", "stride", "corner"}
    new_process()
    code, _, err = command("audit", "--preset=llava-1.5-7b", "--compressor=corner")
    assert code == 2 and "--import=FILE.py" in err


def test_a_config_that_names_it(new_process, method_file, tiny_config, tmp_path):
    """`imports` of a config is what --import adds to."""
    tiny_config.train.elastic = [dict(name="corner", budget=4, wrong=True)]
    tiny_config.imports = [str(method_file)]
    with pytest.raises(UserError, match="compressor corner: unknown name 'wrong'"):
        fit(tiny_config, tmp_path / "run", say=lambda line: None)
    assert "corner" in METHODS
    tiny_config.imports = ["nowhere.py"]
    with pytest.raises(UserError, match="nowhere.py: there is no such file"):
        fit(tiny_config, tmp_path / "run", say=lambda line: None)


@pytest.mark.parametrize("given", [None, "/a.py", ["/a.py"], ("/a.py", "/b.py")])
def test_what_a_run_records(given):
    config = ml_collections.ConfigDict({} if given is None else {"imports": given})
    run._record(config.lock(), ["/b.py"])
    assert to_dict(config)["imports"] == (["/b.py"] if given is None else ["/a.py", "/b.py"])
