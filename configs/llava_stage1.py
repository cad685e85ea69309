"""LLaVA's first stage: the connector alone learns to describe pictures, all else is frozen.

    efficient-vlm train --config=configs/llava_stage1.py \
        --config.data.path=blip_laion_cc_sbu_558k.json --workdir=runs/stage1

LLaVA, arXiv 2304.08485, section 4.2; values of LLaVA-1.5, arXiv 2310.03744, appendix (one epoch of
558,000 pairs in batches of 256) and, for lengths, of its published scripts. Two differences: the
connector goes on from its published weights instead of random ones, as one wants it behind a new
compressor (`--config.model.compressor.name`, `.budget`) or for pictures of another kind; and the
question of a row stays in the prompt, where the scripts leave it out. AdamW has PyTorch's second
moment and Hugging Face's clipping, as the scripts do.

On one device, `--config.train.accumulate=32` takes eight samples at a time.
"""

import ml_collections

# Where checkpoints with Hugging Face's layout are; "7b" or "13b" as the config's argument.
MODELS = {"7b": "llava-hf/llava-1.5-7b-hf", "13b": "llava-hf/llava-1.5-13b-hf"}


def get_config(arg: str = "7b") -> ml_collections.ConfigDict:
    """Args: arg: "7b" or "13b"."""
    if arg not in MODELS:
        raise ValueError(f"argument {arg!r}: one of {', '.join(MODELS)}")
    return ml_collections.ConfigDict(
        dict(
            model=dict(pretrained=MODELS[arg], compressor=dict(name="none"), dtype="bfloat16"),
            adapt=dict(name="full", train="connector"),
            data=dict(
                source="auto",
                path="",
                test_fraction=0.001,
                batch_size=256,
                # A batch of 256 is 256 samples only if each has a row of its own.
                pack=False,
                max_length=2048,
            ),
            train=dict(
                steps=2180,
                optimizer=dict(
                    name="adamw",
                    learning_rate=1e-3,
                    schedule="cosine",
                    warmup_fraction=0.03,
                    weight_decay=0.0,
                    b2=0.999,
                ),
                checkpoint_every=500,
            ),
            eval=dict(images=200, new_tokens=64, batch_size=8),
        )
    )
