"""The stage end to end: numbers, layouts, resume, and the report in a browser."""

import csv
import json
import logging
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataset_stats import worker
from dataset_stats.__main__ import main
from dataset_stats.captions import Address, CaptionRow, read_rows
from dataset_stats.counting import NounCounter
from dataset_stats.noun_table import safe_cell
from dataset_stats.tagging import nltk_data
from dataset_stats.tagging.taggers import LexiconTagger, find_tagger
from pipelines.manifest import Fingerprint, ShardReport, StageDirectory, read_manifest
from pipelines.storage import sha256_file
from pipelines.summary import read_summary

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
DENSE = "The image features a red dog near a wooden bench. <script>document.title = 'hacked'</script> The dog sleeps."
NUM_ROWS = 30


def write_captions(run: Path, shards: list[str]) -> None:
    directory = StageDirectory(run / "captions")
    fingerprint = Fingerprint.of({"stage": "captioning"})
    for shard in shards:
        rows = [
            {
                "key": f"{shard}-{index}",
                "alt_text": ["Dog bench SALE", "=cmd()|dog =cmd()|dog", None, "café 😀 日本"][index % 4],
                "caption": None if index % 10 == 9 else DENSE,
                "flags": ["loop"] if index % 5 == 0 else [],
                "reject": "corrupt_image" if index % 10 == 9 else None,
            }
            for index in range(NUM_ROWS)
        ]
        path = directory.file(shard, ".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        report = ShardReport(
            name=shard,
            source=shard,
            num_read=NUM_ROWS,
            num_kept=NUM_ROWS - 3,
            rejected={"corrupt_image": 3},
            files={".parquet": sha256_file(path)},
        )
        directory.write_marker(report, fingerprint)
    directory.write_manifest(fingerprint, shards, upstream={}, extra={})


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


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    write_captions(tmp_path / "run", ["laion_0", "laion_1"])
    return tmp_path / "run"


def run_stage(run: Path, *overrides: str) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    with pytest.MonkeyPatch.context() as patch:
        recipe = str(run.parent / "recipe.toml")
        patch.setattr("sys.argv", ["dataset_stats", "--recipe", recipe, "--run", str(run), *arguments])
        main()


def test_numbers_files_and_summary_agree(run):
    run_stage(run)
    summary = read_summary(run)["dataset_stats"]
    dense, alt = summary["dense"], summary["alt"]
    assert dense["num_captions"] == 2 * (NUM_ROWS - 3)
    assert dense["rejected"] == {"corrupt_image": 6}
    assert alt["num_captions"] + sum(alt["rejected"].values()) == 2 * NUM_ROWS
    assert alt["rejected"]["no_text"] > 0
    assert dense["boilerplate_fraction"] == 1.0
    assert dense["flags"] == {"loop": 12}
    assert dense["nouns_per_image"] > alt["nouns_per_image"] == alt["total_nouns"] / alt["num_captions"]
    nouns = pq.read_table(run / "stats" / "nouns.parquet").to_pandas()
    assert int(nouns["dense"].sum()) == dense["total_nouns"]
    assert int((nouns["dense"] > 0).sum()) == dense["distinct_nouns"]
    assert int((nouns["dense"] > 10).sum()) == dense["valid_distinct_nouns"]
    assert nouns.set_index("noun").loc["dog", "dense"] == 2 * dense["num_captions"]
    text = (run / "stats" / "table1.md").read_text()
    assert f"{dense['total_nouns']:,}" in text and "233.9M" in text and "the paper's" in text
    manifest = read_manifest(run / "stats")
    assert manifest.extra["sets"]["dense"]["total_nouns"] == dense["total_nouns"]
    with (run / "stats" / "nouns.csv").open(newline="") as file:
        cells = [row[0] for row in csv.reader(file)]
    assert len(cells) == len(nouns) + 1
    assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)


def test_formula_cells_are_disarmed():
    assert [safe_cell(text) for text in ("=1", "+1", "-a", "@x", "dog")] == ["'=1", "'+1", "'-a", "'@x", "dog"]


def test_threshold_changes_the_report_but_counts_nothing_again(run, monkeypatch):
    run_stage(run)
    monkeypatch.setattr(worker.NounCountWorker, "__call__", None)
    run_stage(run, "dataset_stats.valid_threshold=0")
    dense = read_summary(run)["dataset_stats"]["dense"]
    assert dense["valid_distinct_nouns"] == dense["distinct_nouns"]
    monkeypatch.setattr("dataset_stats.__main__._count", None)
    run_stage(run, "dataset_stats.valid_threshold=0")


