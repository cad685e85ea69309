"""Adapted models on meshes of eight CPU devices say and learn what they do on one device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from tiny_models import QUICK_TO_COMPILE

from efficient_vlm.adapt.forms import DoRA
from efficient_vlm.adapt.quantised import NF4
from efficient_vlm.errors import UserError

HERE = Path(__file__).parent
JOBS = [
    dict(adapt=dict(name="lora"), mesh=dict(data=1, fsdp=2, expert=2, tensor=2)),
    dict(adapt=dict(name="lora", base="int8"), mesh=dict(data=2, fsdp=2, tensor=2), capacity=0.75),
    dict(adapt=dict(name="dora"), mesh=dict(data=2, fsdp=2, expert=2)),
    dict(adapt=dict(name="qlora"), mesh=dict(data=2, fsdp=2, expert=2)),
]


@pytest.mark.slow
def test_meshes_change_nothing():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK_TO_COMPILE}",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
    }
    result = subprocess.run(
        [sys.executable, str(HERE / "sharded_adapters.py"), json.dumps(JOBS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for job, (difference, cut, count) in zip(JOBS, json.loads(result.stdout), strict=True):
        assert difference < 1e-4, job
        assert cut > count // 2, job


def test_what_a_mesh_cannot_cut():
    weight = jnp.ones((2, 64, 4))
    spec = PartitionSpec("expert", None, "tensor")
    with pytest.raises(UserError, match=r"adapt\.base: nf4 of experts"):
        NF4.of(weight, 1, 1).specs(spec)
    form = DoRA.of(weight, jnp.ones((2, 64, 1)), jnp.ones((2, 1, 4)), 1.0)
    assert form.specs(spec).magnitude == PartitionSpec("expert", "tensor")
    with pytest.raises(UserError, match=r"adapt\.name: dora on experts"):
        form.specs(PartitionSpec("expert", "tensor", None))
