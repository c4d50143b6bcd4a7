"""The HTML page: what it holds, how large it gets, and that it works in a real browser, from a file, without a network."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import large_page
import pytest

import conceptseg.tables.page as maker

TABLE = "conceptattention/ablation_space"
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
IMAGES = 60


@pytest.fixture(scope="module")
def page(shared) -> Path:
    """The page of a small table on the lab, and CSV and LaTeX beside it."""
    shared.run(f"table={TABLE}", "table.backbones=lab", "dataset.count=6")
    (results,) = (shared.folder / "runs" / "tables").glob("*/results.json")
    table = json.loads(results.read_text())
    table["blocks"][0]["rows"][0]["note"] = "<script>alert(1)</script> & <b>bold</b>"
    results.write_text(json.dumps(table))
    shared.run("--export", "out", "--table", str(results), name="conceptseg-report")
    (found,) = (path for path in (shared.folder / "out").glob("*.html") if path.name != "index.html")
    assert found.name in (shared.folder / "out" / "index.html").read_text()
    return found


def test_the_page_is_one_file_with_pictures_inside_and_nothing_from_elsewhere(page):
    text = page.read_text()
    assert [p.name for p in page.parent.iterdir() if p.is_dir()] == []
    assert text.count("data:image/webp;base64,") > 2, "photos, and a sheet for each method"
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "@import" not in text and "fetch(" not in text


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
    assert len(lines) == 6 and float(lines[5]["quoted/miou"]) == 0.7104 and lines[5]["quoted/miou mark"] == "\u2020"
    assert 0 <= float(lines[5]["standard/accuracy low"]) <= float(lines[5]["standard/accuracy"])
    tex = page.with_suffix(".tex").read_text()
    assert "\\textbf{" in tex and "{\\scriptsize [" in tex and "released protocol" in tex and "71.04$\\dagger$" in tex
    assert tex.count("{") == tex.count("}") and tex.count("&") == 7 * 7 + 5


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A page with the pictures beside it, as one of thousands of images has them."""
    before, maker.EMBED_BELOW = maker.EMBED_BELOW, 0
    try:
        return large_page.make(tmp_path_factory.mktemp("large"), IMAGES)
    finally:
        maker.EMBED_BELOW = before


def test_pictures_of_thousands_of_images_are_linked_and_stay_under_thirty_megabytes(large):
    (folder,) = [path for path in large.parent.iterdir() if path.is_dir()]
    sheets = [path.stat().st_size for path in folder.iterdir()]
    text = large.read_text()
    assert all(f'"{folder.name}/{path.name}"' in text for path in folder.iterdir())
    assert len(sheets) == 1 + large_page.KEEPING, "photos, and a sheet for each method that kept maps"
    of_an_image = sum(sheets) / IMAGES + len(text.partition('"samples":')[2].partition("</script>")[0]) / IMAGES
    words = 90 * large_page.METHODS * large_page.WORDS  # a bar for each word of each method
    assert large_page.IMAGES * of_an_image + words + 200_000 < 30e6, of_an_image


def test_a_table_stands_in_the_index_over_all_pages(page):
    runs = page.parents[1] / "runs"
    (table,) = (runs / "tables").glob("*/*.html")
    assert f'href="{table.relative_to(runs).as_posix()}"' in (runs / "index.html").read_text()


def test_another_programs_index_is_left_alone(page, tmp_path, caplog):
    shutil.copy(page, tmp_path)
    (tmp_path / "index.html").write_text("<title>My thesis</title>")
    assert maker.write_index(tmp_path) is None
    assert (tmp_path / "index.html").read_text() == "<title>My thesis</title>" and "stays as it is" in caplog.text
    (tmp_path / "index.html").unlink()
    assert maker.write_index(tmp_path) == tmp_path / "index.html"
    (tmp_path / page.name).unlink()
    assert maker.write_index(tmp_path) is None and not (tmp_path / "index.html").exists(), "a list of nothing"


