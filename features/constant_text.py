"""Text features of one text for all images of a table, as a subject of DreamBooth has: no captions are read."""

# L tokens of the text, D text width

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from errors import UserError
from features.jobs import FamilyPlan, FeatureFamily, FeatureInputs, FeatureJob
from features.quantization import store_text
from features.rare_token import require_token
from features.text_settings import (
    TextSettings,
    describe_text_job,
    index_weights,
    plan_text_job,
    text_facts,
    text_output,
    text_record,
    write_null_caption,
)
from features.text_worker import TextCounts
from features.writer import SampleToWrite, write_samples
from pipelines.engine.pieces import Piece, PieceReport
from pipelines.raw.reading import Reading
from pipelines.store.families import text_schema
from pipelines.store.feature_store import join_shards

# Raised when a change of code changes what is made of unchanged texts.
CONSTANT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ConstantTextConfig:
    """What a `ConstantTextWorker` needs; `directory` is where the null caption goes, `run` where headers are kept."""

    caption: str
    weight: float
    text: TextSettings
    reading: Reading
    run: Path
    directory: Path
    key: str


class ConstantTextWorker:
    """Writes the embedding of one text for each sample of a raw shard; one tar member and one index row a sample.

    Raises:
        UserError: the text encoder reads nothing of the text, or gives values that are not finite.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".parquet")
    join = staticmethod(join_shards)

    def __init__(self, config: ConstantTextConfig) -> None:
        import torch

        torch.set_num_threads(config.text.num_threads)
        encoder = config.text.open_encoder()
        (tokens,) = encoder.tokenize([config.caption])
        if encoder.token_kinds.is_unreadable(tokens):
            raise UserError(f"{config.key} = {config.caption!r}: {config.text.model} reads nothing of it")
        self._config = config
        self._embedding, null = encoder.encode([config.caption, ""])  # [L, D]
        if not self._embedding.isfinite().all():
            raise UserError(f"{config.key} = {config.caption!r}: {config.text.model} gives values that are not finite")
        self._stored = store_text(self._embedding, config.text.storage)
        self._family = text_schema(config.text.storage, encoder.spec.width)
        write_null_caption(config.directory, null)

    def __call__(self, piece: Piece) -> PieceReport:
        """Write the tar and index of samples [piece.start, piece.stop)."""
        config, counts = self._config, TextCounts(self._config.text.max_tokens)

        def store(item: SampleToWrite) -> None:
            self._family.write(item.tar, [item.row], [self._stored.parts])
            counts.count(self._embedding, self._stored, config.text.storage)

        row = {"caption_index": 0, "weight": config.weight}
        report = write_samples(piece, store, family=self._family, reading=config.reading, run=config.run, row=row)
        return replace(report, details=counts.details)


def constant_text_job(inputs: FeatureInputs) -> FeatureJob:
    """Describe the encoding of the table's text for all samples of its raw shards.

    Raises:
        UserError: the table's token is not in the text, or is a common word.
    """
    features = inputs.features
    (caption,) = features.captions
    assert caption.text is not None
    require_token(inputs, [caption.text], what=f"the text of features.{inputs.stage_name}.captions")
    return describe_text_job(
        inputs,
        family=CONSTANT_TEXT,
        worker_class=ConstantTextWorker,
        worker_config=ConstantTextConfig(
            caption=caption.text,
            weight=index_weights(inputs)[0],
            text=TextSettings.of(inputs),
            reading=inputs.data.reading,
            run=inputs.run,
            directory=text_output(inputs).path,
            key=f"features.{inputs.stage_name}.captions.0.text",
        ),
        sources=inputs.raw,
        made_of={"constant": CONSTANT_VERSION, "text": caption.text},
        memory_settings={"features.max_tokens": features.max_tokens},
        upstream={},
        dtype=features.text_dtype,
    )


def _plan(inputs: FeatureInputs) -> FamilyPlan:
    job = constant_text_job(inputs)
    return plan_text_job(inputs, job, num_tokens=inputs.features.max_tokens, basis="one text, at most")


CONSTANT_TEXT = FeatureFamily(
    name="text",
    is_wanted=lambda features: features.text and features.captions[0].text is not None,
    job=constant_text_job,
    plan=_plan,
    schema=text_record,
    facts=text_facts,
    probe=lambda config, folder: replace(config, directory=folder),
)
