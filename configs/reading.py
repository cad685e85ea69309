"""Reading: transcribe a rendered string of four characters, 8 to 12 pixels high.

    efficient-vlm train --config=configs/reading.py --workdir=runs/reading

A string of L characters from an alphabet of A holds L log2(A) bits: what one visual token must
carry at budget 1.
"""

import ml_collections
import quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: as for the quickstart."""
    config = quickstart.get_config(arg)
    config.data.tasks = ("dense", "global")
    config.data.questions_per_image = 2
    config.data.max_length = 0
    config.eval.new_tokens = 6
    return config
