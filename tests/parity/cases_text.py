"""Text decoders: a base, an odd and a golden size of each, and what only some checkpoints use."""

from dataclasses import replace

import transformers as T
from tiny_torch import BASE, ODD, Size, case, causal, family

LONG = (40, 33, 21)  # long enough for scaled frequencies to differ


def rope(theta: float, **changes) -> dict:
    return dict(rope_parameters=dict(rope_type="default", rope_theta=theta) | changes)


def alternating(size: Size) -> list[str]:
    """Local layers with a global one last, as (sliding, full) or (sliding, sliding, full)."""
    period = 3 if size.layers == 3 else 2
    return [
        "full_attention" if i % period == period - 1 else "sliding_attention"
        for i in range(size.layers)
    ]


def make_llama(size: Size, lengths=None, storage=None, **changes):
    config = T.LlamaConfig(**size.text(**(rope(1e4) | changes)))
    return causal(T.LlamaForCausalLM, config, size, lengths, **(storage or {}))


@family
def llama(size):
    return make_llama(size, head_dim=None if size is BASE else size.head_dim)


@family
def llama_rope3_tied(size):
    scaled = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    biased = dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    return make_llama(size, LONG if size is BASE else (24, 15, 6), **biased, **rope(5e5, **scaled))


def version_4(build):
    """The same case with the older spelling of config.json, which is what hubs hold."""
    case(f"{build.__name__}__v4")(lambda: replace(build(ODD), version_4=True))
    return build


version_4(llama_rope3_tied)


LLAMA_VARIANTS = dict(
    mha=dict(num_key_value_heads=6, rms_norm_eps=1e-5),
    mqa=dict(num_key_value_heads=1, rms_norm_eps=1e-6, tie_word_embeddings=True),
    linear=rope(1e4, rope_type="linear", factor=4.0),
    # Within the original length, which is where "dynamic" does not depend on padding.
    dynamic=rope(1e4, rope_type="dynamic", factor=4.0),
    yarn=rope(1e4, rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
    # A factor that is not the ratio of the lengths.
    yarn_other=rope(1e4, rope_type="yarn", factor=3.0, original_max_position_embeddings=16),
    yarn_tuned=rope(
        1e4,
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=16,
        beta_fast=8.0,
        beta_slow=2.0,
        attention_factor=1.3,
    ),
    gelu=dict(hidden_act="gelu_pytorch_tanh", attention_bias=True),
)
for _name, _changes in LLAMA_VARIANTS.items():
    case(f"llama__{_name}")(lambda changes=_changes: make_llama(ODD, LONG, **changes))
case("llama__sharded")(lambda: make_llama(ODD, storage=dict(shard_size="60KB")))
case("llama__bfloat16")(lambda: make_llama(ODD, storage=dict(bfloat16=True)))


def make_mistral(**changes):
    config = T.MistralConfig(**ODD.text(**(rope(1e4) | changes)))
    return causal(T.MistralForCausalLM, config, ODD)


case("mistral__window")(lambda: make_mistral(sliding_window=4))
case("mistral__whole")(lambda: make_mistral(sliding_window=None))


def make_qwen2(size, **changes):
    config = T.Qwen2Config(**size.text(**(rope(1e6) | changes)))
    return causal(T.Qwen2ForCausalLM, config, size)


@family
def qwen2(size):
    return make_qwen2(size, tie_word_embeddings=size is not ODD)


version_4(qwen2)


WINDOW = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)


@version_4
@case("qwen2__sliding")
def qwen2_sliding(size=ODD):
    return make_qwen2(size, **WINDOW)


@family
def qwen3(size, **changes):
    changes |= dict(head_dim=size.head_dim, tie_word_embeddings=size is BASE) | rope(1e6)
    return causal(T.Qwen3ForCausalLM, T.Qwen3Config(**size.text(**changes)), size)


@version_4
@case("qwen3__sliding")
def qwen3_sliding(size=ODD):
    return qwen3(size, **WINDOW)


def make_qwen3_moe(size, **changes):
    base = dict(
        head_dim=size.head_dim,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        moe_intermediate_size=size.ff // 2 - 2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[0],
    )
    config = T.Qwen3MoeConfig(**size.text(**(base | changes)))
    return causal(T.Qwen3MoeForCausalLM, config, size)


@family
def qwen3_moe(size):
    return make_qwen3_moe(size)


@case("qwen3_moe__every_second")
def qwen3_moe_every_second():
    return make_qwen3_moe(ODD, decoder_sparse_step=2, mlp_only_layers=[], norm_topk_prob=False)


@family
def gemma(size):
    kv_heads = size.kv_heads if size is ODD else 1
    changes = dict(num_key_value_heads=kv_heads, head_dim=size.head_dim)
    return causal(T.GemmaForCausalLM, T.GemmaConfig(**size.text(**changes)), size)


def gemma2_config(size, window=5):
    return T.Gemma2Config(
        **size.text(head_dim=size.head_dim),
        query_pre_attn_scalar=20,
        sliding_window=window,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    )


