"""What a pass over images has made, dealt out to the folders of its scores; also of passes that were killed."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from curation.image_pass import OF
from curation.score_files import count_unknown, rejects_of, write_rows
from curation.scores.protocol import REJECT, ImageScore
from errors import UserError
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_file, atomic_write_json, discard_folder, exclusive, sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from pipelines.store.state_files import read_state
from pipelines.store.tables import MEND_SHARD, read_table

PASSES_FOLDER = ".passes"
PASS_NAME = "pass.json"

log = get_logger("columns")


@dataclass(frozen=True, kw_only=True)
class ImagePass:
    """A pass: which scores it makes, under which settings; passes of the same share a folder, and go on in it."""

    folder: ShardDirectory
    fingerprints: Mapping[str, Fingerprint]

    @property
    def fingerprint(self) -> Fingerprint:
        """What decides the bytes of its files."""
        return Fingerprint.of({name: each.digest for name, each in self.fingerprints.items()})

    def note(self) -> None:
        """Write down what it is: a later command deals out what this one may leave behind."""
        fields = {name: each.fields for name, each in self.fingerprints.items()}
        atomic_write_json(self.folder.path / PASS_NAME, {"scores": fields})


def open_pass(columns: Path, scores: Sequence[ImageScore], fingerprints: Mapping[str, Fingerprint]) -> ImagePass:
    """Return the pass that makes some scores, in the folder of all columns."""
    chosen = {score.name: fingerprints[score.name] for score in scores}
    name = Fingerprint.of({name: each.digest for name, each in chosen.items()}).digest[:16]
    return ImagePass(folder=ShardDirectory(columns / PASSES_FOLDER / name), fingerprints=chosen)


def deal_out(columns: Path, wanted: Mapping[str, Fingerprint]) -> None:
    """Deal out the finished shards of all passes that there are.

    What was made under other settings than `wanted`, or of a shard that is done, is left out; what is of a score that
    is not wanted now is kept for when it is.
    """
    num_dealt = 0
    for folder in _passes(columns):
        one = _read_pass(folder)
        num_dealt += 0 if one is None else deal_out_pass(columns, one, wanted)
    if num_dealt:
        log.info(f"{num_dealt:,} shards of a pass that did not come to its end are kept")


def drop_passes(columns: Path, *, except_for: Collection[Path] = ()) -> None:
    """Remove what passes have left that are dealt out, but for those that will go on."""
    for folder in _passes(columns):
        if folder not in except_for:
            shutil.rmtree(folder)
    discard_folder(columns / PASSES_FOLDER)


def _passes(columns: Path) -> list[Path]:
    passes = columns / PASSES_FOLDER
    found = sorted(passes.iterdir()) if passes.is_dir() else []
    return [folder for folder in found if folder.is_dir() and not folder.is_symlink()]


def _read_pass(folder: Path) -> ImagePass | None:
    path = folder / PASS_NAME
    if not path.is_file():
        return None  # killed before it began
    try:
        content = read_state(path, mend="its shards are made anew", keys=("scores",))
    except UserError as error:
        log.warning(str(error))
        return None
    fields: dict[str, Any] = content["scores"]
    fingerprints = {name: Fingerprint.of(each) for name, each in fields.items()}
    return ImagePass(folder=ShardDirectory(folder), fingerprints=fingerprints)


def deal_out_pass(columns: Path, one: ImagePass, wanted: Mapping[str, Fingerprint]) -> int:
    """Do what `deal_out` does for one pass; gives the number of its shards that something was kept of."""
    scores = {name: each for name, each in one.fingerprints.items() if wanted.get(name, each).digest == each.digest}
    num_dealt = 0
    for shard in one.folder.marked():
        report = one.folder.report(shard, one.fingerprint)
        if report is None or not one.folder.is_done(shard, report.source, one.fingerprint):
            continue
        missing = {
            name: each
            for name, each in scores.items()
            if not ShardDirectory(columns / name).is_done(shard, report.source, each)
        }
        if missing:
            deal_out_shard(columns, one.folder.file(shard, ".parquet"), report, missing)
            num_dealt += 1
    return num_dealt


def deal_out_shard(columns: Path, path: Path, report: ShardReport, scores: Mapping[str, Fingerprint]) -> None:
    """Write the files and markers of some scores from the file of a pass over one shard."""
    table = read_table(path, mend=MEND_SHARD)
    for name, fingerprint in scores.items():
        prefix = f"{name}{OF}"
        names = [each for each in table.column_names if each.startswith(prefix)]
        rows = table.select(["key", *names]).rename_columns(["key", *(each.removeprefix(prefix) for each in names)])
        output = ShardDirectory(columns / name)
        with exclusive(output.path):
            write_shard(output, rows, fingerprint, name=report.name, source=report.source)


def write_shard(
    output: ShardDirectory, rows: pa.Table, fingerprint: Fingerprint, *, name: str, source: str
) -> ShardReport:
    """Write one shard of a score, and its marker last."""
    output.clear_marker(name)
    path = output.file(name, ".parquet")
    with atomic_file(path) as temporary:
        write_rows([rows], temporary)
    rejected = rejects_of(rows, REJECT)
    report = ShardReport(
        name=name,
        source=source,
        num_read=rows.num_rows,
        num_kept=rows.num_rows - sum(rejected.values()),
        rejected=rejected,
        files={".parquet": sha256_file(path)},
        details=count_unknown(rows),
    )
    output.write_marker(report, fingerprint)
    return report
