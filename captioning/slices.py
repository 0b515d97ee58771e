"""One slice of a shard: caption what is new, ask again where a caption loops, score, and keep what is there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from captioning.config import CaptioningConfig
from captioning.engines.protocol import Caption, Captioner, Refusal
from captioning.loading import LoadedSample, SampleLoader
from captioning.loops import repeated_ngram_ratio
from captioning.quality import judge
from captioning.table import judge_row_again
from pipelines.raw.samples import RawSample

if TYPE_CHECKING:
    # They bring torch, which the driver never needs.
    from captioning.clip_score import ClipScorer, ImageEmbeddings

Row = dict[str, Any]


class SliceCaptioner:
    """Turns the samples of a slice into rows; nothing it does depends on the slices before."""

    def __init__(self, config: CaptioningConfig, engine: Captioner, scorer: "ClipScorer | None") -> None:
        self._config = config
        self._engine = engine
        self._scorer = scorer

    def caption(self, loader: SampleLoader, samples: Sequence[RawSample]) -> list[Row]:
        """Return one row per sample, rejected ones too."""
        rows: list[Row] = []
        images = self._scorer.collect() if self._scorer is not None else None
        captions = iter(self._engine.caption(_take(loader.load(samples), rows=rows, images=images)))
        said = {index: next(captions) for index, row in enumerate(rows) if row["reject"] is None}
        assert len(rows) == len(samples) and next(captions, None) is None, "one row per sample, one caption per image"
        second = self._ask_again(loader, samples, said)
        for index, caption in said.items():
            rows[index] = self._finish(rows[index], caption, second.get(index))
        if images is not None:
            # The image of a refused one was seen too; its score goes the way of its caption.
            scores = images.scores([rows[index].get("caption_raw") or "" for index in said])
            for index, score in zip(said, scores, strict=True):
                rows[index]["clip_score"] = score if rows[index]["reject"] is None else None
        return rows

    def update(
        self, loader: SampleLoader, samples: Sequence[RawSample], earlier: Sequence[Row], *, is_scored: bool
    ) -> list[Row]:
        """Return the rows of `samples`, where `earlier` ones that hold a caption stay as they are.

        What was rejected, or would be by the recipe's limits, is captioned. Kept captions are scored by CLIP
        unless they are (`is_scored`) by the model of the recipe.
        """
        again = [
            index
            for index, row in enumerate(earlier)
            if row["reject"] is not None or loader.limit_of(row["width"], row["height"]) is not None
        ]
        rows = [judge_row_again(row, self._config.quality) for row in earlier]
        if not is_scored:
            self._score(loader, samples, rows, [index for index in range(len(rows)) if index not in set(again)])
        for index, row in zip(again, self.caption(loader, [samples[index] for index in again]), strict=True):
            rows[index] = row
        return rows

    def _ask_again(
        self, loader: SampleLoader, samples: Sequence[RawSample], said: Mapping[int, Caption | Refusal]
    ) -> Mapping[int, Caption | Refusal]:
        """Return the second try of every caption that loops, by index. Loops are few: their images are read again."""
        if self._config.is_given:
            return {}
        settings = self._config.loop_retry
        looping = [
            index
            for index, caption in said.items()
            if isinstance(caption, Caption)
            and repeated_ngram_ratio(caption.text, settings.ngram_words, by_script=settings.by_script)
            > settings.max_repeated_ngram_ratio
        ]
        if settings.repetition_penalty == 1.0 or not looping:
            return {}
        loaded = loader.load([samples[index] for index in looping])
        captions = self._engine.caption(
            (sample.prepared for sample in loaded), repetition_penalty=settings.repetition_penalty
        )
        return dict(zip(looping, captions, strict=True))

    def _finish(self, row: Row, said: Caption | Refusal, second: Caption | Refusal | None) -> Row:
        kept = said if second is None else second
        row = {**row, "first_caption": said.text if kept is not said and isinstance(said, Caption) else None}
        if isinstance(kept, Refusal):
            # Of a second try, too: kept as a loop the row would never be asked about again, not even by RETRY=1.
            return {**row, "reject": kept.reason}
        row |= {"caption_raw": kept.text, "num_tokens": kept.num_tokens, "finish_reason": kept.finish_reason}
        return {**row, **judge(row, self._config.quality)}

    def _score(self, loader: SampleLoader, samples: Sequence[RawSample], rows: list[Row], kept: Sequence[int]) -> None:
        scores: Iterable[float | None] = [None] * len(kept)
        if self._scorer is not None:
            images = self._scorer.collect()
            for sample in loader.load([samples[index] for index in kept]):
                images.add(sample.look)
            scores = images.scores([rows[index]["caption_raw"] for index in kept])
        for index, score in zip(kept, scores, strict=True):
            rows[index]["clip_score"] = score


def _take(samples: Iterable[LoadedSample], *, rows: list[Row], images: "ImageEmbeddings | None") -> Iterator[Any]:
    """Note every sample's row, and yield what goes to the engine."""
    for sample in samples:
        rows.append(sample.row)
        if sample.row["reject"] is not None:
            continue
        if images is not None:
            images.add(sample.look)
        yield sample.prepared
