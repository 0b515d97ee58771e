"""Lengths, duplicates, languages, missing values, examples: exact, the same for any parts, and said in the report."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stats_run import caption_rows, run_stage, write_caption_shards

from dataset_stats import duplicates
from dataset_stats.config import DatasetStatsConfig
from dataset_stats.counting import NounCounter
from dataset_stats.distribution import QUANTILES, Distribution, bar_width
from dataset_stats.duplicates import EXACT, FOLDED, count_duplicates, hash_texts
from dataset_stats.example_places import ROW_BITS
from dataset_stats.languages import NO_LETTERS, UNDECIDED, LanguageTable
from dataset_stats.set_rows import SetRows
from dataset_stats.tagging.taggers import LexiconTagger
from pipelines.store.manifest import read_manifest
from pipelines.store.summary import read_summary

LANGUAGES = {
    "English": ["A dog on the beach at sunset", "Purple lamp", "Red vintage car parked near a house"],
    "German": ["Junge Frau lächelt in die Kamera", "DAS HAUS UND DER GARTEN", "Rotes Auto vor dem Haus"],
    "French": ["Un chien sur la plage au coucher du soleil", "Salon avec canapé et table"],
    "Spanish": ["Un perro en la playa al atardecer", "Coche rojo aparcado cerca de la casa"],
    "Portuguese": ["Um cachorro na praia ao pôr do sol"],
    "Italian": ["Un cane sulla spiaggia al tramonto", "Auto rossa parcheggiata vicino alla casa"],
    "Dutch": ["Een hond op het strand bij zonsondergang"],
    "Turkish": ["Gün batımında sahilde bir köpek ve deniz"],
    "Indonesian or Malay": ["Seekor anjing di pantai dengan laut dan pasir"],
    "Vietnamese": ["Một con chó trên bãi biển"],
    "Cyrillic script": ["Собака на пляже, IMG 1"],
    "Chinese": ["海滩上的一只狗", "𠀀𠀁 x"],
    "Japanese": ["東京の夜景"],
    "Korean": ["해변의 개"],
    "Arabic script": ["كلب على الشاطئ"],
    UNDECIDED: ["Rengüvexgü D170", "a", "IMG"],
    NO_LETTERS: ["123 - 456!", "😀 × ÷"],
}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), max_size=30), min_size=1, max_size=4).filter(any))
def test_a_distribution_of_parts_is_what_pandas_says_of_all(parts):
    distribution = Distribution()
    for part in parts:
        distribution.add(np.array(part, dtype=np.int32))
    values = pd.Series(list(itertools.chain(*parts)))
    summary = distribution.summary()
    assert (distribution.num, distribution.total) == (len(values), values.sum())
    assert summary["mean"] == pytest.approx(values.mean())
    assert summary["s.d."] == pytest.approx(values.std(ddof=0), abs=1e-6)
    expected = [values.min(), *values.quantile(list(QUANTILES.values())), values.max()]
    assert [summary[name] for name in ("min", *QUANTILES, "max")] == pytest.approx(expected)
    width = bar_width([distribution], 7)
    assert sum(distribution.histogram(width, 7)) == len(values)
    assert distribution.histogram(width, 7)[0] == (values < width).sum()
    assert distribution.histogram(1, 3)[-1] == (values >= 2).sum()


def write_hashes(path: Path, texts: list[str | None]) -> Path:
    kept = [text for text in texts if text is not None]
    take = pa.array([None if text is None else sum(t is not None for t in texts[:i]) for i, text in enumerate(texts)])
    columns = {
        name: pa.array(hashes).take(take) for name, hashes in zip((EXACT, FOLDED), hash_texts(kept), strict=True)
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("most_in_memory", [3, 1 << 24])
def test_duplicates_are_counted_over_shards_in_parts_of_any_size(tmp_path, monkeypatch, most_in_memory):
    monkeypatch.setattr(duplicates, "MAX_HASHES", most_in_memory)
    shards = [["a dog", None, "A  Dog", "cat"], ["lamp", "a dog", None, "cat\n"], ["cat", "a dog", "one", "é", "É"]]
    files = [write_hashes(tmp_path / f"{number}.parquet", texts) for number, texts in enumerate(shards)]
    texts = [text for shard in shards for text in shard if text is not None]
    found = count_duplicates(SetRows(files=files), num_captions=len(texts))
    folded = pd.Series([" ".join(text.casefold().split()) for text in texts])
    assert found.num_exact == len(texts) - len(set(texts)) == 3
    assert found.num_folded == int(folded.duplicated().sum()) == 6
    places = [(repeated.count, *divmod(repeated.place, 1 << ROW_BITS)) for repeated in found.most_frequent]
    assert places == [(4, 0, 0), (3, 0, 3), (2, 2, 3)], "the most frequent first, at the place where they come first"


def test_languages_are_told_by_letters_and_common_words():
    table = LanguageTable()
    counter = NounCounter(LexiconTagger(), languages=table)
    texts = [text for found in LANGUAGES.values() for text in found]
    names = table.languages(texts, counter.count(texts).language_scores)
    expected = [name for name, found in LANGUAGES.items() for _ in found]
    assert dict(zip(texts, names, strict=True)) == dict(zip(texts, expected, strict=True))
    without = NounCounter(LexiconTagger()).count(texts)
    assert not without.language_scores.any()
    assert np.array_equal(counter.count(texts).num_nouns, without.num_nouns)


NOUNS = ["dog", "bench", "lamp", "tree", "car", "house"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("quality") / "run"
    captions = [f"The scene depicts a {NOUNS[n % 6]} and a {NOUNS[(n + 1) % 6]} number {n}." for n in range(60)]
    alt_texts: list[str | None] = ["Red Lamp", "red  lamp", None, "  ", "Собака на пляже", "the dog of the house"] * 10
    rows = caption_rows("laion_0", alt_texts, captions)
    for row in rows[:6]:
        row["flags"] = ["boilerplate", "loop"]
    write_caption_shards(run, {"laion_0": rows[:30], "laion_1": rows[30:]})
    run_stage(run)
    return run


def test_numbers_of_quality_end_to_end(run):
    summary = read_summary(run)["dataset_stats"]
    alt, dense = summary["alt"], summary["dense"]
    assert alt["rejected"] == {"blank_text": 10, "no_text": 10}
    assert (alt["duplicates"], alt["folded_duplicates"]) == (36, 37)
    assert alt["languages"] == {"English": 30, "Cyrillic script": 10}
    assert (dense["duplicates"], dense["languages"]) == (0, {"English": 60})
    texts = pd.Series(["Red Lamp", "red  lamp", "Собака на пляже", "the dog of the house"]).str.len()
    assert alt["lengths"]["characters"]["median"] == pd.concat([texts] * 10).median()
    assert alt["lengths"]["nouns"]["mean"] == alt["nouns_per_image"]
    extra = read_manifest(run / "stats").extra["sets"]["dense"]
    assert sum(extra["lengths"]["words"]["histogram"]["counts"]) == 60
    assert extra["duplicates"]["most_frequent"] == []


def test_there_is_one_number_of_boilerplate(run):
    dense = read_summary(run)["dataset_stats"]["dense"]
    assert dense["boilerplate_fraction"] == 1.0, "'the scene' is an empty opening as 'the image' is"
    assert dense["flags"] == {"loop": 6}
    for name in ("table1.md", "report.html"):
        text = (run / "stats" / name).read_text()
        assert len(re.findall(r"^\| Boilerplate \| [^|]*\d|<th scope=\"row\">Boilerplate", text, re.MULTILINE)) == 1
        assert "Flag: boilerplate" not in text and "Flag: loop" in text


def test_openings_cover_the_frames_that_captioning_strips():
    openings = DatasetStatsConfig().boilerplate
    assert len(set(openings)) == len(openings)
    assert {"the image", "this scene", "in the picture", "this photograph"} <= set(openings)


def test_examples_of_nouns_differ(run):
    text = (run / "stats" / "report.html").read_text()
    rows = json.loads(re.search(r'id="noun-data">(.*?)</script>', text)[1])
    examples = {row[0]: row[-1] for row in rows}
    shown = [examples[noun] for noun in NOUNS]
    assert len(set(shown)) == len(NOUNS)
    assert all(re.search(rf"\b{noun}\b", examples[noun].lower()) for noun in NOUNS)


def test_notices_say_what_is_wrong_and_a_sound_set_has_none(run, tmp_path):
    text = (run / "stats" / "report.html").read_text()
    notices = re.findall(r"<li>(.*?) <a href=\"#(\w+)\"", text)
    assert ("alt: 92.5% of the captions (37 of 40) are duplicates, up to case and white space", "duplicates") in notices
    assert ("alt: 33.3% of the samples (20 of 60) have no text that can be used", "missing") in notices
    assert ("alt: 25.0% of the captions (10 of 40) are not English", "languages") in notices
    assert ("dense: 10.0% of the captions (6 of 60) are flagged loop", "faults") in notices
    same = tmp_path / "same.parquet"
    pq.write_table(pa.table({"text": ["One dog.", "one  dog.", "ONE DOG."]}), same)
    sound = tmp_path / "sound.parquet"
    texts = [f"A {noun} stands beside the {other}." for noun in NOUNS for other in NOUNS if noun != other]
    pq.write_table(pa.table({"text": texts}), sound)
    run_stage(tmp_path / "run", f"dataset_stats.sets=same={same}#text,sound={sound}#text")
    notices = re.findall(r"<li>(.*?) <a href=\"#(\w+)\"", (tmp_path / "run" / "stats" / "report.html").read_text())
    assert ("same: all captions are one and the same text", "duplicates") in notices
    assert not [text for text, _ in notices if text.startswith("sound")]


def test_a_sample_says_that_duplicates_are_not_estimated(run):
    run_stage(run, "dataset_stats.sample=100")
    text = (run / "stats-sample" / "report.html").read_text()
    assert "their share is not estimated" in text
    errors = read_summary(run)["dataset_stats_sample"]["alt"]["estimate"]["standard_errors"]
    assert errors["language_fraction.English"] == 0.0 and "characters_per_caption" in errors
