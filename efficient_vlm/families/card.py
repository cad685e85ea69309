"""The model card of what leaves for a hub: README.md with a YAML header, from recorded facts only.

A fact that nobody recorded is left out of the header, and is "not recorded" in the text. The form
is that of the Hugging Face Hub (its page "Model Cards"); `huggingface_hub` writes the YAML.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_vlm.families import card_tables as tables
from efficient_vlm.families.card_tables import NOT_RECORDED, cell, code
from efficient_vlm.families.hub import README, Source
from efficient_vlm.files import write_atomic

# The base's own card, kept beside ours: its licence and its warnings hold for what was made of it.
BASE_README = "README_base.md"
OLD_README = "README_old.md"
TAG = "efficient_vlm"
_LICENCE = ("license", "license_name", "license_link")


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that another was made of.

    Attributes:
      name, revision, commit: on a hub, as in `hub.Source`.
      license, license_name, license_link: as the header of its card has them.
      folder: last part of the folder's path, for one without a name.
    """

    name: str | None = None
    revision: str | None = None
    commit: str | None = None
    license: str | Sequence[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    folder: str | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """A source of training data.

    Attributes:
      name: of the file or builder.
      hub: name of the data set on a hub, "org/name".
      sha256: digest of the file, or of the content.
      license: as its source states it.
      rows, used: how many rows there were, and how many were trained on.
      skipped: reason -> how many rows were left out for it.
    """

    name: str
    hub: str | None = None
    sha256: str | None = None
    license: str | None = None
    rows: int | None = None
    used: int | None = None
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Card:
    """What is known of a model that leaves.

    Attributes:
      base: what it was made of.
      trained: None where nothing was trained; else field -> value of the training, which may be
        empty where weights were changed and nobody recorded how.
      relation: to the base, in the words of the hub: "finetune", "adapter", "quantized", "merge".
      data: sources of training data; empty where none is recorded.
      params, trained_params: number of parameters, and of those that were trained.
      dtype: of the stored weights.
      compressor: name and options; budgets: visual tokens per picture that it was trained or
        evaluated at.
      results, controls, cost: rows of results.json.
      protocol: how the results came about.
      energy: field -> value, as recorded.
      command, versions: how it was made, and with what.
      library, pipeline, tags: of the header.
    """

    base: Base = Base()
    trained: Mapping[str, Any] | None = None
    relation: str | None = None
    data: Sequence[Data] = ()
    params: int | None = None
    trained_params: int | None = None
    dtype: str | None = None
    compressor: Mapping[str, Any] | None = None
    budgets: Sequence[int] = ()
    results: Sequence[Mapping[str, Any]] = ()
    controls: Sequence[Mapping[str, Any]] = ()
    cost: Sequence[Mapping[str, Any]] = ()
    protocol: str | None = None
    energy: Mapping[str, Any] | None = None
    command: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    library: str = "transformers"
    pipeline: str = "image-text-to-text"
    tags: Sequence[str] = ()

    def header(self) -> dict[str, Any]:
        """The fields of the YAML header; those without a fact are absent."""
        licence = {name: getattr(self.base, name) for name in _LICENCE}
        fields = {
            "base_model": self.base.name,
            "base_model_relation": self.relation if self.base.name else None,
            "base_model_revision": self.base.commit if self.base.name else None,
            **licence,
            "datasets": list(dict.fromkeys(each.hub for each in self.data if each.hub)),
            "library_name": self.library,
            "pipeline_tag": self.pipeline,
            "tags": list(dict.fromkeys([TAG, *self.tags])),
        }
        return {name: value for name, value in fields.items() if value}

    def text(self) -> str:
        """The whole card."""
        from huggingface_hub import ModelCardData

        name = self.base.name or self.base.folder or "Model"
        title = cell(name.rpartition("/")[2])
        title += ", trained further" if self.trained is not None else ""
        parts = {
            f"# {title}": self._what(),
            "## Base": self._base(),
            "## Training": self._training(),
            "## Data": tables.data(self.data) if self.trained is not None else "None was used.",
            "## Compressor": self._compressor(),
            "## Results": self._results(),
            "## Cost": tables.cost(self.cost),
            "## Energy": tables.fields(self.energy or {}),
            "## How it was made": self._making(),
        }
        body = "\n\n".join(f"{heading}\n\n{text}" for heading, text in parts.items())
        return f"---\n{ModelCardData(**self.header()).to_yaml()}\n---\n\n{body}\n"

    def write(self, directory: str | os.PathLike[str]) -> Path:
        """Writes README.md; one there that is no card of ours becomes README_old.md.

        Raises:
          OSError: the folder cannot be written.
        """
        path = Path(directory) / README
        if path.is_file() and not is_ours(read_header(path)):
            os.replace(path, path.with_name(OLD_README))
        write_atomic(path, self.text().encode())
        return path

    def _what(self) -> str:
        known = self.base.name or self.base.folder
        base = f"of {code(known)}" if known else "of a model that is not recorded"
        if self.trained is None:
            what = f"The weights {base}, written by efficient_vlm; nothing was trained."
        elif not known:
            what = "Weights trained and written by efficient_vlm."
        elif self.relation == "adapter":
            what = f"An adapter {base}, trained and written by efficient_vlm."
        else:
            what = f"Weights made of those {base}, written by efficient_vlm."
        counts = {"parameters": self.params, "trained": self.trained_params, "dtype": self.dtype}
        counts = {name: value for name, value in counts.items() if value is not None}
        return what + (f"\n\n{tables.fields(counts)}" if counts else "")

    def _base(self) -> str:
        base = self.base
        where = base.name and code(base.name)
        if where is None and base.folder is not None:
            where = f"a folder {code(base.folder)}, whose name on a hub is not recorded"
        licence = base.license if isinstance(base.license, str | None) else ", ".join(base.license)
        names = [text for text in (licence, base.license_name, base.license_link) if text]
        lines = [
            f"- model: {where or NOT_RECORDED}",
            f"- revision: {code(base.revision) if base.revision else 'the default one'}, "
            f"commit {code(base.commit) if base.commit else NOT_RECORDED}",
            f"- licence, as its card states it: {', '.join(map(cell, names)) or NOT_RECORDED}",
        ]
        return "\n".join(lines if base.name else [lines[0], lines[2]])

    def _training(self) -> str:
        if self.trained is None:
            return "Nothing was trained."
        return tables.fields(self.trained)

    def _compressor(self) -> str:
        if not self.compressor:
            return NOT_RECORDED
        lines = [tables.fields(self.compressor)]
        if self.budgets:
            lines.append(f"- budgets (visual tokens): {', '.join(map(str, self.budgets))}")
        text = "\n".join(lines)
        if self.compressor.get("name") == "none":
            return text
        return f"{text}\n\nefficient_vlm applies it; other libraries may read all visual tokens."

    def _results(self) -> str:
        text = tables.results(self.results)
        if self.controls:
            text += f"\n\nControls:\n\n{tables.results(self.controls)}"
        return f"Protocol: {cell(self.protocol)}\n\n{text}" if self.protocol else text

    def _making(self) -> str:
        command = f" {NOT_RECORDED}"
        if self.command:
            command = f"\n\n    {' '.join(self.command.split())}"
        return f"Command:{command}\n\nVersions:\n\n{tables.fields(self.versions)}"


def read_header(path: Path) -> dict[str, Any]:
    """The YAML header of a card; {} where there is none that can be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # Of any kind that YAML raises: a stranger's card must not stop an export.
        return {}


def is_ours(header: Mapping[str, Any]) -> bool:
    """Whether the card with this header was written here."""
    tags = header.get("tags")
    return isinstance(tags, list) and TAG in tags


def read_base(source: Source) -> Base:
    """What is known of a model that another is made of; licences come from its card alone."""
    header = read_header(source.directory / README)
    licence = {name: _plain(header.get(name)) for name in _LICENCE}
    name, revision, commit = source.name, source.revision, source.commit
    if name is None and is_ours(header):  # An earlier export: its base is the base.
        name, commit = (_plain(header.get(f"base_model{end}")) for end in ("", "_revision"))
    return Base(name, revision, commit, **licence, folder=source.directory.resolve().name)


def _plain(value: Any) -> Any:
    """Text, or a list of texts; None for anything else that a header may hold."""
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value
    return value if isinstance(value, str) else None


def copy_terms(source: Path, target: Path) -> None:
    """Copies the licence files of a base, and its card as README_base.md."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name.startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(path, target / path.name)
    card = source / README
    if is_ours(read_header(card)):
        card = source / BASE_README
    if card.is_file():
        shutil.copyfile(card, target / BASE_README)
