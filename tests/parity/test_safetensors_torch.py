"""Checkpoints in and out of PyTorch."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from efficient_vlm.checkpoints.safetensors_format import CheckpointError
from efficient_vlm.checkpoints.safetensors_read import SINGLE, Checkpoint
from efficient_vlm.checkpoints.safetensors_write import write

torch = pytest.importorskip("torch")
torch_api = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.parity


def test_bfloat16_and_float8_values(tmp_path):
    values = torch.linspace(-3, 3, 24).reshape(4, 6)
    tensors = {"b": values.bfloat16(), "e": values.to(torch.float8_e4m3fn), "s": values[0, 0]}
    torch_api.save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / SINGLE)
    ckpt = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        got = ckpt.read(name, finite=True).astype(np.float32)
        np.testing.assert_array_equal(got, tensor.float().numpy())
    assert ckpt.shape("s") == ()


def test_the_conversion_hint_works(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save({"w": weight.T, "tied": weight}, tmp_path / "model.bin")
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(tmp_path)
    hint = str(error.value).partition("convert it: python")[2]
    subprocess.run(f"{sys.executable} {hint}", shell=True, check=True, cwd=tmp_path)
    ckpt = Checkpoint.open(tmp_path)
    np.testing.assert_array_equal(ckpt.read("w"), weight.T.numpy())
    np.testing.assert_array_equal(ckpt.read("tied"), weight.numpy())


def test_written_bfloat16_loads_in_torch(tmp_path):
    values = np.arange(4).astype(ml_dtypes.bfloat16)
    write(tmp_path, [("x", values.shape, values.dtype, lambda: values)])
    assert torch_api.load_file(tmp_path / SINGLE)["x"].float().tolist() == [0, 1, 2, 3]
