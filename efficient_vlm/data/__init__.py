"""Data: records, scenes, tokens, and the pipeline of batches.

Importing this is cheap; Grain, TFDS and Pillow are imported when first needed.
"""

import importlib
from typing import Any

_WHERE = {
    "DataConfig": "config",
    "Pipeline": "pipeline",
    "check_fingerprint": "pipeline",
    "make_train": "pipeline",
    "EvalSet": "evalset",
    "make_eval": "evalset",
    "Conversation": "records",
    "Record": "records",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
