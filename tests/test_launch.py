"""Launch scripts: what a dry run prints, and what runs, with stand-ins for the tools of clouds."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "launch"
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


# A cloud in a folder: `ssh` runs in a home of its own, what it starts goes on behind it, and
# `describe` says what stands in a file.
CLOUD = r"""
home={home}
case "$*" in
  *describe*)
    echo "WARNING: a newer version is available" >&2
    [ ! -f {home}/broken ] || {{ rm {home}/broken; echo "connection reset" >&2; exit 1; }}
    [ -f {home}/state ] || {{ echo "NOT_FOUND: no such node" >&2; exit 1; }}
    cat {home}/state ;;
  *" scp "*) [ ! -f {home}/broken_scp ] || {{ rm {home}/broken_scp; exit 1; }} ;;
  *" create "*) echo READY > {home}/state ;;
  *" delete "*) rm -rf {home}/state {home}/train.* ;;
  *" ssh "*)
    for word; do case $word in --command=*) command=${{word#--command=}} ;; esac; done
    case $command in
      *"pip install"* | *chmod* | *"tar -xzf"*) exit 0 ;;
    esac
    cd {home} && exec bash -c "$command" ;;
esac
exit 0"""
TRAIN = """#!/usr/bin/env bash
echo "train: $*"
echo x >> {home}/runs
trap 'kill %1; exit 143' TERM
touch {home}/ready
sleep {seconds} & wait $!
exit {code}
"""


@pytest.fixture
def cloud(tmp_path):
    """(folder of tools, home of the only worker, log of calls)."""
    home = tmp_path / "home"
    (home / "efficient_vlm").mkdir(parents=True)
    (home / ".venv/bin").mkdir(parents=True)
    log = stand_in(tmp_path / "bin", "gcloud", CLOUD.format(home=home))
    yield tmp_path / "bin", home, log
    if (pid := home / "train.pid").exists():
        subprocess.run(["kill", "-KILL", pid.read_text().strip()], stderr=subprocess.DEVNULL)


def training(home, seconds=0, code=0):
    """Puts a stand-in for the trainer where the scripts look for it."""
    tool = home / ".venv/bin/efficient-vlm"
    tool.write_text(TRAIN.format(home=home, seconds=seconds, code=code))
    tool.chmod(0o755)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ssh_ends_while_training_goes_on_and_stop_ends_that(cloud):
    tools, home, _ = cloud
    training(home, seconds=60)
    settings = dict(path=tools, ZONE="z")
    words = ("run", "--", "--config=a.py", "--workdir=/mnt/runs/my run")
    assert run("tpu_vm.sh", *words, **settings).returncode == 0
    wait_for((home / "ready").exists)
    assert not (home / "train.code").exists()
    log = (home / "train.log").read_text()
    assert "train: train --distributed --config=a.py --workdir=/mnt/runs/my run" in log
    assert run("tpu_vm.sh", "stop", **settings).returncode == 0
    wait_for(lambda: (home / "train.code").exists() and (home / "train.code").read_text())
    assert (home / "train.code").read_text() == "143\n"


@pytest.mark.parametrize("code", [0, 2])
def test_watch_ends_with_the_run(cloud, code):
    tools, home, log = cloud
    training(home, code=code)
    done = run("tpu_vm.sh", "watch", path=tools, ZONE="z", POLL="0.05")
    assert done.returncode == code, done.stderr
    assert f"The run has ended with {code}." in done.stdout
    calls = log.read_text().splitlines()
    assert sum(" create " in call for call in calls) == 1
    assert (home / "runs").read_text().count("x") == 1


def test_watch_does_not_end_with_the_run_of_before(cloud):
    """A TPU that is there, with the code of a run that failed; the first copy fails, too."""
    tools, home, _ = cloud
    training(home)
    (home / "state").write_text("READY\n")
    (home / "train.code").write_text("2\n")
    (home / "broken_scp").touch()
    done = run("tpu_vm.sh", "watch", path=tools, ZONE="z", POLL="0.05")
    assert done.returncode == 0 and "That failed; again" in done.stdout
    assert "The run has ended with 0." in done.stdout
    assert (home / "runs").read_text().count("x") == 1


def watching(cloud):
    tools, home, _ = cloud
    environment = {"HOME": os.environ["HOME"], "PATH": f"{tools}:{os.environ['PATH']}"}
    watch = subprocess.Popen(
        ["bash", str(SCRIPTS / "tpu_vm.sh"), "watch"],
        env={**environment, "ZONE": "z", "POLL": "0.05"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for((home / "ready").exists)
    return watch


def test_preempted_and_started_again(cloud):
    """The run saves and ends with 143, then the TPU is gone; a look that fails ends nothing."""
    _, home, log = cloud
    training(home, seconds=60)
    watch = watching(cloud)
    (home / "broken").touch()
    wait_for(lambda: not (home / "broken").exists())
    (home / "ready").unlink()
    (home / "state").write_text("PREEMPTED\n")
    subprocess.run(["kill", "-TERM", (home / "train.pid").read_text().strip()])
    training(home)
    said = watch.communicate(timeout=60)[0]
    assert watch.returncode == 0 and "The run has ended with 0." in said
    calls = log.read_text().splitlines()
    assert sum(" create " in call for call in calls) == 2
    assert sum(" delete " in call for call in calls) == 1
    assert (home / "runs").read_text().count("x") == 2


def test_a_run_that_is_started_again_ends_the_one_before(cloud):
    """Its code is not taken for that of the new one; `stop` behind the end marks nothing."""
    tools, home, _ = cloud
    training(home, seconds=60)
    settings = dict(path=tools, ZONE="z")
    assert run("tpu_vm.sh", "run", **settings).returncode == 0
    wait_for((home / "ready").exists)
    training(home, code=3)
    assert run("tpu_vm.sh", "run", **settings).returncode == 0
    wait_for(lambda: (home / "train.code").exists() and (home / "train.code").read_text())
    assert (home / "train.code").read_text() == "3\n"
    assert (home / "runs").read_text().count("x") == 2
    assert run("tpu_vm.sh", "stop", **settings).returncode == 0
    assert not (home / "train.stopped").exists()


def test_watch_ends_when_the_run_is_stopped(cloud):
    tools, home, _ = cloud
    training(home, seconds=60)
    watch = watching(cloud)
    assert run("tpu_vm.sh", "stop", path=tools, ZONE="z").returncode == 0
    # Once more: it is stopped all the same, and no preemption.
    wait_for((home / "train.code").exists)
    assert "no run to stop" in run("tpu_vm.sh", "stop", path=tools, ZONE="z").stdout
    assert (home / "train.stopped").exists()
    said = watch.communicate(timeout=60)[0]
    assert watch.returncode == 143 and "The run has ended with stopped." in said
    assert (home / "runs").read_text().count("x") == 1


@pytest.fixture
def other():
    """A process that has nothing to do with the scripts."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_processes_behind_a_reboot_are_others(cloud, other):
    """Files stay, numbers are given again: nothing is taken for the run, and nothing is killed."""
    tools, home, _ = cloud
    training(home)
    (home / "state").write_text("READY\n")
    (home / "train.boot").write_text("another\n")
    for name in ("train.pid", "train.shell"):
        (home / name).write_text(f"{other.pid}\n")
    settings = dict(path=tools, ZONE="z", POLL="0.05")
    assert "no run to stop" in run("tpu_vm.sh", "stop", **settings).stdout
    done = run("tpu_vm.sh", "watch", **settings)
    assert done.returncode == 0 and (home / "runs").read_text().count("x") == 1
    assert other.poll() is None


def test_stop_waits_for_a_run_that_has_just_been_started(cloud, other):
    tools, home, _ = cloud
    (home / "train.boot").write_bytes(Path("/proc/sys/kernel/random/boot_id").read_bytes())
    (home / "train.shell").write_text(f"{other.pid}\n")
    environment = {"HOME": os.environ["HOME"], "PATH": f"{tools}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPTS / "tpu_vm.sh"), "stop"]
    with subprocess.Popen(command, env={**environment, "ZONE": "z"}) as stop:
        wait_for((home / "train.stopped").exists)
        (home / "train.pid").write_text(f"{other.pid}\n")
        assert stop.wait(30) == 0
    assert other.wait(30) == -signal.SIGTERM and (home / "train.stopped").exists()


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
    told = 'printf "gpus %s\\n" "$JAX_LOCAL_DEVICE_IDS" >> ' + str(tmp_path / "bin/calls")
    log = stand_in(tmp_path / "bin", "srun", f"{told}\nexit {code}")
    stand_in(tmp_path / "bin", "scontrol")
    words = ("--config=a.py", "--workdir=/shared/run")
    settings = dict(SLURM_JOB_ID="17", SLURM_GPUS_ON_NODE="4")
    done = run("slurm.sh", *words, path=tmp_path / "bin", **settings)
    assert done.returncode == code
    calls = log.read_text()
    assert "efficient-vlm train --distributed --config=a.py --workdir=/shared/run" in calls
    assert ("scontrol requeue 17" in calls) == again
    assert "gpus 0,1,2,3\n" in calls  # JAX would take one for each task.
    each = {**settings, "SLURM_NTASKS_PER_NODE": "4"}
    run("slurm.sh", *words, path=tmp_path / "bin", **each)
    assert "gpus \n" in log.read_text()  # And there it is right.
    dry = commands(run("slurm.sh", *words, DRY_RUN="1"))
    assert [c[0] for c in dry] == ["srun", "scontrol"]
    assert commands(run("slurm.sh", "--dry-run", *words)) == dry


def test_a_workload_of_xpk():
    (made,) = commands(run("xpk.sh", "--dry-run", "run", "--", "--config=a.py", **XPK))
    assert made[:3] == ["xpk", "workload", "create"]
    assert "--cluster=c" in made and "--docker-image=registry/image" in made
    assert "--max-restarts=20" in made
    assert made[-1] == "--command=efficient-vlm train --distributed --config=a.py"
    build, push = commands(run("xpk.sh", "--dry-run", "image", **XPK))
    assert build[:2] == ["docker", "build"] and push == ["docker", "push", "registry/image"]
