"""The five questions of docs/STATS.md: its pandas and DuckDB snippets run, and answer the same."""

import re
from pathlib import Path

import duckdb
import pandas as pd
import pytest
from stats_run import caption_rows, run_stage, write_caption_shards

STATS_PAGE = Path(__file__).resolve().parent.parent / "docs" / "STATS.md"
ALT_TEXTS = ["Dog SALE", "two dogs on a bench", "Bench plaza 17", "plaza plaza", "Dog", None] * 4
CAPTIONS = ["The image features a red dog near a wooden bench. The dogs sleep under a lamp."] * len(ALT_TEXTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    run = folder / "runs" / "demo"
    write_caption_shards(run, {"laion_0": caption_rows("laion_0", ALT_TEXTS, CAPTIONS)})
    sets = '{"LAION" = {column = "alt_text"}, "LAION-LLaVA" = {column = "caption"}}'
    run_stage(run, f"dataset_stats.sets={sets}")
    return folder


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", STATS_PAGE.read_text(), flags=re.DOTALL)


def test_five_questions_have_the_same_answer_in_pandas_and_duckdb(folder, monkeypatch):
    monkeypatch.chdir(folder)
    opening, *questions = snippets("python")
    queries = snippets("sql")
    assert len(questions) == len(queries) == 5
    for number, (question, query) in enumerate(zip(questions, queries, strict=True), start=1):
        names: dict = {}
        exec(opening + question, names)  # the page's own text
        answer = names["answer"]
        found = duckdb.sql(query).fetchall()
        assert found and found[0][-1] > 0, f"question {number} has no answer to compare"
        if isinstance(answer, pd.Series) and answer.index.name == "noun":
            answer = answer.reset_index().sort_values([answer.name, "noun"], ascending=[False, True])
            assert list(answer.itertuples(index=False, name=None)) == found, f"question {number}"
        else:
            values = list(answer) if isinstance(answer, pd.Series) else [answer]
            assert [float(value) for value in found[0]] == pytest.approx(values), f"question {number}"
