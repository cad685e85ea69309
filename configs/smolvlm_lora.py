"""LoRA on SmolVLM, for one GPU: questions about pictures, such as VQAv2's.

    efficient-vlm train --config=configs/smolvlm_lora.py --config.data.path=my.jsonl \
        --workdir=runs/lora

Values of SmolVLM's published fine-tuning notebook (`Smol_VLM_FT.ipynb` of huggingface/smollm): rank
8, alpha 8, all products of the decoder and of attention in the encoder, 16 samples a step, Adam
with moments of 8 bits, and 1e-4 after 50 steps, then linear to 0. It trains one epoch on half of
VQAv2's validation questions, 6,698 steps: `--config.train.steps` is rows / 16 for one epoch of
yours. No dropout in the adapters, where the notebook has 0.1. `--config.adapt.name=qlora` keeps the
base in 4 bits, as its QLoRA does.
"""

import ml_collections

MODELS = {
    "256m": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "500m": "HuggingFaceTB/SmolVLM-500M-Instruct",
    "2.2b": "HuggingFaceTB/SmolVLM-Instruct",
}
# The notebook's names (q_proj, k_proj, v_proj) are those of the encoder's attention as well.
TARGETS = ("decoder", r"^vit/.*layers/.*attention/(query|key|value)/kernel$")


def get_config(arg: str = "256m") -> ml_collections.ConfigDict:
    """Args: arg: "256m", "500m" or "2.2b"."""
    if arg not in MODELS:
        raise ValueError(f"argument {arg!r}: one of {', '.join(MODELS)}")
    return ml_collections.ConfigDict(
        dict(
            model=dict(pretrained=MODELS[arg], compressor=dict(name="none"), dtype="bfloat16"),
            adapt=dict(name="lora", rank=8, alpha=8.0, targets=list(TARGETS)),
            data=dict(
                source="auto",
                path="",
                test_fraction=0.05,
                batch_size=16,
                # So that 16 rows are 16 samples.
                pack=False,
                max_length=4096,
                max_images=16,
            ),
            train=dict(
                steps=6698,
                optimizer=dict(
                    name="adamw",
                    learning_rate=1e-4,
                    schedule="linear",
                    warmup_steps=50,
                    weight_decay=0.01,
                    b2=0.999,
                    moments="int8",
                ),
                checkpoint_every=250,
            ),
            eval=dict(images=200, new_tokens=16, batch_size=8, metric="exact_match"),
        )
    )
