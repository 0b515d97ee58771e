"""What the run's columns say of a set's samples: duplicate images, and claims that the images do not support."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dataset_stats.captions import Address
from dataset_stats.distribution import Distribution
from errors import UserError
from pipelines.columns.columns_folders import CAPTIONS, MAIN_CAPTION, ColumnsFolder
from pipelines.columns.known_scores import score_command
from pipelines.columns.sample_columns import SampleColumns
from pipelines.engine.pieces import Source
from pipelines.store.tables import MEND_SHARD, read_table

if TYPE_CHECKING:
    from dataset_stats.set_rows import SetRows

DUPLICATES, CLAIMS = "duplicates", "claims"
COLUMNS = {
    DUPLICATES: ("duplicate", "duplicate_of", "duplicate_kind", "duplicate_group"),
    CLAIMS: ("num_claims", "num_unknown", "unsupported_share", "unsupported_sentences"),
}
TITLES = {DUPLICATES: "Duplicate images", CLAIMS: "Claims"}
GROUPS = {"2": (2, 2), "3": (3, 3), "4 to 9": (4, 9), "10 or more": (10, None)}
NUM_EXAMPLES = 10


@dataclass(kw_only=True)
class ImageDuplicates:
    """Samples whose image another one, which is kept, has already.

    Attributes:
        num_samples: of which it is known.
        kinds: duplicates by kind.
        groups: by size, how many groups of samples of this set there are.
        examples: sample, the one that it is a duplicate of, kind.
    """

    num_samples: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    largest_group: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def num_duplicates(self) -> int:
        """Duplicates of all kinds."""
        return sum(self.kinds.values())


@dataclass(kw_only=True)
class Claims:
    """What captions claim, and how much of it the images do not support.

    Attributes:
        num_captions: captions that were asked about.
        num_unknown: claims of which nobody knows.
        num_marked: captions with an unsupported claim.
        shares: the unsupported share of each caption with a known claim, in whole percent.
        marked_nouns: nouns that marked sentences have more often than all captions: noun, occurrences in marked
            sentences that were read, per 1000 nouns of them, per 1000 nouns of all captions.
    """

    num_captions: int = 0
    num_claims: int = 0
    num_unknown: int = 0
    num_unsupported: int = 0
    num_marked: int = 0
    shares: Distribution = field(default_factory=Distribution)
    marked_nouns: list[tuple[str, int, float, float]] = field(default_factory=list)

    @property
    def unsupported_fraction(self) -> float:
        """Share of the known claims."""
        return self.num_unsupported / max(self.num_claims - self.num_unknown, 1)


class Scores:
    """The scores that the report shows of the sets of a run's samples."""

    def __init__(self, run: Path, sources: Mapping[str, Sequence[Source]]) -> None:
        self._run = run
        self._addresses = {name: [Address.parse(source.path) for source in own] for name, own in sources.items()}

    @cached_property
    def _columns(self) -> SampleColumns:
        return SampleColumns(self._run)

    def hashes(self) -> dict[str, dict[str, str]]:
        """Return what decides what the report shows of them: by folder, the hash of each shard's file."""
        found: dict[str, dict[str, str]] = {}
        for score, addresses in ((score, own) for own in self._addresses.values() for score in COLUMNS):
            if (folder := self._folder(score, addresses)) is not None:
                reports = folder.manifest.shards
                shards = {address.shard for address in addresses} & reports.keys()
                found.setdefault(folder.name, {}).update((each, reports[each].files[".parquet"]) for each in shards)
        return {name: dict(sorted(shards.items())) for name, shards in sorted(found.items())}

    def missing(self) -> list[str]:
        """Return, for people, what is not known of some sets, and the command that finds it out."""
        names: dict[tuple[str, str], list[str]] = {}
        for score, (name, own) in product(TITLES, self._addresses.items()):
            if self._is_missing(score, own):
                names.setdefault((score, _caption_of_score(score, own)), []).append(name)
        return [
            f"{TITLES[score]} of {', '.join(own)}: "
            + score_command(score, self._run, caption=None if caption == MAIN_CAPTION else caption).rstrip(",")
            for (score, caption), own in names.items()
        ]

    def image_duplicates(self, name: str, rows: SetRows) -> ImageDuplicates | None:
        """Return what is known of a set's images; None where nothing is."""
        tables = list(self._tables(DUPLICATES, name, rows))
        if not tables:
            return None
        found, groups = ImageDuplicates(), []
        kinds: Counter[str] = Counter()
        for number, table in tables:
            known = table.filter(table["duplicate"].is_valid())
            own = known.filter(known["duplicate"])
            found.num_samples += known.num_rows
            kinds.update(str(kind) for kind in own["duplicate_kind"].to_pylist())
            groups.append(known["duplicate_group"].drop_null().combine_chunks())
            shard = self._addresses[name][number].shard
            for row in own.slice(0, NUM_EXAMPLES - len(found.examples)).to_pylist():
                sample = f"{shard}/{row['key']}"
                found.examples.append((sample, str(row["duplicate_of"]), str(row["duplicate_kind"])))
        sizes = np.asarray(pa.chunked_array(groups).value_counts().field("counts"))
        for label, (least, most) in GROUPS.items():
            found.groups[label] = int(((sizes >= least) & (sizes <= (most or sizes.max(initial=0)))).sum())
        found.largest_group = int(sizes.max(initial=0))
        found.kinds = dict(sorted(kinds.items()))
        return found

    def claims(self, name: str, rows: SetRows) -> Claims | None:
        """Return what is known of the claims of a set's captions, `marked_nouns` left out; None where nothing is."""
        found = None
        for _, table in self._tables(CLAIMS, name, rows):
            found = found or Claims()
            asked = table.filter(table["num_claims"].is_valid())
            known = np.asarray(asked["num_claims"]) - np.asarray(asked["num_unknown"])
            shares = np.asarray(asked["unsupported_share"].fill_null(0.0), np.float64)
            found.num_captions += asked.num_rows
            found.num_claims += int(np.asarray(asked["num_claims"]).sum())
            found.num_unknown += int(np.asarray(asked["num_unknown"]).sum())
            found.num_unsupported += int(np.rint(shares * known).sum())
            found.num_marked += int((shares > 0).sum())
            # A share is of float32, and a percent that it reaches it has.
            found.shares.add(np.floor(100 * shares[known > 0] + 1e-4).astype(np.int64))
        return found

    def marked_sentences(self, name: str, rows: SetRows) -> Iterator[tuple[Address, dict[int, list[int]]]]:
        """Yield of each source of a set, by number of the row, the numbers of its unsupported sentences."""
        for number, table in self._tables(CLAIMS, name, rows):
            numbers = rows.numbers(number, np.arange(table.num_rows))
            marked = zip(numbers.tolist(), table["unsupported_sentences"].to_pylist(), strict=True)
            yield self._addresses[name][number], {row: sentences for row, sentences in marked if sentences}

    def _is_missing(self, score: str, addresses: Sequence[Address]) -> bool:
        if not _has_samples(score, addresses):
            return False
        folder = self._folder(score, addresses)
        return folder is None or any(address.shard not in folder.manifest.shards for address in addresses)

    def _folder(self, score: str, addresses: Sequence[Address]) -> ColumnsFolder | None:
        if not _has_samples(score, addresses):
            return None
        caption = _caption_of_score(score, addresses)
        of_score = [each for each in self._columns.folders if each.score == score and each.caption == caption]
        return next((each for each in of_score if set(COLUMNS[score]) <= set(each.schema.names)), None)

    def _tables(self, score: str, name: str, rows: SetRows) -> Iterator[tuple[int, pa.Table]]:
        """Yield the number of each source of which a score is known, and its columns of the set's rows."""
        addresses = self._addresses[name]
        if (folder := self._folder(score, addresses)) is None:
            return
        for number, address in enumerate(addresses):
            if address.shard not in folder.manifest.shards:
                continue
            table = read_table(folder.file(address.shard), ["key", *COLUMNS[score]], mend=MEND_SHARD)
            if address.sample is not None and address.sample.num_rows == table.num_rows:
                table = table.take(pa.array(address.sample.rows()))
            if not table["key"].equals(read_table(rows.files[number], ["key"], mend=MEND_SHARD)["key"]):
                raise UserError(
                    f"{folder.file(address.shard)} is not of the same samples as the captions of {address.shard}; "
                    f"{folder.command} makes what is old anew"
                )
            yield number, table if rows.chosen is None else table.filter(pa.array(rows.chosen(number)))


