"""What loading costs and where it puts things; files and folders that do not fit."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import efficient_vlm as evlm
from efficient_vlm.checkpoints import safetensors_write
from efficient_vlm.checkpoints.names import Leaf, Piece
from efficient_vlm.checkpoints.safetensors_read import Checkpoint
from efficient_vlm.cli import main as cli
from efficient_vlm.errors import UserError
from efficient_vlm.families import architecture, load
from efficient_vlm.families.table import family_of
from efficient_vlm.families.weights import FusedReader, Weights
from efficient_vlm.nn.fuse import unfuse
from efficient_vlm.nn.linear import Joined

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = dict(
    model_type="llama",
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=4,
    num_attention_heads=16,
    tie_word_embeddings=False,
)


def script(source, *arguments, **variables):
    """Standard output of a script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source), *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [3, 1 << 22], ids=["small", "mapped"])
def test_weights_are_read_to_where_jax_takes_them(count, dtype):
    room = load.aligned((2, count), np.dtype(dtype))
    room[:] = 1
    taken = jax.device_put(room)
    assert room.shape == taken.shape and room.dtype == taken.dtype
    assert taken.unsafe_buffer_pointer() == room.ctypes.data


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A Llama of 350 MB in float32 on the disk, and (bytes of all parameters, of the largest)."""
    folder = tmp_path_factory.mktemp("large")
    model = architecture.build_model(CONFIG)
    names = architecture.name_map(family_of(CONFIG), CONFIG, model)
    row = np.random.default_rng(0).standard_normal(8192 * 1024).astype(np.float32)
    tensors = [
        (name, shape, row.dtype, lambda shape=shape: row[: int(np.prod(shape))].reshape(shape))
        for name, shape in names.tensors().items()
    ]
    safetensors_write.write(folder, tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    sizes = [4 * int(np.prod(shape)) for shape in names.tensors().values()]
    return folder, sum(sizes), max(sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_holds_the_parameters_and_one_tensor(large, dtype):
    """Memory of the process, without pages of the mapped file, against 1.2 of the largest."""
    folder, total, largest = large
    peak = script(
        """
        import sys, threading, time
        import jax.numpy as jnp
        import efficient_vlm as evlm
        from efficient_vlm.inference import pretrained

        def held():
            lines = open("/proc/self/status").read().splitlines()
            return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))

        evlm.from_pretrained(sys.argv[3])  # Whatever libraries need once.
        start, most, done = held(), 0, False

        def watch():
            global most
            while not done:
                most = max(most, held())
                time.sleep(0.002)

        thread = threading.Thread(target=watch)
        thread.start()
        vlm = evlm.from_pretrained(sys.argv[1], dtype=sys.argv[2])
        done = True
        thread.join()
        print(most - start)
        """,
        folder,
        dtype,
        GOLDEN / "llama",
    )
    scale = 1 if dtype == "float32" else 0.5
    assert int(peak) <= scale * total + 1.2 * largest


def test_straight_to_a_sharding(tmp_path):
    """On four devices, from a published and from an imported directory."""
    assert script(
        """
        import sys
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        import efficient_vlm as evlm
        from efficient_vlm.families.imported import import_model
        from flax.traverse_util import flatten_dict

        mesh = Mesh(np.array(jax.devices()), ("x",))

        def sharding(path, shape):
            return NamedSharding(mesh, P("x") if shape and shape[0] % 4 == 0 else P())

        import_model(sys.argv[1], sys.argv[2])
        plain = flatten_dict(evlm.from_pretrained(sys.argv[1]).params, sep="/")
        for folder in sys.argv[1:]:
            found = flatten_dict(evlm.from_pretrained(folder, sharding=sharding).params, sep="/")
            assert set(found) == set(plain)
            for path, value in found.items():
                assert value.sharding == sharding(path, value.shape), path
                assert np.array_equal(value, plain[path]), path
        print(sum(len(v.addressable_shards[0].data) < len(v) for v in found.values() if v.ndim) > 9)
        """,
        GOLDEN / "llama",
        tmp_path / "imported",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    ).split() == ["True"]


def changed(tmp_path, change):
    """The golden Llama with other tensors: `change` gets and gives name -> array."""
    source = Checkpoint.open(GOLDEN / "llama")
    arrays = change({name: np.array(source.read(name)) for name in source.names})
    tensors = [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()]
    safetensors_write.write(tmp_path / "changed", tensors)
    (tmp_path / "changed" / "config.json").write_bytes(
        (GOLDEN / "llama" / "config.json").read_bytes()
    )
    return tmp_path / "changed"


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda a: {n: v.astype(np.int8) for n, v in a.items()}, {}, "int8, a quantised model"),
        (lambda a: a | {NORM: a[NORM] * 1e6}, dict(dtype="float16"), "beyond the range of float16"),
        (lambda a: a | {NORM: a[NORM] * 1e6}, dict(dtype="float16", check=False), "beyond .*16"),
        (lambda a: a | {NORM: a[NORM] * np.nan}, {}, "24 of 24 values are NaN or Inf"),
        (lambda a: a | {QUERY: a[QUERY] * np.inf}, {}, "values are NaN or Inf"),
        (lambda a: a | {"x\x1b[31m" + "y" * 3000: a[NORM]}, {}, "1 are unknown"),
        (lambda a: a | {f"{QUERY}.qweight": a[NORM]}, {}, "GPTQ or AWQ(?s:.*)dequantise"),
        (lambda a: a | {"q.lora_A.weight": a[NORM]}, {}, "unmerged adapter(?s:.*)merge"),
    ],
)
def test_tensors_that_cannot_be_taken(change, options, message, tmp_path):
    folder = changed(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        evlm.from_pretrained(folder, **options)
    assert len(str(caught.value).splitlines()) <= 3
    assert len(str(caught.value)) < 600
    assert "\x1b" not in str(caught.value)


def test_an_error_is_raised_again(tmp_path):
    """Whoever keeps the weights of a damaged file gets them neither at first nor later."""
    folder = changed(tmp_path, lambda a: a | {NORM: a[NORM] * np.nan})
    config = architecture.read_config(folder)
    checkpoint, model = Checkpoint.open(folder), architecture.build_model(config)
    source = load.FamilyCheckpoint(checkpoint, family_of(config), config, model)
    weights = Weights(reader=FusedReader(source, check=True))
    for form in ("fused", "split", "fused"):
        with pytest.raises(UserError, match="NaN or Inf"):
            getattr(weights, form)


def test_parts_of_several_dtypes_keep_them(tmp_path):
    """They are not joined, and are stored again as they were."""
    folder = changed(tmp_path, lambda a: a | {QUERY: a[QUERY].astype(np.float16)})
    vlm = evlm.from_pretrained(folder, param_dtype="stored")
    layers = vlm.fused["language"]["layers"]
    assert isinstance(layers["0"]["attention"]["query"]["kernel"], Joined)
    assert layers["1"]["attention"]["query"]["kernel"].dtype == np.float16
    vlm.save(tmp_path / "out")
    before, after = Checkpoint.open(folder), Checkpoint.open(tmp_path / "out")
    for name in before.names:
        assert before.dtype(name) == after.dtype(name)
        np.testing.assert_array_equal(before.read(name), after.read(name))


def test_either_form_of_weights_first():
    """Split and joined are the same values, whichever is asked for first."""
    one, other = (evlm.from_pretrained(GOLDEN / "llava", check=False) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one.params, unfuse(other.fused))
    jax.tree.map(np.testing.assert_array_equal, one.fused, other.fused)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_columns_of_a_wider_matrix():
    """A parameter of one tensor, and one of several, written beside another."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((70, 5)).astype(np.float32) for name in "ab"}
    pieces = [Piece(name, (70, 5), turn=(1, 0)) for name in "ab"]
    wide = np.zeros((5, 100), np.float32)
    Leaf((pieces[0],)).read(tensors.get, wide[:, 20:90])
    expected = np.pad(tensors["a"].T, ((0, 0), (20, 10)))
    np.testing.assert_array_equal(wide, expected)
    wide = np.zeros((10, 100), np.float32)
    Leaf(tuple(pieces)).read(tensors.get, wide[:, 20:90])
    both = np.concatenate([tensors["a"].T, tensors["b"].T])
    np.testing.assert_array_equal(wide, np.pad(both, ((0, 0), (20, 10))))


