"""Files of captions, wherever they are: which there are, which of their columns is the key, and which the text."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from errors import MissingFileError, UserError
from pipelines.as_typed import typed_path
from pipelines.raw.patterns import expand_braces, match_urls
from pipelines.raw.samples import IMAGE_EXTENSIONS, is_note, is_stray, readable_name, split_at_extension
from pipelines.raw.tables.column_names import SAMPLE_NAMES, TEXT_NAMES, known_column
from pipelines.raw.tables.open_table import TABLES, TableFormat, table_format
from pipelines.raw.texts import TEXT_EXTENSIONS, text_members
from pipelines.store.files import is_remote

FILE_EXTENSIONS = (*IMAGE_EXTENSIONS, *TEXT_EXTENSIONS)
# Images, and their classes and masks.
BESIDE_TEXTS = (*FILE_EXTENSIONS, "cls", "json")
MAX_NAMED = 3
# What `datasets` writes of a folder of tables.
NO_TABLES = re.compile(r"dataset_infos?\.json|dataset_dict\.json|state\.json", re.IGNORECASE)
TAR = re.compile(r".*\.(tar|tar\.gz|tgz)", re.IGNORECASE | re.DOTALL)
TEXTS, TARS = "text", "tar"  # kinds of files of captions that are no tables


def choose_key_column(columns: Sequence[str]) -> str | None:
    """Return the column of a table that is the key of its rows, known by its name, or None."""
    return known_column(SAMPLE_NAMES, columns)


def choose_text_column(path: str, columns: Sequence[str]) -> str:
    """Return the column of a table that holds the texts, known by its name.

    Raises:
        UserError: there is none; names the columns there are.
    """
    found = known_column(TEXT_NAMES, columns)
    if found is None:
        raise UserError(
            f"{path}: none of its columns is known as that of the texts, such as {', '.join(TEXT_NAMES[:3])}; columns "
            f"are {', '.join(columns) or 'none'}: name one of them"
        )
    return found


def key_of_path(name: str) -> str:
    """Return a key that may be the path of an image or text: as in folders, without what such files end with."""
    if "." not in name:
        return name
    stem, extension = split_at_extension(name)
    return stem if extension.lower().rpartition(".")[2] in FILE_EXTENSIONS else name


def find_files(key: str, pattern: str) -> list[str]:
    """Return the files and folders that a path, pattern or URL means; what exists is taken as it is.

    Raises:
        MissingFileError: there are none; names the recipe's `key`.
    """
    if is_remote(pattern):
        try:
            return [found for url in expand_braces(pattern) for found in match_urls(url)]
        except MissingFileError as error:
            raise MissingFileError(f"{key}: {str(error).removeprefix('data.shards: ')}") from None
    path = typed_path(pattern.removeprefix("file://"))
    if path.exists():
        return [str(path)]
    found = []
    for part in map(Path, expand_braces(str(path))):
        matched = sorted(Path(part.anchor or ".").glob(str(part.relative_to(part.anchor))))
        if not matched:
            raise MissingFileError(f"{key}: no file matches {part}")
        found += [str(file) for file in matched]
    return found


def text_files(folder: str) -> dict[str, list[Path]]:
    """Return the files that may be the text of each key in a folder and the folders in it, the one that counts first.

    Keys and order are those of raw shards: `a.txt` is before `a.caption`, and `a.jpg.txt` is of `a` too.
    """
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(file for file in _files(folder) if _kind(file.name) == TEXTS):
        key, extension = split_at_extension(str(file.relative_to(folder)))
        found.setdefault(key, {}).setdefault(extension.lower(), file)
    ordered = {key: [files[name] for name in text_members(list(files), None)] for key, files in found.items()}
    return {key: files for key, files in ordered.items() if files}


def stray_files(folder: str) -> list[str]:
    """Return the names of files in a folder of texts that are neither texts nor what may lie beside them."""
    files = (readable_name(str(file.relative_to(folder))) for file in Path(folder).rglob("*") if file.is_file())
    return sorted(
        name for name in files if is_stray(name) or is_note(name) or name.rpartition(".")[2].lower() not in BESIDE_TEXTS
    )


def say_strays(log: logging.Logger, path: str, names: Sequence[str]) -> None:
    """Warn of members of a folder or tar of texts that belong to no sample, with their number and some of them."""
    if names:
        log.warning(f"{path}: {len(names):,} members are no samples, such as {', '.join(names[:MAX_NAMED])}")


def files_by_kind(folder: str) -> dict[str, list[Path]]:
    """Return what captions a folder and the folders in it hold: tables by format, "tar", and "text" for a file each."""
    kinds: dict[str, list[Path]] = {}
    for file in _files(folder):
        if kind := _kind(file.name):
            kinds.setdefault(kind, []).append(file)
    return {kind: sorted(files) for kind, files in sorted(kinds.items())}


def captions_in_folder(key: str, folder: str, *, layout: str = "auto") -> list[tuple[str, str]]:
    """Return kind and path of what a folder holds: its tables, its tars ("text"), or itself if it holds texts.

    Args:
        key: of the recipe; errors begin with it.
        layout: the kind that is meant, or "auto".

    Raises:
        UserError: it holds several kinds of them, or none; names some.
    """
    kinds = files_by_kind(folder)
    wanted = {"auto": set(kinds), "text": {TEXTS, TARS}}.get(layout, {layout})
    chosen = {kind: files for kind, files in kinds.items() if kind in wanted}
    if not chosen:
        others = f"; it holds {', '.join(kinds)}" if kinds else ""
        of_layout = "" if layout == "auto" else f" of layout {layout}"
        raise MissingFileError(f"{key}: {folder} holds no captions{of_layout}{others}")
    if len(chosen) > 1:
        some = " and ".join(
            f"{kind} ({readable_name(str(files[0].relative_to(folder)))})" for kind, files in chosen.items()
        )
        raise UserError(
            f"{key}: {folder} holds {some}, and only one of them can be meant: name its files, such as "
            f"{folder}/*{next(iter(chosen.values()))[0].suffix}, or a folder that has nothing else"
        )
    ((kind, files),) = chosen.items()
    if kind == TEXTS:
        return [(TEXTS, folder)]
    return [(TEXTS if kind == TARS else kind, str(file)) for file in files]


def kind_of_file(path: str) -> TableFormat | str:
    """Return the kind of a file of captions: the format of a table, or "tar".

    Raises:
        UserError: its name does not say it; names the formats there are.
    """
    name = path.partition("?")[0] if path.startswith(("http://", "https://")) else path
    if TAR.fullmatch(name):
        return TARS
    found = table_format(path)
    if found is None:
        raise UserError(f"{path} is not called as a file of captions is: {TABLES}, or a tar, or a folder of .txt files")
    return found


def _files(folder: str) -> Iterator[Path]:
    """The files of a folder that may be captions: none that are hidden, or that people and archivers add."""
    for file in Path(folder).rglob("*"):
        name = readable_name(str(file.relative_to(folder)))
        is_left_out = is_stray(name) or is_note(name) or any(part.startswith("_") for part in Path(name).parts)
        if not is_left_out and file.is_file():
            yield file


def _kind(name: str) -> str | None:
    extension = name.rpartition(".")[2].lower()
    if extension in TEXT_EXTENSIONS:
        return TEXTS
    if TAR.fullmatch(name):
        return TARS
    return None if NO_TABLES.fullmatch(name) else table_format(name)
