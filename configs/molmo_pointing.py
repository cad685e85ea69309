"""Molmo learns to point at things of your own.

    efficient-vlm train --config=configs/molmo_pointing.py --config.data.path=points.jsonl \
        --workdir=runs/points

A row is a question and an answer in Molmo's format, which `processing.pointing.write` makes of
points (fractions of width and height):

    from efficient_vlm.processing.pointing import Point, write
    answer = write([Point(0.25, 0.4), Point(0.7, 0.5)], label="cups")
    row = {"images": ["table.jpg"], "messages": [
        {"role": "user", "content": "<image>Point to the cups."},
        {"role": "assistant", "content": answer}]}

Of pictures without any, the answer is "There are none." Molmo, arXiv 2409.17146: values of its
fine-tuning, by which all is trained, the decoder at 1e-5 and encoder and connector at half of it,
after 200 steps, with a cosine; there to a tenth of the peak, here to 0. Batches there are of 256
samples; here as many as `data.batch_size`. The metric
matches points with those of the held-out answers (F1).

Molmo2 (argument "molmo2") takes the same rows with `write(..., form="molmo2")`.
"""

import ml_collections

MODELS = {"7b-d": "allenai/Molmo-7B-D-0924", "7b-o": "allenai/Molmo-7B-O-0924",
          "1b": "allenai/MolmoE-1B-0924", "molmo2": "allenai/Molmo2-4B"}  # fmt: skip


def get_config(arg: str = "7b-d") -> ml_collections.ConfigDict:
    """Args: arg: "7b-d", "7b-o", "1b" or "molmo2"."""
    if arg not in MODELS:
        raise ValueError(f"argument {arg!r}: one of {', '.join(MODELS)}")
    return ml_collections.ConfigDict(
        dict(
            model=dict(pretrained=MODELS[arg], compressor=dict(name="none"), dtype="bfloat16"),
            adapt=dict(name="full"),
            data=dict(
                source="auto",
                path="",
                test_fraction=0.05,
                separate_turns=True,
                batch_size=256,
                pack=False,
                max_length=4096,
            ),
            train=dict(
                steps=1000,
                optimizer=dict(
                    name="adamw",
                    learning_rate=1e-5,
                    groups=[dict(pattern=r"^(?!language/)", scale=0.5)],
                    schedule="cosine",
                    warmup_steps=200,
                    weight_decay=0.0,
                    b1=0.9,
                    b2=0.95,
                ),
                checkpoint_every=200,
            ),
            eval=dict(images=200, new_tokens=128, batch_size=4, metric="points"),
        )
    )
