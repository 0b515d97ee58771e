"""What one `make caption` has to do for each column: sources, fingerprint and the folder they go to."""

import fnmatch
import os
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioning.config import DEFAULT_PROMPTS, CaptioningConfig
from captioning.earlier import EARLIER_FOLDER, UPDATABLE, found_settings, to_set_aside, updatable
from captioning.given.addresses import MAIN_COLUMN
from captioning.given.coverage import GivenSource, open_sources
from captioning.quality import FLAGS, JUDGE_VERSION
from captioning.table import is_judged
from captioning.worker import CaptionWorkerConfig
from encoders.weights import ModelSource, resolve_model
from errors import UserError
from pipelines.columns.caption_columns import captions_folder
from pipelines.command import Command
from pipelines.engine.pieces import Source
from pipelines.engine.progress import get_logger
from pipelines.engine.run import EngineConfig
from pipelines.raw.patterns import select_shards
from pipelines.raw.shard_names import shard_name
from pipelines.raw.shards import describe_shards
from pipelines.recipe import DECIDES_TEXTS, DataConfig
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory, manifest_path, read_manifest

log = get_logger("captioning")

# Raised when a change of code changes the captions of unchanged inputs.
CODE_VERSION = 3
# What every fingerprint had before defaults were left out of it. Keys that came later have no place here.
WRITTEN_OUT: dict[str, Any] = {
    "engine": "transformers",
    "prompts": DEFAULT_PROMPTS,
    "max_alt_text_chars": 300,
    "dtype": "auto",
    "max_new_tokens": 256,
    "temperature": 0.0,
    "seed": 0,
    "loop_retry.repetition_penalty": 1.1,
    "loop_retry.ngram_words": 4,
    "loop_retry.max_repeated_ngram_ratio": 0.3,
}
WRITTEN_OUT_OF_SERVERS: dict[str, Any] = {
    "server.image_short_side_pixels": 0,
    "server.penalty_parameter": "repetition_penalty",
}


@dataclass(frozen=True, kw_only=True)
class CaptioningJob:
    """The settings of one column and the raw shards it covers; `num_texts` of each, by name, have a text of their own.

    `column` is `caption`, or the name of the pass, and `own_keys` what that changes; `given` says where the texts are
    that no model makes.
    """

    column: str
    own_keys: AbstractSet[str]
    config: CaptioningConfig
    data: DataConfig
    workers: EngineConfig
    model: ModelSource
    sources: list[Source]
    num_texts: dict[str, int]
    output: ShardDirectory
    fingerprint: Fingerprint
    run: Path
    given: list[GivenSource]

    @property
    def room(self) -> str:
        """What its progress and its log lines are called."""
        return "captioning" if self.column == MAIN_COLUMN else f"captioning {self.column}"

    @property
    def figures(self) -> str:
        """What its figures are called in the summary."""
        return "captioning" if self.column == MAIN_COLUMN else f"captioning@{self.column}"

    def table_of(self, key: str) -> str:
        """Return the table of the recipe that a key of this column is in."""
        return f"captioning.passes.{self.column}" if key in self.own_keys else "captioning"

    @property
    def worker_config(self) -> CaptionWorkerConfig:
        """What each worker process is given."""
        return CaptionWorkerConfig(
            captioning=self.config,
            reading=self.data.reading,
            max_pixels=self.data.max_pixels,
            num_threads=max(1, int(self.workers.cpus_per_worker)),
            gpu_share=gpu_share(self.workers),
            settings=updatable(self.fingerprint),
            run=self.run.absolute(),
            given=tuple(source.column for source in self.given),
            earlier=(self.output.path / EARLIER_FOLDER).absolute(),
            api_key=os.environ.get(self.config.server.api_key_variable, ""),
        )

    @property
    def extra(self) -> dict[str, Any]:
        """What the manifest tells later rooms and people."""
        return {
            **(self._table if self.config.is_given else self._asked),
            "quality": self.config.quality.model_dump(mode="json"),
            "judge_version": JUDGE_VERSION,
            # What an expression may ask for as `flags.<flag>`, though no caption has it.
            "flags": list(FLAGS),
            "engine": self.config.engine,
            "clip_model": self.config.clip_model,
            # A score changes no text and rejects nobody: text features have no use for it.
            "texts": Fingerprint.of({**self.fingerprint.fields, "clip_model": None}).digest,
        }

    @property
    def _asked(self) -> dict[str, Any]:
        return {
            "model": self.config.model,
            "revision": self.config.revision,
            "prompts": dict(self.config.prompts),
            "prompts_sha256": self.config.prompts_sha256,
        }

    @property
    def _table(self) -> dict[str, Any]:
        fields = {**self.fingerprint.fields, "clip_model": None}
        return {
            "table": {source.name: source.address.text for source in self.given},
            # A column that is added or changed leaves text features of the others as they are.
            "texts_of": {
                column: Fingerprint.of({**fields, "table": identity}).digest
                for column, identity in [("alt_text", "#"), *((source.name, source.identity) for source in self.given)]
            },
        }

    def pending(self) -> list[Source]:
        """Return the shards that are not done yet."""
        return [
            source for source in self.sources if not self.output.is_done(source.name, source.identity, self.fingerprint)
        ]

    def changed_settings(self) -> list[str]:
        """Return `field: old -> new` of each setting by which captions that are there differ, but for `UPDATABLE`."""
        changes = self.output.changes(self.fingerprint, defaults=self.config.fingerprint_defaults())
        return [change for change in changes if not change.startswith(tuple(f"{name}: " for name in UPDATABLE))]

    def to_complete(self) -> list[str]:
        """Return the finished shards that are completed rather than captioned: rejects, other limits, CLIP scores.

        Raises:
            UserError: rejects are to be tried again of captions that were made under other settings.
        """
        return to_set_aside(self.output, self.sources, self.fingerprint, retry_rejects=self.config.retry_rejects)

    def is_done(self) -> bool:
        """Whether nothing is pending and the manifest is that of these settings."""
        manifest = self._manifest()
        return manifest is not None and not self.pending() and not self.to_complete()

    def is_judged(self) -> bool:
        """Whether the captions that are there have been judged under the recipe's thresholds by today's judge."""
        manifest = self._manifest()
        return manifest is not None and is_judged(manifest, self.config.quality)

    def _manifest(self) -> Manifest | None:
        if not manifest_path(self.output.path).is_file():
            return None
        manifest = read_manifest(self.output.path)
        return manifest if manifest.fingerprint.digest == self.fingerprint.digest else None


