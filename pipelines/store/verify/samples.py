"""Checks of a folder of samples: each row of its table has its image, whole and of what the row says."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.store.verify.file_checks import picture_damage
from pipelines.store.verify.findings import Check, Problem
from pipelines.store.verify.folders import Folder
from pipelines.store.verify.kinds import ANEW

TABLE_NAME = "samples.parquet"
COLUMNS = ("file", "key", "prompt", "seed", "width", "height")


def read_samples(folder: Folder) -> list[dict[str, Any]]:
    """Return the rows of a folder's table; none where it cannot be read, which the check of its hash tells."""
    if TABLE_NAME not in folder.files or folder.manifest is None:
        return []
    try:
        return pq.read_table(folder.files[TABLE_NAME], columns=list(COLUMNS)).to_pylist()
    except (pa.ArrowException, OSError, KeyError):
        return []


def sample_checks(folder: Folder, rows: list[dict[str, Any]]) -> Iterator[Check]:
    """Check the image of each row."""
    for row in rows:
        path = folder.path / row["file"]
        yield Check(directory=folder.path, files=(path,), look=partial(_check_image, folder, row, path))


def _check_image(folder: Folder, row: Mapping[str, Any], path: Path) -> Problem | None:
    if not path.is_file():
        text = f"{path.name} is missing, though {TABLE_NAME} has it"
        return folder.problem(text, key=row["key"], mend=f"`{folder.command}` draws it anew")
    if damage := picture_damage(path):
        return folder.problem(f"{path.name} {damage}", key=row["key"], mend=folder.mend(ANEW, path))
    with Image.open(path) as image:
        found = {"prompt": image.info.get("prompt"), "seed": image.info.get("seed"), "size": image.size}
    expected = {"prompt": row["prompt"], "seed": str(row["seed"]), "size": (row["width"], row["height"])}
    for name, value in expected.items():
        if found[name] != value:
            text = f"{path.name}: its {name} is {found[name]!r}, but {TABLE_NAME} says {value!r}"
            return folder.problem(text, key=row["key"], mend=folder.mend(ANEW, path))
    return None