def test_a_new_shard_is_the_only_one_counted(run, monkeypatch):
    run_stage(run)
    counted = []
    original = worker.NounCountWorker.__call__

    def spy(self, piece):
        counted.append(piece.source.name)
        return original(self, piece)

    monkeypatch.setattr(worker.NounCountWorker, "__call__", spy)
    write_captions(run, ["laion_0", "laion_1", "laion_2"])
    run_stage(run)
    assert set(counted) == {"laion_2.alt_text", "laion_2.caption"}
    assert read_summary(run)["dataset_stats"]["dense"]["num_captions"] == 3 * (NUM_ROWS - 3)


def test_cutting_shards_into_pieces_changes_no_byte(run):
    run_stage(run)
    files = sorted((run / "stats" / "counts").glob("*.parquet"))
    whole = {path.name: path.read_bytes() for path in files}
    shutil.rmtree(run / "stats")
    run_stage(run, "engine.samples_per_slice=100")
    assert {path.name: path.read_bytes() for path in files} == whole


def test_truncation_and_the_nouns_it_costs(run):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "</s>": 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = run.parent / "t5"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    # "the image features a red dog" are 6 words: with 7 tokens, the bench and all behind it are lost.
    run_stage(run, f"dataset_stats.text_model={folder}", "dataset_stats.text_limits=[7, 300]")
    dense = read_summary(run)["dataset_stats"]["dense"]
    assert dense["over_limit_fraction"] == {"7": 1.0, "300": 0.0}
    kept_per_caption = int(NounCounter(LexiconTagger()).count(["the image features a red dog"]).num_nouns[0])
    assert dense["nouns_lost"]["7"] == dense["total_nouns"] - kept_per_caption * dense["num_captions"]
    assert dense["nouns_lost"]["300"] == 0


def test_a_missing_stage_column_or_file_is_one_clear_error(run, tmp_path):
    with pytest.raises(ValueError, match=r"no column 'capton'; columns are key, alt_text, caption"):
        run_stage(run, "dataset_stats.sets.dense.column=capton")
    with pytest.raises(ValueError, match=r"dataset_stats\.sets\.dense\.files is missing"):
        run_stage(run, "dataset_stats.sets.dense.layout=csv")
    shutil.rmtree(run / "captions")
    with pytest.raises(FileNotFoundError, match="has not finished"):
        run_stage(run)


def rows_of(layout: str, path: Path, column: str = "text") -> list[CaptionRow]:
    return [row for block in read_rows(Address(layout=layout, column=column, path=str(path)), 0, 99) for row in block]


