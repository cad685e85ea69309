"""Launch scripts: what a dry run prints, and what runs, with stand-ins for the tools of clouds."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "experiments"
XPK = dict(CLUSTER="c", ZONE="z", PROJECT="p", IMAGE="registry/image")


def run(script, *words, path=None, **settings):
    environment = {"HOME": os.environ["HOME"], "PATH": os.environ["PATH"], **settings}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def commands(done):
    """Commands as they were printed, back in words."""
    assert done.returncode == 0, done.stderr
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


def stand_in(folder, name, body=""):
    """A tool that writes down how it was called."""
    folder.mkdir(exist_ok=True)
    tool = folder / name
    log = folder / "calls"
    tool.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> {log}\n{body}\n')
    tool.chmod(0o755)
    return log


@pytest.mark.parametrize("script", ["tpu_vm.sh", "slurm.sh", "xpk.sh"])
def test_they_are_bash(script):
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)]).returncode == 0


def test_a_dry_run_of_a_pod(tmp_path):
    """From nothing to a run on every worker, and again behind a preemption; nothing is called."""
    log = stand_in(tmp_path / "bin", "gcloud")
    words = ("--dry-run", "watch", "--", "--config=a.py", "--workdir=/mnt/runs/my run")
    settings = dict(ZONE="zone-b", TYPE="v5litepod-64", NFS="10.0.0.9:/runs")
    printed = commands(run("tpu_vm.sh", *words, path=tmp_path / "bin", **settings))
    assert not log.exists()
    verbs = [c[4] for c in printed if c[:4] == ["gcloud", "compute", "tpus", "tpu-vm"]]
    once = ["create", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert verbs == [*once, "describe", "delete", *once]
    assert all("--zone=zone-b" in c for c in printed if c[0] == "gcloud")
    create = printed[0]
    assert "--accelerator-type=v5litepod-64" in create and "--spot" in create
    (start,) = {c[-1] for c in printed if "efficient-vlm train" in c[-1]}
    assert "train --distributed --config=a.py --workdir=/mnt/runs/my\\ run" in start
    assert any("mount -t nfs 10.0.0.9:/runs /mnt/runs" in c[-1] for c in printed)
    everywhere = [c for c in printed if c[4:5] == ["ssh"]]
    assert all("--worker=all" in c for c in everywhere)


def test_preempted_and_started_again(tmp_path):
    """READY, then PREEMPTED, then READY with a run that has ended."""
    looks = tmp_path / "looks"
    body = f"""
case "$*" in
  *describe*) echo x >> {looks}
    [ "$(wc -l < {looks})" = 2 ] && echo PREEMPTED || echo READY ;;
  *"cat train.code"*) [ "$(wc -l < {looks})" -ge 3 ] && echo 0 ;;
esac
exit 0"""
    log = stand_in(tmp_path / "bin", "gcloud", body)
    done = run("tpu_vm.sh", "watch", path=tmp_path / "bin", ZONE="z", POLL="0.01")
    assert done.returncode == 0, done.stderr
    assert "The run has ended with 0." in done.stdout
    calls = log.read_text().splitlines()
    assert sum(" create " in call for call in calls) == 2
    assert sum(" delete " in call for call in calls) == 1
    assert sum("efficient-vlm train --distributed" in call for call in calls) == 2


def test_a_failed_command_ends_it(tmp_path):
    stand_in(tmp_path / "bin", "gcloud", "exit 7")
    done = run("tpu_vm.sh", "all", path=tmp_path / "bin", ZONE="z")
    assert done.returncode == 7
    assert sum(line.startswith("+ ") for line in done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "words", "settings", "said"),
    [
        ("tpu_vm.sh", (), {}, "no action"),
        ("tpu_vm.sh", ("creat",), {}, "unknown action 'creat'"),
        ("tpu_vm.sh", ("create",), {}, "ZONE is not set"),
        ("tpu_vm.sh", ("run", "--config=a.py"), {"ZONE": "z"}, "behind --"),
        ("slurm.sh", (), {}, "no options of train"),
        ("xpk.sh", ("go",), XPK, "unknown action 'go'"),
        ("xpk.sh", ("run",), {**XPK, "IMAGE": ""}, "IMAGE is not set"),
    ],
)
def test_mistakes(script, words, settings, said):
    done = run(script, *words, **settings)
    assert done.returncode == 2 and said in done.stderr
    assert len(done.stderr.splitlines()) <= 3


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (143, True)])
def test_slurm_goes_on_after_its_time(tmp_path, code, again):
    log = stand_in(tmp_path / "bin", "srun", f"exit {code}")
    stand_in(tmp_path / "bin", "scontrol")
    words = ("--config=a.py", "--workdir=/shared/run")
    done = run("slurm.sh", *words, path=tmp_path / "bin", SLURM_JOB_ID="17")
    assert done.returncode == code
    calls = log.read_text()
    assert "efficient-vlm train --distributed --config=a.py --workdir=/shared/run" in calls
    assert ("scontrol requeue 17" in calls) == again
    dry = commands(run("slurm.sh", *words, DRY_RUN="1"))
    assert [c[0] for c in dry] == ["srun", "scontrol"]


def test_a_workload_of_xpk():
    (made,) = commands(run("xpk.sh", "--dry-run", "run", "--", "--config=a.py", **XPK))
    assert made[:3] == ["xpk", "workload", "create"]
    assert "--cluster=c" in made and "--docker-image=registry/image" in made
    assert "--max-restarts=20" in made
    assert made[-1] == "--command=efficient-vlm train --distributed --config=a.py"
    build, push = commands(run("xpk.sh", "--dry-run", "image", **XPK))
    assert build[:2] == ["docker", "build"] and push == ["docker", "push", "registry/image"]
