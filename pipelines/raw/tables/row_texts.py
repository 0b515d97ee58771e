"""What the rows of tables say of samples: keys, texts and classes, by columns that are read when they are needed."""

import functools
import math
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipelines.raw.samples import split_at_extension
from pipelines.raw.tables.column_names import ID_NAMES, KEY_NAMES, TEXT_NAMES, known_column, known_columns
from pipelines.raw.tables.open_table import Table, open_table
from pipelines.raw.tables.rows import key_of_cell, local_name
from pipelines.raw.texts import first_text, split_place, text_of_value

LABEL_COLUMN = "label"
MAX_LABEL = 2**31 - 1
MAX_LABEL_DIGITS = 100
MAX_KEY_BYTES = 900


class RowTexts:
    """The columns of some tables of the same kind, whose rows are numbered through all of them; from any thread."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._cells: dict[str, list[Any]] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def columns(self) -> list[str]:
        """Names of the columns of any of the tables."""
        names: dict[str, None] = {}
        for path in self._paths:
            with open_table(path) as table:
                names.update(dict.fromkeys(table.columns))
        return list(names)

    @functools.cached_property
    def text_columns(self) -> list[str]:
        """The columns that are called as texts are, the one that counts first."""
        return known_columns(TEXT_NAMES, self.columns)

    def column(self, name: str) -> list[Any]:
        """Return the cells of a column, None for each row that is at fault or whose table has no such column."""
        with self._lock:
            if name not in self._cells:
                # Whoever asks for one of the texts will ask for the others.
                names = self.text_columns if name in self.text_columns else [name]
                for known, cells in self._read(names).items():
                    self._cells[known] = cells
            return self._cells[name]

    def text(self, row: int, column: str | None = None) -> str | None:
        """Return the text in `column`, or in the first of the columns of texts that has one; raises `SampleReject`.

        Where all are blank it is empty.
        """
        if column is not None:
            return self.named_text(row, column)
        return first_text(self.column(name)[row] for name in self.text_columns)

    def named_text(self, row: int, name: str) -> str | None:
        """Return the text of a column, of a list of texts that which `split_place` says; raises `SampleReject`."""
        field, place = split_place(name) if name not in self.columns else (name, None)
        return text_of_value(self.column(field)[row], place) if field in self.columns else None

    def label(self, row: int) -> int | None:
        """Return the class of a row, or None."""
        return label_of(self.column(LABEL_COLUMN)[row]) if LABEL_COLUMN in self.columns else None

    def has_labels(self) -> bool:
        """Whether some row has a class."""
        return LABEL_COLUMN in self.columns and any(label_of(cell) is not None for cell in self.column(LABEL_COLUMN))

    def _read(self, names: Sequence[str]) -> dict[str, list[Any]]:
        cells: dict[str, list[Any]] = {name: [] for name in names}
        for path in self._paths:
            with open_table(path) as table:
                found = [name for name in names if name in table.columns]
                for row in table.rows(range(table.num_rows), found):
                    for name in names:
                        cells[name].append(None if row.reject else row.values.get(name))
        return cells


def label_of(cell: Any) -> int | None:
    """Return the class that a cell or the text of a `.cls` means, or None where there is none that fits int32."""
    if isinstance(cell, float) and cell.is_integer():  # pandas makes floats of whole numbers where one is missing
        cell = int(cell)
    if isinstance(cell, str):
        cell = cell.strip()
        # Python refuses to read a number of thousands of digits.
        if not cell.isdecimal() or len(cell) > MAX_LABEL_DIGITS:
            return None
        cell = int(cell)
    if not isinstance(cell, int) or isinstance(cell, bool):
        return None
    return cell if 0 <= cell <= MAX_LABEL else None


def row_keys(table: Table, name: str, *, path_column: str | None = None) -> tuple[list[str], list[str | None]]:
    """Return a key for each row of a table, and the reason why the row cannot be used, or None.

    The key is that of a column called so; else an id, or the path in `path_column` below the folder that all are in
    and without extension, if each row has its own; else shard `name` and number of the row.
    """
    own = known_column(KEY_NAMES, table.columns)
    own = None if own == path_column else own  # of an object of JSON by path
    names = known_columns(ID_NAMES, table.columns) if own is None else [own]
    names += [path_column] if path_column is not None and path_column not in names else []
    cells: dict[str, list[Any]] = {column: [] for column in names}
    rejects: list[str | None] = []
    for row in table.rows(range(table.num_rows), names):
        rejects.append(row.reject)
        for column in names:
            cells[column].append(row.values.get(column))
    numbered = [f"{name}_{row:08d}" for row in range(len(rejects))]
    if own is not None:
        return _own_keys(cells[own], numbered, rejects)
    for column in names:
        keys = _path_keys(cells[column]) if column == path_column else [_id_key(cell) for cell in cells[column]]
        if len(set(keys)) == len(keys) and None not in keys:
            return [key for key in keys if key is not None], rejects
    return numbered, rejects


def _own_keys(
    cells: Sequence[Any], numbered: Sequence[str], rejects: Sequence[str | None]
) -> tuple[list[str], list[str | None]]:
    keys = [_id_key(cell) for cell in cells]
    counts = Counter(keys)
    reasons: list[str | None] = []
    for key, reject in zip(keys, rejects, strict=True):
        reason = "no_key" if key is None else "duplicate_key" if counts[key] > 1 else None
        reasons.append(reject or reason)
    return [key or number for key, number in zip(keys, numbered, strict=True)], reasons


def _id_key(cell: Any) -> str | None:
    """Return a cell as a key, or None if it is no name that a file below a folder can have."""
    is_missing = cell is None or (isinstance(cell, float) and (math.isnan(cell) or not cell.is_integer()))
    if is_missing or not isinstance(cell, str | bytes | int | float):
        return None
    key = key_of_cell(cell).strip()
    parts = key.split("/")
    is_name = bool(key) and "\0" not in key and "\n" not in key and not {"", ".", ".."} & set(parts)
    return key if is_name and len(key.encode()) <= MAX_KEY_BYTES else None


def _path_keys(cells: Sequence[Any]) -> list[str | None]:
    """Return paths as keys: without the folder that all are in, and without extensions; also of paths of Windows."""
    names = [key_of_cell(local_name(cell.strip())).strip() if isinstance(cell, str) else None for cell in cells]
    paths = [name and (name if "/" in name else name.replace("\\", "/")).split("/") for name in names]
    parts = [[part for part in path if part not in ("", ".")] if path else [] for path in paths]
    folders = [path[:-1] for path in parts if path]
    first, last = (min(folders), max(folders)) if folders else ([], [])
    # Of sorted names the first and the last differ as early as any two do.
    depth = next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), None)
    depth = min(len(first), len(last)) if depth is None else depth
    return [_id_key(split_at_extension("/".join(path[depth:]))[0]) if path else None for path in parts]
