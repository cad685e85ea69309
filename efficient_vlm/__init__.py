"""Token-efficient vision-language models in JAX.

Every technique is a config line, every claim is measured. Importing this costs nothing: JAX comes
with the first name that needs it.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "UserError": "efficient_vlm.errors",
    "VisionLanguageModel": "efficient_vlm.models.vlm",
    "evaluate_run": "efficient_vlm.evaluation.run",
    "fit": "efficient_vlm.cli.run",
    "from_pretrained": "efficient_vlm.inference.load",
    "generate": "efficient_vlm.inference.generate",
    "load_config": "efficient_vlm.cli.config_file",
}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from efficient_vlm.runtime import paused_collection

    with paused_collection():
        found = importlib.import_module(_WHERE[name])
    return getattr(found, "load" if name == "load_config" else name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
