"""Relations and presence: "is red left of blue", "is there a red digit", balanced yes and no.

efficient-vlm train --config=configs/spatial.py --workdir=runs/spatial
"""

import ml_collections
import quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Args: arg: as for the quickstart."""
    config = quickstart.get_config(arg)
    config.data.tasks = ("relation", "absent", "global")
    config.data.clutter = 4
    config.data.max_length = 0
    return config