def test_one_tensor_in_both_spellings(tmp_path):
    source = Checkpoint.open(GOLDEN / "llava")
    arrays = {name: np.array(source.read(name)) for name in source.names}
    arrays["model.language_model.norm.weight"] = arrays["language_model.model.norm.weight"] + 1
    tensors = [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()]
    config = architecture.read_config(GOLDEN / "llava")
    safetensors_write.write(tmp_path, tensors)
    with pytest.raises(UserError, match="are one tensor, twice"):
        load.FamilyCheckpoint(
            Checkpoint.open(tmp_path), family_of(config), config, architecture.build_model(config)
        )


def test_digests_are_compared(tmp_path):
    import hashlib

    data = (GOLDEN / "llama" / "model.safetensors").read_bytes()
    digest = {"model.safetensors": hashlib.sha256(data).hexdigest()}
    evlm.from_pretrained(GOLDEN / "llama", sha256=digest)
    other = {"model.safetensors": "0" * 64}
    with pytest.raises(UserError, match="SHA-256"):
        evlm.from_pretrained(GOLDEN / "llama", sha256=other)


@pytest.mark.parametrize("options", [dict(compresor=dict(name="fastv")), dict(max_pixels=3)])
def test_options_that_do_not_exist(options):
    with pytest.raises(UserError, match=f"{next(iter(options))!r}"):
        evlm.from_pretrained(GOLDEN / "llama", **options)


