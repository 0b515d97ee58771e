"""The features a stage trains on: which directories and shards, and whether they are what the recipe says."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from pipelines.command import Command
from pipelines.feature_store import latent_directory, text_directory
from pipelines.manifest import Fingerprint, Manifest, read_manifest, require_same
from pipelines.recipe import Recipe
from pipelines.shards import select_shards


class CaptionTable(pydantic.BaseModel):
    """An entry of `captions`: a column of the captions, and how often training draws it."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    column: str
    weight: float = 1.0


class FeatureTable(pydantic.BaseModel):
    """What training reads of `[features]` and `[features.stageN]`; the features room owns and validates the tables."""

    model_config = pydantic.ConfigDict(extra="ignore", frozen=True)

    shards: list[str]
    resolution: int
    buckets: bool = False
    captions: list[CaptionTable] = [CaptionTable(column="caption")]
    text_storage: str = "bfloat16"
    vae_model: str
    vae_revision: str | None = None
    text_model: str
    text_revision: str | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class StageFeatures:
    """Feature directories of a stage, checked; `text` is None for stage 1, which is conditioned on class labels."""

    latents: Path
    latent_manifest: Manifest
    text: Path | None
    text_manifest: Manifest | None
    shards: list[str]

    @property
    def vae(self) -> dict[str, Any]:
        """Model, revision, scaling_factor and shift_factor of the VAE."""
        return self.latent_manifest.extra["vae"]

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        """Model, revision, max_tokens and d_text of the text encoder."""
        return self.text_manifest.extra["text"] if self.text_manifest else None

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return what identifies the data: the settings they were made with, and a hash over every tar and index."""
        families = {"latents": self.latent_manifest, "text": self.text_manifest}
        fields: dict[str, Any] = {}
        for family, manifest in families.items():
            if manifest is not None:
                fields |= {f"{family}.{name}": value for name, value in manifest.fingerprint.fields.items()}
                files = {name: manifest.shards[name].files for name in self.shards}
                fields[f"{family}.files"] = Fingerprint.of(files).digest
        return fields


def read_feature_table(recipe: Recipe, stage: int) -> FeatureTable:
    """Return what the recipe says about the features of `stage`.

    Raises:
        ValueError: a table or key is missing or wrong; names it.
    """
    shared = recipe.tables.get("features", {})
    if f"stage{stage}" not in shared:
        raise ValueError(f"{recipe.path}: features.stage{stage} is missing: it says what stage {stage} reads")
    try:
        return FeatureTable.model_validate(shared | shared[f"stage{stage}"])
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{recipe.path}: features.{key} of stage {stage}: {first['msg']}") from None


def open_features(command: Command) -> StageFeatures:
    """Find the features of a command's stage and check them against the recipe and the captions they came from.

    Raises:
        FileNotFoundError: features of this stage have not been made.
        ValueError: they were made with other settings, or from other captions; names the field and both values.
    """
    assert command.stage is not None
    table = read_feature_table(command.recipe, command.stage)
    latents = latent_directory(command.run, table.resolution)
    latent_manifest = _read(latents, command)
    vae = latent_manifest.extra["vae"]
    for field_name, expected, found in (
        ("resolution", table.resolution, latent_manifest.extra["resolution"]),
        ("buckets", table.buckets, latent_manifest.fingerprint.fields.get("buckets", table.buckets)),
        ("vae_model", table.vae_model, vae["model"]),
        ("vae_revision", table.vae_revision, vae["revision"]),
    ):
        require_same(field_name, expected, found, where=str(latents))
    pattern_key = f"features.{command.stage_name}.shards"
    shards = [str(name) for name in select_shards(sorted(latent_manifest.shards), table.shards, key=pattern_key)]
    text, text_manifest = None, None
    if command.stage > 1:
        text = text_directory(command.run, [caption.column for caption in table.captions])
        text_manifest = _read(text, command)
        _check_text(text, text_manifest, table=table, run=command.run)
        for name in shards:
            if name not in text_manifest.shards:
                raise ValueError(f"{text} lacks shard {name}, which {latents} has; run `{_make_features(command)}`")
    return StageFeatures(
        latents=latents, latent_manifest=latent_manifest, text=text, text_manifest=text_manifest, shards=shards
    )


def _make_features(command: Command) -> str:
    phase = f" PHASE={command.phase}" if command.phase else ""
    return f"make features STAGE={command.stage}{phase} RUN={command.run}"


def _read(directory: Path, command: Command) -> Manifest:
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} does not exist: stage {command.stage} has no features; run `{_make_features(command)}` first"
        )
    return read_manifest(directory)


def _check_text(directory: Path, manifest: Manifest, *, table: FeatureTable, run: Path) -> None:
    encoder = manifest.extra["text"]
    where = str(directory)
    require_same("text_model", table.text_model, encoder["model"], where=where)
    require_same("text_revision", table.text_revision, encoder["revision"], where=where)
    require_same("text_storage", table.text_storage, encoder.get("storage", "bfloat16"), where=where)
    if "captions" in manifest.extra:
        captions = [caption.model_dump() for caption in table.captions]
        require_same("captions", captions, manifest.extra["captions"], where=where)
    if table.max_tokens is not None:
        require_same("max_tokens", table.max_tokens, encoder["max_tokens"], where=where)
    if (run / "captions" / "manifest.json").is_file():
        captions = read_manifest(run / "captions").fingerprint.digest
        require_same("captions", captions, manifest.upstream.get("captions"), where=where)
