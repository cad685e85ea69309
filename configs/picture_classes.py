"""A labelled picture set made into questions, with classes that training never sees.

    efficient-vlm train --config=configs/picture_classes.py --workdir=runs/land
    efficient-vlm train --config=configs/picture_classes.py:colorectal_histology \
        --workdir=runs/tissue

The argument names a data set of TensorFlow Datasets that has been prepared with
`file_format="array_record"`, or its folder; the default is EuroSAT (arXiv 1709.00029), satellite
pictures of ten kinds of land. Every picture gets the question `data.template`, its class is the
answer. Classes of `data.held_out` are a control: results have the tasks "seen" and "held_out", and
an answer to the latter can be right only by what the model knew before.

Values of LoRA are those of `finetune.py`.
"""

import finetune
import ml_collections

# Of EuroSAT's classes.
HELD_OUT = ["River", "Forest"]


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: name or folder of a data set; "" for eurosat/rgb with two classes held out."""
    config = finetune.get_config()
    config.model.pretrained = "HuggingFaceTB/SmolVLM-256M-Instruct"
    config.data.update(
        source="tfds",
        path=arg or "eurosat/rgb",
        template="What is shown in this picture?",
        held_out=[] if arg else HELD_OUT,
        max_images=1,
    )
    config.eval.update(new_tokens=16)
    return config
