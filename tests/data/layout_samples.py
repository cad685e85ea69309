"""The same rows in every layout, and pictures of one colour."""

import base64
import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from data_samples import image_bytes

from efficient_vlm.data import DataConfig


def config(path="", **changes):
    fields = {"batch_size": 4, "image_size": 8, "max_length": 64, "vocab_size": 300}
    fields |= {"test_fraction": 0.0, "num_threads": 0, "max_images": 2, "source": "auto"}
    return DataConfig.from_mapping({"path": str(path), **(fields | changes)})


def rows(number):
    """[(id, picture, question, answer)]"""
    return [(f"r{i}", image_bytes(i), f"What is {i}?", f"Noise {i}.") for i in range(number)]


def messages(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_messages(folder, given):
    lines = [
        {"id": i, "images": [base64.b64encode(p).decode()], "messages": messages("<image>" + q, a)}
        for i, p, q, a in given
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "rows.jsonl"


def write_parts(folder, given):
    """Content in parts, with the pictures in them."""
    lines = []
    for number, (name, picture, question, answer) in enumerate(given):
        (folder / f"part{number}.png").write_bytes(picture)
        asked = [
            {"type": "image", "image": f"part{number}.png"},
            {"type": "text", "text": question},
        ]
        lines.append({"id": name, "messages": messages(asked, [{"type": "text", "text": answer}])})
    (folder / "parts.json").write_text(json.dumps(lines))
    return folder / "parts.json"


def parquet_rows(given):
    return [
        {
            "id": i,
            "images": [{"bytes": p, "path": None}],
            "texts": [{"user": q, "assistant": a, "source": "made"}],
        }
        for i, p, q, a in given
    ]


def write_parquet(path, listed, group=3, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(listed, **options), path, row_group_size=group)
    return path


def write_shards(folder, given):
    half = len(given) // 2
    for name, part in (("b", given[half:]), ("a", given[:half])):
        write_parquet(folder / f"{name}.parquet", parquet_rows(part))
    return folder / "*.parquet"


def write_questions(folder, given):
    """Columns question, answers, image."""
    listed = [
        {"id": i, "question": q, "answers": [a, "other", a], "image": {"bytes": p, "path": "x.png"}}
        for i, p, q, a in given
    ]
    return write_parquet(folder / "vqa" / "val-00000-of-00001.parquet", listed)


def write_csv(folder, given, name="rows.csv", delimiter=","):
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["id", "file_name", "question", "answer"])
    for number, (i, picture, question, answer) in enumerate(given):
        (folder / f"cell{number}.png").write_bytes(picture)
        writer.writerow([i, f"cell{number}.png", question, answer])
    (folder / name).write_text(text.getvalue())
    return folder / name


def add(tar, name, data, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def write_tar(folder, given, name="rows.tar"):
    with tarfile.open(folder / name, "w") as tar:
        for i, picture, question, answer in given:
            said = {"question": question, "id": i}
            add(tar, f"deep/{i}.json", json.dumps(said).encode())
            add(tar, f"deep/{i}.png", picture)
            add(tar, f"deep/{i}.txt", answer.encode())
    return folder / name


def tiles(folder, names=("forest", "river", "field"), splits=None, file_format="array_record"):
    """A labelled picture set, prepared by TFDS without TensorFlow; its folder."""
    import tensorflow_datasets as tfds

    splits = splits or {"train": range(12), "test": range(12, 18)}

    class Tiles(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=list(names)),
                "captions": tfds.features.Sequence({"text": tfds.features.Text()}),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {name: self._generate_examples(numbers) for name, numbers in splits.items()}

        def _generate_examples(self, numbers):
            for i in numbers:
                captions = [{"text": f"tile {i}"}, {"text": "a tile"}]
                yield (
                    i,
                    {
                        "image": io.BytesIO(image_bytes(i)),
                        "label": i % len(names),
                        "captions": captions,
                    },
                )

    builder = Tiles(data_dir=folder, file_format=file_format)
    builder.download_and_prepare()
    return builder.data_dir


def indices(iterator, number):
    return np.concatenate([next(iterator)["index"] for _ in range(number)]).tolist()
