import json
from pathlib import Path
from typing import Any

import pytest

from conceptseg.errors import ReportError
from conceptseg.report.results import Results, save
from conceptseg.report.results_md import check, render, write


def made(row: dict[str, Any] | None = None, **table: Any) -> Results:
    """The plain table with some keys changed, in the table itself or in its second row."""
    data: dict[str, Any] = json.loads(Path(__file__).with_name("test_report_table.json").read_text())
    data["blocks"][0]["rows"][1] |= row or {}
    return Results.from_json(data | table)


@pytest.fixture
def lab() -> Results:
    return made()


def named(table: str) -> Results:
    return made(table=table)


def unrun(table: str = "voc") -> Results:
    """The plain table with the one row that was not run."""
    data: dict[str, Any] = made(table=table, title=f"Paper {table}", command=f"conceptseg table={table}").to_json()
    data["blocks"][0]["rows"] = [row for row in data["blocks"][0]["rows"] if row["status"] == "not run"]
    return Results.from_json(data)


def saved(folder: Path, *tables: Results) -> tuple[Path, Path]:
    """RESULTS.md and benchmarks/ with these tables written to both."""
    for results in tables:
        save(folder / "benchmarks" / results.table / "results.json", results)
    write(folder / "RESULTS.md", folder / "benchmarks")
    return folder / "RESULTS.md", folder / "benchmarks"


def test_a_section_has_command_numbers_definitions_protocol_and_runs(lab):
    text = render(lab)
    assert "```sh\nconceptseg table=lab\n```" in text
    assert "| ConceptAttention | lab | 64 | **56.1** [50.3, 61.2] | \u2013 |" in text
    assert "| *centre prior* | control | 64 | 90.0 [90.0, 90.0] | \u2013 |" in text
    assert "| DAAM | lab | 64 | 41.0 [36.0, 46.0] n=60 | \u2013 |" in text
    assert "- **mIoU** (standard definition; `miou`): Mean of IoUs. Source: VOC devkit" in text
    assert "Protocol: `single v1`" in text and "`3457730d85b4`" in text and "- Drawn scenes." in text


def test_a_row_that_was_not_run_says_so_with_its_note_and_its_quoted_number(lab):
    assert "| Flux<br><sub>as printed</sub> | weights | not run | \u2013 | 71.0 |" in render(lab)


def test_what_rows_need_is_said_once_and_no_cell_holds_a_command(lab):
    for text in (render(lab), render(unrun())):
        assert text.count("Flux, 24 GB; VOCdevkit") == 1
        assert "```sh\n# Flux\nconceptseg extractor=flux\n```" in text
        assert not [line for line in text.splitlines() if line.startswith("|") and "conceptseg " in line]


def test_a_table_of_which_nothing_was_run_is_a_line_with_a_page_of_its_own(tmp_path, lab):
    path, benchmarks = saved(tmp_path, lab, unrun())
    text, page = path.read_text(), benchmarks / "voc" / "README.md"
    (line,) = [line for line in text.splitlines() if "Paper voc" in line]
    assert line == "- [Paper voc](benchmarks/voc/README.md), 1 row. Needs Flux, 24 GB; VOCdevkit. `conceptseg table=voc`"
    assert "conceptseg:begin voc" not in text and not (benchmarks / "lab" / "README.md").exists()
    assert "# Paper voc\n" in page.read_text() and "| 71.0 |" in page.read_text()
    assert check(path, benchmarks) == []


def test_a_table_that_is_run_at_last_moves_to_the_first_page(tmp_path, lab):
    path, benchmarks = saved(tmp_path, lab, unrun())
    saved(tmp_path, named("voc"))
    assert not (benchmarks / "voc" / "README.md").exists() and "conceptseg:begin voc" in path.read_text()
    assert check(path, benchmarks) == []


def test_a_page_that_is_stale_or_out_of_place_is_reported(tmp_path, lab):
    path, benchmarks = saved(tmp_path, lab, unrun())
    page = benchmarks / "voc" / "README.md"
    page.write_text(page.read_text().replace("71.0", "72.0"))
    (sentence,) = check(path, benchmarks)
    assert str(page) in sentence and "stale" in sentence
    page.rename(benchmarks / "lab" / "README.md")
    missing, orphan = sorted(check(path, benchmarks), reverse=True)
    assert "has no section" in missing and "no place here" in orphan


def test_the_first_screen_has_the_headline_rows_under_the_headline_columns(tmp_path):
    data: dict[str, Any] = made(row={"headline": True}).to_json()
    data["columns"][0]["headline"] = True
    data["blocks"].append({**data["blocks"][0], "name": "two objects", "rows": data["blocks"][0]["rows"][:1]})
    path, _ = saved(tmp_path, Results.from_json(data))
    text = path.read_text()
    first = text[: text.index("conceptseg:begin lab")]
    assert "|  | one object:<br>mIoU | two objects:<br>mIoU |" in first
    assert [line for line in first.splitlines() if line.startswith("| C")] == ["| ConceptAttention | 56.1 | \u2013 |"]
    assert "[The lab](#the-lab), 5 rows, 1 of them not run: `conceptseg table=lab`" in first


