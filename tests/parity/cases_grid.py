"""Models whose pictures differ in size: Qwen-VL, Molmo2, LFM2-VL."""

from functools import partial

import numpy as np
import torch
import transformers as T
from cases_text import rope, version_4
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

QWEN_PATCH = 4
GRIDS = ((4, 6), (6, 4), (2, 8))  # patches (height, width) of the first, second, third picture


def qwen_case(size: Size, model_class, config, grids=GRIDS, **storage) -> Case:
    """Patches of all pictures in one list, beside their grids."""
    begin, end = config.vision_start_token_id, config.vision_end_token_id

    def picture(index):
        h, w = grids[index % len(grids)]
        pixels = noise(h * w, 3 * 2 * QWEN_PATCH**2, seed=index)
        return [begin, *[size.image_id] * (h * w // 4), end], (pixels, [1, h, w])

    def collate(rows):
        types = [[int(token == size.image_id) for token in row.ids] for row in rows]
        inputs = collate_text(rows) | dict(mm_token_type_ids=right_pad(types, torch.int32))
        if images := all_images(rows):
            inputs["pixel_values"] = torch.cat([pixels for pixels, _ in images])
            inputs["image_grid_thw"] = torch.tensor([grid for _, grid in images])
        return inputs

    model = build(model_class, config)

    def positions(inputs):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        ids, _ = model.model.get_rope_index(**{name: inputs[name] for name in names})
        return dict(mrope_position_ids=ids)

    return Case(model, write_rows(size, picture=picture), collate, extras=positions, **storage)


def qwen_ids(size: Size) -> dict:
    names = ("image", "video", "vision_start", "vision_end")
    return {f"{name}_token_id": size.special + i for i, name in enumerate(names)}


def qwen_vision(size: Size, **changes) -> dict:
    return dict(
        depth=size.vision["num_hidden_layers"],
        num_heads=size.vision["num_attention_heads"],
        patch_size=QWEN_PATCH,
        **changes,
    )


def sections(size: Size) -> list[int]:
    """Rotary pairs of a head of hidden / heads for time, height, width."""
    pairs = size.hidden // size.heads // 2
    return [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]


def make_qwen2_vl(size, **storage):
    config = T.Qwen2VLConfig(
        vision_config=qwen_vision(
            size,
            embed_dim=size.vision["hidden_size"],
            hidden_size=size.hidden,
            mlp_ratio=3 if size is ODD else 2,
        ),
        text_config=size.text(**rope(1e6, mrope_section=sections(size))),
        tie_word_embeddings=size is ODD,
        **qwen_ids(size),
    )
    return qwen_case(size, T.Qwen2VLForConditionalGeneration, config, **storage)


@family
def qwen2_vl(size):
    return make_qwen2_vl(size)


version_4(qwen2_vl)
case("qwen2_vl__memory")(lambda: make_qwen2_vl(ODD, original_format=False))


@family
def qwen2_5_vl(size):
    """Windows of 2 x 2 (odd: 3 x 3) merged tokens, cut at the border; full attention in block 1."""
    config = T.Qwen2_5_VLConfig(
        vision_config=qwen_vision(
            size,
            hidden_size=size.vision["hidden_size"],
            intermediate_size=size.vision["intermediate_size"],
            out_hidden_size=size.hidden,
            window_size=24 if size is ODD else 16,
            fullatt_block_indexes=[1, 3] if size is ODD else [1],
        ),
        text_config=size.text(**rope(1e6, mrope_section=sections(size))),
        tie_word_embeddings=size is ODD,
        **qwen_ids(size),
    )
    grids = GRIDS if size is BASE else ((6, 10), (10, 4), (2, 2))
    return qwen_case(size, T.Qwen2_5_VLForConditionalGeneration, config, grids)


version_4(qwen2_5_vl)


@family
def qwen3_vl(size):
    """A learned table of positions resampled to the grid; features of two blocks added later."""
    third = 1 if size is ODD else size.head_dim // 6
    section = [size.head_dim // 2 - 2 * third, third, third]
    config = T.Qwen3VLConfig(
        vision_config=qwen_vision(
            size,
            hidden_size=size.vision["hidden_size"],
            intermediate_size=size.vision["intermediate_size"],
            out_hidden_size=size.hidden,
            num_position_embeddings=25 if size is ODD else 16,
            deepstack_visual_indexes=[0, 2] if size is ODD else [0, 1],
        ),
        text_config=size.text(
            head_dim=size.head_dim, **rope(5e6, mrope_section=section, mrope_interleaved=True)
        ),
        tie_word_embeddings=size is ODD,
        **qwen_ids(size),
    )
    return qwen_case(size, T.Qwen3VLForConditionalGeneration, config)


version_4(qwen3_vl)


def pooling_windows(grid: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """2 x 2 windows of a grid of patch indices, padded with -1, and how many there are."""
    h, w = grid.shape
    grid = np.pad(grid, [(0, h % 2), (0, w % 2)], constant_values=-1)
    rows, columns = grid.shape[0] // 2, grid.shape[1] // 2
    windows = grid.reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3)
    return windows.reshape(-1, 4), [rows, columns]


def crop_pooling(side: int, tiling: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Windows of a global crop and of crops that overlap by a margin of one patch on each side."""
    low, low_grid = pooling_windows(np.arange(side**2).reshape(side, side))
    th, tw = tiling
    crops = side**2 + np.arange(th * tw * side**2).reshape(th, tw, side, side)
    lines = []
    for i in range(th):
        rows = slice(0 if i == 0 else 1, side if i == th - 1 else side - 1)
        parts = []
        for j in range(tw):
            columns = slice(0 if j == 0 else 1, side if j == tw - 1 else side - 1)
            parts.append(crops[i, j, rows, columns])
        lines.append(np.concatenate(parts, axis=1))
    high, high_grid = pooling_windows(np.concatenate(lines))
    return np.concatenate([low, high]), low_grid + high_grid


def make_molmo2(size, text, side=3, columns=False):
    """Crops of an odd number of patches, so that windows are padded; tilings differ."""
    vision = dict(
        hidden_size=size.vision["hidden_size"],
        intermediate_size=size.vision["intermediate_size"],
        num_attention_heads=size.vision["num_attention_heads"],
        num_key_value_heads=size.vision["num_attention_heads"],
        head_dim=size.vision["hidden_size"] // size.vision["num_attention_heads"],
    )
    # Ids from `vocab` on live in the second table of embeddings, and have no row in the head.
    begin, end, patch, column, low_begin = (size.vocab + i for i in range(5))
    config = T.Molmo2Config(
        vision_config=vision
        | dict(
            num_hidden_layers=size.vision["num_hidden_layers"],
            image_size=[side * size.patch] * 2,
            patch_size=size.patch,
            **size.vision_eps,
        ),
        adapter_config=vision
        | dict(
            vision_feature_layer=[size.vision["num_hidden_layers"] - 1 - (size is ODD), 0],
            intermediate_size=size.ff - 6,
            text_hidden_size=size.hidden,
        ),
        text_config=dict(
            vocab_size=size.vocab,
            additional_vocab_size=16,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=size.ff,
            max_position_embeddings=128,
            attention_bias=False,
            **(size.rms_eps | dict(num_key_value_heads=size.kv_heads) | text),
        ),
        image_start_token_id=begin,
        image_end_token_id=end,
        image_patch_id=patch,
        image_col_id=column,
        low_res_image_start_token_id=low_begin,
        frame_start_token_id=size.vocab + 7,
        frame_end_token_id=size.vocab + 8,
    )

    def picture(index):
        tiling = ((1, 2), (2, 1), (1, 1))[index % 3]
        pooling, grid = crop_pooling(side, tiling)
        rows = ([patch] * grid[3] + [column] * columns) * grid[2]
        ids = [low_begin, *[patch] * (grid[0] * grid[1]), end, begin, *rows, end]
        crops = noise(1 + tiling[0] * tiling[1], side**2, 3 * size.patch**2, seed=index)
        return ids, (crops, torch.tensor(pooling), grid)

    model = build(T.Molmo2ForConditionalGeneration, config)
    collate = partial(collate_crops, image_ids={begin, end, patch, column, low_begin})
    return Case(model, write_rows(size, picture=picture), collate)


def collate_crops(rows, image_ids: set[int]) -> dict:
    """Crops of all pictures in one list; windows count patches from the first crop of the batch."""
    types = [[int(token in image_ids) for token in row.ids] for row in rows]
    inputs = collate_text(rows) | dict(mm_token_type_ids=right_pad(types, torch.int32))
    images = all_images(rows)
    if not images:
        return inputs
    offset, windows = 0, []
    for crops, pooling, _ in images:
        windows.append(torch.where(pooling >= 0, pooling + offset, -1))
        offset += crops.shape[0] * crops.shape[1]
    return inputs | dict(
        pixel_values=torch.cat([crops for crops, _, _ in images]),
        image_token_pooling=torch.cat(windows),
        image_grids=torch.tensor([grid for _, _, grid in images]),
        image_num_crops=torch.tensor([len(crops) for crops, _, _ in images]),
    )


@family
def molmo2(size):  # the decoder is Qwen3's
    text = dict(head_dim=size.head_dim, qk_norm_type="qwen3", norm_after=False, **rope(1e6))
    return make_molmo2(size, text, columns=size is not BASE)


@family
def molmo2_olmo(size):  # the decoder is OLMo's: norms after the sublayers, over the whole width
    kv_heads = size.heads if size is ODD else size.kv_heads
    text = dict(head_dim=size.hidden // size.heads, num_key_value_heads=kv_heads)
    text |= dict(qk_norm_type="olmo", norm_after=True, **rope(5e5))
    return make_molmo2(size, text, side=4 if size is ODD else 3)


@case("lfm2_vl")
def lfm2_vl(size=BASE):
    """Pictures of 4 x 4, 2 x 6 and 4 x 2 patches, padded to 16."""
    text = T.Lfm2Config(
        **size.text(),
        layer_types=["conv", "full_attention", "conv"],
        conv_L_cache=3,
        block_auto_adjust_ff_dim=False,
    )
    config = T.Lfm2VlConfig(
        vision_config=T.Siglip2VisionConfig(
            **size.vision, patch_size=8, num_patches=16, vision_use_head=False
        ),
        text_config=text,
        image_token_id=size.image_id,
        projector_hidden_size=56,
        downsample_factor=2,
    )

    def picture(index):
        shape = ((4, 4), (2, 6), (4, 2))[index]
        count = shape[0] * shape[1]
        pixels = noise(16, 3 * 64, seed=index)
        pixels[count:] = 0
        return [size.image_id] * (count // 4), (pixels, shape, [1] * count + [0] * (16 - count))

    def collate(rows):
        inputs = collate_text(rows)
        images = all_images(rows)
        if not images:
            return inputs
        return inputs | dict(
            pixel_values=torch.stack([pixels for pixels, _, _ in images]),
            spatial_shapes=torch.tensor([shape for _, shape, _ in images]),
            pixel_attention_mask=torch.tensor([mask for _, _, mask in images]),
        )

    model = build(T.Lfm2VlForConditionalGeneration, config)
    return Case(model, write_rows(size, picture=picture), collate)
