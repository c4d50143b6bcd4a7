"""The HTML page: what it holds, how large it gets, and that it works in a real browser, from a file, without a network."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TABLE = "conceptattention/ablation_space"
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
NUMBER = re.compile(r"-?\d+(\.\d+)?")


@pytest.fixture(scope="module")
def page(shared) -> Path:
    """The page of a small table on the lab, and CSV and LaTeX beside it."""
    shared.run(f"table={TABLE}", "table.backbones=lab", "dataset.count=6")
    (results,) = (shared.folder / "runs" / "tables").glob("*/results.json")
    table = json.loads(results.read_text())
    table["blocks"][0]["rows"][0]["note"] = "<script>alert(1)</script> & <b>bold</b>"
    results.write_text(json.dumps(table))
    shared.run("--export", "out", "--table", str(results), name="conceptseg-report")
    (found,) = (shared.folder / "out").glob("*.html")
    return found


def test_the_page_is_one_file_with_pictures_inside_and_nothing_from_elsewhere(page):
    text = page.read_text()
    assert [p.name for p in page.parent.iterdir() if p.is_dir()] == []
    assert text.count("data:image/webp;base64,") == 6 * (1 + 4)
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "@import" not in text and "fetch(" not in text


def test_words_from_data_are_escaped(page):
    text = page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;bold" in text and "<script>alert" not in text


def test_provenance_and_configuration_of_every_run_are_on_the_page(page):
    text = page.read_text()
    run_ids = {p.parent.name for p in (page.parents[1] / "runs").glob("*/manifest.json")}
    assert run_ids and all(run_id in text for run_id in run_ids)
    assert "_target_: conceptseg.extractors.concept_attention.ConceptAttention" in text and "source files with digests" in text


def test_csv_and_latex_hold_the_table(page):
    lines = list(csv.DictReader(io.StringIO(page.with_suffix(".csv").read_text())))
    assert len(lines) == 6 and float(lines[5]["published/miou"]) == 0.7104 and lines[5]["published/miou mark"] == "\u2020"
    assert 0 <= float(lines[5]["standard/accuracy low"]) <= float(lines[5]["standard/accuracy"])
    tex = page.with_suffix(".tex").read_text()
    assert "\\textbf{" in tex and "{\\scriptsize [" in tex and "released protocol" in tex and "71.04$\\dagger$" in tex
    assert tex.count("{") == tex.count("}") and tex.count("&") == 7 * 10 + 4


def test_thousands_of_images_stay_under_thirty_megabytes():
    from conceptseg.html_report import METHODS_OF_MANY, TRUTH, _fitted, _mask, _webp

    # Busier than photographs: three of VOC's take 1.8, 0.3 and 1.0 kB for photo, mask and map, this as much.
    small = np.random.default_rng(0).integers(0, 256, (11, 16, 3), dtype=np.uint8)
    photo = np.asarray(Image.fromarray(small).resize((500, 333), Image.Resampling.BICUBIC))
    mask = np.asarray(Image.fromarray(small[..., 0]).resize((500, 333), Image.Resampling.BICUBIC)) > 128
    size, grid = _fitted(photo.shape), np.asarray(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC))
    sizes = len(_webp(photo, 55, size)), len(_mask(mask, size, TRUTH)), len(_webp(grid, 60, (64, 64)))
    assert min(sizes) > 300, sizes
    each = sizes[0] + sizes[1] + METHODS_OF_MANY * (sizes[1] + sizes[2])
    assert 4276 * (each + 500) < 30e6, sizes  # 500 bytes of addresses, scores and words in the page


def test_many_pictures_are_linked_beside_the_page(shared, page):
    import conceptseg.html_report as maker
    from conceptseg.report.results import load

    (results,) = (shared.folder / "runs" / "tables").glob("*/results.json")
    before, maker.EMBED_BELOW = maker.EMBED_BELOW, 0
    try:
        written = maker.write_html(load(results), shared.folder / "runs", shared.folder / "linked", pictures=2)
    finally:
        maker.EMBED_BELOW = before
    (folder,) = [p for p in written.parent.iterdir() if p.is_dir()]
    assert len(list(folder.iterdir())) == 2 * (2 + 2 * 4)
    assert all(f"{folder.name}/{picture.name}" in written.read_text() for picture in folder.iterdir())


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(page):
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright, which drives the system's Chromium")
    with sync.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = chromium.new_page(viewport={"width": 1300, "height": 1000}, color_scheme="light")
        opened.said = []
        opened.on("console", lambda message: opened.said.append(message.text))
        opened.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.on("requestfailed", lambda request: opened.said.append(request.url))
        opened.goto(page.as_uri())
        yield opened
        chromium.close()


def column(browser, place):
    return [c.inner_text().split()[0] for c in browser.locator(f"table.sortable tbody tr td:nth-child({place})").all()]


def scores(browser):
    return [float(f.get_attribute("data-score")) for f in browser.locator("figure[data-score]").all()]


def test_a_browser_opens_the_page_without_a_word_of_complaint(browser, page):
    assert browser.locator("figure[data-score]").count() == 6 and browser.said == []
    if folder := os.environ.get("SCREENSHOTS"):  # to be looked at
        browser.screenshot(path=f"{folder}/{page.stem}.png", full_page=True)


def test_a_click_on_a_heading_sorts_and_another_one_turns_the_order_round(browser):
    place = browser.locator("thead th").count()
    heading = browser.locator("thead th").nth(place - 1).locator("button")
    heading.click()
    first = [float(v) for v in column(browser, place)]
    heading.click()
    second = [float(v) for v in column(browser, place)]
    assert first == sorted(first, reverse=True) and second == sorted(second) and len(set(first)) > 1
    assert browser.said == []


def test_pictures_are_ordered_and_filtered(browser):
    browser.select_option("[name=order]", "worst")
    worst = scores(browser)
    browser.select_option("[name=order]", "best")
    assert worst == sorted(worst) and scores(browser) == worst[::-1]
    word = browser.locator("[name=word] option").nth(1).inner_text()
    browser.select_option("[name=word]", word)
    assert all(word in text for text in browser.locator("figure[data-score] figcaption").all_inner_texts())
    assert 0 < len(scores(browser)) < 6
    browser.select_option("[name=word]", "")
    browser.fill("[name=search]", "no such key")
    assert scores(browser) == []
    browser.fill("[name=search]", "")
    browser.select_option("[name=order]", "disagreement")
    assert len(scores(browser)) == 6 and browser.said == []


def test_maps_truth_and_prediction_are_laid_over_the_photo(browser):
    for name in ("map", "truth", "prediction"):
        layer, box = browser.locator(f".stack .{name}").first, browser.locator(f"[name={name}]")
        before = layer.is_visible()
        box.set_checked(not before)
        assert layer.is_visible() is not before
    assert browser.locator(".stack .photo").first.evaluate("image => image.naturalWidth") > 0


def test_bars_follow_the_chosen_method(browser):
    first = browser.locator(".parts .bars").inner_text()
    browser.select_option(".parts select", index=3)
    assert browser.locator(".parts .bars").inner_text() != first and browser.said == []
