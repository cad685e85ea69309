"""Transfer of PaliGemma to one task: a question about each picture, and its answer.

    efficient-vlm train --config=configs/paligemma_transfer.py --config.data.path=my.jsonl \
        --workdir=runs/transfer

PaliGemma, arXiv 2407.07726, section 3.2.4 (stage 3): all parameters are trained; pictures and
question (the prefix) see each other, and the loss is that of the answer (the suffix) with its end
token alone. A row is one question: `data.separate_turns` splits longer conversations. Values of the
authors' example for data of one's own (`transfers/forkme.py` of google-research/big_vision: 15
epochs, 32 rows, 1e-5, a cosine after 5 % of the steps). Its decoupled decay of 3e-7 is not times
the learning rate; ours is: 0.03 gives the same at the peak. `train.steps` is rows * 15 / 32; 1000
is that of 2,133 rows.

The argument is the size of the pictures, 224, 448 or 896, which the paper tries in this order, with
learning rates 3e-5, 1e-5 and 3e-6, and 1 to 100 epochs.
"""

import ml_collections

# Pixels -> visual tokens, one for each patch of 14 x 14.
SIZES = {"224": 256, "448": 1024, "896": 4096}


def get_config(arg: str = "224") -> ml_collections.ConfigDict:
    """Args: arg: pixels, "224", "448" or "896"."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r}: one of {', '.join(SIZES)}")
    return ml_collections.ConfigDict(
        dict(
            model=dict(
                pretrained=f"google/paligemma-3b-pt-{arg}",
                compressor=dict(name="none"),
                dtype="bfloat16",
            ),
            adapt=dict(name="full"),
            data=dict(
                source="auto",
                path="",
                test_fraction=0.1,
                separate_turns=True,
                batch_size=32,
                pack=False,
                max_length=SIZES[arg] + 128,  # 128 are for text.
            ),
            train=dict(
                steps=1000,
                optimizer=dict(
                    name="adamw",
                    learning_rate=1e-5,
                    schedule="cosine",
                    warmup_fraction=0.05,
                    weight_decay=0.03,
                    b2=0.999,
                ),
                checkpoint_every=200,
            ),
            eval=dict(images=200, new_tokens=32, batch_size=8),
        )
    )
