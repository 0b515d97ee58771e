"""`captioning.table` read: for each column of captions where its texts come from, and which files those are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from errors import MissingFileError, UserError
from pipelines.raw.caption_files import choose_key_column
from pipelines.raw.patterns import GLOB, expand_braces
from pipelines.raw.tables import table_format
from pipelines.raw.texts import TEXT_FIELDS
from pipelines.store.files import is_remote
from pipelines.store.remote import list_urls

MAIN_COLUMN = "caption"
TEXT_SUFFIXES = (".txt", ".caption", ".text")


@dataclass(frozen=True, kw_only=True)
class TextAddress:
    """Where the texts of a column come from.

    Attributes:
        column: of captions/<shard>.parquet.
        text: the address as the recipe has it.
        own: for texts of the samples themselves, the name of the text, or nothing for the text that came with the
            image; None where they are in files.
        files: path, glob, folder or URL.
        key_column, text_column: of a table; None is the first of those there are.
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
    if "#" in text and not Path(text).expanduser().exists():
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

    A folder with tables in it and no texts is its tables.

    Raises:
        MissingFileError: there are none; names the key.
    """
    pattern = address.files
    if is_remote(pattern):
        found = [
            url for part in expand_braces(pattern) for url in (list_urls(part) if set(part) & set(GLOB) else [part])
        ]
    else:
        path = Path(pattern.removeprefix("file://")).expanduser()
        found = [str(path)] if path.exists() else _match(str(path))
    found = [file for path in found for file in _tables_of(path)]
    if not found:
        raise MissingFileError(f"{address.key}: there is no such file")
    return sorted(found)


def _match(pattern: str) -> list[str]:
    matched = []
    for part in expand_braces(pattern):
        path = Path(part)
        matched += [str(found) for found in Path(path.anchor or ".").glob(str(path.relative_to(path.anchor)))]
    return matched


def _tables_of(path: str) -> list[str]:
    folder = Path(path)
    if is_remote(path) or not folder.is_dir():
        return [path]
    tables = [str(file) for file in folder.iterdir() if table_format(file.name) not in (None, "lines")]
    return tables if tables and next(text_files(folder), None) is None else [path]


def text_files(folder: Path) -> Iterator[Path]:
    """Yield the files of texts in a folder and those below it."""
    for file in folder.rglob("*"):
        if file.suffix.lower() in TEXT_SUFFIXES and not file.name.startswith("."):
            yield file


def choose_columns(address: TextAddress, columns: Sequence[str], file: str) -> tuple[str, str]:
    """Return which columns of a table hold keys and texts.

    Raises:
        UserError: there are none; names the file and its columns.
    """
    key = address.key_column or choose_key_column(columns)
    text = address.text_column or next((name for name in TEXT_FIELDS if name in columns and name != key), None)
    for kind, name in (("keys", key), ("texts", text)):
        if name is None or name not in columns:
            wanted = f"no column {name!r}" if name else f"no column of {kind} that is known by its name"
            raise UserError(
                f"{address.key}: {file} has {wanted}; its columns are {', '.join(columns)}: "
                f"write {address.files}#key,text"
            )
    assert key is not None and text is not None, "raised above"
    return key, text
