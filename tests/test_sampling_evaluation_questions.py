"""`make eval TASK=questions`: benchmarks asked of a chat server, resumed, scored by their own rules."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sampling_run import make_run
from test_sampling_evaluation_questions_layouts import GENEVAL, write_lines

from encoders.chat_server import ServerError
from errors import UserError
from pipelines.store.manifest import read_manifest
from sampling.evaluation.__main__ import main
from sampling.evaluation.questions import answers_kept
from sampling.evaluation.questions.layouts import AskedPrompt
from sampling.evaluation.questions.scoring import AnsweredImage, geometric_mean, score
from sampling.evaluation.questions.wording import Question
from tests.chat_server import Answer, ScriptedServer, fail, prompt_of, say

RECIPE = """
[engine]
in_process = true

[sampling]
prompts = "{{run}}/raw/prompts.jsonl"
num_steps = 1
text_dtype = "float32"
images_per_prompt = 2

[evaluation]
prompt_set = "{prompt_set}"
prompts = "{prompts}"

[evaluation.questions]
model = "asked-vlm"
server = {{ base_url = "{base_url}", max_backoff_seconds = 0.1, patience_seconds = 0.3 }}
"""
NO_LIKELIHOODS = fail(422, "Unexpected keys in the request: {'logprobs', 'top_logprobs'}")


def likely(*tokens: tuple[str, float]) -> Answer:
    """An answer whose first token is one of these, with their likelihoods."""
    status, body = say(tokens[0][0])
    top = [{"token": token, "logprob": math.log(share), "bytes": None} for token, share in tokens]
    body["choices"][0]["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return status, body | {"model": "vlm-of-the-server"}


def soft(body: dict[str, Any], number: int) -> Answer:
    """Teddy bears are there for sure, dogs 1 to 9, and all else, three buses too, is true by 3 to 1."""
    asked = prompt_of(body)
    assert (body["max_tokens"], body["top_logprobs"], body["temperature"]) == (1, 20, 0.0)
    assert asked.endswith(" Answer in one word.")
    if "How many" in asked:
        return likely(("three", 0.5), (" Three", 0.1), ("2", 0.2), ("Many", 0.2))
    if "teddy bear in" in asked:
        return likely(("Yes", 0.9), (" yes", 0.1))
    return likely(("No", 0.9), ("Yes", 0.1)) if "dog" in asked else likely(("Yes", 0.6), ("No", 0.2), ("A", 0.2))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose samples of GenEval's prompts are drawn, and the file of those."""
    run = make_run(tmp_path_factory.mktemp("questions") / "run")
    write_lines(run / "geneval.jsonl", GENEVAL)
    with ScriptedServer(soft) as server:
        ask(run, server.base_url)
    return run


def ask(
    run: Path, base_url: str, *settings: str, prompt_set: str = "geneval", file: str = "geneval.jsonl"
) -> dict[str, Any]:
    """Type the command; return questions.json."""
    (run / "recipe.toml").write_text(RECIPE.format(prompt_set=prompt_set, prompts=f"{{run}}/{file}", base_url=base_url))
    flags = [part for setting in settings for part in ("--set", setting)]
    main(["questions", "--recipe", str(run / "recipe.toml"), "--run", str(run), "--stage", "2", *flags])
    return json.loads((run / "evaluation" / "stage2-questions" / "questions.json").read_text())


def again(run: Path, *settings: str, answer: Callable[[dict[str, Any], int], Answer]) -> tuple[dict[str, Any], int]:
    """Ask another server; return what the table says and how many questions it was asked."""
    with ScriptedServer(answer) as server:
        value = ask(run, server.base_url, *settings)
        return value["checkpoints"][0], len(server.requests)


