"""The same samples in every way in which raw shards come: a tar, folders, Parquet and Arrow, tables of paths."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from raw_shards import write_tar

COLUMNS: tuple[str, ...] = ("file_name", "text", "label")


class Sample(NamedTuple):
    key: str
    image: bytes
    text: str
    label: int

    @property
    def file_name(self) -> str:
        return f"{self.key}.png"


def write_folder(place: Path, samples: Sequence[Sample], *, has_texts: bool = True) -> Path:
    for sample in samples:
        file = place / sample.file_name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(sample.image)
        if has_texts:
            file.with_suffix(".txt").write_text(sample.text)
    return place


def write_table(path: Path, samples: Sequence[Sample], *, folder: str = "") -> Path:
    """A table of paths and texts, in the format that its name says."""
    rows = [{"file_name": folder + sample.file_name, "text": sample.text, "label": sample.label} for sample in samples]
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    text = io.StringIO()
    if kind in ("csv", "tsv"):
        writer = csv.DictWriter(text, list(COLUMNS), delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
    elif kind == "jsonl":
        text.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        json.dump(rows, text)
    data = text.getvalue().encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def write_rows(path: Path, samples: Sequence[Sample], *, is_struct: bool, row_group_size: int = 7) -> Path:
    images = [sample.image for sample in samples]
    columns = {"text": [sample.text for sample in samples], "label": [sample.label for sample in samples]}
    if is_struct:
        structs = [{"bytes": sample.image, "path": sample.file_name} for sample in samples]
        table = pa.table({"image": structs, **columns})
    else:
        table = pa.table({"key": [sample.key for sample in samples], "png": images, **columns})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def _in_tar(place: Path, samples: Sequence[Sample]) -> Path:
    members = []
    for sample in samples:
        members += [(sample.file_name, sample.image), (f"{sample.key}.txt", sample.text.encode())]
        members.append((f"{sample.key}.cls", str(sample.label).encode()))
    return write_tar(place / "photos.tar", members)


def _folder_of_classes(place: Path, samples: Sequence[Sample]) -> Path:
    for sample in samples:
        path = place / "photos" / f"{sample.key}.cls"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(sample.label))
    return write_folder(place / "photos", samples)


def _metadata(name: str) -> Callable[[Path, Sequence[Sample]], Path]:
    def write(place: Path, samples: Sequence[Sample]) -> Path:
        write_folder(place / "photos", samples, has_texts=False)
        write_table(place / "photos" / name, samples)
        return place / "photos"

    return write


def _table(name: str) -> Callable[[Path, Sequence[Sample]], Path]:
    def write(place: Path, samples: Sequence[Sample]) -> Path:
        write_folder(place / "images", samples, has_texts=False)
        return write_table(place / name, samples, folder="images/")

    return write


def _data_set(place: Path, samples: Sequence[Sample]):
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    rows = [
        {"image": {"bytes": sample.image, "path": sample.file_name}, "text": sample.text, "label": sample.label}
        for sample in samples
    ]
    return datasets.Dataset.from_list(rows, features=features)


def _saved(place: Path, samples: Sequence[Sample]) -> Path:
    _data_set(place, samples).save_to_disk(str(place / "photos"))
    return place / "photos"


def _exported(place: Path, samples: Sequence[Sample]) -> Path:
    (place / "photos" / "data").mkdir(parents=True)
    _data_set(place, samples).to_parquet(str(place / "photos" / "data" / "train-00000-of-00001.parquet"))
    return place / "photos"


# What is typed as SHARDS for each way in.
KINDS: dict[str, Callable[[Path, Sequence[Sample]], Path]] = {
    "tar": _in_tar,
    "folder": _folder_of_classes,
    "metadata.csv": _metadata("metadata.csv"),
    "metadata.jsonl": _metadata("metadata.jsonl"),
    "metadata.parquet": _metadata("metadata.parquet"),
    "struct": lambda place, samples: write_rows(place / "photos.parquet", samples, is_struct=True),
    "binary": lambda place, samples: write_rows(place / "photos.parquet", samples, is_struct=False),
    "one_group": lambda place, samples: write_rows(place / "p.parquet", samples, is_struct=True, row_group_size=10**6),
    "save_to_disk": _saved,
    "to_parquet": _exported,
    "table.csv": _table("photos.csv"),
    "table.tsv": _table("photos.tsv"),
    "table.jsonl": _table("photos.jsonl"),
    "table.json": _table("photos.json"),
    "table.csv.gz": _table("photos.csv.gz"),
    "table.jsonl.gz": _table("photos.jsonl.gz"),
    "table.parquet": _table("photos.parquet"),
}
