"""Vision encoders alone, and models whose pictures all have one size."""

import torch
import transformers as T
from cases_text import gemma2_config, gemma3_config, rope, version_4
from tiny_torch import (
    BASE,
    ODD,
    Case,
    Size,
    all_images,
    build,
    case,
    collate_text,
    family,
    noise,
    right_pad,
    write_rows,
)


def tower(config_class, size: Size, side: int, **changes):
    """The config of an encoder of `side` x `side` patches."""
    base = dict(image_size=side * size.patch, patch_size=size.patch)
    return config_class(**(size.vision | size.vision_eps | base | changes))


def encoder(model_class, config, height: int, width: int, **inputs) -> Case:
    patch = config.patch_size
    pixels = noise(2, 3, height * patch, width * patch)
    return Case(build(model_class, config), inputs=dict(pixel_values=pixels, **inputs))


@family
def siglip_vision(size):
    config = tower(T.SiglipVisionConfig, size, size.side)
    return encoder(T.SiglipVisionModel, config, size.side, size.side)


@case("siglip_vision__no_head")
def siglip_vision_no_head():
    config = tower(T.SiglipVisionConfig, ODD, 5, vision_use_head=False)
    return encoder(T.SiglipVisionModel, config, 5, 5)


@case("siglip_vision__resampled")
def siglip_vision_resampled():
    config = tower(T.SiglipVisionConfig, ODD, 5)
    return encoder(T.SiglipVisionModel, config, 4, 7, interpolate_pos_encoding=True)


@family
def clip_vision(size):
    config = tower(T.CLIPVisionConfig, size, size.side)
    return encoder(T.CLIPVisionModel, config, size.side, size.side)


@case("clip_vision__resampled")
def clip_vision_resampled():
    config = tower(T.CLIPVisionConfig, ODD, 5)
    return encoder(T.CLIPVisionModel, config, 4, 7, interpolate_pos_encoding=True)


@case("clip_vision__gelu")
def clip_vision_gelu():
    return encoder(T.CLIPVisionModel, tower(T.CLIPVisionConfig, ODD, 5, hidden_act="gelu"), 5, 5)


@case("siglip2_naflex_vision")
def siglip2_naflex_vision():
    """Pictures of 5 x 4 and 3 x 4 patches in one batch, the second padded."""
    config = T.Siglip2VisionConfig(**BASE.vision, patch_size=8, num_patches=16)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    inputs = dict(
        pixel_values=noise(2, 20, 3 * 8**2),
        pixel_attention_mask=mask,
        spatial_shapes=torch.tensor([[5, 4], [3, 4]]),
    )
    return Case(build(T.Siglip2VisionModel, config), inputs=inputs)


def square_pictures(size: Size, side: int, tokens: int, before=(), after=()):
    """write_rows' picture: `tokens` placeholders and pixels (3, side * patch, side * patch)."""

    def picture(index):
        ids = [*before, *[size.image_id] * tokens, *after]
        return ids, noise(3, side * size.patch, side * size.patch, seed=index)

    return picture


def collate_pictures(rows) -> dict:
    """Text, and the pictures of all rows in one row of reading order."""
    images = all_images(rows)
    return collate_text(rows) | (dict(pixel_values=torch.stack(images)) if images else {})


def make_llava(size, vision=None, text=None, strategy="default", storage=None, **changes):
    side = size.side
    config = T.LlavaConfig(
        vision_config=vision or tower(T.CLIPVisionConfig, size, side),
        text_config=text or T.LlamaConfig(**size.text()),
        image_token_index=size.image_id,
        image_seq_length=side**2,
        vision_feature_select_strategy=strategy,
        **(dict(vision_feature_layer=-2) | changes),
    )
    tokens = side**2 + (strategy == "full" and config.vision_config.model_type.startswith("clip"))
    rows = write_rows(size, picture=square_pictures(size, side, tokens))
    model = build(T.LlavaForConditionalGeneration, config)
    return Case(model, rows, collate_pictures, **(storage or {}))


@family
def llava(size):
    return make_llava(size)


version_4(llava)


def phi_config(size):
    text = size.text(**rope(1e4, partial_rotary_factor=0.5))
    text.pop("rms_norm_eps", None)
    return T.PhiConfig(**text, **size.vision_eps)


@case("llava__siglip_phi")
def llava_siglip_phi():
    vision = tower(T.SiglipVisionConfig, ODD, ODD.side, vision_use_head=False)
    return make_llava(ODD, vision, phi_config(ODD), strategy="full")


@case("llava__clip_qwen2")
def llava_clip_qwen2():
    return make_llava(ODD, text=T.Qwen2Config(**ODD.text(tie_word_embeddings=True)))


@case("llava__two_layers")
def llava_two_layers():
    return make_llava(ODD, vision_feature_layer=[-2, 1], multimodal_projector_bias=False)


case("llava__full")(lambda: make_llava(ODD, strategy="full", vision_feature_layer=-1))
case("llava__sharded")(lambda: make_llava(ODD, storage=dict(shard_size="60KB")))
case("llava__memory")(lambda: make_llava(ODD, storage=dict(original_format=False)))


def collate_prefix(rows) -> dict:
    """PaliGemma: type 0 (image and prefix) sees all of type 0, type 1 (suffix) is causal."""
    prefixes = [len(row.ids) if row.prefix is None else row.prefix for row in rows]
    types = [[int(i >= n) for i in range(len(row.ids))] for row, n in zip(rows, prefixes)]
    return collate_pictures(rows) | dict(token_type_ids=right_pad(types))


