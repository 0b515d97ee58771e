"""The page of `make choose PLAN=1` in headless Chromium: opened from disk with the network off."""

from pathlib import Path

import pytest
from choose_run import type_choose, write_run
from chromium import require_chromium

WHERE = (
    "min_side >= 400 and (0.15 < clip_score <= 0.3 or aesthetic > 4) and not flags.loop and format in ('jpeg', 'png')"
    " and width > 2 * min_side and coalesce(aesthetic, 0) * 1000000 + min_side > 12 and 'circle' in lower(caption)"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    require_chromium()
    run = tmp_path_factory.mktemp("choose") / "run"
    write_run(run)
    with pytest.MonkeyPatch.context() as patch:
        captions = "features.stage2.captions=[{column='caption',weight='exp(clip_score)'},{column='short'}]"
        weights = ["features.stage2.weight=aesthetic", "features.stage2.weight_temperature=0.5", captions]
        type_choose(run, patch, f"features.stage2.where={WHERE}", *weights, plan=True)
    return run / "choose" / "stage2.html"


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_it_opens_offline_fits_the_screen_and_runs_nothing_of_a_caption(path, browser, width, scheme) -> None:
    problems: list[str] = []
    context = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": width, "height": 900})
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda one: None if one.url.startswith(("file:", "data:")) else problems.append(one.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('img').forEach(image => image.loading = 'eager')")
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert "<script>window.hacked" in " ".join(page.locator(".card summary").all_inner_texts())
    # Texts on an axis do not lie over each other, nor outside of their chart.
    overlaps = page.evaluate("""() => [...document.querySelectorAll('svg')].flatMap(svg => {
        const box = svg.getBoundingClientRect();
        const texts = [...svg.querySelectorAll('text:not(.cut)')].map(each => each.getBoundingClientRect());
        const outside = texts.filter(one => one.left < box.left - 1 || one.right > box.right + 1);
        const pairs = texts.filter((one, n) => n && one.left < texts[n - 1].right);
        return [...outside, ...pairs];
    })""")
    assert overlaps == [] and problems == []
    card = page.locator(".card:has(summary)").first
    before = card.bounding_box()["height"]
    card.locator("summary").click()
    assert card.bounding_box()["height"] >= before
    context.close()
