"""Writes `tests/samples/smolvlm`: a SmolVLM of 60,000 random weights, complete with tokenizer.

    python tests/samples/make_smolvlm.py

It answers nonsense; everything around the weights is as in a published directory.
"""

import json
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from efficient_vlm.families import architecture
from efficient_vlm.families import save as export
from efficient_vlm.families.table import family_of
from efficient_vlm.models.init import abstract_parameters

OUT = Path(__file__).parent / "smolvlm"
SPECIAL = [
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)),
]
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def tokenizer() -> Tokenizer:
    """Bytes and special tokens, nothing learned."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[])
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def main() -> int:
    words = tokenizer()
    text = dict(
        model_type="llama",
        vocab_size=words.get_vocab_size(),
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        hidden_act="silu",
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        rope_theta=100000.0,
    )
    vision = dict(
        model_type="smolvlm_vision",
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
    )
    config = dict(
        model_type="smolvlm",
        architectures=["SmolVLMForConditionalGeneration"],
        image_token_id=words.token_to_id("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        text_config=text,
        vision_config=vision,
    )
    model = architecture.build_model(config)
    rng = np.random.default_rng(0)
    shapes = abstract_parameters(model)
    params = jax.tree.map(
        lambda p: (rng.standard_normal(p.shape) * 0.2 + (p.ndim == 1)).astype(ml_dtypes.bfloat16),
        shapes,
    )
    export.export(OUT, family_of(config), config, model, params)
    words.save(str(OUT / "tokenizer.json"))
    settings = {
        "tokenizer_config.json": dict(
            bos_token="<|im_start|>", eos_token="<end_of_utterance>", chat_template=TEMPLATE
        ),
        "preprocessor_config.json": dict(
            do_image_splitting=True,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            max_image_size=dict(longest_edge=64),
            size=dict(longest_edge=128),
            resample=1,
        ),
    }
    for name, content in settings.items():
        (OUT / name).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
