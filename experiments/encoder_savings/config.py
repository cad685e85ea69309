"""The model of this experiment: the quickstart's, with six encoder layers and 256 patches.

    efficient-vlm train --config=experiments/encoder_savings/config.py --workdir=runs/deep

Two by two patches of four pixels become one of 64 tokens, a cell of the scene's grid each. Nothing
is pruned in training. `:quick` is the same in a few steps, as a test.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "" or "quick"."""
    if arg not in ("", "quick"):
        raise ValueError(f"encoder_savings knows quick, not {arg!r}")
    width = dict(width=64, qk_norm=True, qk_scale=4.0)
    config = ml_collections.ConfigDict(
        dict(
            data=dict(
                source="token_bench",
                tasks=("needle", "count", "point", "global"),
                image_size=64,
                batch_size=32,
                questions_per_image=8,
                max_length=6,
                train_images=16_000,
                test_images=1_000,
            ),
            model=dict(
                encoder=dict(
                    image_size=64,
                    patch_size=4,
                    depth=6,
                    # Maps of 256 x 256 are most of a step: two heads take .76 of the time of four.
                    num_heads=2,
                    mlp_dim=128,
                    stem_dim=128,
                    # Scenes are dark, see configs/quickstart.py.
                    pixel_mean=0.1,
                    pixel_std=0.2,
                    scan_unroll=6,
                    **width,
                ),
                projector=dict(name="patch_merger", side=2, bias=False),
                compressor=dict(name="none"),
                # The projector gives the decoder's width.
                connector=dict(identity=True),
                decoder=dict(
                    segments=[dict(layers=2)],
                    mlp_dim=192,
                    out_scale=0.5,
                    embed_scale=0.35,
                    tie_embeddings=True,
                    rope_fraction=0.25,
                    num_heads=4,
                    scan_unroll=2,
                    **width,
                ),
            ),
            train=dict(
                steps=1_800,
                seed=0,
                optimizer=dict(
                    name="muon",
                    learning_rate=1e-2,
                    adam_learning_rate=6e-3,
                    warmup_steps=100,
                    decay_steps=1_950,
                    weight_decay=0.1,
                ),
                checkpoint_every=250,
                keep=1,
            ),
            eval=dict(
                images=256,
                batch_size=32,
                new_tokens=2,
                map_questions=0,
                seeds=10,
                methods=[dict(name="none")],
            ),
        )
    )
    if arg == "quick":
        config.data.update(train_images=64, test_images=32)
        config.train.update(steps=4, checkpoint_every=4)
        config.eval.update(images=32)
    return config
