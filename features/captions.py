"""The captions a text job encodes, and their identity: what of them decides the embeddings, and nothing else."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from errors import UserError
from pipelines.as_typed import did_you_mean, typed_command, typed_flag
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.store.files import atomic_write_json, discard, sha256_file, sha256_text
from pipelines.store.manifest import Manifest, require_same
from pipelines.store.state_files import read_state, state_of
from pipelines.store.tables import sound_table

# In a directory of text features: the identity of each shard's captions, and the Parquet file it was taken from.
IDENTITIES_NAME = ".captions.json"
NUM_READERS = 8
# Columns of captions that say what a row is of, and what became of it.
NO_TEXTS = ("key", "shard", "prompt", "finish_reason", "reject")

log = get_logger("features")


def mend_captions() -> str:
    """Return what to do about a shard's captions that cannot be used."""
    return f"remove it and type `{typed_command('caption')}` again: this shard alone is captioned anew"


def _mend_source(shard: str, run: Path) -> str:
    command = typed_command("caption", {"run": run})
    return (
        f"{shard} has changed since: put back the one that was captioned, or type `{command}` with its "
        f"{typed_flag('shards')} again: this shard alone is captioned anew"
    )


def caption_sources(
    run: Path, raw: Sequence[Source], columns: Sequence[str], *, captions: Manifest, directory: Path
) -> list[Source]:
    """Describe the captions of raw shards as sources of a text job that writes `directory`.

    A source's identity is a hash over keys, the texts of `columns` and who is rejected: new flags, or thresholds that
    reject nobody else, leave the embeddings as they are. It is read anew only where the Parquet file has changed.

    Raises:
        UserError: a shard has no captions, they were made from another tar than the one there is now, or a column is
            missing; names shard and field.
    """
    known = _read_identities(directory)

    def describe(shard: Source) -> Source:
        path = run / "captions" / f"{shard.name}.parquet"
        if shard.name not in captions.shards:
            command = typed_command("caption", {"run": run})
            raise UserError(f"{path.parent}: shard {shard.name} has no captions; run `{command}` on it first")
        report = captions.shards[shard.name]
        require_same(
            "source",
            shard.identity,
            report.source,
            where=str(path),
            mend=_mend_source(shard.path, run),
        )
        file, identity = known.get(shard.name, ("", ""))
        if file != report.files[path.suffix]:
            identity = text_identity(path, columns)
        return Source(name=shard.name, path=str(path), identity=identity, num_samples=report.num_read)

    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(describe, raw))


def text_identity(path: Path, columns: Sequence[str]) -> str:
    """Return a hash over what `columns` of a captions file give a text encoder.

    Raises:
        UserError: the file is no Parquet, or lacks a column of texts; names both.
    """
    wanted = ["key", *columns, "reject"]
    with sound_table(path, mend=mend_captions()):
        schema = pq.read_schema(path)
        for column in wanted:
            position = schema.get_field_index(column)
            if position < 0 or not pa.types.is_string(schema.field(position).type):
                texts = [
                    field.name for field in schema if pa.types.is_string(field.type) and field.name not in NO_TEXTS
                ]
                raise UserError(
                    f"{path}: there is no column {column!r} of texts, which features.<name>.captions names"
                    f"{did_you_mean(column, texts)}; its columns of texts are {', '.join(texts)}"
                )
        table = pq.read_table(path, columns=wanted)
    return sha256_text(json.dumps([table.column(column).to_pylist() for column in wanted], ensure_ascii=False))


def require_unchanged(source: Source, captions: Manifest) -> None:
    """Check that a captions file is the one its manifest describes.

    Raises:
        UserError: it is not; names the file and both hashes.
    """
    path = Path(source.path)
    expected, found = captions.shards[source.name].files[path.suffix], sha256_file(path)
    if found != expected:
        raise UserError(
            f"{path} has SHA-256 {found}, but by its manifest {expected}: it has changed; {mend_captions()}"
        )


def remember_identities(sources: Sequence[Source], *, captions: Manifest, directory: Path) -> None:
    """Keep what `caption_sources` found out, so that the next command need not read the captions."""
    known = _read_identities(directory)
    found = {source.name: [captions.shards[source.name].files[".parquet"], source.identity] for source in sources}
    if known | found != known:
        atomic_write_json(directory / IDENTITIES_NAME, known | found)


def _read_identities(directory: Path) -> dict[str, list[str]]:
    path, mend = directory / IDENTITIES_NAME, "the captions are read again"
    if not path.is_file():
        return {}
    try:
        return state_of(dict[str, list[str]], read_state(path, mend=mend), where=str(path), mend=mend)
    except UserError as error:
        log.warning(str(error))
        discard(path)
        return {}
