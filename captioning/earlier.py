"""Captions that are there already and only need completing: rejects tried again, other limits, a CLIP score.

A finished shard that needs it is set aside in `captions/.earlier/`, see `pipelines.engine.set_aside`. The worker takes
from it every row that stands and makes the others.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.table import read_settings
from errors import UserError
from pipelines.as_typed import typed_flag
from pipelines.engine.pieces import Source, all_piece_reports, read_piece_note
from pipelines.engine.set_aside import EARLIER_FOLDER, clear_set_aside, earlier_files, set_shard_aside
from pipelines.store.manifest import (
    MARKER_FOLDER,
    Fingerprint,
    ShardDirectory,
    manifest_path,
    read_manifest,
    require_same_fingerprint,
)
from pipelines.store.tables import read_table

SUFFIXES = (".parquet",)
# Fields of the fingerprint that decide which samples have a caption, and what is measured of it, but not its words.
UPDATABLE = ("max_pixels", "max_aspect_ratio", "clip_model")


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """The rows of a shard as they were, one per sample, and the settings of `UPDATABLE` they were made under."""

    rows: list[dict[str, Any]]
    settings: dict[str, Any]


def updatable(fingerprint: Fingerprint) -> dict[str, Any]:
    """Return the fields of `UPDATABLE`."""
    return {name: fingerprint.fields[name] for name in UPDATABLE}


def found_settings(output: ShardDirectory) -> Iterator[dict[str, Any]]:
    """Yield the settings that the files of a folder of captions were made under, parts and those set aside too."""
    found = [output.file(name, ".parquet") for name in output.marked()]
    found += earlier_files(output, ".parquet")
    found += [path.with_suffix(".parquet") for path in all_piece_reports(output)]
    for path in filter(Path.is_file, found):
        yield read_settings(path)


def read_earlier(folder: Path | None, name: str) -> Earlier | None:
    """Return what was set aside of a shard, or None; `set_aside` has made sure that it may be used."""
    path = (folder or Path()) / f"{name}.parquet"
    if folder is None or not path.with_suffix(".json").is_file():
        return None
    mend = "remove it and type the command again: this shard is captioned anew"
    return Earlier(rows=read_table(path, mend=mend).to_pylist(), settings=read_settings(path))


def to_set_aside(
    output: ShardDirectory, sources: Sequence[Source], fingerprint: Fingerprint, *, retry_rejects: bool
) -> list[str]:
    """Return the finished shards that need completing.

    Raises:
        UserError: rejects are to be tried again of captions that were made under other settings; names the field.
    """
    names = []
    for source in sources:
        path = output.file(source.name, ".parquet")
        if not path.is_file() or not (output.path / MARKER_FOLDER / f"{source.name}.json").is_file():
            continue
        report = output.report(source.name, fingerprint)
        is_current = report is not None
        if report is None:
            # Made under other limits, perhaps: the file knows which.
            report = output.report(source.name, _with(fingerprint, read_settings(path)))
        if report is None and retry_rejects:
            _refuse(output, source.name, fingerprint)
        if report is None or report.source != source.identity:
            continue
        if not is_current or (retry_rejects and report.rejected):
            names.append(source.name)
    return names


def set_aside(
    output: ShardDirectory, names: Sequence[str], sources: Sequence[Source], fingerprint: Fingerprint
) -> None:
    """Set finished shards aside, to be completed by the run that follows."""
    for source in sources:
        if source.name in names:
            settings = read_settings(output.file(source.name, ".parquet"))
            set_shard_aside(output, source, _with(fingerprint, settings), suffixes=SUFFIXES)


def forget_parts_with_rejects(output: ShardDirectory) -> None:
    """Let an interrupted run's parts be made again where they hold rejects, but not those of shards set aside."""
    for path in all_piece_reports(output):
        is_retried = (output.path / EARLIER_FOLDER / f"{path.parent.name}.json").is_file()
        with contextlib.suppress(UserError):  # the run that follows says so, and does the piece again
            if not is_retried and read_piece_note(path).report.rejected:
                path.unlink()


def clear_earlier(output: ShardDirectory, sources: Sequence[Source], fingerprint: Fingerprint) -> None:
    """Forget what was set aside of shards that are done, and what the recipe or the tars have left behind."""

    def made_under(name: str) -> Fingerprint:
        return _with(fingerprint, read_settings(output.path / EARLIER_FOLDER / f"{name}.parquet"))

    clear_set_aside(output, sources, fingerprint, suffixes=SUFFIXES, made_under=made_under)


def _with(fingerprint: Fingerprint, settings: Mapping[str, Any]) -> Fingerprint:
    return Fingerprint.of({**fingerprint.fields, **settings})


def _refuse(output: ShardDirectory, name: str, fingerprint: Fingerprint) -> None:
    retry = typed_flag("retry", True)
    if manifest_path(output.path).is_file():
        require_same_fingerprint(
            fingerprint,
            read_manifest(output.path).fingerprint,
            where=f"captioning.retry_rejects ({retry}), {output.path}",
            mend=f"set it back to keep these captions, or name another run; without {retry} they are all made anew",
        )
    raise UserError(
        f"captioning.retry_rejects ({retry}): the captions of {name} were made under other settings than these; "
        f"only {', '.join(UPDATABLE)} may differ. Without {retry} they are all made anew"
    )
