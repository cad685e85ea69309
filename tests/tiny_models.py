"""Models and runs small enough to compile and train in seconds."""

import jax
import ml_collections

# For programs that run once or twice, XLA_FLAGS with which they compile in half the time. JAX 0.12
# does not know the first, and no process starts with a flag that is unknown.
QUICK_TO_COMPILE = " ".join(
    ["--xla_cpu_use_fusion_emitters=false"] * (jax.__version_info__ < (0, 11))
    + ["--xla_cpu_parallel_codegen_split_count=1"]
)
DECODER = dict(
    width=32,
    num_heads=4,
    num_kv_heads=2,
    segments=[dict(layers=2)],
    mlp_dim=48,
    qk_norm=True,
    qk_scale=2.0,
    scan_unroll=2,
)
ENCODER = dict(image_size=32, patch_size=8, width=24, depth=2, num_heads=2, mlp_dim=32)
MOE = dict(num_experts=4, top_k=2, expert_dim=16, shared_dim=8)
VOCAB = 20


def make_tiny_config(data_dir):
    """Background colours are strong, so that "global" is learned in a hundred steps."""
    return ml_collections.ConfigDict(
        dict(
            data=dict(
                source="token_bench",
                dir=data_dir,
                tasks=("needle", "global"),
                image_size=32,
                grid=4,
                max_count=1,
                tint=0.8,
                noise=0.0,
                batch_size=8,
                questions_per_image=2,
                train_images=192,
                test_images=64,
            ),
            model=dict(
                encoder=dict(
                    image_size=32, patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32
                ),
                compressor=dict(name="none", budget=16),
                decoder=dict(
                    width=16,
                    num_heads=2,
                    segments=[dict(layers=1)],
                    mlp_dim=32,
                    moe=dict(num_experts=2, top_k=1, expert_dim=16),
                ),
            ),
            train=dict(
                steps=6,
                seed=0,
                elastic=[dict(name="none", budget=16), dict(name="random", budget=4)],
                optimizer=dict(name="adamw", learning_rate=1e-2, warmup_steps=2),
                checkpoint_every=2,
                log_every=1,
            ),
            eval=dict(
                images=16,
                batch_size=16,
                new_tokens=2,
                seeds=2,
                map_questions=2,
                methods=[dict(name="none", budgets=[16]), dict(name="random", budgets=[4])],
            ),
        )
    )
