"""`captioning.table` read: for each column of captions where its texts come from, and which files those are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from errors import UserError
from pipelines.as_typed import typed_path
from pipelines.raw import caption_files
from pipelines.raw.tables.column_names import TEXT_NAMES, known_columns
from pipelines.raw.tables.rows import column_and_place, require_columns
from pipelines.raw.texts import TEXT_EXTENSIONS, first_text, text_of_value
from pipelines.store.files import is_remote

MAIN_COLUMN = "caption"


@dataclass(frozen=True, kw_only=True)
class TextAddress:
    """Where the texts of a column come from.

    Attributes:
        column: of captions/<shard>.parquet.
        text: the address as the recipe has it.
        own: for texts of the samples themselves, the name of the text, or nothing for the text that came with the
            image; None where they are in files.
        files: path, glob, folder or URL.
        key_column, text_column: of a table; None is the first there is. `captions[1]` is the second text of a list.
    """

    column: str
    text: str
    own: str | None = None
    files: str = ""
    key_column: str | None = None
    text_column: str | None = None

    @property
    def key(self) -> str:
        """What errors name."""
        return f"captioning.table: {self.column} = {self.text!r}"


def read_addresses(table: str | Mapping[str, str], run: Path) -> list[TextAddress]:
    """Return the address of each column, `caption` first; `{run}` in one stands for the run's folder.

    Raises:
        UserError: an address says too much; names it.
    """
    texts = {MAIN_COLUMN: table or "#"} if isinstance(table, str) else dict(table)
    order = sorted(texts, key=lambda column: column != MAIN_COLUMN)
    return [parse_address(column, texts[column].replace("{run}", str(run))) for column in order]


def parse_address(column: str, text: str) -> TextAddress:
    """Return the address of one column: `files`, `files#text`, `files#key,text`, or `#name` of a sample's own text.

    Raises:
        UserError: what follows `#` is none of these.
    """
    if text.startswith("#"):
        return TextAddress(column=column, text=text, own=text[1:])
    files, columns = text, ""
    if "#" in text and not typed_path(text).exists():
        files, _, columns = text.rpartition("#")
    names = [name.strip() for name in columns.split(",")] if columns else []
    if len(names) > 2 or not all(names):
        raise UserError(
            f"captioning.table: {column} = {text!r}: write files#key,text with the names of two columns, "
            "files#text with one, or no #"
        )
    return TextAddress(
        column=column,
        text=text,
        files=files,
        key_column=names[0] if len(names) == 2 else None,
        text_column=names[-1] if names else None,
    )


def find_files(address: TextAddress) -> list[str]:
    """Return the files that an address means, sorted: tables, tars and folders of texts.

    Of a folder it is what is in it, and the folder itself if it holds texts, or if `#txt` or the like asks for them.

    Raises:
        MissingFileError, UserError: there are none, or not of every part of a pattern; names the key.
    """
    found: list[str] = []
    layout = "text" if address.key_column is None and address.text_column in TEXT_EXTENSIONS else "auto"
    for path in caption_files.find_files(address.key, address.files):
        if is_remote(path) or not Path(path).is_dir():
            found.append(path)
        else:
            found += [file for _, file in caption_files.captions_in_folder(address.key, path, layout=layout)]
    return sorted(found)


class ChosenColumns(NamedTuple):
    """Which column of a table holds keys, which hold texts, the one that counts first, and which text of a list."""

    key: str
    texts: Sequence[str]
    place: int | None = None

    def text_of(self, values: Mapping[str, Any]) -> str | None:
        """Return the text of a row; raises `SampleReject` as `text_of_value`."""
        if self.place is not None:
            return text_of_value(values.get(self.texts[0]), self.place)
        return first_text(values.get(name) for name in self.texts)


def choose_columns(address: TextAddress, columns: Sequence[str], file: str) -> ChosenColumns:
    """Return which columns of a table hold keys and texts: those that are named, else all that are called so.

    Raises:
        UserError: there are none; names the key, the file and its columns.
    """
    try:
        key = address.key_column or caption_files.choose_key_column(columns)
        if key is None:
            raise UserError(
                f"{file}: none of its columns is known as that of the keys, such as key, path, image or id; "
                f"columns are {', '.join(columns)}"
            )
        require_columns(file, [key], columns)
        if address.text_column is not None:
            name, place = column_and_place(file, address.text_column, columns)
            return ChosenColumns(key, [name], place)
        others = [name for name in columns if name != key]
        caption_files.choose_text_column(file, others)
        return ChosenColumns(key, known_columns(TEXT_NAMES, others))
    except UserError as error:
        raise UserError(f"{address.key}: {error}; write {address.files}#key,text") from None