def test_the_gallery_shows_the_methods_that_were_named(page, shared):
    (results,) = (shared.folder / "runs" / "tables").glob("*/results.json")
    export = ("--export", "named", "--table", str(results), "--gallery")
    shared.run(*export, "*cross-attention*", "--gallery", "output, softmax", name="conceptseg-report")
    (made,) = (path for path in (shared.folder / "named").glob("*.html") if path.name != "index.html")
    gallery = json.loads(made.read_text().rpartition('<div class="pictures">')[2].partition(">")[2].partition("</script>")[0])
    pictured = gallery["methods"][: len(gallery["maps"])]
    assert pictured and all("cross-attention" in name or name == "output, softmax" for name in pictured), gallery["methods"]
    refused = shared.run(*export, "output softmax", code=1, name="conceptseg-report")
    assert 'has no method "output softmax". Did you mean "output, softmax"' in refused.said


def test_a_figure_is_one_tables(page, shared):
    (results,) = (shared.folder / "runs" / "tables").glob("*/results.json")
    shared.run("--figure", "one.svg", "--table", str(results), name="conceptseg-report")
    drawn = (shared.folder / "one.svg").read_text()
    assert drawn.startswith("<svg ") and drawn.count("<circle") > 2
    two = ("--table", str(results), "--table", str(results))
    refused = shared.run("--figure", "two.svg", *two, code=1, name="conceptseg-report")
    assert "2 tables were named. Name one" in refused.said and not (shared.folder / "two.svg").exists()


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    if BROWSER is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="pip install playwright, which drives the system's Chromium")
    with sync.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


def opened(chromium, page: Path, width: int = 1300):
    """The page in a window of its own, which notes what the browser complains of."""
    window = chromium.new_page(viewport={"width": width, "height": 1000}, color_scheme="light")
    window.said = []
    window.on("console", lambda message: window.said.append(message.text))
    window.on("pageerror", lambda error: window.said.append(str(error)))
    window.on("requestfailed", lambda request: window.said.append(request.url))
    window.goto(page.as_uri())
    if folder := os.environ.get("SCREENSHOTS"):  # to be looked at
        window.screenshot(path=f"{folder}/{page.stem}-{width}.png", full_page=True)
    return window


@pytest.fixture(scope="module")
def browser(chromium, page):
    return opened(chromium, page)


def column(browser, place):
    return [c.inner_text().split()[0] for c in browser.locator(f"table.sortable tbody tr td:nth-child({place})").all()]


def scores(browser):
    return [float(f.get_attribute("data-score")) for f in browser.locator("figure[data-score]").all()]


def test_a_browser_opens_the_page_without_a_word_of_complaint(browser):
    assert browser.locator("figure[data-score]").count() == 6 and browser.said == []


def test_a_click_on_a_heading_sorts_and_another_one_turns_the_order_round(browser):
    headings = browser.locator("thead tr:last-child th")
    place = headings.count()
    heading = headings.nth(place - 1).locator("button")
    heading.click()
    first = [float(v) for v in column(browser, place)]
    heading.click()
    second = [float(v) for v in column(browser, place)]
    assert first == sorted(first, reverse=True) and second == sorted(second) and len(set(first)) > 1
    assert browser.said == []


def test_rows_of_the_table_are_filtered(browser):
    browser.fill("[name=rows]", "softmax")
    assert browser.locator("table.sortable tbody tr:visible").count() == 3
    browser.fill("[name=rows]", "")
    assert browser.locator("table.sortable tbody tr:visible").count() == 6


def test_pictures_are_ordered_and_filtered(browser):
    browser.select_option(".pictures [name=order]", "worst")
    worst = scores(browser)
    browser.select_option(".pictures [name=order]", "best")
    assert worst == sorted(worst) and scores(browser) == worst[::-1]
    word = browser.locator("[name=word] option").nth(1).inner_text()
    browser.select_option("[name=word]", word)
    assert all(word in text for text in browser.locator("figure[data-score] figcaption").all_inner_texts())
    assert 0 < len(scores(browser)) < 6
    browser.select_option("[name=word]", "")
    browser.fill("[name=search]", "no such key")
    assert scores(browser) == []
    browser.fill("[name=search]", "")
    browser.select_option(".pictures [name=order]", "disagreement")
    assert len(scores(browser)) == 6 and browser.said == []


