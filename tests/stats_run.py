"""A run with captions to count, for the tests of dataset_stats."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_stats.__main__ import main
from pipelines.store.files import sha256_file
from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport

RECIPE = """
[data]
shards = "{run}/raw/*.tar"
[engine]
in_process = true
samples_per_slice = 8
[dataset_stats]
tagger = "textblob"
num_gallery_images = 4
max_reject_fraction = 0.9
[dataset_stats.sets]
"alt" = { column = "alt_text" }
"dense" = { column = "caption" }
"""


def write_caption_shards(run: Path, shards: dict[str, list[dict]]) -> None:
    """RUN/captions as the captioning stage leaves it; rows need key, alt_text, caption, flags and reject."""
    directory = ShardDirectory(run / "captions")
    fingerprint = Fingerprint.of({"stage": "captioning"})
    for shard, rows in shards.items():
        path = directory.file(shard, ".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        reasons = [row["reject"] for row in rows if row["reject"]]
        report = ShardReport(
            name=shard,
            source=shard,
            num_read=len(rows),
            num_kept=len(rows) - len(reasons),
            rejected={reason: reasons.count(reason) for reason in reasons},
            files={".parquet": sha256_file(path)},
        )
        directory.write_marker(report, fingerprint)
    directory.write_manifest(fingerprint, list(shards), upstream={}, extra={})


def caption_rows(shard: str, alt_texts: list[str | None], captions: list[str | None]) -> list[dict]:
    """Rows without flags or rejects."""
    return [
        {"key": f"{shard}-{index}", "alt_text": alt_text, "caption": caption, "flags": [], "reject": None}
        for index, (alt_text, caption) in enumerate(zip(alt_texts, captions, strict=True))
    ]


def run_stage(run: Path, *overrides: str) -> None:
    """`python -m dataset_stats` in this process; the recipe is `recipe.toml` beside the run."""
    recipe = run.parent / "recipe.toml"
    if not recipe.is_file():
        recipe.write_text(RECIPE)
    arguments = [part for override in overrides for part in ("--set", override)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dataset_stats", "--recipe", str(recipe), "--run", str(run), *arguments])
        main()
