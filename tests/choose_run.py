"""A run with columns whose values a test knows, for `make choose`: two sources, unknown values, hostile captions."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from columns_run import write_captions, write_columns
from raw_shards import encode, photo, write_tar

import curation.choose.__main__ as choose

SHARDS = {"laion_0": 60, "laion_1": 40, "sam_00": 50}
HOSTILE = (
    '<script>window.hacked = 1</script><img src=x onerror=\'window.hacked = 2\'>" onload="window.hacked = 3" & '
    "{{ 7 * 7 }}"
)
RECIPE = """
[data]
shards = "{run}/raw/*.tar"

[features.stage2]
resolution = 64
"""


def rows_of(shard: str) -> list[dict[str, Any]]:
    """The samples of a shard, with all that is known of them; of some there is no aesthetic score."""
    rng = np.random.default_rng(len(shard) + int(shard[-1]))
    rows = []
    for number in range(SHARDS[shard]):
        rows.append(
            {
                "shard": shard,
                "key": f"{shard}-{number:03d}",
                "min_side": int(rng.integers(100, 900)),
                "width": int(rng.integers(100, 2000)),
                "aesthetic": math.nan if number % 10 == 3 else float(np.float32(rng.normal(5, 1))),
                "clip_score": float(np.float32(rng.uniform(0.1, 0.4))),
                "format": ["jpeg", "png", "webp", None][int(rng.integers(4))],
                "flags": ["loop"] if number % 7 == 0 else [],
                "caption": HOSTILE if number % 2 else f"A red circle {number}",
            }
        )
    return rows


def all_rows() -> list[dict[str, Any]]:
    return [row for shard in SHARDS for row in rows_of(shard)]


def write_run(run: Path) -> None:
    rows = {shard: rows_of(shard) for shard in SHARDS}
    for shard, own in rows.items():
        write_tar(run / "raw" / f"{shard}.tar", [(f"{row['key']}.jpg", encode(photo(n))) for n, row in enumerate(own)])
    named = ("key", "caption", "flags", "clip_score")
    captions = {shard: [{name: row[name] for name in named} for row in own] for shard, own in rows.items()}
    write_captions(run / "captions", captions, flags=["loop"])
    short = {shard: [{"key": row["key"], "caption": "a circle"} for row in own] for shard, own in rows.items()}
    write_captions(run / "captions@short", short, flags=[])
    for name, columns in (("pixels", ("min_side", "width", "format")), ("aesthetic", ("aesthetic",))):
        write_columns(
            run / "columns" / name,
            {shard: {each: [row[each] for row in own] for each in ("key", *columns)} for shard, own in rows.items()},
        )


def type_choose(run: Path, monkeypatch: pytest.MonkeyPatch, *settings: str, plan: bool = False, **options: str) -> None:
    """Type `make choose`; `settings` are laid over the recipe."""
    recipe = run.parent / "recipe.toml"
    recipe.write_text(RECIPE)
    words = ["choose", "--recipe", str(recipe), "--run", str(run), *(["--plan"] if plan else [])]
    words += [word for setting in settings for word in ("--set", setting)]
    words += [word for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", words)
    choose.main()
