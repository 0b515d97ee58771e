"""What is said of raw shards before any sample is read, as far as headers and names tell."""

from collections import Counter
from collections.abc import Sequence

from pipelines.as_typed import typed_flag
from pipelines.engine.progress import get_logger
from pipelines.raw.reading import Reading
from pipelines.raw.shard_headers import ShardSummary
from pipelines.raw.tables.open_table import table_format
from pipelines.raw.texts import TEXT_EXTENSIONS

NAMES_SHOWN = 3
OTHER_KINDS = {
    "files": "links that lead nowhere or in a circle, pipes or the like",
    "members": "links, devices, sparse files or paths that leave the tar",
}

log = get_logger("shards")


def say_what_headers_tell(paths: Sequence[str], summaries: Sequence[ShardSummary], reading: Reading) -> None:
    """Warn of shards that are damaged or empty, of what is no sample, of rejects, and of texts that are not taken."""
    for path, summary in zip(paths, summaries, strict=True):
        if summary.fault is not None:
            log.warning(f"{path}: {summary.fault}")
        what = "files" if summary.kind == "folder" else "members"
        if names := summary.unusable:
            log.warning(f"{path}: {len(names):,} {what} are {OTHER_KINDS[what]}: {_some(names)}")
        if names := summary.strays:
            log.warning(f"{path}: {len(names):,} {what} are no samples: {_some(names)}")
        if summary.kind == "folder" and summary.num_texts == 0 and reading.dialect != "sa1b":
            _name_texts_elsewhere(path, summary.strays)
    if empty := [path for path, summary in zip(paths, summaries, strict=True) if not summary.num_samples]:
        log.warning(f"{len(empty):,} of {len(paths):,} shards have no samples: {_some(empty)}")
    _say_rejects(paths, summaries)
    if reading.dialect != "sa1b" and reading.text_column is None:
        _say_unknown_texts(summaries)


def _say_rejects(paths: Sequence[str], summaries: Sequence[ShardSummary]) -> None:
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for path, summary in zip(paths, summaries, strict=True):
        for reason, (count, example) in summary.rejects.items():
            counts[reason] += count
            examples.setdefault(reason, f"{example} in {path}" if len(paths) > 1 else example)
    if counts:
        num_samples = sum(summary.num_samples for summary in summaries)
        listed = "; ".join(f"{count:,} {reason} ({examples[reason]})" for reason, count in counts.most_common())
        log.warning(
            f"{counts.total():,} of {num_samples:,} samples will be rejects, as is known before any is read: {listed}"
        )


def _say_unknown_texts(summaries: Sequence[ShardSummary]) -> None:
    """Say how to take texts for captions that are called by a word of the user's own, as `x.en.txt` is."""
    counts: Counter[str] = Counter()
    for summary in summaries:
        if summary.unknown_texts:
            counts.update(summary.unknown_texts)
    if counts:
        name, count = counts.most_common(1)[0]
        log.warning(
            f"{count:,} samples have a text called {name} beside the image and none that is taken for the caption: "
            f"data.text_column={name.rpartition('.')[0]} takes it"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def _name_texts_elsewhere(folder: str, strays: Sequence[str]) -> None:
    """Say of a folder whose images have no texts, and that has a table or texts elsewhere, how to type those."""
    folder = folder.rstrip("/")
    table = next((name for name in strays if table_format(name) not in (None, "lines")), None)
    texts = next((name for name in strays if "/" in name and name.rpartition(".")[2] in TEXT_EXTENSIONS), None)
    if table is not None:
        log.warning(
            f"{folder}: no image has a text beside it, but there is a table: if it names the images by path, type "
            f"{typed_flag('shards', f'{folder}/{table}')}; if it has captions by their keys or names, "
            f"captioning.table={folder}/{table}"
        )
    elif texts is not None:
        log.warning(
            f"{folder}: no image has a text beside it, but there are texts elsewhere: if {texts} and its like are "
            f"captions, type captioning.table={folder}/{texts.partition('/')[0]}"
        )
