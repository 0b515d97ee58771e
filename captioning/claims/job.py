"""What one `make claims` has to do for one column of captions: sources, fingerprint, and the folder it writes."""

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.claims.sources import claim_sources, score_of
from captioning.claims.splitting import CLAIMS_VERSION
from captioning.claims.table import VERSION, score_spec
from captioning.claims.worker import ClaimWorkerConfig
from captioning.config import CaptioningConfig
from captioning.job import find_model, select_raw, workers_of
from captioning.passes import is_cut
from encoders.weights import ModelSource
from errors import UserError
from pipelines.columns.caption_columns import CaptionColumn, RunCaptions
from pipelines.command import Command
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig
from pipelines.raw.shards import describe_shards
from pipelines.recipe import DataConfig
from pipelines.store.manifest import Fingerprint, ShardDirectory, manifest_path, read_manifest
from pipelines.text.sentences import SPLITTER_VERSION

COLUMNS_FOLDER = "columns"

log = get_logger("claims")


@dataclass(frozen=True, kw_only=True)
class ClaimsJob:
    """A column of captions, who is asked about it, and the raw shards it covers.

    `config` is the table `[captioning]` with what its claims say laid over it.
    """

    config: CaptioningConfig
    data: DataConfig
    workers: EngineConfig
    model: ModelSource
    column: CaptionColumn
    sources: list[Source]
    output: ShardDirectory
    fingerprint: Fingerprint
    run: Path

    @property
    def worker_config(self) -> ClaimWorkerConfig:
        """What each worker process is given."""
        return ClaimWorkerConfig(
            captioning=self.config,
            reading=self.data.reading,
            max_pixels=self.data.max_pixels,
            num_threads=max(1, int(self.workers.cpus_per_worker)),
            run=self.run.absolute(),
            captions=self.column.folder.absolute(),
            column=self.column.column,
            output=self.output.path.absolute(),
            asked=Fingerprint.of({**self.fingerprint.fields, "threshold": None}).digest,
            api_key=os.environ.get(self.config.server.api_key_variable, ""),
        )

    @property
    def upstream(self) -> dict[str, str]:
        """What the manifest says of the captions."""
        return {"captions": self.column.manifest.fingerprint.digest}

    @property
    def extra(self) -> dict[str, Any]:
        """What the manifest tells later rooms and people."""
        claims = self.config.claims
        return {
            "score": score_spec(),
            "of": self.column.name,
            "engine": self.config.engine,
            "model": self.config.model,
            "revision": self.config.revision,
            "question": claims.question,
            "threshold": claims.threshold,
        }

    def pending(self) -> list[Source]:
        """Return the shards that are not done yet."""
        return [
            source for source in self.sources if not self.output.is_done(source.name, source.identity, self.fingerprint)
        ]

    def is_done(self) -> bool:
        """Whether nothing is pending and the manifest is that of these settings."""
        path = manifest_path(self.output.path)
        return (
            path.is_file()
            and read_manifest(self.output.path).fingerprint.digest == self.fingerprint.digest
            and not self.pending()
        )


def read_jobs(command: Command) -> list[ClaimsJob]:
    """Validate the recipe's tables, read the headers of the raw shards, and find the captions of each column.

    Raises:
        UserError, MissingFileError: a key is wrong, or a shard, its captions or the model are not there; names it.
    """
    table = command.recipe.table("captioning", CaptioningConfig)
    data = command.recipe.table("data", DataConfig)
    config = _asking(table)
    workers = command.recipe.table("engine", EngineConfig)
    workers = workers_of(config, workers, is_other=config.engine != table.engine)
    model = find_model(config, workers)
    raw = [shard.source for shard in describe_shards(select_raw(command, config.shards), data.reading, run=command.run)]
    return list(_jobs(command.run, config, data, workers=workers, model=model, raw=raw))


def _jobs(
    run: Path,
    config: CaptioningConfig,
    data: DataConfig,
    *,
    workers: EngineConfig,
    model: ModelSource,
    raw: Sequence[Source],
) -> Iterator[ClaimsJob]:
    captions = RunCaptions(run)
    for name in config.claims.of:
        own = config.passes.get(name, {})
        try:
            column = captions.find(name, key="captioning.claims.of")
            patterns = own.get("shards", ("*",))
            of_column = [each for each in raw if any(fnmatch.fnmatchcase(each.name, pattern) for pattern in patterns)]
            sources = claim_sources(captions, of_column, column)
        except UserError as error:
            # A cut of captions may wait for claims of these, which this command is to make.
            if not is_cut(own) or all(is_cut(config.passes.get(other, {})) for other in config.claims.of):
                raise
            log.warning(f"claims of {name} are left out for now: {error}")
            continue
        yield ClaimsJob(
            config=config,
            data=data,
            workers=workers,
            model=model,
            column=column,
            sources=sources,
            output=ShardDirectory(run / COLUMNS_FOLDER / score_of(column)),
            fingerprint=_fingerprint(config, data, model),
            run=run,
        )


def _asking(table: CaptioningConfig) -> CaptioningConfig:
    """Return the table with what its claims say laid over it.

    Raises:
        UserError: captions are given, and nobody is named to ask.
    """
    claims = table.claims
    if table.is_given and (claims.engine is None or claims.model is None):
        raise UserError(
            "captioning.engine = 'given' has no model that could be asked about claims: set captioning.claims.engine "
            "and captioning.claims.model"
        )
    laid: dict[str, Any] = {
        "engine": claims.engine or table.engine,
        "batch_size": claims.batch_size,
        # Of the answer, one token is looked at.
        "max_new_tokens": 1,
        "temperature": 0.0,
        "clip_model": None,
        "table": "",
    }
    if claims.model is not None:
        laid |= {"model": claims.model, "revision": claims.revision}
    return table.model_copy(update=laid)


def _fingerprint(config: CaptioningConfig, data: DataConfig, model: ModelSource) -> Fingerprint:
    """Return what decides the columns."""
    claims = config.claims
    fields = {
        **claims.fingerprint_fields(),
        "engine": config.engine,
        "model": model.identity,
        "dtype": config.dtype,
        **data.fingerprint_fields(),
        "max_pixels": data.max_pixels,
        "max_aspect_ratio": config.max_aspect_ratio,
        "threshold": claims.threshold,
        "version": f"{VERSION}.{CLAIMS_VERSION}.{SPLITTER_VERSION}",
    }
    if config.engine == "openai" and (server := config.server.fingerprint_fields()):
        fields["server"] = server
    if config.engine == "vllm" and (vllm := config.vllm.fingerprint_fields()):
        fields["vllm"] = vllm
    return Fingerprint.of(fields)
