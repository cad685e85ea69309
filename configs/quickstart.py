"""The quickstart: a small MoE vision-language model on real handwritten digits.

    efficient-vlm train --config=configs/quickstart.py --workdir=runs/quickstart

One elastic model, trained at 64, 16, 4 and 1 visual tokens, evaluated with every compressor.
`:smoke` is the same run in about a minute; `:dense` has a dense decoder.
"""

import ml_collections


def data() -> dict:
    """Scenes of handwritten digits, eight questions about each."""
    return dict(
        source="token_bench",
        tasks=("needle", "count", "point", "global"),
        image_size=64,
        batch_size=32,
        questions_per_image=8,
        max_length=6,
        train_images=16_000,
        test_images=1_000,
    )


def model() -> dict:
    """One encoder layer and two decoder layers of width 64, 317 thousand parameters."""
    return dict(
        encoder=dict(
            image_size=64,
            patch_size=8,
            width=64,
            depth=1,
            num_heads=4,
            mlp_dim=256,
            stem_dim=256,
            # Scenes are dark: without these the patches start an order of magnitude smaller than
            # the position embedding, and no lookup by colour is learned in thousands of steps.
            pixel_mean=0.1,
            pixel_std=0.2,
            qk_norm=True,
            qk_scale=4.0,
            scan_unroll=4,
        ),
        compressor=dict(name="text_topk", budget=16, bias="none"),
        connector=dict(),
        decoder=dict(
            width=64,
            num_heads=4,
            segments=[dict(layers=2)],
            mlp_dim=192,
            moe=dict(num_experts=4, top_k=2, expert_dim=96),
            qk_norm=True,
            qk_scale=4.0,
            out_scale=0.5,
            embed_scale=0.35,
            # With one table for input and output, `global` teaches what the colour words mean.
            tie_embeddings=True,
            rope_fraction=0.25,
            scan_unroll=4,
        ),
    )


def train() -> dict:
    """Four minutes on two cores."""
    return dict(
        steps=2_400,
        seed=0,
        # Smaller budgets join when the full one has learned what to look at.
        elastic=[
            dict(name="text_topk", budget=64, weight=0.7),
            dict(name="text_topk", budget=16, weight=0.15, start=0.74),
            dict(name="text_topk", budget=4, weight=0.1, start=0.74),
            dict(name="text_topk", budget=1, weight=0.05, start=0.74),
        ],
        optimizer=dict(
            name="muon",
            learning_rate=1e-2,
            adam_learning_rate=6e-3,
            warmup_steps=100,
            decay_steps=2_600,
            # 1,400 digits are few: without it fewer unseen ones are read.
            weight_decay=0.1,
        ),
        checkpoint_every=250,
    )


def evaluation() -> dict:
    """The selector that was trained, beside baselines that nothing was trained for."""
    return dict(
        images=256,
        batch_size=32,
        new_tokens=2,
        methods=[
            dict(name="none", budgets=[64]),
            dict(name="text_topk", budgets=[64, 16, 4, 1]),
            dict(name="random", budgets=[16, 4]),
            dict(name="stride", budgets=[16, 4]),
            dict(name="average_pool", budgets=[16, 4, 1]),
            dict(name="downsample", budgets=[16, 4]),
        ],
    )


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: "", or words joined by "," among smoke, dense."""
    modes = set(arg.split(",")) - {""}
    if modes - {"smoke", "dense"}:
        raise ValueError(f"quickstart knows smoke and dense, not {arg!r}")
    config = ml_collections.ConfigDict()
    config.data, config.model, config.train, config.eval = data(), model(), train(), evaluation()
    if "dense" in modes:
        config.model.decoder.moe = None
    if "smoke" in modes:
        config.data.update(train_images=1_000, test_images=100)
        config.train.update(steps=40, checkpoint_every=10)
        config.train.elastic = [
            dict(name="text_topk", budget=64, weight=0.5),
            dict(name="text_topk", budget=16, weight=0.5),
        ]
        config.eval.update(images=64, seeds=2, map_questions=2)
        config.eval.methods = [
            dict(name="none", budgets=[64]),
            dict(name="text_topk", budgets=[16]),
            dict(name="random", budgets=[16]),
        ]
    return config
