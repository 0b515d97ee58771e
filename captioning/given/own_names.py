"""Names of texts of the samples themselves: those that are typed, against those that there are."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from captioning.given.coverage import GivenSource
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.raw.images import SampleReject
from pipelines.raw.reading import Reading
from pipelines.raw.samples import RawSample
from pipelines.raw.shards import RawShard, open_shard
from pipelines.raw.tables.open_table import open_table, table_format
from pipelines.raw.texts import json_members
from pipelines.store.files import is_remote

SHARDS_LOOKED_AT, SAMPLES_LOOKED_AT, MAX_NAMED = 4, 100, 20

log = get_logger("captioning")


def check_own_names(given: Sequence[GivenSource], sources: Sequence[Source], *, reading: Reading, run: Path) -> None:
    """Warn of `data.text_column` and of each `#name` of `captioning.table` that no text at the beginning is called."""
    typed = {source.address.key: source.address.own for source in given if source.address.own}
    if reading.text_column is not None:
        typed[f"data.text_column = {reading.text_column!r}"] = reading.text_column
    names: dict[str, None] = {}
    num_samples = 0
    for source in sources[:SHARDS_LOOKED_AT]:
        if not typed:
            return
        with open_shard(source.path, reading, run=run, identity=source.identity) as raw:
            for sample in islice((sample for sample in raw.samples if sample.reject is None), SAMPLES_LOOKED_AT):
                num_samples += 1
                typed = {key: name for key, name in typed.items() if not _has_text(raw, sample, name)}
                names.update(dict.fromkeys(raw.text_names(sample)))
                if json_members(sample.key, sample.members):
                    names["fields of their JSON"] = None
        if table_format(source.path) is not None and (is_remote(source.path) or Path(source.path).is_file()):
            with open_table(source.path) as table:
                names.update(dict.fromkeys(table.columns))
    listed = ", ".join(list(names)[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")
    for key in typed:
        log.warning(
            f"{key}: none of the first {num_samples:,} samples has a text of this name; "
            f"names there are {listed or 'none'}"
        )


def _has_text(raw: RawShard, sample: RawSample, name: str) -> bool:
    try:
        return raw.named_text(sample, name) is not None
    except SampleReject:  # it is there, and cannot be read
        return True
