"""Questions about the scenes of prompts, and how far kept answers agree with the judge."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.store.manifest import Fingerprint, ShardDirectory, ShardReport
from sampling.evaluation.questions.answers_kept import SCHEMA
from sampling.evaluation.questions.layouts import read_geneval2
from toyworld.asked import CLAIM, score_agreement, write_questions
from toyworld.config import ToyworldConfig
from toyworld.questions import is_true
from toyworld.render import render
from toyworld.scenes import Scene, random_scene
from toyworld.wording import dense_caption

NUM_SCENES = 12


@pytest.fixture
def scenes(tmp_path: Path) -> dict[str, Scene]:
    """A run whose samples show what their prompts say; the scenes by prompt, one of which is there twice."""
    rng = np.random.default_rng(5)
    drawn = [random_scene(rng) for _ in range(NUM_SCENES)]
    folder = tmp_path / "samples" / "stage2"
    for path in (tmp_path / "raw", folder):
        path.mkdir(parents=True)
    rows, found = [], {}
    for number, scene in enumerate([*drawn, drawn[0]]):
        prompt = dense_caption(scene, np.random.default_rng(0))
        found[prompt] = scene
        rows.append({"key": f"p{number}", "prompt": prompt, "scene": json.loads(scene.to_json())})
        render(scene, 64, 64, rng=np.random.default_rng(number)).save(folder / f"p{number}.png")
    (tmp_path / "raw" / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [{"key": row["key"], "prompt": row["prompt"], "file": f"{row['key']}.png"} for row in rows]
    pq.write_table(pa.Table.from_pylist(table), folder / "samples.parquet")
    return found


def test_right_answers_are_true_of_the_scene_and_stay_the_same(tmp_path: Path, scenes: dict[str, Scene]) -> None:
    write_questions(tmp_path)
    path = tmp_path / "judge" / "questions.jsonl"
    before = path.read_bytes(), path.stat().st_mtime_ns
    asked = read_geneval2(path, key="k")
    assert [item.prompt for item in asked] == list(scenes)
    for item in asked:
        scene = scenes[item.prompt]
        assert len(item.questions) == 4 * len(scene.objects)
        for question in item.questions:
            (claim,) = CLAIM.findall(question.text)
            assert is_true(scene, claim) is (question.answer == "yes")
    assert sum(question.answer == "no" for item in asked for question in item.questions) > 2 * NUM_SCENES
    write_questions(tmp_path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_agreement_is_with_what_the_judge_sees_and_not_with_the_prompt(
    tmp_path: Path, scenes: dict[str, Scene]
) -> None:
    """All answers as the scenes are; then one picture shows another scene, one answer is wrong, one is unknown."""
    write_questions(tmp_path)
    rows = [
        {"file": f"p{number}.png", "question": q.text, "answer": q.answer, "group": q.group, "said": q.answer}
        for number, item in enumerate(read_geneval2(tmp_path / "judge" / "questions.jsonl", key="k"))
        for q in item.questions
    ]

    def agreement() -> dict:
        directory = ShardDirectory(tmp_path / "evaluation" / "answers" / "stage2-abc")
        directory.path.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), directory.file("images-00000", ".parquet"))
        fingerprint = Fingerprint.of({})
        report = ShardReport(name="images-00000", source="", num_read=1, num_kept=1)
        directory.write_marker(report, fingerprint)
        directory.write_manifest(fingerprint, ["images-00000"], upstream={}, extra={"model": "vlm", "answers": "soft"})
        score_agreement(ToyworldConfig(), tmp_path)
        return json.loads((tmp_path / "judge" / "stage2-abc.json").read_text())

    whole = agreement()
    assert whole["agreement"] == 1.0 and whole["num_questions"] == len(rows)
    assert whole["asked_of"] == "vlm" and set(whole["by_skill"]) == {
        *("object", "other colour", "other shape", "other position"),
    }
    rows[0]["said"] = "no"
    rows[1] |= {"said": None, "reject": "not_understood"}
    found = agreement()
    assert found["agreement"] == pytest.approx(1 - 1 / (len(rows) - 1)) and found["unknown"] == {"not_understood": 1}
    assert found["by_skill"]["object"]["agreement"] < 1 == found["by_skill"]["other shape"]["agreement"]
    # The picture of the last prompt is that of the first: what is asked for is not there, and the answer is yes.
    folder = tmp_path / "samples" / "stage2"
    (folder / f"p{NUM_SCENES - 1}.png").write_bytes((folder / "p0.png").read_bytes())
    assert agreement()["agreement"] < found["agreement"]
