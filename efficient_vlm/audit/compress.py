"""`efficient-vlm compress`: what a method makes of one picture, drawn.

With a run, everything is the run's: encoder, decoder, tokenizer. Without one there are no weights,
and statistics of the pixels stand in for the encoder (`audit.pixel_signals`); the picture says so.
"""

import argparse
import bisect
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from efficient_vlm.audit import drawing, heat, pixel_signals
from efficient_vlm.audit.command import Subject
from efficient_vlm.audit.command import read_methods as read_chosen
from efficient_vlm.audit.compress_run import TrainedModel
from efficient_vlm.audit.marked import Marked
from efficient_vlm.audit.sheet import HeatPanel, Panel, draw_sheet
from efficient_vlm.compressors import VisualTokens, methods
from efficient_vlm.compressors.grids import Grid, as_grid
from efficient_vlm.data import images
from efficient_vlm.data.records import REASONS, BadRecord
from efficient_vlm.errors import UserError
