"""The model, the methods and the inputs of `compressors.py`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_vlm import compressors
from efficient_vlm.costs.flops import Cost, model_cost
from efficient_vlm.inference.stages import Programs, programs_of
from efficient_vlm.models.init import abstract_parameters
from efficient_vlm.models.inputs import Layout, ModelInputs, Pictures
from efficient_vlm.models.vlm import VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of the model that is measured, and the budget."""

    side: int = 24
    patch: int = 14
    width: int = 1024
    heads: int = 16
    encoder_layers: int = 4
    encoder_mlp: int = 4096
    decoder_layers: int = 8
    decoder_mlp: int = 2816
    vocab: int = 512
    text: int = 64
    budget: int = 64

    @property
    def patches(self) -> int:
        return self.side**2

    def model(self) -> VisionLanguageModel:
        """The model without a method; the connector is LLaVA's, two products."""
        return VisionLanguageModel(
            vocab_size=self.vocab,
            encoder=dict(
                image_size=self.side * self.patch,
                patch_size=self.patch,
                width=self.width,
                depth=self.encoder_layers,
                num_heads=self.heads,
                mlp_dim=self.encoder_mlp,
                position="learned",
                class_token=True,
            ),
            compressor=dict(name="none", budget=self.patches),
            connector=dict(hidden_dim=self.width),
            decoder=dict(
                width=self.width,
                num_heads=self.heads,
                segments=[dict(layers=self.decoder_layers)],
                mlp_dim=self.decoder_mlp,
                bidirectional_visual=False,
            ),
        )


QUICK = Geometry(
    side=8,
    patch=4,
    width=64,
    heads=4,
    encoder_layers=3,
    encoder_mlp=128,
    decoder_layers=4,
    decoder_mlp=96,
    vocab=32,
    text=8,
    budget=16,
)


def settings(name: str, geometry: Geometry) -> dict[str, Any]:
    """Options of a method: the budget, or the nearest that it reaches; published forms inside."""
    budget = geometry.budget
    special = {
        "none": dict(budget=geometry.patches),
        "mlp": dict(),
        "tome": dict(budget=budget),
        "qformer": dict(budget=budget, num_queries=budget),
        "minicpm_merger": dict(layer=max(1, round(geometry.encoder_layers * 7 / 27))),
        "hiprune": dict(budget=budget, middle_layer=0.375),  # Layer 9 of CLIP's 24.
        "fastv": dict(layer=2, keep=budget),
        "dart": dict(layer=2, keep=budget),
        # Published schedules are for 576 patches; on a small grid a third of the tokens.
        "sparsevlm": dict(budget=budget if geometry.patches == 576 else None),
        "fitprune": dict(rate=0.9),
        **{label: dict() for label in ("pyramiddrop", "feather", "v2drop", "vtw")},
    }
    options = special.get(name, {})
    if name not in special or name == "minicpm_merger":
        grid = (geometry.side, geometry.side)
        reachable = compressors.reachable(name, grid)
        options = {**options, "budget": min(reachable, key=lambda b: (abs(b - budget), b))}
    return options


@dataclasses.dataclass
class Method:
    """One method in the model: which program runs each stage, and what it costs."""

    name: str
    options: dict[str, Any]
    model: VisionLanguageModel
    programs: Programs
    cost: Cost

    @classmethod
    def create(cls, name: str, geometry: Geometry, new_tokens: int) -> "Method":
        options, base = settings(name, geometry), geometry.model()
        budget = options.get("budget")
        rest = {k: v for k, v in options.items() if k != "budget"}
        if "features" in compressors.options(name):  # A projector of its own: no connector.
            rest["features"] = geometry.width
            base = base.clone(connector=dict(identity=True))
        model = base.with_compressor(name, budget, **rest)
        return cls(
            name=name,
            options=options,
            model=model,
            programs=programs_of(model, Layout(1, geometry.side, geometry.side)),
            cost=model_cost(model, text_tokens=geometry.text, new_tokens=new_tokens),
        )

    @functools.cached_property
    def module(self) -> compressors.base.Compressor:
        return self.model.make_compressor()


def parameters(model: VisionLanguageModel, known: Any = None) -> Any:
    """Parameters of a model, the arrays of `known` where it has them.

    The others are random: gains of norms 1, the rest of variance 1 / width.
    """
    there = {} if known is None else dict(jax.tree_util.tree_flatten_with_path(known)[0])
    rng, deviation = np.random.default_rng(0), model.decoder["width"] ** -0.5

    def fill(path, leaf):
        if path in there and there[path].shape == leaf.shape:
            return there[path]
        if "scale" in str(path[-1]):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(deviation * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_parameters(model))


def make_inputs(geometry: Geometry, batch: int) -> ModelInputs:
    """Random pictures, one question of `text` tokens for each."""
    rng = np.random.default_rng(0)
    pixels = geometry.side * geometry.patch
    images = rng.integers(0, 256, (batch, 1, pixels, pixels, 3)).astype(np.uint8)
    prompts = rng.integers(0, geometry.vocab, (batch, geometry.text))
    pictures = Pictures(images, np.ones((batch, 1), bool))
    lengths = np.full(batch, geometry.text)
    return jax.tree.map(jnp.asarray, ModelInputs.of_rows(prompts, lengths, pictures=pictures))
