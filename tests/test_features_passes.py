"""Features of captions in several passes: each column is found where it lies, one that changes is encoded anew."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from feature_run import encoded, extract, picture, write_raw, write_recipe

from captioning.__main__ import main as caption_main
from curation.__main__ import main as columns_main
from errors import UserError
from pipelines.columns.sample_columns import SampleColumns
from pipelines.store.manifest import read_manifest
from pipelines.store.verify.run import verify_run
from tests.sound_run import require_sound
from tests.tiny_models import save_clip

SHARDS = ("laion_00000", "laion_00001")
MIXED = 'features.stage2.captions=[{column="caption"},{column="short"},{column="words",weight=0.5}]'
SHORT = 'features.stage2.captions=[{column="short"}]'
PASSES = (
    "captioning.engine=given",
    "captioning.passes.short={engine='cut',max_sentences=1}",
    "captioning.passes.words={engine='cut',max_words=8}",
    "captioning.max_reject_fraction=1.0",
)


def caption(run: Path, *settings: str) -> None:
    """Make captions and passes of a run."""
    words = ["captioning", "--recipe", str(run.parent / "recipe.toml"), "--run", str(run)]
    words += [part for setting in (*PASSES, *settings) for part in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        caption_main()


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of twelve samples with captions of one to four sentences, the third without, and two passes."""
    folder = tmp_path_factory.mktemp("passes")
    for number, shard in enumerate(SHARDS):
        samples: list[dict[str, Any]] = []
        for index in range(12):
            text = " ".join(f"A {word} {index} is here." for word in ("red", "blue", "green", "dog")[: 1 + index % 4])
            image = encoded(picture(100 * number + index))
            samples.append({"key": f"{number}{index:05d}", "png": image, "txt": "" if index == 2 else text})
        write_raw(folder / "run" / "raw" / f"{shard}.tar", samples)
    write_recipe(folder)
    caption(folder / "run")
    return folder / "run"


@pytest.fixture
def run(tmp_path: Path, captioned: Path) -> Path:
    folder = shutil.copytree(captioned.parent, tmp_path / "folder")
    return folder / "run"


def rows_of(run: Path, folder: str, shard: str = SHARDS[0]) -> list[dict[str, Any]]:
    return pq.read_table(run / folder / f"{shard}.parquet").to_pylist()


def written(run: Path) -> dict[str, int]:
    """When each tar of text was written."""
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.glob("features/text*/*.tar")}


def test_each_column_is_encoded_from_its_own_folder(run: Path) -> None:
    extract(run, MIXED)
    extract(run, SHORT)
    extract(run, 'features.stage2.captions=[{column="words"},{column="caption"}]')
    folder = "features/text-caption+short+words"
    rows = rows_of(run, folder)
    assert len(rows) == 36 and [row["weight"] for row in rows[:3]] == [1.0, 1.0, 0.5]
    texts = {name: [row["caption"] for row in rows_of(run, f"captions{at}")] for name, at in
             (("caption", ""), ("short", "@short"), ("words", "@words"))}  # fmt: skip
    # The same text has the same embedding, wherever it lies: as long as that of the column alone.
    alone = [row["nbytes"] for row in rows_of(run, "features/text-short")]
    assert [row["nbytes"] for row in rows[1::3]] == alone
    whole = [row["nbytes"] for row in rows_of(run, "features/text-words+caption")]
    assert ([row["nbytes"] for row in rows[2::3]], [row["nbytes"] for row in rows[0::3]]) == (whole[0::2], whole[1::2])
    same = [texts["caption"][i] == texts["short"][i] for i in range(12)]
    assert [rows[3 * i]["nbytes"] == rows[3 * i + 1]["nbytes"] for i in range(12)] == same
    # What captioning has rejected is its reject, told once, in each column.
    assert {row["reject"] for row in rows[6:9]} == {"caption:no_caption"}
    assert read_manifest(run / folder).rejected == {"caption:no_caption": 2}
    require_sound(run)


