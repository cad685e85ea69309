"""`efficient-vlm audit aot` around its compiler: several methods beside each other, lines of
progress, and the commands of docs/plans.md. What compiles is tested in tests/costs/compiled."""

import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from efficient_vlm.cli import audit_aot, audit_kernels_gpu
from efficient_vlm.cli import main as cli
from efficient_vlm.cli import methods as chosen
from efficient_vlm.costs import ledger
from efficient_vlm.costs.compiled import chips, compiled, programs

DOCS = Path(__file__).parents[2] / "docs"
# Seconds of each program; the decoder's are in proportion to its tokens.
ENCODE, COMPRESS = 0.1, 0.001
AOT = ("audit", "aot", "--preset=smolvlm-256m", "--topology=v5e-4", "--batch=4")


@pytest.fixture
def compilers(monkeypatch):
    """[(work, topology, sizes)] of the plans that would have been compiled."""
    asked = []

    def compile_plan(work, topology, sizes, say):
        asked.append((work, topology, sizes))
        tokens = ledger.build(work.model, text_tokens=work.text, images=work.images).entering
        times = {"encode": ENCODE, "compress": COMPRESS}
        stages = []
        for name in programs.PROGRAMS[work.task]:
            say(name)
            memory = compiled.Memory(10, 10, 10, 10, 100 if tokens < 5000 else 10)
            fits = memory.total <= memory.limit
            seconds = {"flops": times.get(name, tokens / 1e4), "hbm": 0.0} if fits else None
            facts = (1.0, 1.0, {}, {}, 0) if fits else (None,) * 5
            stages.append(compiled.CompiledStage(name, fits, memory, *facts, seconds, 0.1))
        chip = chips.CHIPS["v5e"]
        return compiled.Answer(topology, dict(sizes), 4, chip, stages)

    monkeypatch.setattr(audit_aot, "compile_plan", compile_plan)
    monkeypatch.setattr(audit_aot, "devices_of", lambda topology: range(devices_in(topology)))
    monkeypatch.setattr(chosen, "dry_run", lambda *args: None)  # Seconds.
    return asked


def devices_in(topology):
    shape = re.findall(r"\d+", topology.partition(":")[2])
    count = 1
    for side in shape:
        count *= int(side)
    return count


