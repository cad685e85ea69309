"""Programs prepared while weights are read: the same answers, and nothing is compiled twice."""

import logging
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

import efficient_vlm as evlm
from efficient_vlm.inference import pretrained, programs

SAMPLES = Path(__file__).parents[1] / "samples"
PICTURE = [SAMPLES / "llava" / "00.jpg"]
STAGES = ("encode_stage", "compress_stage", "prefill_stage")
# Each as no other test has it, so that its programs are new.
REQUESTS = {
    "picture": dict(images=[PICTURE], max_new_tokens=13),
    "text": dict(images=None, max_new_tokens=14),
    "penalty": dict(images=[PICTURE], max_new_tokens=15, repetition_penalty=1.5, logprobs=2),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_each_program_is_made_once_by_a_thread(name, caplog, monkeypatch):
    """Up to the first token; the answer is the usual one."""
    request = REQUESTS[name]
    expected = evlm.from_pretrained(SAMPLES / "smolvlm").run(["What?"], **request)
    jax.clear_caches()
    programs._kept.clear()
    vlm = evlm.from_pretrained(SAMPLES / "smolvlm", check=False)
    lowered, lower = [], programs.BoundedJit.lower

    def watched(program, *args, **options):
        lowered.append((program.__name__, threading.get_ident()))
        return lower(program, *args, **options)

    monkeypatch.setattr(programs.BoundedJit, "lower", watched)
    # What is logged is what this thread does.
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        out = vlm.run(["What?"], **request)
    wanted = STAGES if request["images"] else STAGES[2:]
    assert tuple(stage for stage, _ in lowered) == wanted
    assert threading.get_ident() not in dict(lowered).values()
    said = [record.getMessage() for record in caplog.records]
    assert not [line for line in said if any(stage in line for stage in STAGES)]
    assert [line for line in said if "decode_stage" in line]  # The log does tell.
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    monkeypatch.setattr(pretrained, "prepared", None)  # Nothing is waited for any more.
    np.testing.assert_array_equal(vlm.run(["What?"], **request).tokens, expected.tokens)


def test_the_encoder_does_not_wait_for_the_decoder(monkeypatch):
    """Weights of the decoder that come late come late for the encoder's picture."""
    vlm, encoded = evlm.from_pretrained(SAMPLES / "smolvlm", check=False), threading.Event()
    expected = evlm.from_pretrained(SAMPLES / "smolvlm").run(["Why?"], [PICTURE], max_new_tokens=3)
    part, timed = type(vlm.weights.reader).part, pretrained.generate.__globals__["_timed"]

    def late(reader, name):
        assert name != "language" or encoded.wait(60)
        return part(reader, name)

    def watched(seconds, stage, *args, **options):
        out = timed(seconds, stage, *args, **options)
        encoded.set() if stage == "encode" else None
        return out

    monkeypatch.setattr(type(vlm.weights.reader), "part", late)
    monkeypatch.setitem(pretrained.generate.__globals__, "_timed", watched)
    found = vlm.run(["Why?"], [PICTURE], max_new_tokens=3)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_what_goes_wrong_with_a_program_is_told_once():
    vlm = evlm.from_pretrained(SAMPLES / "smolvlm", check=False)
    with pytest.raises(evlm.UserError, match="max_new_tokens|kind"):
        vlm.run(["What?"], [PICTURE], max_new_tokens=2, cache=dict(kind="none"))
    assert vlm.run(["What?"], [PICTURE], max_new_tokens=2).tokens.shape == (1, 1, 2)