def read_job(command: Command, config: CaptioningConfig, *, column: str, own_keys: AbstractSet[str]) -> CaptioningJob:
    """Validate the recipe's other tables and read the headers of the raw shards, for one column of captions.

    Raises:
        UserError, MissingFileError: a key is wrong, or a shard or the model is not there; names it.
    """
    data = command.recipe.table("data", DataConfig)
    workers = command.recipe.table("engine", EngineConfig)
    workers = workers_of(config, workers, is_other=column != MAIN_COLUMN)
    table = f"captioning.passes.{column}" if "shards" in own_keys else "captioning"
    paths = select_raw(command, config.shards, table=table)
    model = find_model(config, workers)
    given = open_sources(config.table, command.run) if config.is_given else []
    shards = describe_shards(paths, data.reading, run=command.run)
    clip = resolve_model(config.clip_model).identity if config.clip_model is not None else None
    fingerprint = _fingerprint(config, data, model=model, clip=clip, given=given)
    output = ShardDirectory(captions_folder(command.run, column))
    written_out = {} if config.is_given else WRITTEN_OUT | (WRITTEN_OUT_OF_SERVERS if config.engine == "openai" else {})
    return CaptioningJob(
        column=column,
        own_keys=own_keys,
        config=config,
        data=data,
        workers=workers,
        model=model,
        sources=[shard.source for shard in shards],
        num_texts={shard.source.name: shard.num_texts for shard in shards},
        output=output,
        fingerprint=output.known_as(fingerprint, defaults=written_out, made_under=found_settings(output)),
        run=command.run,
        given=given,
    )


