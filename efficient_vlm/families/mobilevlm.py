"""MobileVLM (arXiv 2312.16886) and MobileVLM V2 (arXiv 2402.03766), under their own names."""

from typing import Any

from efficient_vlm.checkpoints.names import NameMap, Piece
from efficient_vlm.errors import UserError, short
from efficient_vlm.families.base import Config, Family
from efficient_vlm.families.texts import decoder_fields, text_of
from efficient_vlm.families.vision import clip, clip_tensors, embedding_refused
from efficient_vlm.processing.pictures.resized import MobileVLMPictures
from efficient_vlm.processing.prompt_families import VICUNA_SYSTEM

# The released files name this tower but do not describe it.
_TOWER = "clip-vit-large-patch14-336"
_CLIP_L_336 = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
_METHODS = {"ldpnet": "ldp", "ldpnetv2": "ldpv2"}
_MODULES = {"ldp": "LDP_0", "ldpv2": "LDPv2_0"}


def _text(config: Config) -> Config:
    """The text config: released files have Llama's fields at the top."""
    return config.get("text_config") or {**config, "model_type": "llama"}


def _vision(config: Config) -> Config:
    vision, tower = config.get("vision_config"), str(config.get("mm_vision_tower", _TOWER))
    if vision is None and not tower.rstrip("/").endswith(_TOWER):
        raise UserError(
            f"config.json: mm_vision_tower={short(tower)}",
            allowed=_TOWER,
            fix="add the tower's config as vision_config",
        )
    return vision or _CLIP_L_336


def _method(config: Config) -> str:
    kind = config["mm_projector_type"]
    if kind not in _METHODS:
        raise UserError(
            f"config.json: mm_projector_type={short(kind)}", allowed=", ".join(_METHODS)
        )
    return _METHODS[kind]


def _model(config: Config) -> dict[str, Any]:
    text = _text(config)
    layer = config.get("mm_vision_select_layer", config.get("vision_feature_layer", -2))
    if layer == 0:
        raise embedding_refused("mm_vision_select_layer")
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(
            f"config.json: mm_vision_select_feature={short(config['mm_vision_select_feature'])}",
            allowed="patch (the CLS token is left out)",
        )
    return dict(
        vocab_size=text["vocab_size"],
        # Layer -1 is the output of the last block, as in ours; 0 is the embedding.
        encoder=clip(_vision(config), (layer if layer < 0 else layer - 1,)),
        projector=dict(name="method", method=_method(config), side=2),
        compressor=dict(name="none"),
        connector=dict(identity=True),
        decoder=decoder_fields(text, config.get("tie_word_embeddings")),
    )


def _tensors(m: NameMap, config: Config, spelling: str) -> None:
    text, method = _text(config), _method(config)
    text_of(text).tensors(m, text, "model.", "lm_head", spelling)
    clip_tensors(m, _vision(config), "model.vision_tower.vision_tower.vision_model.")
    ours, theirs = f"project/{_MODULES[method]}/{method}_", "model.mm_projector."
    if method == "ldpv2":
        _product(m, f"{ours}up", f"{theirs}mlp.mlp.0")
        _product(m, f"{ours}down", f"{theirs}mlp.mlp.2")
        _depthwise(m, f"{ours}peg", f"{theirs}peg.peg.0")
        return
    _product(m, f"{ours}up", f"{theirs}model.mlp.1")
    _product(m, f"{ours}down", f"{theirs}model.mlp.3")
    for i in range(2):
        block, name = f"{ours}block_{i}_", f"{theirs}model.mb_block.{i + 1}.block."
        _depthwise(m, f"{block}depthwise", f"{name}0.0")
        _norm(m, f"{block}depthwise_norm", f"{name}0.1")
        _product(m, f"{block}squeeze", f"{name}1.fc1", convolution=True)
        _product(m, f"{block}excite", f"{name}1.fc2", convolution=True)
        _product(m, f"{block}out", f"{name}2.0", convolution=True)
        _norm(m, f"{block}out_norm", f"{name}2.1")


def _product(m: NameMap, path: str, name: str, convolution: bool = False) -> None:
    """A torch Linear or a convolution of 1 x 1, with or without bias."""
    fan_in, out = m.shapes[f"{path}_kernel"]
    shape = (out, fan_in, 1, 1) if convolution else (out, fan_in)
    m.add(f"{path}_kernel", Piece(f"{name}.weight", shape, view=(out, fan_in), turn=(1, 0)))
    if f"{path}_bias" in m:
        m.plain(f"{path}_bias", f"{name}.bias")


def _depthwise(m: NameMap, path: str, name: str) -> None:
    channels = m.shapes[f"{path}_kernel"][-1]
    piece = Piece(f"{name}.weight", (channels, 1, 3, 3), view=(channels, 3, 3), turn=(1, 2, 0))
    m.add(f"{path}_kernel", piece)
    if f"{path}_bias" in m:
        m.plain(f"{path}_bias", f"{name}.bias")


def _norm(m: NameMap, path: str, name: str) -> None:
    m.plain(f"{path}_scale", f"{name}.weight")
    m.plain(f"{path}_bias", f"{name}.bias")


def _processor(preprocessor: Config, config: Config, **options: Any) -> Any:
    return MobileVLMPictures.from_hf(preprocessor, config, **options)


MOBILEVLM = Family(
    name="mobilevlm",
    model_types=("mobilevlm",),
    model=_model,
    tensors=_tensors,
    ignored=(
        r"model\.vision_tower\.vision_tower\.vision_model\.post_layernorm\..*",
        r".*\.position_ids",
        r".*rotary_emb\.inv_freq",
    ),
    processor=_processor,
    # A placeholder of their code, not a row of the vocabulary.
    image_token=lambda config: config.get("image_token_index", -200),
    picture_options=("max_visual_tokens",),
    prompt="llava",
    # Their code asks with the conversation "v1", which has the sentence.
    prompt_options={"system": VICUNA_SYSTEM},
)
