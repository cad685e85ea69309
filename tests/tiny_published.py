"""Published directories in miniature, complete with tokenizer: random weights of tests/golden's
geometry, for runs that need to write and read words.
"""

import copy
import json
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from efficient_vlm.families import architecture
from efficient_vlm.families import save as export
from efficient_vlm.families.table import family_of
from efficient_vlm.models.init import abstract_parameters

GOLDEN = Path(__file__).parent / "golden"
_PATCHES = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>")
# Golden model -> special tokens, bos and eos, settings of its pictures.
_SQUARE = {"size": {"height": 12, "width": 12}, "crop_size": {"height": 12, "width": 12}}
SAMPLES = {
    "llava": (("<s>", "</s>", "<image>"), ("<s>", "</s>"), _SQUARE),
    "paligemma": (("<bos>", "<eos>", "<image>"), ("<bos>", "<eos>"), _SQUARE),
    "molmo_qwen2": (
        ("<|endoftext|>", *_PATCHES),
        (None, "<|endoftext|>"),
        {
            "base_image_input_size": [48, 48],
            "image_patch_size": 8,
            "image_token_length_h": 3,
            "image_token_length_w": 3,
            "overlap_margins": [2, 2],
            "max_crops": 4,
        },
    ),
}


def published(name, directory):
    """Writes a sample to a directory."""
    special, (bos, eos), pictures = SAMPLES[name]
    words = _byte_tokenizer(special)
    config = _with_words(json.loads((GOLDEN / name / "config.json").read_text()), words)
    directory.mkdir()
    rng = np.random.default_rng(0)
    model = architecture.build_model(config)
    params = jax.tree.map(
        lambda p: (0.2 * rng.standard_normal(p.shape) + (p.ndim == 1)).astype(np.float32),
        abstract_parameters(model),
    )
    export.export(directory, family_of(config), config, model, params)
    words.save(str(directory / "tokenizer.json"))
    roles = {"eos_token": eos, **({} if bos is None else {"bos_token": bos})}
    for file, content in (("tokenizer_config", roles), ("preprocessor_config", pictures)):
        (directory / f"{file}.json").write_text(json.dumps(content))
    return directory


def _byte_tokenizer(special):
    """Bytes, then special tokens; nothing is learned."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return made


def _with_words(config, words):
    """The config with the size and the ids of a tokenizer."""
    config, size = copy.deepcopy(config), words.get_vocab_size()
    if "vision_backbone" in config:  # Molmo: the head scores bytes and the end token alone.
        rows = words.token_to_id("<|endoftext|>") + 1
        config |= {"vocab_size": rows, "embedding_size": rows}
        config |= {"image_patch_id": words.token_to_id("<im_patch>")}
        # Positions of the pictures take more than the golden prompt.
        return config | {"max_sequence_length": 4096}
    text = config["text_config"]
    text |= {"vocab_size": size, "max_position_embeddings": 4096}
    if "vocab_size" in config:
        config["vocab_size"] = size
    return config | {"image_token_index": words.token_to_id("<image>")}