def answer_files(run: Path) -> dict[str, bytes]:
    """The parts of the answers that were made last, with their manifest."""
    folders = sorted((run / "evaluation" / "answers").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return {path.name: path.read_bytes() for path in sorted(folders[-1].glob("[im]*"))}


def test_geneval_is_scored_softly_with_every_input_beside_the_score(drawn: Path) -> None:
    folder = drawn / "evaluation" / "stage2-questions"
    (row,) = json.loads((folder / "questions.json").read_text())["checkpoints"]
    scores = {number["metric"]: number for number in row["scores"]}
    tags = {"single_object": 1, "counting": 1, "position": 1, "color_attr": 1}
    assert {tag: scores[tag]["value"] for tag in tags} == tags
    assert scores["GenEval by questions"]["value"] == 1
    values = [[0.75], [0.75], [1, 0.75, 0.75], [0.75, 0.75, 0.75, 0.75, 0.9]]
    means = [sum(each) / len(each) for each in values]
    assert scores["Soft-TIFA AM"]["value"] == pytest.approx(sum(means) / 4)
    assert (scores["Soft-TIFA AM"]["num_images"], scores["Soft-TIFA AM"]["num_prompts"]) == (8, 4)
    asked = row["asked"]
    assert (asked["model"], asked["server_calls_it"]) == ("asked-vlm", ["vlm-of-the-server"])
    assert (asked["answers"], asked["images_per_prompt"], asked["num_questions"]) == ("soft", 2, 20)
    text = (folder / "questions.md").read_text()
    for shown in ("asked-vlm", "vlm-of-the-server", asked["file_sha256"], "wording_version: 2", "| soft |", "seed: 0"):
        assert shown in text
    (answers,) = (drawn / "evaluation" / "answers").iterdir()
    rows = [row for path in sorted(answers.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert [row["file"] for row in rows][:2] == ["00000.png", "00000-1.png"]
    bus = next(row for row in rows if "buses" in row["question"])
    assert (bus["said"], bus["share"], bus["mass"], bus["text"]) == ("three", 0.75, 0.8, "three")
    assert read_manifest(answers).extra["answers"] == "soft"


def test_a_finished_table_asks_nothing_and_needs_no_server(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (drawn / "evaluation" / "stage2-questions" / "questions.md").read_bytes()
    ask(drawn, "http://127.0.0.1:1/v1")
    assert "nothing to do" in capsys.readouterr().err
    assert (drawn / "evaluation" / "stage2-questions" / "questions.md").read_bytes() == before


def test_a_command_that_ended_in_the_middle_asks_the_rest_and_writes_the_same_bytes(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers_kept, "IMAGES_AT_ONCE", 2)
    name = "evaluation.questions.model=other-vlm"
    _, num_whole = again(drawn, name, answer=soft)
    calm = answer_files(drawn)
    assert len(calm) == 5
    table = (drawn / "evaluation" / "stage2-questions" / "questions.json").read_bytes()
    for path in (drawn / "evaluation" / "answers").glob("*/*-0000[123].parquet"):
        path.unlink()
    (drawn / "evaluation" / "stage2-questions" / "manifest.json").unlink()
    # The whole of it, and then from the second of four parts on.
    with pytest.raises(ServerError, match="run the same command again"):
        again(drawn, name, answer=lambda body, number: soft(body, number) if number < 6 else fail(503, "gone"))
    _, num_rest = again(drawn, name, answer=soft)
    assert num_rest < num_whole and answer_files(drawn) == calm
    assert (drawn / "evaluation" / "stage2-questions" / "questions.json").read_bytes() == table


def test_a_server_without_likelihoods_gives_hard_answers_and_the_table_says_so(drawn: Path) -> None:
    def hard(body: dict[str, Any], number: int) -> Answer:
        if "logprobs" in body:
            return NO_LIKELIHOODS
        asked = prompt_of(body)
        return say("There are two." if "How many" in asked else "No." if "dog" in asked else "Yes, I think so.")

    row, _ = again(drawn, "evaluation.questions.model=hard-vlm", answer=hard)
    values = {number["metric"]: number["value"] for number in row["scores"]}
    assert row["asked"]["answers"] == "hard" and "num_right_answers_not_told" not in row["asked"]
    assert values["counting"] == 0 and values["GenEval by questions"] == values["all right"] == values["TIFA"] == 0.75
    with pytest.raises(ServerError, match=r'tells no likelihoods .*evaluation\.questions\.answers = "soft" wants them'):
        again(drawn, "evaluation.questions.answers=soft", "evaluation.questions.model=hard-vlm", answer=hard)


def test_questions_without_an_answer_are_counted_and_too_many_give_no_score(drawn: Path) -> None:
    def mumble(body: dict[str, Any], number: int) -> Answer:
        if "teddy bear?" in prompt_of(body):
            return likely(("Perhaps", 0.9), ("Yes", 0.04))
        return fail(400, "an unseemly image") if "black" in prompt_of(body) else soft(body, number)

    table = drawn / "evaluation" / "stage2-questions" / "questions.json"
    before = table.read_bytes()
    named = "evaluation.questions.model=mumbling-vlm"
    with pytest.raises(
        UserError, match=r"4 of 20 questions have no answer, more than .*max_unknown_fraction 0\.05"
    ) as no:
        again(drawn, named, answer=mumble)
    assert "not_understood 2, such as 'Is the orange to the right of the teddy bear?': 'Perhaps'" in str(no.value)
    assert "refused_by_server 2, such as 'Are the knives black?'" in str(no.value) and table.read_bytes() == before
    row, num_asked = again(drawn, named, "evaluation.questions.max_unknown_fraction=0.2", answer=soft)
    values = {number["metric"]: number["value"] for number in row["scores"]}
    # What is answered stays; without an answer none of these images is right.
    assert num_asked == 0 and row["asked"]["unknown"] == {"not_understood": 2, "refused_by_server": 2}
    assert (values["position"], values["color_attr"], values["Soft-TIFA GM"]) == (
        0,
        0,
        pytest.approx((0.75 + 0.75) / 4),
    )


def test_where_the_server_has_failed_the_same_command_asks_again(drawn: Path) -> None:
    def stumble(body: dict[str, Any], number: int) -> Answer:
        status, answer = soft(body, number)
        return (status, answer | {"choices": []}) if "black" in prompt_of(body) else (status, answer)

    named = "evaluation.questions.model=stumbling-vlm"
    with pytest.raises(UserError, match=r"server_failed 2, such as .*asks again where the server has failed"):
        again(drawn, named, answer=stumble)
    row, num_asked = again(drawn, named, answer=soft)
    assert num_asked == 20 + 1 and row["asked"]["unknown"] == {}, (
        "all of the part, after a question that settles the mode"
    )
    assert again(drawn, named, answer=soft)[1] == 0
    # So it does where few enough are missing for a table.
    few = ("evaluation.questions.model=another-stumbling-vlm", "evaluation.questions.max_unknown_fraction=0.1")
    assert again(drawn, *few, answer=stumble)[0]["asked"]["unknown"] == {"server_failed": 2}
    row, num_asked = again(drawn, *few, answer=soft)
    assert num_asked == 20 + 1 and row["asked"]["unknown"] == {}
    assert again(drawn, *few, answer=soft)[1] == 0


def test_a_failure_at_the_first_question_does_not_make_answers_hard(drawn: Path) -> None:
    def late(body: dict[str, Any], number: int) -> Answer:
        status, answer = soft(body, number)
        return (status, answer | {"choices": []}) if "red?" in prompt_of(body) else (status, answer)

    with pytest.raises(ServerError, match="has failed at a first question: an answer without choices"):
        again(drawn, "evaluation.questions.model=late-vlm", answer=late)


def test_a_server_that_is_never_understood_is_left_after_the_first_images(drawn: Path) -> None:
    with pytest.raises(
        UserError, match=r"'silent-vlm' has given no answer to 20 questions: not_understood 20, such as"
    ):
        again(drawn, "evaluation.questions.model=silent-vlm", answer=lambda *_: likely(("<think>", 1.0)))


def test_what_is_missing_is_said_before_anything_is_drawn(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sampling.evaluation.questions.report.draw_samples", None)
    for settings, message in (
        (["evaluation.prompt_set=coco"], "has no questions"),
        (["evaluation.questions.wording=Well?"], "holds {question} once"),
        (["evaluation.questions.yes=['No']"], "'no' is among the words of yes and of no"),
        (["evaluation.prompts={run}/raw/prompts.jsonl"], "line 1 is not in the layout of GenEval's"),
    ):
        with pytest.raises(UserError, match=message):
            ask(drawn, "http://127.0.0.1:1/v1", *settings)

    monkeypatch.setitem(globals(), "RECIPE", RECIPE.replace('model = "asked-vlm"', ""))
    with pytest.raises(UserError, match=r"evaluation\.questions\.model is not set"):
        ask(drawn, "http://127.0.0.1:1/v1")


def test_the_recipes_own_prompts_are_asked_from_a_file(drawn: Path) -> None:
    lines = [
        {"prompt": "a star", "vqa_list": [["Is it a star?", "Yes"], ["Is it a dog?", "No"]], "skills": ["a", "b"]},
        {"prompt": "no such prompt", "vqa_list": [["Is it?", "yes"]], "skills": ["a"]},
    ]
    write_lines(drawn / "own.jsonl", lines)
    settings = ["evaluation.prompt_set=sampling", "evaluation.questions.file={run}/own.jsonl"]
    row, _ = again(drawn, *settings, answer=soft)
    values = {number["metric"]: number["value"] for number in row["scores"]}
    assert values == {
        "Soft-TIFA AM": pytest.approx((0.75 + 0.9) / 2),
        "Soft-TIFA GM": pytest.approx(math.sqrt(0.75 * 0.9)),
        "a": 0.75,
        "b": 0.9,
    }
    assert row["asked"]["num_images_without_questions"] == 4 and row["asked"]["num_prompts"] == 1


# Scores by hand


def image(
    values: Sequence[float], *, group: str = "", parents: Sequence[tuple[int, ...]] = (), num_atoms: int | None = None
) -> AnsweredImage:
    questions = tuple(
        Question(text="?", answer="yes", group="ab"[place % 2], parents=parents[place] if parents else ())
        for place in range(len(values))
    )
    asked = AskedPrompt(key=group, prompt=group, questions=questions, group=group, num_atoms=num_atoms)
    return AnsweredImage(asked=asked, values=values, is_right=[value >= 0.5 for value in values])


def scored(images: Sequence[AnsweredImage], name: str) -> dict[str, float]:
    return {each.metric: each.value for each in score(images, set_name=name, mode="soft")}


def test_dpg_bench_counts_a_question_only_where_its_parents_and_theirs_are_yes() -> None:
    # Of the first image the second question is no, and with it fall its child and its child's child.
    parents = [(), (0,), (1,), (2,), (0,)]
    images = [image([0.9, 0.2, 0.8, 0.6, 0.7], parents=parents), image([1.0, 1.0])]
    found = scored(images, "dpg-bench")
    assert found["DPG-Bench by questions"] == pytest.approx(((0.9 + 0.2 + 0.7) / 5 + 1) / 2)
    # Categories are over all questions, whatever they depend on.
    assert found["a"] == pytest.approx((0.9 + 0.8 + 0.7 + 1) / 4)
    assert found["b"] == pytest.approx((0.2 + 0.6 + 1) / 3)


def test_compbench_multiplies_and_geneval_weighs_tags_alike() -> None:
    images = [image([0.5, 0.5], group="color"), image([1.0, 0.8], group="color"), image([0.4], group="numeracy")]
    assert scored(images, "t2i-compbench") == {
        "color by questions": pytest.approx((0.25 + 0.8) / 2),
        "numeracy by questions": 0.4,
    }
    found = scored(images, "geneval")
    assert (found["color"], found["numeracy"], found["GenEval by questions"]) == (1.0, 0.0, 0.5)


def test_geneval2_has_both_means_skills_and_atoms() -> None:
    found = scored([image([0.2, 0.8], num_atoms=3), image([0.9, 0.0, 0.9], num_atoms=10)], "geneval2")
    assert found["Soft-TIFA AM"] == pytest.approx((0.5 + 0.6) / 2)
    assert found["Soft-TIFA GM"] == pytest.approx(0.4 / 2) and geometric_mean([0.25, 1.0]) == 0.5
    assert (found["a"], found["b"]) == (pytest.approx(2 / 3), 0.4)
    assert (found["3 atoms"], found["10 atoms"]) == (pytest.approx(0.4), 0.0)