def _has_samples(score: str, addresses: Sequence[Address]) -> bool:
    """Whether a score may be known of captions: those of the run, and images of raw shards, too."""
    layouts = {address.layout for address in addresses}
    return layouts == {CAPTIONS} or (score == DUPLICATES and layouts == {"raw"})


def _caption_of_score(score: str, addresses: Sequence[Address]) -> str:
    """The column of captions that a score of a set is about; of a score of images the main one."""
    return MAIN_CAPTION if score == DUPLICATES else _caption_of(addresses[0])


def _caption_of(address: Address) -> str:
    """The column of captions that a file of captions is read for: of a pass, its name."""
    return Path(address.path).parent.name.partition("@")[2] or address.column


def as_json(found: ImageDuplicates | Claims) -> dict[str, Any]:
    """Return the figures for `summary.json` and the manifest."""
    if isinstance(found, ImageDuplicates):
        return {
            "num_samples": found.num_samples,
            "kinds": found.kinds,
            "groups": found.groups,
            "largest_group": found.largest_group,
        }
    return {
        "num_captions": found.num_captions,
        "num_claims": found.num_claims,
        "num_unknown": found.num_unknown,
        "num_unsupported": found.num_unsupported,
        "num_marked": found.num_marked,
        "unsupported_percent": found.shares.summary(),
    }
