"""The model that GRPO starts from: the quickstart's, smaller, and stopped before it has learnt all.

    efficient-vlm train --config=experiments/grpo/config.py --workdir=runs/grpo_base

Scenes of 5 x 5 cells, 25 visual tokens, a dense decoder; trained at all of them alone.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The whole config."""
    width = dict(width=64, num_heads=4, qk_norm=True, qk_scale=4.0)
    return ml_collections.ConfigDict(
        dict(
            data=dict(
                source="token_bench",
                tasks=("needle", "count", "global"),
                image_size=40,
                grid=5,
                max_count=5,
                batch_size=32,
                questions_per_image=8,
                max_length=6,
                train_images=4_000,
                test_images=500,
            ),
            model=dict(
                encoder=dict(
                    image_size=40,
                    patch_size=8,
                    depth=1,
                    mlp_dim=256,
                    stem_dim=256,
                    pixel_mean=0.1,
                    pixel_std=0.2,
                    **width,
                ),
                compressor=dict(name="text_topk", budget=25, bias="none"),
                connector=dict(),
                decoder=dict(
                    segments=[dict(layers=2)],
                    mlp_dim=192,
                    out_scale=0.5,
                    embed_scale=0.35,
                    tie_embeddings=True,
                    rope_fraction=0.25,
                    **width,
                ),
            ),
            train=dict(
                steps=300,
                seed=0,
                optimizer=dict(
                    name="muon",
                    learning_rate=1e-2,
                    adam_learning_rate=6e-3,
                    warmup_steps=50,
                    decay_steps=600,
                    weight_decay=0.1,
                ),
                checkpoint_every=100,
            ),
            eval=dict(
                images=64,
                batch_size=32,
                new_tokens=2,
                map_questions=0,
                methods=[dict(name="text_topk", budgets=[25])],
            ),
        )
    )
