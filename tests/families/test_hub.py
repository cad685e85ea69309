"""Names on a hub, against a hub of our own on loopback and a cache as the library lays it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_hub import SmallHub, commit_of, lay_out, use

from efficient_vlm.checkpoints.safetensors_index import INDEX, SINGLE
from efficient_vlm.errors import UserError
from efficient_vlm.families import hub

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SETTINGS = {
    "config.json": b"{}",
    "tokenizer.json": b"{ }",
    "chat_template.jinja": b"{{ x }}",
    "merges.txt": b"a b",
    "README.md": b"---\nlicense: mit\n---\n",
    "LICENSE": b"words",
}
OTHERS = {
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"import os",
    "consolidated.safetensors": b"twice",
    "tf_model.h5": b"h5",
    "training.log": b"log",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{'onnx'}",
    "1_Pooling/model.safetensors": b"below",
}
WHOLE = {**SETTINGS, **OTHERS, SINGLE: b"weights"}


def index_of(*names: str) -> bytes:
    return json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}).encode()


@pytest.fixture
def server():
    server = SmallHub()
    yield server
    server.close()


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return use(monkeypatch, tmp_path / "home", server.url)


def refused(name, **options) -> str:
    with pytest.raises(UserError) as caught:
        hub.find(name, **options)
    said = str(caught.value)
    assert len(said.splitlines()) <= 3 and "fix:" in said and "Traceback" not in said
    return said


# ---- what is downloaded --------------------------------------------------------------------------


def test_only_what_is_read_is_fetched(server, cache, capfd):
    commit = server.add("org/name", WHOLE)
    source = hub.find("org/name")
    assert source == hub.Source(
        cache / "models--org--name" / "snapshots" / commit, "org/name", None, commit
    )
    assert sorted(server.fetched) == sorted([*SETTINGS, SINGLE])
    held = {path.name: path.read_bytes() for path in source.directory.iterdir()}
    assert held == {**SETTINGS, SINGLE: b"weights"}
    # The second time nothing is fetched, and the folder alone says where it is from.
    assert hub.resolve("org/name") == source.directory and len(server.fetched) == len(held)
    assert hub.find(source.directory) == source
    assert capfd.readouterr() == ("", "")  # Bars are for terminals.


def test_a_new_commit_is_fetched(server, cache):
    server.add("org/name", WHOLE)
    before = hub.find("org/name")
    commit = server.add("org/name", {**WHOLE, SINGLE: b"better"})
    after = hub.find("org/name")
    assert after.commit == commit != before.commit
    assert [(s.directory / SINGLE).read_bytes() for s in (before, after)] == [b"weights", b"better"]


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        ({INDEX: index_of(*SHARDS), **dict.fromkeys(SHARDS, b"w")}, SHARDS),
        # Two checkpoints: the shards of the index; an index that is left over: the file.
        ({INDEX: index_of(*SHARDS), **dict.fromkeys(SHARDS, b"w"), SINGLE: b"w"}, SHARDS),
        ({INDEX: index_of(*SHARDS), SINGLE: b"w"}, [SINGLE]),
        ({INDEX: index_of(SINGLE), SINGLE: b"w"}, [SINGLE]),
        ({INDEX: index_of("a.safetensors"), "a.safetensors": b"w"}, ["a.safetensors"]),
    ],
)
def test_weights_are_those_of_the_index(files, weights, server, cache):
    server.add("org/name", {"config.json": b"{}", **files, "b.safetensors": b"more"})
    directory = hub.resolve("org/name")
    assert sorted(path.name for path in directory.glob("*.safetensors")) == sorted(weights)


def test_revisions(server, cache):
    old = server.add("org/name", WHOLE, "v1.0")
    new = server.add("org/name", {**WHOLE, SINGLE: b"better"})
    for revision, commit in ((None, new), ("", new), ("main", new), ("v1.0", old), (old, old)):
        source = hub.find("org/name", revision)
        assert (source.commit, source.revision) == (commit, revision or None)
    said = refused("org/name", revision="v2")
    assert "no revision 'v2'" in said and f"{server.url}/org/name/tree/main" in said
    assert "revision: 3" in str(pytest.raises(UserError, hub.find, "org/name", 3).value)


def test_a_token_opens_what_is_gated(server, cache, monkeypatch):
    server.add("org/name", WHOLE)
    server.gated.add("org/name")
    said = refused("org/name")
    assert "org/name: gated" in said and "hf auth login" in said and server.url in said
    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    server.refused.add("org/name")
    assert "ask for access" in refused("org/name")
    server.refused.clear()
    assert (hub.resolve("org/name") / SINGLE).read_bytes() == b"weights"


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "only 'pytorch_model.bin'"),
        ({"config.json": b"{}", "name.gguf": b"x"}, "only 'name.gguf'"),
        ({"config.json": b"{}", "consolidated.safetensors": b""}, "only 'consolidated.safeten"),
        ({"README.md": b""}, "no weights"),
        ({INDEX: index_of(*SHARDS), SHARDS[0]: b""}, f"names {SHARDS[1]}, which is not there"),
        ({"README.md": b"", SINGLE: b"w"}, "config.json is neither on the hub nor in"),
        ({INDEX: b"[]"}, "index"),
        (
            {"adapter_config.json": b'{"base_model_name_or_path": "org/base"}'},
            "a LoRA adapter of 'org/base'",
        ),
    ],
)
def test_models_without_safetensors(files, words, server, cache, capfd):
    server.add("org/name", files)
    with pytest.raises(UserError) as caught:
        hub.find("org/name")
    assert words in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert not any(path.endswith((".bin", ".gguf")) for path in server.fetched)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("token", [False, True])
def test_a_name_that_leads_nowhere_may_be_a_path(token, server, cache, tmp_path, monkeypatch):
    if token:
        monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    said = refused("rnus/quckstart")
    assert f"neither a folder here nor a model on {server.url}" in said
    assert "check the spelling" in said and "hf auth login" in said
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    for typo in ("runs/quckstart", "rnus/quickstart"):
        assert "did you mean runs/quickstart?" in refused(typo)


def test_answers_that_are_errors(server, cache, monkeypatch):
    server.broken.add("org/name")
    assert "status 500" in refused("org/name") and "run it again" in refused("org/name")
    for name in ("org/na--me", "org/a..b", "org/name.git"):
        assert "no name on a hub" in refused(name)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    said = refused("org/other")
    assert "status 401" in said and "Invalid credentials" in said and "log in" in said


def test_no_network(monkeypatch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.chdir(tmp_path)
    cache = use(monkeypatch, tmp_path / "home", url)
    said = refused("org/name")
    assert f"no answer from {url}" in said and "refused" in said and "check the network" in said
    snapshot = lay_out(cache, "org/name", {"config.json": b"{}", SINGLE: b"weights"})
    assert hub.resolve("org/name") == snapshot  # The cache serves.


def test_a_full_disk(server, cache, monkeypatch):
    server.add("org/name", WHOLE)
    cache.parent.mkdir()
    cache.write_text("a file where the cache should be")
    said = refused("org/name")
    assert "org/name: " in said and "HF_HOME" in said


# ---- without a network ---------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return use(monkeypatch, tmp_path / "home", "http://127.0.0.1:9", offline=True)


def test_a_cache_that_others_filled(offline):
    files = {"config.json": b"{}", SINGLE: b"weights"}
    snapshot = lay_out(offline, "org/name", files)
    assert hub.find("org/name") == hub.Source(snapshot, "org/name", None, commit_of(files))
    assert hub.find("org/name", commit_of(files)).directory == snapshot
    shards = {"config.json": b"{}", INDEX: index_of(*SHARDS), **dict.fromkeys(SHARDS, b"w")}
    snapshot = lay_out(offline, "org/sharded", shards, revision="v1")
    assert hub.resolve("org/sharded", "v1") == snapshot
    (snapshot / SHARDS[1]).unlink()
    said = refused("org/sharded", revision="v1")
    assert f"org/sharded: {SHARDS[1]} is neither" in said and "HF_HUB_OFFLINE" in said


def test_settings_that_others_did_not_fetch_are_not_missed(server, cache, monkeypatch, tmp_path):
    """transformers takes no README; what a commit holds is known from the listing."""
    server.add("org/name", WHOLE)
    source = hub.find("org/name")
    (source.directory / "README.md").unlink()
    use(monkeypatch, tmp_path / "home", server.url, offline=True)
    assert hub.find("org/name") == source
    (source.directory / SINGLE).unlink()
    assert "not (all of it) in the cache" in refused("org/name")


def test_nothing_in_the_cache(offline, tmp_path):
    said = refused("org/name")
    assert f"not (all of it) in the cache {offline}" in said and "HF_HUB_OFFLINE" in said
    lay_out(offline, "org/name", {"config.json": b"{}", SINGLE: b"weights"})
    assert "org/name at revision 'v9'" in refused("org/name", revision="v9")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    assert "did you mean runs/quickstart?" in refused("runs/quckstart")


def test_the_environment_is_the_librarys(server, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, in processes of their own."""
    server.add("org/name", WHOLE)
    code = "from efficient_vlm.families.hub import resolve; print(resolve('org/name'))"
    # Other tests of this process may have switched the network off for theirs.
    settings = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings |= dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / "home"))
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=settings | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).parts[-4:-1] == ("hub", "models--org--name", "snapshots")
        server.models.clear()


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *(
            "name",
            "./org/name",
            "/org/name",
            "~/org/name",
            "../org/name",
            "org/sub/name",
            ".org/name",
        ),
        *("org/model.safetensors", f"org/{INDEX}", "org/", "/name", "org/na me", "org/nämé", ""),
        *("a" * 60 + "/" + "b" * 60, "https://host/org/name", "org\\name", "-o/name"),
    ],
)
def test_what_looks_like_a_path_is_one(path, offline):
    assert not hub.is_name(path)
    assert hub.find(path).directory == Path(os.path.expanduser(path))


def test_a_folder_comes_before_a_name(offline, tmp_path):
    assert hub.is_name("org/name") and not hub.is_name(Path("org/name"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert hub.find("org/name") == hub.Source(Path("org/name"))
    said = str(pytest.raises(UserError, hub.find, "org/name", "v1").value)
    assert "on the disk, which comes before a hub" in said
    said = str(pytest.raises(UserError, hub.find, "./org", "v1").value)
    assert "revision: 'v1'" in said


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"name": 1}', '{"name": "a/b", "commit": []}', "\xff"]
)
def test_damaged_records_say_nothing(text, tmp_path):
    (tmp_path / hub.RECORD).write_text(text)
    assert hub.of_folder(tmp_path) == hub.Source(tmp_path)
