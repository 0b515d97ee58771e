"""`report.html` in headless Chromium: opened from disk with the network off."""

import csv
import io
from pathlib import Path

import pytest
from chromium import require_chromium
from raw_shards import encode, photo, write_tar
from stats_run import run_stage, write_caption_shards

from pipelines.store.summary import read_summary

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
HOSTILE = (
    "The image features a dog. <script>window.hacked = 1; alert(1)</script><img src=x onerror='window.hacked = 2'>"
    "</script><!-- {{ 7 * 7 }} & a bench"
)
ALT_TEXTS = ["Dog bench SALE", "<script>window.hacked=3</script>", None, "café 😀 日本 \x07\u202e", "plaza 17"]
NUM_ROWS = 40
# Everything that is read as text, on the surface it lies on.
TEXTS = [
    "body", ".lead", ".note", ".small", "nav a", "#table1 tbody th", "#table1 .folded td", "#table1 .paper td",
    "#lengths td", "#duplicates td", "#missing th small", "#languages td", "#notices li", ".tools button",
    "#changes td", "#noun-table th button", "#noun-table tbody th", "#noun-table tbody td:last-child",
    "mark", "#found",
    ".gallery dd", ".gallery dt", ".definitions dd", ".definitions code", "#theme", "figcaption", ".findings li",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Captions that attack the page, and images for the gallery."""
    require_chromium()
    run = tmp_path_factory.mktemp("page") / "run"
    rows = [
        {
            "key": f"{index:03d}",
            "alt_text": ALT_TEXTS[index % len(ALT_TEXTS)],
            "caption": f"{HOSTILE} word{index}word" if index % 3 else "A red lamp near two dogs.",
            "flags": ["loop"] if index % 5 == 0 else [],
            "reject": None,
        }
        for index in range(NUM_ROWS)
    ]
    write_caption_shards(run, {"laion_0": rows})
    write_tar(run / "raw" / "laion_0.tar", [(f"{row['key']}.jpg", encode(photo(1))) for row in rows])
    run_stage(run)
    run_stage(run, "dataset_stats.sample=100")
    return run


class Visit:
    """A page that is open, and everything that went wrong on it."""

    def __init__(self, browser, path: Path, *, viewport: dict, scheme: str) -> None:
        self.problems: list[str] = []
        context = browser.new_context(offline=True, color_scheme=scheme, viewport=viewport)
        self.page = context.new_page()
        self.page.on(
            "console", lambda message: self._note(message.text) if message.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("dialog", lambda dialog: (self._note(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on(
            "request",
            lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else self._note(request.url),
        )
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-charts=drawn]", timeout=120_000)

    def _note(self, problem: str) -> None:
        self.problems.append(problem)


@pytest.fixture(scope="module")
def page(run, browser):
    """The full count's page on a desktop, for tests that leave it as they found it."""
    return Visit(browser, run / "stats" / "report.html", viewport=DESKTOP, scheme="light").page


@pytest.mark.parametrize(
    ("folder", "viewport", "scheme"), [("stats", PHONE, "dark"), ("stats-sample", DESKTOP, "light")]
)
def test_opens_offline_without_errors_and_runs_no_script_of_a_caption(run, browser, folder, viewport, scheme):
    path = run / folder / "report.html"
    assert path.stat().st_size < 5_000_000
    visit = Visit(browser, path, viewport=viewport, scheme=scheme)
    page = visit.page
    assert page.locator(".chart .main-svg").count() >= 5
    assert page.locator(".chart[role=img][aria-label*=median]").count() == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    page.fill("#search", "script")  # shows the hostile captions in the noun table, too
    assert "<script>window.hacked" in page.locator("#noun-table").inner_text()
    assert "<script>window.hacked" in page.locator(".gallery").inner_text()
    assert page.locator(".gallery article img").count() == 4
    assert page.evaluate("window.hacked") is None
    assert page.locator("main script, main img[src=x]").count() == 0
    assert page.locator("#sample").count() == (1 if folder == "stats-sample" else 0)
    assert visit.problems == []


def test_search_filters_and_sort_sorts(page):
    rows = page.locator("#noun-table tbody tr")
    before = rows.count()
    page.fill("#search", "BENCH")
    assert rows.locator("th").first.inner_text() == "bench"
    assert 0 < rows.count() < before
    assert all("bench" in text.lower() for text in rows.all_inner_texts())
    page.fill("#search", "no such noun anywhere")
    assert rows.count() == 0 and page.inner_text("#found").startswith("0 of ")
    page.fill("#search", "")
    assert rows.count() == before
    for column, cells in ((0, "th"), (1, "td:nth-child(2)"), (2, "td:nth-child(3)")):
        orders = []
        for _ in range(2):
            page.click(f"#noun-table button[data-column='{column}']")
            texts = rows.locator(cells).all_inner_texts()
            orders.append(texts if column == 0 else [int(text.replace(",", "")) for text in texts])
        ascending, descending = orders if column == 0 else orders[::-1]
        assert ascending == sorted(ascending) and descending == sorted(descending, reverse=True)
        assert ascending[0] != ascending[-1]
    assert page.locator("#noun-table th[aria-sort=ascending]").count() == 1


def test_every_chart_and_table_can_be_saved_without_a_network(page, tmp_path):
    def saved(selector: str) -> bytes:
        with page.expect_download() as download:
            page.locator(selector).click()
        assert download.value.suggested_filename.startswith("run-")
        download.value.save_as(tmp_path / "saved")
        return (tmp_path / "saved").read_bytes()

    assert page.locator("main table").count() == page.locator(".tools button[aria-label^='Download the table']").count()
    assert page.locator(".chart").count() == page.locator("figure .tools button:text-is('PNG')").count()
    assert saved("figure:has(#chart-zipf) button:text-is('PNG')").startswith(b"\x89PNG")
    assert b"<svg" in saved("figure:has(#chart-words) button:text-is('SVG')")[:200]
    histogram = [
        line.split(",")
        for line in saved("figure:has(#chart-nouns) button:text-is('CSV')").decode("utf-8-sig").split("\r\n")
    ]
    assert histogram[0] == ["from", "to", "alt", "dense"]
    assert sum(float(line[3]) for line in histogram[1:-1]) == pytest.approx(1, abs=1e-4)
    page.fill("#search", "bench")
    nouns = list(csv.reader(io.StringIO(saved("#nouns .tools button").decode("utf-8-sig"))))
    page.fill("#search", "")
    assert nouns[0] == ["Noun", "alt", "dense", "A caption with it"]
    (bench,) = [line for line in nouns if line[0] == "bench"]
    assert bench[1:3] == ["8", "26"] and "bench" in bench[3].lower() and len({len(line) for line in nouns}) == 1
    table = list(csv.reader(io.StringIO(saved("#table1 .tools button").decode("utf-8-sig"))))
    assert [line[0] for line in table] == [
        "Caption set", "alt", "alt, plurals folded", "dense", "dense, plurals folded", "LAION (the paper's)",
        "LAION-LLaVA (the paper's)", "SAM-LLaVA (the paper's)", "Internal (the paper's)",
    ]  # fmt: skip
    page.locator("#duplicates details:has-text('alt') summary").click()
    repeated = saved("#duplicates details:has-text('alt') .tools button")
    assert list(csv.reader(io.StringIO(repeated.decode("utf-8-sig"))))[1] == ["8", "Dog bench SALE"]


def test_contents_lead_to_every_part(page):
    targets = page.locator("#contents a").evaluate_all("links => links.map(link => link.getAttribute('href').slice(1))")
    assert targets == page.locator("main section").evaluate_all("parts => parts.map(part => part.id)")
    assert page.locator("main table th:not([scope])").count() == 0


def test_numbers_are_those_of_the_summary(run, page):
    table = page.inner_text("#table1 table")
    for figures in read_summary(run)["dataset_stats"].values():
        assert f"{figures['valid_distinct_nouns']:,} / {figures['distinct_nouns']:,}" in table
        assert f"{figures['valid_fraction']:.1%}" in table and f"{figures['total_nouns']:,}" in table
    assert "The paper's rows" in table and "210K / 2461K" in table
    definitions = page.inner_text("#definitions")
    for name in (
        "VN/DN",
        "Nouns per image",
        "Nouns lost",
        "Boilerplate",
        "Flags",
        "Plurals folded",
        "more than 10 times",
    ):
        assert name in definitions


def test_every_text_can_be_read_in_both_themes(page):
    """WCAG AA asks for a contrast of 4.5 between text and what it lies on."""
    seen = set()
    for scheme, theme in (("light", "the system's"), ("dark", "the system's"), ("dark", "the other")):
        page.emulate_media(color_scheme=scheme)
        if theme == "the other":
            page.click("#theme")
        seen.add((theme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
        for selector in TEXTS:
            assert page.locator(selector).count(), f"nothing is {selector}"
            assert contrast(page, selector) >= 4.5, f"{selector}, {scheme}, {theme}"
        labels = page.locator(".chart text").first.evaluate("e => getComputedStyle(e).fill")
        card = page.locator("figure").first.evaluate("e => getComputedStyle(e).backgroundColor")
        assert ratio(labels, card) >= 4.5, f"charts, {scheme}, {theme}"
    assert len({background for _, background in seen}) == 2, "light and dark differ"


LONG_NAME = "LAION-2B-en-aesthetic-recaptioned-llava-next-34b-v2"
ODD_SETS = {
    "arab": ["قطة سوداء تجلس على الأريكة الحمراء، في غرفة المعيشة (2024)."] * 8
    + ["公園で犬が走っている写真です。" * 20] * 3,
    LONG_NAME: [f"A scarf {'very ' * 90}near a car and a teapot {number}." for number in range(12)],
    "tail": ["A dog."] * 1960 + ["dog " * 3000] * 40,
    "one": ["dog"],
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory, browser):
    """The page of sets that are unlike the demo's, on a phone."""
    folder = tmp_path_factory.mktemp("odd")
    for number, captions in enumerate(ODD_SETS.values()):
        with (folder / f"{number}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["key", "caption"], *enumerate(captions)])
    sets = ",".join(f"{name}={folder / str(number)}.csv" for number, name in enumerate(ODD_SETS))
    run_stage(folder / "run", f"dataset_stats.sets={sets}", "dataset_stats.num_gallery_images=0")
    visit = Visit(browser, folder / "run" / "stats" / "report.html", viewport=PHONE, scheme="light")
    assert visit.problems == []
    return visit.page


def test_words_and_names_of_any_length_fit_a_phone(odd):
    assert odd.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    cut = "cells => cells.filter((cell) => cell.scrollWidth > cell.clientWidth + 1).map((cell) => cell.textContent)"
    for cells in ("#noun-table td.n", "#missing th", "#table1 td", "#changes .pair:visible th"):
        assert odd.locator(cells).evaluate_all(cut) == [], cells
    table, head = (odd.locator(f"#missing {part}").first.bounding_box() for part in ("table", "tbody th"))
    assert table and head and head["width"] > 0.9 * table["width"], "a row's name has the whole line"
    shown = odd.locator("#chart-ratio .ytick text").all_text_contents()
    assert len(shown) == len(set(shown)) == len(ODD_SETS) + 4
    assert any(name.startswith("LAION-2B") and name.strip().endswith("b-v2") for name in shown)


def test_an_example_shows_its_noun_and_marks_the_word_alone(odd):
    for noun, row in (("teapot", LONG_NAME), ("car", LONG_NAME)):
        odd.fill("#search", noun)
        line = odd.locator("#noun-table tbody tr").filter(has=odd.get_by_role("rowheader", name=noun, exact=True))
        assert line.locator("mark").inner_text() == noun, row
        text = line.locator("td").last.inner_text()
        assert text[max(text.index("near a car"), 0) :].startswith("near a car and a teapot")
    odd.fill("#search", "")


def test_texts_from_right_to_left_are_set_so(odd):
    direction = "cells => cells.map((cell) => getComputedStyle(cell).direction)"
    odd.locator("#duplicates details:has-text('arab') summary").click()
    texts = odd.locator("#duplicates details:has-text('arab') td:last-child")
    assert texts.evaluate_all(direction) == ["rtl", "ltr"]


def test_a_few_endless_captions_leave_the_bars_of_all_others_apart(odd):
    charts = {chart["id"]: chart for chart in odd.evaluate("charts")}
    bars = next(trace["y"] for trace in charts["chart-nouns"]["traces"] if trace["name"] == "tail")
    assert bars[-1] == 0.02 and max(bars) == 0.98, "2 % have 3,000 nouns and share the last bar"
    assert charts["chart-nouns"]["width"] == 1 and "3,000" in charts["chart-nouns"]["x"]
    assert odd.locator("#chart-zipf .points path").count() == 2, "where a set has but one noun, it is a point"


def contrast(page, selector: str) -> float:
    """Contrast of an element's text with the surfaces below it, blended where they are transparent."""
    text, *surfaces = page.locator(selector).first.evaluate(
        """element => {
          const found = [getComputedStyle(element).color];
          for (let e = element; e; e = e.parentElement) found.push(getComputedStyle(e).backgroundColor);
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          return found.map((colour) => {
            canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data];
          });
        }"""
    )
    below = [255.0, 255.0, 255.0]
    for *channels, alpha in reversed(surfaces):
        below = [alpha / 255 * new + (1 - alpha / 255) * old for new, old in zip(channels, below, strict=True)]
    return _ratio(text[:3], below)


def ratio(text: str, surface: str) -> float:
    """Contrast of two colours written as rgb(r, g, b)."""
    return _ratio(*([float(part) for part in c[c.index("(") + 1 : -1].split(",")[:3]] for c in (text, surface)))


def _ratio(*colours) -> float:
    def luminance(colour) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(luminance(colour) for colour in colours)
    return (light + 0.05) / (dark + 0.05)