def test_every_layout_gives_rows_and_counts_what_is_unreadable(tmp_path):
    bad = b"dog" + b"\xff"
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "dog"}\n{"text": "\\ud800"}\nnot json\n{"text": 5}\n')
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfkey,text\n7,dog\n8," + bad + b"\n")
    pq.write_table(pa.table({"text": pa.array(["dog", None])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": pa.array([b"dog", bad])}), tmp_path / "b.parquet")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "sa_1.txt").write_bytes(b"dog")
    (texts / "sa_2.txt").write_bytes(bad)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(texts.glob("*.txt")):
            tar.add(path, f"./{path.name}")

    def outcome(rows: list[CaptionRow]) -> list[str | None]:
        return [row.text or row.reject for row in rows]

    assert outcome(rows_of("jsonl", tmp_path / "a.jsonl")) == ["dog", "not_utf8", "not_json", "not_text"]
    assert outcome(rows_of("csv", tmp_path / "a.csv")) == ["dog", "not_utf8"]
    assert [row.key for row in rows_of("csv", tmp_path / "a.csv")] == ["7", "8"]
    assert outcome(rows_of("parquet", tmp_path / "a.parquet")) == ["dog", None]
    assert outcome(rows_of("parquet", tmp_path / "b.parquet")) == ["dog", "not_utf8"]
    assert outcome(rows_of("text", texts)) == outcome(rows_of("text", tmp_path / "a.tar")) == ["dog", "not_utf8"]


def test_sets_in_other_layouts_go_through_the_stage(run):
    table = run.parent / "web.jsonl"
    table.write_text("".join(json.dumps({"TEXT": f"dog number {index}"}) + "\n" for index in range(20)))
    sets = f'{{web = {{layout = "jsonl", files = "{table}", column = "TEXT"}}}}'
    run_stage(run, f"dataset_stats.sets={sets}")
    web = read_summary(run)["dataset_stats"]["web"]
    assert (web["num_captions"], web["valid_distinct_nouns"]) == (20, 2)


def test_sets_can_be_given_on_one_line(run):
    table = run.parent / "web.csv"
    table.write_text("text\nA dog.\nTwo dogs.\n")
    run_stage(run, f"dataset_stats.sets=alt=laion_0#alt_text,web={table}#text")
    summary = read_summary(run)["dataset_stats"]
    assert list(summary) == ["alt", "web"]
    assert (summary["alt"]["num_captions"], summary["web"]["total_nouns"]) == (20, 2)
    with pytest.raises(ValueError, match="name=files#column"):
        run_stage(run, "dataset_stats.sets=laion_0")


@pytest.mark.parametrize("name", ["noun", "a b", "=x"])
def test_set_names_that_break_columns_are_refused(run, name):
    with pytest.raises(ValueError, match="cannot name a caption set"):
        run_stage(run, f'dataset_stats.sets={{"{name}" = {{}}}}')


def test_nltk_data_is_installed_only_when_its_checksums_hold(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "data"))
    archive = tmp_path / "tagger.zip"
    parts = {part: json.dumps([part]).encode() for part in nltk_data.SHA256}
    with zipfile.ZipFile(archive, "w") as file:
        for part, data in parts.items():
            file.writestr(f"{nltk_data.NLTK_TAGGER}/{nltk_data.NLTK_TAGGER}.{part}.json", data)
    with pytest.raises(ValueError, match="SHA-256"):
        nltk_data.main(["--url", archive.as_uri()])
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(nltk_data, "SHA256", {part: nltk_data._sha256(data) for part, data in parts.items()})
    nltk_data.main(["--url", archive.as_uri()])
    assert find_tagger("auto").name == "nltk"
    nltk_data.main(["--url", (tmp_path / "gone.zip").as_uri()])  # complete: nothing is fetched
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "other"))
    with pytest.raises(OSError, match="cannot be fetched"):
        nltk_data.main(["--url", (tmp_path / "gone.zip").as_uri()])


def test_report_works_in_a_browser_without_a_network(run):
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the playwright package is missing")
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    run_stage(run)
    path = run / "stats" / "report.html"
    assert path.stat().st_size < 5_000_000
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGUMENTS)
        page = browser.new_context(offline=True, color_scheme="dark", viewport={"width": 390, "height": 844}).new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-charts=drawn]", timeout=120_000)
        assert page.locator(".chart .main-svg").count() >= 3
        assert page.title().startswith("Nouns of run")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        rows = page.locator("#noun-table tbody tr")
        before = rows.count()
        page.fill("#search", "bench")
        assert rows.locator("th").first.inner_text() == "bench"
        page.fill("#search", "")
        page.click("#noun-table button[data-column='0']")
        nouns = rows.locator("th").all_inner_texts()
        assert len(nouns) == before and nouns == sorted(nouns)
        page.click("#noun-table button[data-column='2']")
        counts = [int(text.replace(",", "")) for text in rows.locator("td:nth-child(3)").all_inner_texts()]
        assert counts == sorted(counts, reverse=True)
        assert _contrast(page, "body") > 7 and _contrast(page, ".note") > 4.5
        page.click("#theme")
        assert _contrast(page, "body") > 7 and _contrast(page, ".note") > 4.5
        assert "<script>document.title" in page.locator(".gallery").inner_text()
        assert problems == []
        browser.close()


def _contrast(page, selector: str) -> float:
    """WCAG contrast of an element's text with the page."""

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text = page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).color")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light, dark = sorted((luminance(text), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_ray_workers_give_the_same_numbers(run):
    if os.environ.get("RAY_ADDRESS"):
        pytest.skip("RAY_ADDRESS is set: this test starts a Ray of its own")
    run_stage(run)
    expected = read_summary(run)["dataset_stats"]
    nouns = (run / "stats" / "nouns.parquet").read_bytes()
    shutil.rmtree(run / "stats")
    run_stage(run, "engine.in_process=false", "engine.num_workers=2")
    assert read_summary(run)["dataset_stats"] == expected
    assert (run / "stats" / "nouns.parquet").read_bytes() == nouns