def _fingerprint(
    config: CaptioningConfig, data: DataConfig, *, model: ModelSource, clip: str | None, given: Sequence[GivenSource]
) -> Fingerprint:
    """Return what decides the captions.

    At another batch size float32 rounds differently in the last digit: captions could differ where two words tie to
    seven digits.
    """
    # Where nobody is asked, it is the texts that decide.
    table = {"engine": config.engine, "table": {source.name: source.identity for source in given}}
    fields = {
        **(table if config.is_given else {**config.fingerprint_fields(), "model": model.identity}),
        "code_version": CODE_VERSION,
        **data.fingerprint_fields(),
        **data.fingerprint_fields(DECIDES_TEXTS),
        "dialect": data.dialect,
        # Limits are always written out: captions made under others are completed.
        "max_pixels": data.max_pixels,
        "max_aspect_ratio": config.max_aspect_ratio,
        "clip_model": clip,
    }
    # Of a server, what changes what it is asked.
    if config.engine == "openai" and (server := config.server.fingerprint_fields()):
        fields["server"] = server
    if config.engine == "vllm" and (vllm := config.vllm.fingerprint_fields()):
        fields["vllm"] = vllm
    return Fingerprint.of(fields)


def workers_of(config: CaptioningConfig, workers: EngineConfig, *, is_other: bool) -> EngineConfig:
    """Return the workers of `config`.

    The recipe's are for the captions themselves; of what is asked beside them, `is_other`, by a pass or about claims,
    they have the GPUs that its own engine needs.
    """
    num_gpus = workers.gpus_per_worker
    if is_other and config.engine == "vllm":
        num_gpus = float(vllm_gpus(config))
    elif (is_other and config.engine == "openai") or (config.is_given and config.clip_model is None):
        num_gpus = 0.0
    return workers.model_copy(update={"gpus_per_worker": num_gpus})


def gpu_share(workers: EngineConfig) -> float:
    """Return the part of a GPU that is one worker's alone; 0 where workers share what they see."""
    if not workers.gpus_per_worker:
        return 1.0 if workers.num_workers == 1 or workers.in_process else 0.0
    return min(1.0, workers.gpus_per_worker)


def find_model(config: CaptioningConfig, workers: EngineConfig) -> ModelSource:
    """Return where the model of `config` is: none of given captions, and of a server its name there.

    Raises:
        UserError: workers that ask a server are to have GPUs.
    """
    if config.is_given:
        return ModelSource(location="", revision=None, identity="none")
    if config.engine == "vllm":
        _require_gpus_of_vllm(config, workers)
    if config.engine != "openai":
        return resolve_model(config.model, config.revision)
    if workers.gpus_per_worker:
        raise UserError(
            f"engine.gpus_per_worker is {workers.gpus_per_worker}, but workers of captioning.engine = 'openai' use no "
            "GPU: set it to 0, and engine.num_workers to a few"
        )
    # What the server loads under this name is not known here; `revision` is the user's word for it.
    identity = f"{config.model}@{config.revision or 'main'} of a server"
    return ModelSource(location=config.model, revision=config.revision, identity=identity)


def vllm_gpus(config: CaptioningConfig) -> int:
    """Return how many GPUs a worker of `engine = "vllm"` needs: those its model is spread over, none on a CPU."""
    return 0 if config.device == "cpu" else config.vllm.tensor_parallel_size


def _require_gpus_of_vllm(config: CaptioningConfig, workers: EngineConfig) -> None:
    if config.device.startswith("cuda:"):
        raise UserError(
            f"captioning.device = {config.device!r}, but vLLM takes the GPUs that the worker has: set it to auto"
        )
    if workers.gpus_per_worker != vllm_gpus(config):
        raise UserError(
            f"engine.gpus_per_worker is {workers.gpus_per_worker:g}, but with captioning.engine = 'vllm' a worker has "
            f"whole GPUs, as many as captioning.vllm.tensor_parallel_size ({config.vllm.tensor_parallel_size}) says, "
            f"and none with captioning.device = 'cpu': set it to {vllm_gpus(config)}"
        )


def select_raw(command: Command, patterns: Sequence[str], *, table: str = "captioning") -> list[str]:
    """Return the raw shards that fit some of the patterns that `table` has as its `shards`.

    Warns of other patterns, as a recipe may be for more datasets.

    Raises:
        UserError: none fits.
    """
    key, paths = f"{command.recipe.blame(table, 'shards')}: {table}.shards", command.raw_shards
    fitting = [pattern for pattern in patterns if any(fnmatch.fnmatchcase(shard_name(path), pattern) for path in paths)]
    for pattern in sorted(set(patterns) - set(fitting)) if fitting else []:
        log.warning(f"{key}: {pattern!r} fits none of the {len(paths)} shards")
    return select_shards(paths, fitting or patterns, key=key)
