"""What one `make columns` has to do: raw shards, scores, their fingerprints and what is pending."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curation.choosing import chosen_scores
from curation.config import ColumnsConfig
from curation.cores import num_cores
from curation.scores.protocol import ImageScore, Score, TableScore
from curation.table_rows import input_hashes, source_identity
from pipelines.command import Command
from pipelines.engine.pieces import Source
from pipelines.engine.run import EngineConfig
from pipelines.raw.shards import describe_shards
from pipelines.recipe import DataConfig
from pipelines.store.manifest import Fingerprint, ShardDirectory

COLUMNS_FOLDER = "columns"


@dataclass(frozen=True, kw_only=True)
class ColumnsJob:
    """A command's settings and the raw shards it covers."""

    config: ColumnsConfig
    data: DataConfig
    workers: EngineConfig
    scores: list[Score]
    sources: list[Source]
    run: Path

    @property
    def folder(self) -> Path:
        """The folder of all columns."""
        return self.run / COLUMNS_FOLDER

    @property
    def image_scores(self) -> list[ImageScore]:
        """The scores that share passes over the images."""
        return [score for score in self.scores if isinstance(score, ImageScore)]

    def output(self, score: Score) -> ShardDirectory:
        """Return the folder of a score."""
        return ShardDirectory(self.folder / score.name)

    def fingerprint(self, score: Score) -> Fingerprint:
        """Return what decides a score's numbers, beside the shards."""
        fields = {"score": score.name, "version": score.version, **score.settings()}
        if isinstance(score, ImageScore):
            # Which texts of a sample count is nothing to its image.
            fields |= {"max_pixels": self.data.max_pixels, "image_column": self.data.image_column}
        return Fingerprint.of(fields)

    def sources_of(self, score: Score) -> list[Source]:
        """Return the shards as a score knows them: with what else it is made from in their identity.

        Raises:
            UserError: a folder that it reads lacks some shards; names them, and the command that makes them.
        """
        if isinstance(score, ImageScore):
            return self.sources
        hashes = input_hashes(self.run, score.reads, [each.name for each in self.sources], score=score.name)
        sources = []
        for each in self.sources:
            beside = score.source(each.name) if isinstance(score, TableScore) else ""
            identity = source_identity(each.identity, *hashes[each.name], beside)
            sources.append(Source(name=each.name, path=each.path, identity=identity, num_samples=each.num_samples))
        return sources

    def pending(self, score: Score, sources: Sequence[Source]) -> list[Source]:
        """Return those of `sources_of(score)` that are not done."""
        output, fingerprint = self.output(score), self.fingerprint(score)
        return [each for each in sources if not output.is_done(each.name, each.identity, fingerprint)]

    def num_threads(self, num_samples: int, *, few_samples: int) -> int:
        """Return how many threads of a worker decode: one for each core that it has."""
        if self.workers.is_in_process(num_samples, few_samples):
            return num_cores()
        return max(1, round(self.workers.cpus_per_worker))


def read_job(command: Command) -> ColumnsJob:
    """Validate the recipe's tables and read the headers of the raw shards.

    Raises:
        UserError, MissingFileError: a key is wrong, or a shard is not there; names it.
    """
    config = command.recipe.table("columns", ColumnsConfig)
    data = command.recipe.table("data", DataConfig)
    workers = command.recipe.table("engine", EngineConfig)
    scores = chosen_scores(config, command.run)
    shards = describe_shards(command.raw_shards, data.reading, run=command.run)
    return ColumnsJob(
        config=config,
        data=data,
        workers=workers,
        scores=scores,
        sources=[shard.source for shard in shards],
        run=command.run,
    )