def test_what_is_shown_to_methods_and_trained_on_are_columns_if_a_row_has_them(lab):
    assert "trained on" not in render(lab)
    text = render(made(row={"told": "true name", "trained_on": "images and captions", "argmax": "no"}))
    assert "| row | provenance | shown to the model | trained on | argmax | n |" in text
    assert "| ConceptAttention | lab | true name | images and captions | no | 64 |" in text
    assert "| *centre prior* | control | \u2013 | \u2013 | \u2013 | 64 |" in text


def test_the_sheet_is_linked_where_there_is_one(lab):
    assert "![" not in render(lab)
    assert "](benchmarks/lab/my%20sheet.png)" in render(made(sheet="benchmarks/lab/my sheet.png"))


def test_pipes_tags_and_line_breaks_in_words_are_escaped():
    results = made(row={"name": "a|b <img src=x> & c\n<!-- conceptseg:end lab -->"})
    row = next(line for line in render(results).splitlines() if line.startswith("| a"))
    assert row.startswith("| a\\|b &lt;img src=x&gt; &amp; c &lt;!-- conceptseg:end lab --&gt; | lab |")


def test_every_line_of_a_table_has_as_many_cells_as_its_head():
    text = render(made(row={"view": "a|b`c"}))
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert sorted({line.count("|") for line in lines}) == [6, 11]


def test_a_fresh_file_has_a_header_and_checks_clean(tmp_path, lab):
    path, benchmarks = saved(tmp_path, lab)
    assert path.read_text().startswith("# Results\n")
    assert path.read_text().count("conceptseg:begin lab") == 1
    assert check(path, benchmarks) == []


def test_sections_are_sorted_by_table_whatever_the_order_of_writing(tmp_path):
    path, benchmarks = saved(tmp_path, named("lab"), named("voc"), named("daam"), named("imagenet"))
    places = [path.read_text().index(f"conceptseg:begin {table} ") for table in ("(overview)", "daam", "imagenet", "lab", "voc")]
    assert places == sorted(places)
    assert check(path, benchmarks) == []


def test_writing_twice_changes_nothing(tmp_path, lab):
    path, _ = saved(tmp_path, lab, named("voc"))
    before = path.read_bytes()
    write(path, tmp_path / "benchmarks")
    assert path.read_bytes() == before


def test_text_outside_the_marks_is_untouched(tmp_path, lab):
    path, _ = saved(tmp_path, lab)
    section = path.read_text()[path.read_text().index("<!-- conceptseg:begin") :].rstrip("\n")
    path.write_bytes(f"Mine,  \r\nabove.\n{section}\n\n\tMine, below, no newline".encode())
    saved(tmp_path, made(title="Another title"))
    text = path.read_bytes().decode()
    assert text.startswith("Mine,  \r\nabove.\n<!--") and text.endswith("-->\n\n\tMine, below, no newline")
    assert "## Another title" in text and "## The lab" not in text
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_a_first_section_goes_after_the_text_that_is_there(tmp_path, lab):
    (tmp_path / "RESULTS.md").write_text("# My words\n")
    path, _ = saved(tmp_path, lab)
    assert path.read_text().startswith("# My words\n\n<!-- conceptseg:begin (overview) -->\n## Tables\n")


def test_a_stale_section_is_reported(tmp_path, lab):
    path, benchmarks = saved(tmp_path, lab, named("voc"))
    path.write_text(path.read_text().replace("56.1", "99.9", 1))
    (sentence,) = check(path, benchmarks)
    assert 'section of table "lab" is stale' in sentence


def test_a_missing_section_is_reported_even_without_a_file(tmp_path, lab):
    save(tmp_path / "benchmarks" / "lab" / "results.json", lab)
    sentences = check(tmp_path / "RESULTS.md", tmp_path / "benchmarks")
    assert len(sentences) == 2 and "no overview" in sentences[0] and 'no section of table "lab"' in sentences[1]


def test_an_orphan_section_is_reported(tmp_path, lab):
    path, benchmarks = saved(tmp_path, lab, named("voc"))
    (benchmarks / "voc" / "results.json").unlink()
    stale, orphan = check(path, benchmarks)
    assert "overview is stale" in stale and 'section of table "voc" has no place' in orphan
    write(path, benchmarks)
    assert check(path, benchmarks) == [] and "voc" not in path.read_text()


def test_a_broken_table_and_a_table_in_anothers_folder_are_reported(tmp_path, lab):
    path, benchmarks = saved(tmp_path, lab)
    (benchmarks / "lab" / "results.json").write_text("{}")
    save(benchmarks / "voc" / "results.json", lab)
    broken, misplaced = check(path, benchmarks)
    assert "schema None" in broken and 'its folder is "voc"' in misplaced


def test_a_checkout_with_windows_line_ends_is_not_stale(tmp_path, lab):
    path, benchmarks = saved(tmp_path, lab)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert check(path, benchmarks) == []


@pytest.mark.parametrize(
    "text",
    [
        "<!-- conceptseg:begin lab -->\n",
        "<!-- conceptseg:end lab -->\n",
        "<!-- conceptseg:begin lab -->\n<!-- conceptseg:end voc -->\n",
        "<!-- conceptseg:begin lab -->\n<!-- conceptseg:end lab -->\n" * 2,
    ],
)
def test_marks_that_do_not_pair_are_refused_and_nothing_is_written(tmp_path, lab, text):
    path = tmp_path / "RESULTS.md"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"pair|never closed"):
        saved(tmp_path, lab)
    assert path.read_text() == text
    assert len(check(path, tmp_path / "benchmarks")) == 1
