"""Programs prepared while weights are read: the same answers, and nothing is compiled twice."""

import logging
from pathlib import Path

import jax
import numpy as np
import pytest

import efficient_vlm as evlm
from efficient_vlm.inference import pretrained

SAMPLES = Path(__file__).parents[1] / "samples"
PICTURE = [SAMPLES / "llava" / "00.jpg"]
# Each as no other test has it, so that its programs are new.
REQUESTS = {
    "picture": dict(images=[PICTURE], max_new_tokens=13),
    "text": dict(images=None, max_new_tokens=14),
    "penalty": dict(images=[PICTURE], max_new_tokens=15, repetition_penalty=1.5, logprobs=2),
}


def messages(caplog, request, names):
    """Log lines of JAX about tracing and compiling any of these programs."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        request()
    return [r.getMessage() for r in caplog.records if any(n in r.getMessage() for n in names)]


@pytest.mark.parametrize("name", REQUESTS)
def test_generate_finds_every_program(name, caplog, monkeypatch):
    """Up to the first token; the weights are read by then, and the answer is the usual one."""
    request = REQUESTS[name]
    expected = evlm.from_pretrained(SAMPLES / "smolvlm").run(["What?"], **request)
    jax.clear_caches()
    vlm = evlm.from_pretrained(SAMPLES / "smolvlm", check=False)
    prepared, real = [], pretrained.prepare
    stages = ("encode_stage", "compress_stage", "prefill_stage")

    def prepare(*args, **options):
        prepared.extend(messages(caplog, lambda: real(*args, **options), stages))
        caplog.clear()

    monkeypatch.setattr(pretrained, "prepare", prepare)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        out = vlm.run(["What?"], **request)
    assert {stage for stage in stages if any(stage in line for line in prepared)} == set(
        stages if request["images"] else ["prefill_stage"]
    )
    late = [record.getMessage() for record in caplog.records]
    assert not [line for line in late if any(stage in line for stage in stages)]
    assert [line for line in late if "decode_stage" in line]  # The log does tell.
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    monkeypatch.setattr(pretrained, "prepare", None)  # Nothing is waited for any more.
    vlm.run(["What?"], **request)
