"""Methods that look at one row of attention never make a matrix of tokens x tokens."""

import math
import re

import jax
import jax.numpy as jnp
import pytest

from efficient_vlm.compressors import DecoderState, Signals, VisualTokens, build
from efficient_vlm.kernels.attention.xla import _BLOCK_KEYS, _BLOCK_QUERIES
from efficient_vlm.nn.intermediates import INTERMEDIATES

GRID, TEXT, HEADS, DEPTH = (24, 24), 64, 2, 16
TOKENS = GRID[0] * GRID[1]
PLACES, WIDTH = TOKENS + TEXT, HEADS * DEPTH


def largest_buffer(function, *inputs) -> int:
    """Elements of the largest array anywhere in the compiled program."""
    text = jax.jit(function).lower(*inputs).compile().as_text()
    shapes = re.findall(r"\b(?:pred|[fsu]\d+|bf16)\[([\d,]*)\]", text)
    return max(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def state() -> DecoderState:
    heads = {
        name: f32(1, PLACES, HEADS, DEPTH) for name in ("query", "key", "plain_query", "plain_key")
    }
    return DecoderState(
        **heads,
        live=jax.ShapeDtypeStruct((1, PLACES), bool),
        prompt=jax.ShapeDtypeStruct((1, TEXT), bool),
        last=jax.ShapeDtypeStruct((1,), jnp.int32),
        bias=f32(1, PLACES),
        before=f32(1, PLACES, WIDTH),
        after=f32(1, PLACES, WIDTH),
        first_visual=f32(1, TOKENS, WIDTH),
        first_text=f32(1, TEXT, WIDTH),
        first_live=jax.ShapeDtypeStruct((1, TOKENS), bool),
    )


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "feather", "v2drop", "dart"])
def test_in_the_decoder(name):
    module = build(name, budget=64)

    def cut(embed, seen):
        tokens = VisualTokens.from_grid(embed, GRID)
        return module.apply({}, tokens, Signals(decoder=seen))

    found = largest_buffer(cut, f32(1, TOKENS, WIDTH), state())
    assert found <= 2 * PLACES * WIDTH < TOKENS * TOKENS


@pytest.mark.parametrize("name", ["fitprune", "sparsevlm"])
def test_methods_that_look_at_all_rows_go_in_blocks(name):
    module = build(name, budget=64)

    def cut(embed, seen):
        tokens = VisualTokens.from_grid(embed, GRID)
        return module.apply({}, tokens, Signals(decoder=seen)).embed

    # A block of 64 query rows; the clusters of sparsevlm compare the tokens that were pruned.
    found = largest_buffer(cut, f32(1, TOKENS, WIDTH), state())
    assert found < PLACES * PLACES


BETWEEN = ["fastervlm", "visionzip", "prumerge", "prumerge_plus", "hiprune", "divprune", "cdpruner"]


# Not scope and vispruner: their docstrings say that they hold a matrix of all similarities.
@pytest.mark.parametrize("name", BETWEEN)
def test_between_encoder_and_decoder(name):
    module = build(name, budget=64)

    def cut(embed, row, keys, text):
        tokens = VisualTokens.from_grid(embed, GRID)
        signals = Signals(attention_row=row, middle_row=row, keys=keys, text=text)
        return module.apply({}, tokens, signals)

    inputs = f32(1, TOKENS, WIDTH), f32(1, TOKENS), f32(1, TOKENS, HEADS, DEPTH), f32(1, WIDTH)
    # The greedy methods keep a row of TOKENS for each of the 64 they choose; divprune looks for its
    # first token in blocks of rows.
    assert largest_buffer(cut, *inputs) <= TOKENS * TOKENS // 2


@pytest.mark.parametrize("name", ["cls_row", "cls_row_full", "mean_query_row", "column_mean"])
def test_signals_of_the_encoder(name):
    def signal(q, k, lse):
        seen = dict(query=q, key=k, lse=lse, mask=None, key_bias=None, live=None)
        return INTERMEDIATES[name](None, seen, 0.25)

    # Sums over all rows go block by block: there is one of a fixed size, whatever the tokens.
    places, bound = TOKENS + 1, (TOKENS + 64) * WIDTH
    if name == "column_mean":
        places, bound = 6 * TOKENS, _BLOCK_QUERIES * _BLOCK_KEYS
    heads = f32(1, places, HEADS, DEPTH)
    assert (
        largest_buffer(signal, heads, heads, f32(1, HEADS, places)) <= bound < places * places / 8
    )