@pytest.mark.parametrize("verb", ["import", "export"])
def test_folders_that_cannot_be_written(verb, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    words = ["efficient-vlm", verb, str(GOLDEN / "llama"), str(tmp_path / "file" / "x")]
    monkeypatch.setattr("sys.argv", words)
    assert cli.main() == 2
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert said.count("\n") <= 3


def test_a_run_is_no_imported_model(tmp_path, capsys, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    words = ["efficient-vlm", "export", str(tmp_path), str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", words)
    assert cli.main() == 2
    assert "a run of efficient-vlm train" in capsys.readouterr().err


def test_another_import_leaves_nothing_of_the_first(tmp_path):
    """A folder that a killed import has left, used for another model."""
    from efficient_vlm.families.imported import STAGE, import_model

    out = tmp_path / "out"
    (out / STAGE).mkdir(parents=True)
    (out / STAGE / "journal.jsonl").write_text('{"identity": "another"}\n')
    (out / STAGE / "language.embedding").write_bytes(b"of another model")
    (out / "tokenizer.json").write_text("{}")
    (out / "carried").mkdir()
    import_model(GOLDEN / "llama", out)
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "config.json", "dtypes.json"]
    whole, again = (evlm.from_pretrained(path).params for path in (GOLDEN / "llama", out))
    assert all(
        np.array_equal(value, flatten_dict(again, sep="/")[path])
        for path, value in flatten_dict(whole, sep="/").items()
    )
    # Killed behind the commit: what is left is swept away, and the import stands.
    (out / STAGE).mkdir()
    with pytest.raises(UserError, match="an imported model"):
        import_model(GOLDEN / "llama", out)
    assert not (out / STAGE).exists()


def test_a_parameter_that_was_lost_is_converted_again(tmp_path):
    """The journal says it is done, the disk says otherwise; and a journal that is damaged."""
    from efficient_vlm.checkpoints.staging import StagingArea

    def fill(stage):
        array = stage.array("a/b", (2, 3), np.dtype(np.float32))
        was = [stage.is_done(part) for part in ("a/0/b", "a/1/b")]
        for layer, part in enumerate(("a/0/b", "a/1/b")):
            array[layer] = layer + 1
            stage.done(part, "a/b", array)
        stage._journal.close()
        return was

    assert fill(StagingArea(tmp_path, "one")) == [False, False]
    assert fill(StagingArea(tmp_path, "one")) == [True, True]
    (tmp_path / "a.b").write_bytes(b"short")
    assert fill(StagingArea(tmp_path, "one")) == [False, False]
    with (tmp_path / "journal.jsonl").open("r+b") as file:
        file.seek(-30, 2)
        file.write(b"\0" * 30)
    assert fill(StagingArea(tmp_path, "one"))[0]
    assert fill(StagingArea(tmp_path, "two")) == [False, False]


def test_an_imported_model_says_what_float16_cannot_hold(tmp_path):
    from efficient_vlm.families.imported import import_model

    folder = changed(tmp_path, lambda a: a | {NORM: a[NORM] * 1e6})
    import_model(folder, tmp_path / "out")
    with pytest.raises(UserError, match="beyond the range of float16"):
        evlm.from_pretrained(tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("name", ["mixtral", "smolvlm"])
def test_the_config_leaves_as_it_came(name, tmp_path):
    """Defaults that were filled in are ours: the reference may read one name for another."""
    evlm.from_pretrained(GOLDEN / name, param_dtype="stored").save(tmp_path / "out")
    folders = (GOLDEN / name, tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in folders)
    assert {**before, "dtype": "float32"} == {**after, "dtype": "float32"}


def test_llava_as_transformers_saves_it(tmp_path):
    """Its version 5 leaves a level out of the names of a tower that it made itself."""
    golden = GOLDEN / "llava"
    checkpoint = Checkpoint.open(golden)
    level = "vision_tower.vision_model."
    arrays = {
        name.replace(level, "vision_tower."): checkpoint.read(name) for name in checkpoint.names
    }
    assert set(arrays) != set(checkpoint.names)
    tensors = [(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()]
    safetensors_write.write(tmp_path, tensors)
    (tmp_path / "config.json").write_bytes((golden / "config.json").read_bytes())
    found = flatten_dict(evlm.from_pretrained(tmp_path).params)
    for path, value in flatten_dict(evlm.from_pretrained(golden).params).items():
        np.testing.assert_array_equal(found[path], value)