def test_methods_beside_each_other(command, compilers):
    words = ("--task=prefill", "--compressor=none,divprune,fastv", "--match=mean_processed:208")
    code, out, err = command(*AOT, *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = {row["compressor"]["name"]: row for row in found["methods"]}
    assert list(rows) == ["none", "divprune", "fastv"]
    assert found["preset"] == "smolvlm-256m" and found["batch"] == 4
    assert rows["divprune"]["compressor"]["budget"] == 16
    assert [row["visual_tokens"] for row in rows.values()] == [832, 208, 832]
    total = {name: ENCODE + COMPRESS + row["visual_tokens"] / 1e4 for name, row in rows.items()}
    for name, row in rows.items():
        assert row["estimated_seconds"] == pytest.approx(total[name])
        assert row["of_none"] == pytest.approx(total[name] / total["none"])
        # As docs/plans.py counts them: chips for as many first tokens a second.
        assert row["chips"] == pytest.approx(4 * total[name] / total["none"])
        assert sum(row["chips_of_stages"].values()) == pytest.approx(row["chips"])
    assert rows["divprune"]["chips_of_stages"]["encode"] == pytest.approx(4 * 0.1 / total["none"])
    assert [work.model.compressor["name"] for work, *_ in compilers] == list(rows)


def test_none_is_what_others_are_compared_with(command, compilers):
    words = ("--task=decode", "--compressor=stride,pool", "--compressor.budget=16")
    code, out, err = command(*AOT, *words)
    assert code == 0, err
    assert [work.model.compressor["name"] for work, *_ in compilers] == ["none", "stride", "pool"]
    lines = out.splitlines()
    assert "smolvlm-256m, decode, 3 methods, batch 4 on v5e:2x2 (4 devices), data:4" in lines[0]
    for text in ("of none", "a token", "chips", "83.2 ms", "20.8 ms", "0.25"):
        assert text in out, out
    assert any(re.search(r"pool\(budget=16\)\s+1\s*$", line) for line in lines)  # 4 x 0.25 chips.


def test_what_does_not_fit_is_said(command, compilers):
    words = ("--task=prefill", "--compressor=none,pool", "--compressor.budget=16", "--images=200")
    code, out, err = command(*AOT, *words)
    assert code == 0 and out.count("does not fit") == 1, out + err
    code, out, err = command(*AOT, *words, "--json")
    none, pool = json.loads(out)["methods"]
    assert not none["fits"] and pool["fits"] and pool["chips"] is None and pool["of_none"] is None


def test_one_method_is_shown_in_full(command, compilers):
    code, out, err = command(*AOT, "--task=prefill", "--json")
    found = json.loads(out)
    assert code == 0 and found["compressor"] == {"name": "none"} and "methods" not in found
    assert [stage["name"] for stage in found["stages"]] == ["encode", "compress", "prefill"]
    code, out, _ = command(*AOT, "--task=prefill")
    assert "bound by" in out and "smolvlm-256m, prefill, none, batch 4 on v5e:2x2" in out


def test_progress_is_said_on_stderr(command, compilers):
    words = (*AOT, "--task=prefill", "--compressor=none,stride", "--compressor.budget=16", "--json")
    code, out, err = command(*words)
    assert code == 0 and json.loads(out)["methods"]
    said = [re.sub(r"^\[\d+:\d\d\] ", "", line) for line in err.splitlines()]
    assert said == [
        "compiling 1 of 6: none, encode for v5e:2x2",
        "compiling 2 of 6: none, compress for v5e:2x2",
        "compiling 3 of 6: none, prefill for v5e:2x2",
        "compiling 4 of 6: stride, encode for v5e:2x2",
        "compiling 5 of 6: stride, compress for v5e:2x2",
        "compiling 6 of 6: stride, prefill for v5e:2x2",
        "compiled 6 programs",
    ]
    code, out, err = command(*words, "--quiet")
    assert code == 0 and json.loads(out) and err == ""


def test_progress_of_a_search(command, compilers):
    words = (*AOT[:-1], "--task=decode", "--search", "--batch=4,8", "--compressor=stride")
    code, out, err = command(*words)
    assert code == 0, err
    first, *_, last = err.splitlines()
    # All tokens, a quarter and a ninth; one mesh for nine heads; two batches.
    assert "compiling 1 of at most 6: stride, data:4, batch 4 for v5e:2x2" in first
    assert last.endswith("compiled 6 programs") and len(err.splitlines()) == 7
    assert out.count("best of stride") == 3
    code, out, err = command(*words, "--json", "--quiet")
    assert code == 0 and len(json.loads(out)["tried"]) == 6 and not err


def test_the_output_of_a_process_is_followed():
    """`audit kernels --topology=h100` counts the programs while its process prints."""
    told = []
    code = "import sys\nfor i in range(3): print(f'@@ program {i}'); print('Used 5 registers')"
    words = [sys.executable, "-c", f"{code}\nprint('last', file=sys.stderr)\nsys.exit(3)"]
    found = audit_kernels_gpu.run_and_tell(words, os.environ, lambda: told.append(1))
    assert found[0] == 3 and found[2] == "last\n" and len(told) == 3
    assert found[1].count("Used 5 registers") == 3


# ---- docs/plans.md -------------------------------------------------------------------------------


def rows_of_the_page():
    """(model, task, row of docs/plans.json) with the command of each row of docs/plans.md."""
    stored = json.loads((DOCS / "plans.json").read_text())
    known = {(r["model"], r["machine"], r["task"], r["share"]): r for r in stored}
    found, model, task = [], None, None
    for line in (DOCS / "plans.md").read_text().splitlines():
        if line.startswith("## "):
            model, task = line.removeprefix("## "), "prefill"
        elif line.startswith("Training"):
            task = "train"
        elif line.startswith("LoRA"):
            task = "lora"
        elif line.startswith("| ") and "machine" not in line:
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            tokens = int(cells[3].replace(",", ""))
            row = next(
                r
                for key, r in known.items()
                if key[:3] == (model, cells[0], task) and r["tokens"] == tokens
            )
            found.append((cells[-1].strip().strip("`"), row))
    return found


def test_every_row_of_the_page_has_the_command_that_makes_it(compilers, capsys):
    """What the command would compile is what was compiled, for each model, task and share."""
    rows = rows_of_the_page()
    stored = json.loads((DOCS / "plans.json").read_text())
    plans = {(r["model"], r["machine"], r["task"], r["share"]): r for r in stored}
    # At three shares: training and inference (two programs) of five models on six machines and of
    # one on two, and its inference on one more; LoRA of one on one.
    assert len(rows) == 3 * (2 * (5 * 6 + 2) + 1 + 1)
    seen = set()
    for line, row in rows:
        program, *words = shlex.split(line)
        assert program == "efficient-vlm"
        parsed = dict(word.removeprefix("--").split("=", 1) for word in words[2:])
        task = "train" if row["task"] == "lora" else row["task"]
        assert (parsed["preset"], parsed["task"]) == (row["model"], task)
        assert parsed.get("adapt") == ("lora" if row["task"] == "lora" else None)
        assert parsed["mesh"] == row["mesh_text"] and int(parsed["batch"]) == row["batch"]
        if row["task"] == "prefill":  # "with --task=decode it is that of a further one"
            other = plans[row["model"], row["machine"], "decode", row["share"]]
            assert all(other[name] == row[name] for name in ("mesh_text", "batch", "tokens"))
        if (row["model"], row["share"]) in seen or chips.chip_of(row["topology"]).gpu:
            continue  # The rest takes as long, and is the same.
        seen.add((row["model"], row["share"]))
        assert cli.run([*words, "--quiet", "--json"]) == 0
        capsys.readouterr()
        work, topology, sizes = compilers[-1]
        assert work.task == task and work.batch == row["batch"] and work.new == 64
        assert topology == row["topology"] and sizes == row["mesh"]
        entering = ledger.build(work.model, text_tokens=work.text, images=work.images).entering
        assert entering == row["tokens"]
    assert len(seen) == 15


@pytest.fixture
def plans(monkeypatch):
    """docs/plans.py as a module, whose compiler looks rows up in docs/plans.json."""
    spec = importlib.util.spec_from_file_location("plans", DOCS / "plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    stored = {module.key(row): row for row in json.loads((DOCS / "plans.json").read_text())}
    monkeypatch.setattr(module, "compiled", lambda *one: stored[one])

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["plans.py", *map(str, words)])
        module.main()

    return run


def test_a_part_of_the_page_in_a_new_folder(plans, tmp_path, capsys):
    out = tmp_path / "not" / "there"
    plans("--only=smolvlm-256m/v5e-16/decode", "--out", out)
    lines = [line for line in (out / "plans.md").read_text().splitlines() if "`efficient" in line]
    assert len(lines) == 3 and all("--task=decode" in line for line in lines)
    per_token = [float(line.split("|")[9]) for line in lines]
    assert per_token == sorted(per_token, reverse=True) and per_token[-1] > 0
    assert f"3 compiled, 0 were there. Written: {out / 'plans.md'}" in capsys.readouterr().out
    # With the other tasks the lines are those of the whole page.
    plans("--only=smolvlm-256m/v5e-16/", "--out", out)
    lines = [line for line in (out / "plans.md").read_text().splitlines() if "`efficient" in line]
    assert len(lines) == 9 and set(lines) <= set((DOCS / "plans.md").read_text().splitlines())
    assert "9 compiled, 3 were there" in capsys.readouterr().out


def test_no_such_plan(plans, tmp_path, capsys):
    with pytest.raises(SystemExit):
        plans("--only=smolvlm-257m", "--out", tmp_path / "new")
    assert "no such plan" in capsys.readouterr().err and not (tmp_path / "new").exists()
