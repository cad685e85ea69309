"""Adapters in the files of PEFT, the library most of them are made with (arXiv 2106.09685)."""

from efficient_vlm.families.peft_read import load_adapter
from efficient_vlm.families.peft_write import WEIGHTS, save_adapter

__all__ = ["WEIGHTS", "load_adapter", "save_adapter"]