def test_another_pass_encodes_anew_what_has_it_and_flags_do_not(run: Path) -> None:
    for table in (MIXED, SHORT, 'features.stage2.captions=[{column="caption"}]'):
        extract(run, table)
    before = written(run)
    caption(run, 'captioning.quality.off_frame_phrases=["red"]')
    for table in (MIXED, SHORT, 'features.stage2.captions=[{column="caption"}]'):
        extract(run, table)
    assert written(run) == before, "flags are no texts"
    # In the words of all shards but one nothing changes: it alone is encoded anew.
    caption(run, "captioning.passes.words.max_words=9")
    problems = [problem.text for problem in verify_run(run).problems]
    assert len(problems) == 1 and "captions@short and" in problems[0] and "captions@words is" in problems[0]
    for table in (MIXED, SHORT, 'features.stage2.captions=[{column="caption"}]'):
        extract(run, table)
    changed = {path.split("/")[1] for path, time in written(run).items() if before[path] != time}
    assert changed == {"text-caption+short+words"}
    require_sound(run)


def test_a_pass_that_lacks_shards_or_is_of_former_captions_is_named(run: Path) -> None:
    shutil.rmtree(run / "captions@short")
    caption(run, "captioning.passes.short.shards=['*0']")
    with pytest.raises(
        UserError, match=r"captions@short: 1 of 2 shards have no captions \(laion_00001\); type `.*caption"
    ):
        extract(run, SHORT)
    caption(run, "captioning.passes.short.shards=['*']")
    caption(run, 'captioning.quality.off_frame_phrases=["red"]', "captioning.only=caption")
    with pytest.raises(UserError, match=r"captions@short/laion_00000.parquet was cut of other captions than are in"):
        extract(run, SHORT)
    shutil.rmtree(run / "captions@words")
    with pytest.raises(UserError, match=r"features.stage2.captions names 'words', but .*: alt_text, .*short.*passes"):
        extract(run, MIXED)


def test_captions_of_other_samples_are_refused(run: Path) -> None:
    path = run / "captions@words" / f"{SHARDS[0]}.parquet"
    extract(run, MIXED)
    table = pq.read_table(path)
    pq.write_table(table.take(list(reversed(range(len(table))))), path)
    with pytest.raises(
        UserError, match=r"captions@words/laion_00000\.parquet has other samples than .*captions/laion_00000.parquet"
    ):
        extract(run, MIXED, "features.stage2.max_tokens=39")


def test_choices_and_weights_name_passes(run: Path) -> None:
    where = "features.stage2.where=length(short) < length(caption) and not short.flags.empty"
    by_length = '{column="caption",weight="1 if length(caption) < 40 else 0"},{column="short",weight="1"}'
    extract(run, where, f"features.stage2.captions=[{by_length}]")
    chosen = [row for row in rows_of(run, "choices/stage2") if row["chosen"]]
    assert [row["key"] for row in chosen] == [f"0{index:05d}" for index in (1, 3, 5, 6, 7, 9, 10, 11)]
    assert [(row["weight.caption"] > 0, row["weight.short"]) for row in chosen[:3]] == [
        (True, 1),
        (False, 1),
        (True, 1),
    ]


def test_clip_scores_of_passes_are_columns(run: Path, tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip")
    settings = (
        f"columns.clip_model={clip}",
        'columns.scores=["clip","clip_score"]',
        'columns.caption_columns=["caption","short"]',
    )
    words = ["columns", "--recipe", str(run.parent / "recipe.toml"), "--run", str(run)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, *(part for setting in settings for part in ("--set", setting))])
        columns_main()
    names = ["caption", "short", "clip_score", "short.clip_score", "clip_tokens", "short.clip_tokens"]
    rows = SampleColumns(run).read(SHARDS[0], names).to_pylist()
    assert all((row["clip_score"] is None) == (row["caption"] is None) for row in rows)
    assert [row["short.clip_score"] is None for row in rows] == [row["short"] is None for row in rows]
    same = [row["short.clip_tokens"] == row["clip_tokens"] for row in rows]
    assert same == [row["short"] == row["caption"] for row in rows] and not all(same)
    # Cut anew, the pass is scored anew, and the captions are not.
    times = {path: path.stat().st_mtime_ns for path in run.glob("columns/*/*.parquet")}
    caption(run, "captioning.passes.short.max_sentences=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, *(part for setting in settings for part in ("--set", setting))])
        columns_main()
    changed = {path.parent.name for path in times if path.stat().st_mtime_ns != times[path]}
    assert changed == {"clip_score@short"}


def test_the_plan_measures_passes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(run, SHORT, plan=True)
    assert "mean of 22 captions" in " ".join(capsys.readouterr().err.split())
