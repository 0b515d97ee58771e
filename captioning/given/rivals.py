"""Columns of a table of captions that may name the image as well as the one that was chosen, and say otherwise."""

from collections.abc import Mapping, Sequence

from captioning.given.addresses import TextAddress, choose_columns
from errors import UserError
from pipelines.raw.tables.column_names import SAMPLE_NAMES, known_columns
from pipelines.raw.tables.open_table import open_table, table_format
from pipelines.raw.tables.places import beginnings, place_of
from pipelines.raw.tables.rows import key_of_cell

ROWS_LOOKED_AT = 1000
# An `id` beside one of these is the row's own.
RIVAL_NAMES = [name for name in SAMPLE_NAMES if name != "id"]


class RivalKeys:
    """The other columns of a table that are called as keys are, by the places in its first rows."""

    def __init__(self, address: TextAddress, file: str) -> None:
        self._address = address
        # None where several rows have one value, as a file's name in several folders: it tells nothing.
        self._rows: dict[str, dict[str, int | None]] = {}
        if address.key_column is not None or table_format(file) is None:
            return
        with open_table(file) as table:
            self._chosen = choose_columns(address, table.columns, file)
            known = known_columns(RIVAL_NAMES, table.columns)
            names = [name for name in known if name not in (self._chosen.key, *self._chosen.texts)]
            for row in table.rows(range(min(ROWS_LOOKED_AT, table.num_rows)), names):
                for name in names:
                    self._note(name, row.values, row.number)

    def _note(self, name: str, values: Mapping[str, object], number: int) -> None:
        cell = values.get(name)
        if cell is not None and not isinstance(cell, dict | list):
            rows, place = self._rows.setdefault(name, {}), place_of(key_of_cell(cell))
            rows[place] = None if place in rows else number

    def require_same(self, sample: str, places: Sequence[str], chosen: int) -> None:
        """Refuse the table if another column says that another row than the `chosen` one is that of a sample.

        Raises:
            UserError: it does; names both columns, and what to type.
        """
        for name, rows in self._rows.items():
            found = next((rows[place] for full in places for place in beginnings(full) if place in rows), None)
            if found is not None and chosen < ROWS_LOOKED_AT and found != chosen:
                key, address = self._chosen.key, f"{self._address.files}#{name},{self._chosen.texts[0]}"
                raise UserError(
                    f"{self._address.key}: by column {key!r} row {chosen + 1} and by {name!r} row {found + 1} "
                    f"are of {sample}: say which of them names images, such as {address}"
                )
