"""Claims about data: nouns (Table 1), captions (Figures 3 and 10), training on dense ones, tokens of a text."""

from collections.abc import Mapping
from typing import Any

from pipelines.recipe import DataConfig
from pipelines.store.summary import read_summary
from pipelines.store.tables import MEND_SHARD, read_table
from toyworld.gallery import caption_examples
from toyworld.paper.arms import Arm, found_in_arms
from toyworld.paper.claims import Finding, Table, TextPair, Words
from toyworld.paper.estimates import NOT_RUN, Verdict, all_of, difference_of, is_more
from toyworld.paper.published import TABLE_1
from toyworld.paper.readings import PaperRuns

NUM_TEXTS = 6
SETS = ("LAION", "LAION-LLaVA", "SAM-LLaVA", "HQ-LLaVA")


def nouns(runs: PaperRuns, words: Words) -> Finding:
    """Table 1: LLaVA's captions have a larger part of valid nouns, and more nouns an image, than alt texts."""
    found = read_summary(runs.world).get("dataset_stats", {})
    figures = {name: found[name] for name in SETS if name in found}
    before, after = figures.get("LAION"), figures.get("LAION-LLaVA")
    if before is None or after is None:
        verdict = Verdict(None, NOT_RUN)
    else:
        gains = [(name, before[name], after[name]) for name in ("valid_fraction", "nouns_per_image")]
        verdict = Verdict(
            all(new > old for _, old, new in gains),
            f"VN/DN goes from {before['valid_fraction']:.1%} to {after['valid_fraction']:.1%}, nouns per image from "
            f"{before['nouns_per_image']:.1f} to {after['nouns_per_image']:.1f}",
        )
    return Finding(
        verdict=verdict,
        theirs=Table(
            title="Table 1",
            columns=("", "VN/DN", "%", "nouns", "per image"),
            rows=[
                (name, f"{row.valid}/{row.distinct}", f"{row.valid_percent:g}", row.total, f"{row.per_image:g}")
                for name, row in TABLE_1.items()
            ],
        ),
        ours=_noun_table(figures),
        links=(("world/stats/report.html", "the noun report of this world"),),
        figures={name: _noun_figures(row) for name, row in figures.items()},
    )


def _noun_table(figures: Mapping[str, Any]) -> Table | None:
    if not figures:
        return None
    rows = [
        (
            name,
            f"{row['valid_distinct_nouns']:,}/{row['distinct_nouns']:,}",
            f"{100 * row['valid_fraction']:.1f}",
            f"{row['total_nouns']:,}",
            f"{row['nouns_per_image']:.1f}",
        )
        for name, row in figures.items()
    ]
    return Table(title="This world", columns=("", "VN/DN", "%", "nouns", "per image"), rows=rows)


def _noun_figures(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("valid_distinct_nouns", "distinct_nouns", "valid_fraction", "total_nouns", "nouns_per_image")
    return {name: row[name] for name in names}


def captions(runs: PaperRuns, words: Words) -> Finding:
    """Figures 3 and 10: alt texts name few of the objects, captions nearly all."""
    figures = read_summary(runs.world).get("captioning", {}).get("by_dataset", {}).get("laion", {})
    if not figures:
        verdict = Verdict(None, NOT_RUN)
    else:
        before, after = figures["named_in_alt_text"], figures["named_in_caption"]
        verdict = Verdict(
            after > before, f"alt texts name {before:.1%} of {figures['objects']:,} objects, captions {after:.1%}"
        )
    data = DataConfig(shards="{run}/raw/*/*.tar")
    examples = [item for item in caption_examples(runs.world, data, count=4 * NUM_TEXTS) if item.alt_text]
    return Finding(
        verdict=verdict,
        ours=None
        if not figures
        else Table(
            title="This world, LAION-like pictures",
            columns=("", "objects named", "invented per caption"),
            rows=[
                ("alt texts", f"{figures['named_in_alt_text']:.1%}", "–"),
                ("captions", f"{figures['named_in_caption']:.1%}", f"{figures['invented_per_caption']:.3f}"),
            ],
        ),
        texts=[
            TextPair(picture=item.picture, before=item.alt_text, after=item.caption) for item in examples[:NUM_TEXTS]
        ],
        figures={name: figures.get(name) for name in ("named_in_alt_text", "named_in_caption")},
    )


def dense_captions(runs: PaperRuns, words: Words) -> Finding:
    """Section 2.4: training on LLaVA's captions of the same images aligns better than on alt texts."""
    dense, raw = Arm("dense captions", "dense"), Arm("alt texts", "raw")
    difference = difference_of(runs.hits("dense"), runs.hits("raw"))
    return found_in_arms(
        runs,
        arms=(dense, raw),
        differences={"dense_over_raw": difference},
        verdict=is_more(difference, "dense over raw captions"),
    )


def tokens(runs: PaperRuns, words: Words) -> Finding:
    """Section 3.1: 120 tokens of a text instead of 77."""
    most, some, few = Arm("all (67 at most)", "main"), Arm("43 tokens", "tokens-43"), Arm("16 tokens", "tokens-16")
    gain = difference_of(runs.hits("main"), runs.hits("tokens-16"))
    rest = difference_of(runs.hits("main"), runs.hits("tokens-43"))
    cut = {limit: _share_cut(runs, limit) for limit in (43, 16)}
    said = ", ".join(
        f"{limit} tokens cut {share:.0%} of the captions" for limit, share in cut.items() if share is not None
    )
    return found_in_arms(
        runs,
        arms=(most, some, few),
        differences={"all_over_43": rest, "all_over_16": gain},
        verdict=all_of(is_more(rest, "all over 43 tokens"), is_more(gain, "all over 16 tokens")),
        measured=f"Here {said}." if said else "",
        further={f"captions_cut_by_{limit}": round(share, 4) for limit, share in cut.items() if share is not None},
    )


def _share_cut(runs: PaperRuns, limit: int) -> float | None:
    """Part of the captions that are longer than a limit, by the index of those that were encoded whole."""
    indexes = sorted((runs.world / "features" / "text").glob("*.parquet"))
    counts = [
        count
        for path in indexes
        for count in read_table(path, ["num_tokens"], mend=MEND_SHARD)["num_tokens"].to_pylist()
        if count
    ]
    return sum(count > limit for count in counts) / len(counts) if counts else None
