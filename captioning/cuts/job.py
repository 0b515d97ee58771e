"""What making one pass of cut captions has to do: of which captions, by which rule, and whether it can be done yet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioning.cuts.config import CutConfig
from captioning.cuts.cutting import CUT_VERSION, CutRule
from captioning.cuts.worker import CutWorkerConfig
from captioning.quality import FLAGS, JUDGE_VERSION
from captioning.table import is_judged
from encoders.tokens import fetch_tokenizer
from encoders.weights import ModelSource
from errors import MissingFileError
from pipelines.as_typed import typed_command
from pipelines.columns.caption_columns import (
    CAPTIONS_SEAM,
    CLAIMS_SEAM,
    CaptionColumn,
    RunCaptions,
    captions_folder,
    claims_folder,
    raw_identity,
)
from pipelines.engine.pieces import Source
from pipelines.engine.run import EngineConfig
from pipelines.store.manifest import Fingerprint, Manifest, ShardDirectory, manifest_path, read_manifest
from pipelines.text.sentences import SPLITTER_VERSION


class WaitingForClaimsError(MissingFileError):
    """Claims of the captions that are to be cut are not there, or are about former ones; names the command."""


@dataclass(frozen=True, kw_only=True)
class CutJob:
    """A pass of cut captions; `raw` are the raw shards it covers, `tokenizer` None counts no tokens.

    Sources are found when they are asked for: the captions that are cut are made by the same command.
    """

    column: str
    config: CutConfig
    workers: EngineConfig
    tokenizer: ModelSource | None
    raw: Sequence[Source]
    run: Path
    _found: dict[str, list[Source]] = field(default_factory=dict, compare=False)

    @property
    def output(self) -> ShardDirectory:
        """The folder it writes."""
        return ShardDirectory(captions_folder(self.run, self.column))

    @property
    def key(self) -> str:
        """What errors name."""
        return f"captioning.passes.{self.column}"

    @property
    def fingerprint(self) -> Fingerprint:
        """What decides the texts, beside the captions and claims themselves."""
        return Fingerprint.of(
            {
                "engine": "cut",
                **self.config.fingerprint_fields(),
                "tokenizer": None if self.tokenizer is None else self.tokenizer.identity,
                "version": f"{CUT_VERSION}.{SPLITTER_VERSION}",
            }
        )

    def changes(self) -> list[str]:
        """Return `field: old -> new` of each setting by which what is there differs."""
        return self.output.changes(self.fingerprint, defaults=self.config.fingerprint_defaults())

    @property
    def extra(self) -> dict[str, Any]:
        """What the manifest tells later rooms and people."""
        bounds = ("max_sentences", "max_words", "max_tokens", "supported")
        return {
            "engine": "cut",
            "of": self.config.of,
            **{name: getattr(self.config, name) for name in bounds},
            "tokenizer": None if self.tokenizer is None else self.tokenizer.location,
            "quality": self.config.quality.model_dump(mode="json"),
            "judge_version": JUDGE_VERSION,
            "flags": list(FLAGS),
            "texts": self.fingerprint.digest,
        }

    def require(self) -> None:
        """Find out before any work starts that the tokenizer is missing; raises as `fetch_tokenizer` does."""
        if self.tokenizer is not None:
            fetch_tokenizer(self.tokenizer, key=f"{self.key}.tokenizer")

    def worker_config(self) -> CutWorkerConfig:
        """Return what each worker process is given; raises as `fetch_tokenizer` does."""
        config = self.config
        rule = CutRule(max_sentences=config.max_sentences, max_words=config.max_words, max_tokens=config.max_tokens)
        file = None if self.tokenizer is None else fetch_tokenizer(self.tokenizer, key=f"{self.key}.tokenizer")
        return CutWorkerConfig(
            rule=rule,
            column=self._of().column,
            quality=config.quality,
            claims=claims_folder(self.run, self.config.of) if config.supported else None,
            tokenizer=file,
        )

    def sources(self) -> list[Source]:
        """Return the captions that are cut, as sources whose identity changes with them and with their claims.

        Raises:
            WaitingForClaimsError: claims are needed, and not there.
            MissingFileError, UserError: captions are not there, or not those of the raw shards.
        """
        if "all" not in self._found:
            self._found["all"] = self._find_sources()
        return self._found["all"]

    def pending(self) -> list[Source]:
        """Return the sources that are not done yet; raises as `sources` does."""
        return [
            source
            for source in self.sources()
            if not self.output.is_done(source.name, source.identity, self.fingerprint)
        ]

    def is_done(self) -> bool:
        """Whether nothing is pending and the manifest is that of these settings; raises as `sources` does."""
        return self._manifest() is not None and not self.pending()

    def is_judged(self) -> bool:
        """Whether what is there has been judged under the recipe's thresholds by today's judge."""
        manifest = self._manifest()
        return manifest is not None and is_judged(manifest, self.config.quality)

    def _manifest(self) -> Manifest | None:
        if not manifest_path(self.output.path).is_file():
            return None
        manifest = read_manifest(self.output.path)
        return manifest if manifest.fingerprint.digest == self.fingerprint.digest else None

    def _of(self) -> CaptionColumn:
        return RunCaptions(self.run).find(self.config.of, key=f"{self.key}.of")

    def _find_sources(self) -> list[Source]:
        captions, of = RunCaptions(self.run), self._of()
        captions.require_shards(of, self.raw)
        claims = self._claims(of) if self.config.supported else {}
        return [
            Source(
                name=raw.name,
                path=str(of.file(raw.name).absolute()),
                identity=f"{raw_identity(of.manifest.shards[raw.name].source)}{claims.get(raw.name, '')}"
                f"{CAPTIONS_SEAM}{of.sha256(raw.name)}",
                num_samples=of.manifest.shards[raw.name].num_read,
            )
            for raw in self.raw
        ]

    def _claims(self, of: CaptionColumn) -> Mapping[str, str]:
        """Return, by shard, what the identity of its claims adds to that of its captions."""
        folder = claims_folder(self.run, self.config.of)
        manifest = read_manifest(folder) if manifest_path(folder).is_file() else None
        shards = {} if manifest is None else manifest.shards
        found = {
            raw.name: f"{CLAIMS_SEAM}{shards[raw.name].files['.parquet']}"
            for raw in self.raw
            if raw.name in shards and shards[raw.name].source.endswith(f"{CAPTIONS_SEAM}{of.sha256(raw.name)}")
        }
        if len(found) < len(self.raw):
            command = typed_command("claims", {"run": self.run})
            caption = typed_command("caption", {"run": self.run})
            raise WaitingForClaimsError(
                f"{self.key} drops what claims of {of.name!r} do not support, and of {len(self.raw) - len(found):,} of "
                f"{len(self.raw):,} shards {folder} has none about the captions that are there now: type `{command}`, "
                f"then `{caption}` again"
            )
        return found