@family
def gemma2(size):  # the window is shorter than the rows
    return causal(T.Gemma2ForCausalLM, gemma2_config(size, 3 if size is ODD else 5), size)


def gemma3_config(size, window=5, factor=8.0):
    theta = dict(
        full_attention=dict(rope_type="linear", factor=factor, rope_theta=1e6),
        sliding_attention=dict(rope_type="default", rope_theta=1e4),
    )
    return T.Gemma3TextConfig(
        **size.text(head_dim=size.head_dim, layer_types=alternating(size), rope_parameters=theta),
        query_pre_attn_scalar=20,
        sliding_window=window,
    )


@family
def gemma3_text(size):
    return causal(T.Gemma3ForCausalLM, gemma3_config(size, 3 if size is ODD else 5), size)


version_4(gemma3_text)


@family
def olmo2(size):
    kv_heads = size.heads if size is ODD else size.kv_heads
    config = T.Olmo2Config(**size.text(num_key_value_heads=kv_heads, **rope(5e5)))
    return causal(T.Olmo2ForCausalLM, config, size)


def make_olmoe(size, storage=None, **changes):
    base = dict(
        num_key_value_heads=size.heads,
        intermediate_size=size.ff // 2 - 2,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=False,
    )
    config = T.OlmoeConfig(**size.text(**(base | changes)))
    return causal(T.OlmoeForCausalLM, config, size, **(storage or {}))


@family
def olmoe(size):
    return make_olmoe(size)


case("olmoe__gqa")(lambda: make_olmoe(ODD, num_key_value_heads=2, norm_topk_prob=True))
case("olmoe__gelu")(lambda: make_olmoe(ODD, hidden_act="gelu_pytorch_tanh"))
case("olmoe__memory")(lambda: make_olmoe(ODD, dict(original_format=False)))


def make_mixtral(size, storage=None, **changes):
    base = dict(
        head_dim=size.head_dim if size is ODD else None,
        intermediate_size=size.ff // 2 - 2,
        num_local_experts=size.experts - (size is BASE) * 4,
        num_experts_per_tok=size.top_k,
    )
    config = T.MixtralConfig(**size.text(**(base | changes)))
    return causal(T.MixtralForCausalLM, config, size, **(storage or {}))


@family
def mixtral(size):
    return make_mixtral(size)


case("mixtral__gelu")(lambda: make_mixtral(ODD, hidden_act="gelu"))
case("mixtral__memory")(lambda: make_mixtral(ODD, dict(original_format=False)))


@family
def gpt_neo(size):
    local_global = [[["global", "local"], size.layers // 2]]
    config = T.GPTNeoConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        num_layers=size.layers,
        num_heads=size.heads,
        max_position_embeddings=64,
        window_size=3 if size is ODD else 5,
        attention_types=local_global + [[["global"], 1]] * (size.layers % 2),
        intermediate_size=size.ff if size is ODD else None,
        layer_norm_epsilon=size.eps or 1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return causal(T.GPTNeoForCausalLM, config, size)


def make_phi(size, **changes):
    text = size.text(**(rope(1e4, partial_rotary_factor=0.5) | changes))
    text.pop("rms_norm_eps", None)
    return causal(T.PhiForCausalLM, T.PhiConfig(**text, **size.vision_eps), size)


@family
def phi(size):
    if size is BASE:
        return make_phi(size, num_key_value_heads=size.heads)
    return make_phi(size, **rope(1e4, partial_rotary_factor=0.75))


version_4(phi)
case("phi__qk_layernorm")(lambda: make_phi(ODD, qk_layernorm=True))


def make_phi3(size, lengths=None, **changes):
    return causal(T.Phi3ForCausalLM, T.Phi3Config(**size.text(**changes)), size, lengths)


@family
def phi3(size):
    return make_phi3(size)


def longrope(original: int, dims: int = 4) -> dict:
    """Scaling whose short factors hold up to `original` positions and long ones beyond."""
    factors = dict(
        short_factor=[1.0 + 0.1 * i for i in range(dims)],
        long_factor=[1.5 + 0.5 * i for i in range(dims)],
    )
    return rope(1e4, rope_type="longrope", **factors) | dict(
        original_max_position_embeddings=original
    )


# Every row, with its continuation, lies on one side of the switch.
case("phi3__longrope_short")(lambda: make_phi3(ODD, (30, 22, 9), **longrope(64)))
case("phi3__longrope_long")(lambda: make_phi3(ODD, (30, 22, 17), **longrope(8)))
case("phi3__longrope_v4")(
    lambda: replace(make_phi3(ODD, (30, 22, 17), **longrope(8)), version_4=True)
)
case("phi3__sliding")(lambda: make_phi3(ODD, sliding_window=4))


@case("phi3__partial")
def phi3_partial():
    return make_phi3(ODD, **rope(1e4, partial_rotary_factor=0.75), tie_word_embeddings=True)