def test_maps_truth_and_prediction_are_laid_over_the_photo(browser):
    places = []
    for name in ("map", "truth", "prediction"):
        layer, box = browser.locator(f".stack .{name}").first, browser.locator(f"[name={name}]")
        before = layer.is_visible()
        box.set_checked(not before)
        assert layer.is_visible() is not before
        shown = "tile => { const style = getComputedStyle(tile); return style.backgroundImage + style.backgroundPositionX }"
        places.append(layer.evaluate(shown))
    assert len(set(places)) == 3, "each shows a tile of its own"
    strip = (
        "async tile => { const i = new Image(); i.src = getComputedStyle(tile).backgroundImage.slice(5, -2); await i.decode(); "
    )
    assert browser.locator(".stack .photo").first.evaluate(strip + "return i.naturalWidth }") == 64 * 2 * 8


def test_bars_follow_the_chosen_method_and_order(browser):
    first = browser.locator(".parts .bars").inner_text()
    browser.select_option(".parts [name=method]", index=3)
    second = browser.locator(".parts .bars").inner_text()
    browser.select_option(".parts [name=order]", "worst")
    assert len({first, second, browser.locator(".parts .bars").inner_text()}) == 3 and browser.said == []


WIDTHS = (390, 1280)
"""Of a telephone and of a screen."""


def assert_nothing_sticks_out(window):
    for width in WIDTHS:
        window.set_viewport_size({"width": width, "height": 1000})
        assert window.evaluate("document.documentElement.scrollWidth") <= width, window.url


def test_nothing_sticks_out_of_a_page_or_the_index(chromium, page):
    for made in (page, page.parent / "index.html"):
        window = opened(chromium, made, WIDTHS[0])
        assert_nothing_sticks_out(window)
        assert window.said == []
        window.close()


def test_a_picture_is_enlarged_by_click_and_by_keyboard(chromium, page):
    window = opened(chromium, page)
    dialog, pictures = window.locator("dialog"), window.locator(".card .boxes")
    methods = window.locator(".pictures [name=method] option").all_inner_texts()
    assert pictures.first.locator(".stack").count() == 2, "two methods side by side"
    pictures.nth(1).click()
    captions = dialog.locator("figcaption").all_inner_texts()
    assert dialog.is_visible() and captions[:2] == ["photo", "truth"] and len(captions) == 6
    assert all(f"{name} ·" in captions[2 * place + 2] for place, name in enumerate(methods[:2]))
    dialog.locator("button").click()
    assert dialog.is_hidden()
    pictures.nth(1).click()
    window.mouse.click(5, 500)
    assert dialog.is_hidden(), "a click beside it closes it"

    pictures.first.focus()
    window.keyboard.press("Enter")
    first = dialog.locator("h4").inner_text()
    window.keyboard.press("ArrowRight")
    assert dialog.is_visible() and dialog.locator("h4").inner_text() != first
    window.keyboard.press("ArrowLeft")
    assert dialog.locator("h4").inner_text() == first
    window.keyboard.press("Escape")
    assert dialog.is_hidden() and pictures.first.evaluate("one => one === document.activeElement") and window.said == []
    window.close()


def test_the_keyboard_keeps_its_place_when_a_gallery_is_drawn_again(chromium, large):
    window = opened(chromium, large)
    window.locator(".card .boxes").first.focus()
    for _ in range(20):
        window.keyboard.press("Tab")
        window.wait_for_function("document.activeElement.closest('.card')")  # a gallery that is drawn again gives it back
    assert window.evaluate("document.activeElement.closest('.card').dataset.place") is not None
    window.close()


def test_only_pictures_near_the_window_are_on_the_page_and_scrolling_brings_the_others(chromium, large):
    window = opened(chromium, large, WIDTHS[0])
    assert 0 < len(scores(window)) < IMAGES
    assert_nothing_sticks_out(window)
    shown = scores(window)
    assert 0 < len(shown) < IMAGES and f"{IMAGES} of {IMAGES} images" in window.locator(".count").inner_text()
    window.evaluate("document.querySelector('.gallery').scrollIntoView(false)")
    window.wait_for_function(f"document.querySelector('figure[data-score]').dataset.score != {shown[0]}")
    window.wait_for_load_state("networkidle")
    assert min(scores(window)) < min(shown) and window.said == []
    window.select_option(".pictures [name=method]", label="Method number 9 (no pictures)")
    assert window.locator("[name=map]").is_disabled(), "its maps are not on the page"
    window.close()