def make_paligemma(
    size, text_config, patterns=("I.....|....", "II...|.....", "....|..."), **storage
):
    config = T.PaliGemmaConfig(
        vision_config=tower(T.SiglipVisionConfig, size, size.side, vision_use_head=False),
        text_config=text_config,
        image_token_index=size.image_id,
        projection_dim=size.hidden,
        hidden_size=size.hidden,
        vocab_size=size.vocab,
    )
    rows = write_rows(size, patterns, square_pictures(size, size.side, size.side**2))
    model = build(T.PaliGemmaForConditionalGeneration, config)
    return Case(model, rows, collate_prefix, **storage)


def gemma_config(size):
    kv_heads = size.kv_heads if size is ODD else 1
    return T.GemmaConfig(**size.text(num_key_value_heads=kv_heads, head_dim=size.head_dim))


@family
def paligemma(size):
    return make_paligemma(size, gemma_config(size))


case("paligemma__memory")(lambda: make_paligemma(ODD, gemma_config(ODD), original_format=False))


@family
def paligemma2(size):  # as published, the window is longer than any row
    return make_paligemma(size, gemma2_config(size, window=96))


@case("paligemma2__window")
def paligemma2_window():
    return make_paligemma(ODD, gemma2_config(ODD, window=7))


def collate_gemma3(image_id: int):
    def collate(rows):
        types = [[int(token == image_id) for token in row.ids] for row in rows]
        return collate_pictures(rows) | dict(token_type_ids=right_pad(types))

    return collate


@family
def gemma3(size):
    """2 x 2 average pooling; a row's pictures are separate blocks of the mask."""
    side = size.even_side
    begin, end = size.special + 1, size.special + 2
    config = T.Gemma3Config(
        vision_config=tower(T.SiglipVisionConfig, size, side, vision_use_head=False),
        text_config=gemma3_config(size, window=6 if size is ODD else 5),
        mm_tokens_per_image=(side // 2) ** 2,
        boi_token_index=begin,
        eoi_token_index=end,
        image_token_index=size.image_id,
    )
    picture = square_pictures(size, side, (side // 2) ** 2, [begin], [end])
    model = build(T.Gemma3ForConditionalGeneration, config)
    return Case(model, write_rows(size, picture=picture), collate_gemma3(size.image_id))


def make_internvl(size, norm="layer_norm", **changes):
    side = size.even_side
    vision = tower(
        T.InternVLVisionConfig,
        size,
        side,
        image_size=(side * size.patch,) * 2,
        patch_size=(size.patch,) * 2,
        norm_type=norm,
        **(dict(attention_bias=True) | changes),
    )
    config = T.InternVLConfig(
        vision_config=vision,
        text_config=T.Qwen2Config(**size.text(tie_word_embeddings=size is BASE)),
        image_token_id=size.image_id,
        image_seq_length=(side // 2) ** 2,
    )
    rows = write_rows(size, picture=square_pictures(size, side, (side // 2) ** 2))
    return Case(build(T.InternVLForConditionalGeneration, config), rows, collate_pictures)


@family
def internvl(size):
    return make_internvl(size)


@case("internvl__rms_qk_norm")
def internvl_rms_qk_norm():  # the 6B encoder: RMS norms, normalised queries and keys, no biases
    return make_internvl(ODD, "rms_norm", use_qk_norm=True, attention_bias=False)


def collate_tiles(rows) -> dict:
    """SmolVLM: rows with fewer tiles are filled with all-zero ones, which the model drops."""
    inputs = collate_text(rows)
    most = max(len(row.images) for row in rows)
    if not most:
        return inputs
    pixels = torch.zeros(len(rows), most, *all_images(rows)[0][0].shape)
    valid = torch.zeros(len(rows), most, *pixels.shape[-2:], dtype=torch.bool)
    for i, row in enumerate(rows):
        for j, (tile, mask) in enumerate(row.images):
            pixels[i, j], valid[i, j] = tile, mask
    return inputs | dict(pixel_values=pixels, pixel_attention_mask=valid)


def make_idefics(size, model_class, config_class, vision_class):
    """All tiles but the first have padded patches at the bottom and on the right."""
    side, scale = size.even_side, size.even_side // 2
    config = config_class(
        vision_config=tower(vision_class, size, side),
        text_config=T.LlamaConfig(**size.text(tie_word_embeddings=size is ODD)),
        image_token_id=size.image_id,
        scale_factor=scale,
        pad_token_id=0,
        tie_word_embeddings=size is ODD,
    )
    tokens = (side // scale) ** 2

    def picture(index):
        mask = torch.ones(side * size.patch, side * size.patch, dtype=torch.bool)
        if index:
            mask[-size.patch * index :] = False
            mask[:, -size.patch :] = False
        return [size.image_id] * tokens, (noise(3, *mask.shape, seed=index), mask)

    return Case(build(model_class, config), write_rows(size, picture=picture), collate_tiles)


@family
def smolvlm(size):
    return make_idefics(
        size, T.SmolVLMForConditionalGeneration, T.SmolVLMConfig, T.SmolVLMVisionConfig
    )


@family
def idefics3(size):
    return make_idefics(
        size, T.Idefics3ForConditionalGeneration, T.Idefics3Config, T.Idefics3VisionConfig
    )
