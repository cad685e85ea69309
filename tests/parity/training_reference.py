"""Three steps of AdamW on a golden checkpoint in the reference library, with its own loss.

    python tests/parity/training_reference.py tests/golden/training.json

writes the losses and norms of gradients that `tests/families/test_training_golden.py` compares.
Gradients and trained weights are saved as checkpoints: all that lies between a parameter of the
library and a published tensor (renaming, stacking, joining) is linear, so it holds for gradients.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import mobilevlm_reference as mobilevlm
import numpy as np
import torch
import transformers
from make_fixtures import save
from safetensors.torch import load_file, save_file
from tiny_torch import EAGER, Case
from torch.nn import functional as F

GOLDEN = Path(__file__).parents[1] / "golden"
ANSWER = 2  # Tokens to predict at the end of each row: text, behind text.
STEPS = 3
# Epsilon is of the size of small gradients: where it is not, rounding decides the sign of an update
# whose true gradient is 0, such as that of a bias of keys.
ADAMW = dict(learning_rate=1e-2, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.1)
# Families that the library has no class for, and whose published code runs on an old one alone.
WITHOUT_CLASS = ("molmo_olmo", "molmo_olmoe", "molmo_qwen2")


class Subject(NamedTuple):
    """A model of the reference.

    Attributes:
      parameters: name -> parameter.
      loss: the mean over targets.
      save: writes the parameters to a folder in the published layout.
      model: of the library; None for one of several parts.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    loss: Callable[[], torch.Tensor]
    save: Callable[[Path], None]
    model: torch.nn.Module | None = None


def read_io(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "io.npz") as io:
        return dict(io)


def targets_of(io: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool [B, L], the last tokens of each row."""
    ids = io["in/input_ids"]
    lengths = io.get("in/attention_mask", np.ones_like(ids)).sum(axis=1)[:, None]
    place = np.arange(ids.shape[1])
    return (place < lengths) & (place >= lengths - ANSWER)


def open_library(name: str) -> Subject:
    """A model that the library has a class for."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    model = cls.from_pretrained(GOLDEN / name, **EAGER).eval()
    io = read_io(name)
    given = {key[3:]: torch.from_numpy(io[key]) for key in io if key.startswith("in/")}
    labels = torch.where(torch.from_numpy(targets_of(io)), given["input_ids"], -100)
    return Subject(
        dict(model.named_parameters()),
        lambda: model(**given, labels=labels).loss,
        # Towers keep the names that they were loaded with, but Molmo2's tables are split again.
        lambda folder: save(name if name.startswith("molmo2") else "loaded", Case(model), folder),
        model,
    )


def open_mobilevlm(name: str) -> Subject:
    """MobileVLM, see `mobilevlm_reference`."""
    kind = dict(zip(("mobilevlm", "mobilevlm_v2"), mobilevlm.NAMES, strict=True))[name]
    parts = mobilevlm.Parts.new(kind)
    tensors = load_file(GOLDEN / name / "model.safetensors")
    parameters = parts.named()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])
    io = read_io(name)
    ids, targets = io["in/input_ids"], torch.from_numpy(targets_of(io))
    lengths = io["in/attention_mask"].sum(axis=1)
    rows = [torch.from_numpy(row[:length]) for row, length in zip(ids, lengths, strict=True)]
    counts = [int((row == mobilevlm.IMAGE).sum()) * 4 // mobilevlm.SIDE**2 for row in rows]
    pixels = torch.from_numpy(io["in/pixel_values"]).split(counts)

    def loss():
        logits = [
            parts.logits(row, own)[:-1][target[1 : len(row)]]
            for row, own, target in zip(rows, pixels, targets, strict=True)
        ]
        wanted = torch.from_numpy(ids)[targets]
        return F.cross_entropy(torch.cat(logits), wanted)

    def write(folder):
        held = {key: p.detach().contiguous() for key, p in parameters.items()}
        save_file(held, folder / "model.safetensors")

    return Subject(parameters, loss, write)


class Trained(NamedTuple):
    """What the reference gave.

    Attributes:
      losses: before each step.
      gradients, weights: folders of checkpoints: the gradient of the first step, and what the
        weights are after the last.
    """

    losses: list[float]
    gradients: Path
    weights: Path


def train(name: str, root: Path) -> Trained:
    """Trains a golden model; writes below `root`."""
    torch.set_num_threads(1)
    subject = (open_mobilevlm if name.startswith("mobilevlm") else open_library)(name)
    parameters = list(subject.parameters.values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=ADAMW["learning_rate"],
        betas=(ADAMW["b1"], ADAMW["b2"]),
        eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
    )
    losses, folders = [], [Path(root) / "gradients", Path(root) / "weights"]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = subject.loss()
        loss.backward()
        losses.append(float(loss.detach()))
        for parameter in parameters:
            if parameter.grad is None:  # Not part of the loss: with zeros it decays like the rest.
                parameter.grad = torch.zeros_like(parameter)
        if step == 0:
            save_gradients(subject, folders[0])
        optimizer.step()
    subject.save(folders[1])
    return Trained(losses, *folders)


def save_gradients(subject: Subject, folder: Path) -> None:
    """Saves the gradients in the place of the parameters, which stay as they are."""
    kept = {name: p.detach().clone() for name, p in subject.parameters.items()}
    with torch.no_grad():
        for parameter in subject.parameters.values():
            parameter.copy_(parameter.grad)
        subject.save(folder)
        for name, parameter in subject.parameters.items():
            parameter.copy_(kept[name])


def gradient_norm(folder: Path) -> float:
    """Of a checkpoint of gradients: sums in float64."""
    held = [load_file(path) for path in Path(folder).glob("*.safetensors")]
    return sum(float(g.double().square().sum()) for part in held for g in part.values()) ** 0.5


def record(names: list[str]) -> dict:
    """What the plain suite compares: losses of all steps and the norm of the first gradient."""
    cases = {}
    for name in names:
        if name in WITHOUT_CLASS:
            cases[name] = dict(losses=[loss_of_logits(name)], grad_norm=None)
            continue
        with tempfile.TemporaryDirectory() as root:
            trained = train(name, Path(root))
            cases[name] = dict(losses=trained.losses, grad_norm=gradient_norm(trained.gradients))
    return dict(
        made_by="python tests/parity/training_reference.py tests/golden/training.json",
        torch=torch.__version__,
        transformers=transformers.__version__,
        answer=ANSWER,
        adamw=ADAMW,
        cases=cases,
    )


def loss_of_logits(name: str) -> float:
    """The mean over targets of what io.npz holds of the published code, in float64."""
    io = read_io(name)
    ids, targets = torch.from_numpy(io["in/input_ids"]), torch.from_numpy(targets_of(io))
    logits = torch.from_numpy(io["out/logits"]).double()
    return float(F.cross_entropy(logits[:, :-1][targets[:, 1:]], ids[targets]))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    folders = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
    made = record([name for name in folders if not name.endswith("_vision")])
    Path(sys.argv[1]).write_text(json.dumps(made, indent=1) + "\n")
