from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conceptseg.errors import ReportError
from conceptseg.report import panels
from conceptseg.report.panels import COLUMN_GAP, PanelCell, PanelRow, colour_map, picture_sheet


def one_row(height: int = 64, width: int = 64, methods: int = 2, seed: int = 0) -> PanelRow:
    """A noise photo with a square object, a void line under it, and predictions that are right."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((height, width), np.uint8)
    truth[20:40, 20:40], truth[40, 20:40] = 3, 255
    cell = PanelCell(rng.integers(0, 256, (8, 8), np.uint8), np.where(truth == 3, truth, 0), "IoU 1.00", (3,))
    return PanelRow("kite\nscenes/1", rng.integers(0, 256, (height, width, 3), np.uint8), truth, (cell,) * methods)


def drawn(path: Path, rows: list[PanelRow], cell: int = 64) -> np.ndarray:
    picture_sheet(path, [f"method {i}" for i in range(len(rows[0].methods))], rows, cell)
    with Image.open(path) as sheet:
        return np.asarray(sheet.convert("RGB"))


def test_each_row_and_each_method_adds_its_own_room(tmp_path):
    one = drawn(tmp_path / "one.png", [one_row()])
    two, three = (drawn(tmp_path / "rows.png", [one_row()] * count) for count in (2, 3))
    wider = drawn(tmp_path / "wider.png", [one_row(methods=3)])
    assert wider.shape[1] - one.shape[1] == 2 * 64 + panels.CELL_GAP + COLUMN_GAP
    assert two.shape[1] == one.shape[1]
    assert three.shape[0] - two.shape[0] == two.shape[0] - one.shape[0] > 64


def test_the_sheet_differs_only_where_a_prediction_differs(tmp_path):
    row = one_row()
    wrong = row.methods[1].prediction.copy()
    wrong[20:40, 40:50] = 3
    before = drawn(tmp_path / "a.png", [row])
    after = drawn(tmp_path / "b.png", [replace(row, methods=(row.methods[0], replace(row.methods[1], prediction=wrong)))])
    y, x = np.nonzero((before != after).any(axis=2))
    assert np.ptp(y) + 1 == 20 and 10 <= np.ptp(x) + 1 <= 11  # the 20 x 10 patch, and the rim of the object beside it
    assert x.min() > before.shape[1] - panels.MARGIN - 64  # in the last column of pictures


def test_void_looks_the_same_whatever_is_predicted_there(tmp_path):
    row = one_row(methods=1)
    over_void = np.where(row.truth == 255, 3, row.methods[0].prediction).astype(np.uint8)
    before = drawn(tmp_path / "a.png", [row])
    after = drawn(tmp_path / "b.png", [replace(row, methods=(replace(row.methods[0], prediction=over_void),))])
    assert np.array_equal(before, after)


def test_hits_extras_misses_and_another_class_have_four_colours():
    truth = np.zeros((40, 40), np.uint8)
    truth[:20, :] = 1
    prediction = np.zeros((40, 40), np.uint8)
    prediction[:20, :10], prediction[:20, 10:20], prediction[20:, :20] = 1, 2, 2
    row = PanelRow("x", np.full((40, 40, 3), 128, np.uint8), truth, ())
    picture = panels._prediction(row, PanelCell(truth, prediction, "", (1, 2)), (40, 40))
    hit, confused, missed, extra, background = (tuple(picture[y, x]) for y, x in ((5, 5), (5, 15), (5, 30), (30, 5), (30, 30)))
    assert len({hit, confused, missed, extra, background}) == 5
    assert len(set(background)) == 1  # grey


def test_maps_are_enlarged_by_whole_cells_in_the_colour_map(tmp_path):
    values = np.array([[0, 255], [85, 170]], np.uint8)
    row = one_row(methods=1)
    sheet = drawn(tmp_path / "a.png", [replace(row, methods=(replace(row.methods[0], map=values),))])
    blocks = np.repeat(np.repeat(colour_map()[values], 32, axis=0), 32, axis=1)
    left = sheet.shape[1] - panels.MARGIN - 2 * 64 - panels.CELL_GAP
    assert any(np.array_equal(sheet[y : y + 64, left : left + 64], blocks) for y in range(sheet.shape[0] - 64))


def test_a_wide_photo_keeps_its_proportions_and_needs_less_height(tmp_path):
    square, wide = drawn(tmp_path / "a.png", [one_row()], 128), drawn(tmp_path / "b.png", [one_row(64, 100)], 128)
    assert square.shape[1] == wide.shape[1]
    assert square.shape[0] - wide.shape[0] == 128 - round(128 * 64 / 100)


def test_eight_rows_of_six_methods_stay_small_even_for_noise(tmp_path):
    rows = [one_row(128, 128, methods=6, seed=seed) for seed in range(8)]
    picture_sheet(tmp_path / "sheet.png", ["a method with a long name that is wrapped"] * 6, rows)
    assert (tmp_path / "sheet.png").stat().st_size <= 1_500_000


def test_too_many_colours_are_reduced_until_the_file_fits(tmp_path, monkeypatch):
    full = drawn(tmp_path / "a.png", [one_row()])
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr(panels, "MAX_BYTES", size * 2 // 3)
    assert drawn(tmp_path / "b.png", [one_row()]).shape == full.shape
    assert (tmp_path / "b.png").stat().st_size <= size * 2 // 3
    monkeypatch.setattr(panels, "MAX_BYTES", 100)
    with pytest.raises(ReportError, match="Draw fewer rows"):
        drawn(tmp_path / "c.png", [one_row()])
    assert not (tmp_path / "c.png").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "without rows"),
        ([one_row(methods=2)], "2 methods for 1 titles"),
        ([replace(one_row(methods=1), truth=np.zeros((3, 3), np.uint8))], r"truth is uint8 \[3, 3\], wanted uint8 \[64, 64\]"),
        ([replace(one_row(methods=1), image=np.zeros((64, 64, 3)))], "image is float64"),
        (
            [replace(one_row(), methods=(replace(one_row().methods[0], map=np.zeros(4, np.uint8)),))],
            r"map of title is uint8 \[4\]",
        ),
    ],
)
def test_pictures_that_do_not_fit_are_refused(tmp_path, rows, message):
    with pytest.raises(ReportError, match=message):
        picture_sheet(tmp_path / "sheet.png", ["title"], rows)
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_give_the_same_file(tmp_path):
    drawn(tmp_path / "a.png", [one_row()])
    drawn(tmp_path / "b.png", [one_row()])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_words_longer_than_a_line_are_broken():
    font = panels._font(12)
    lines = panels._wrapped("voc2012/2007_000033_and_a_very_long_key indeed", 80, font)
    assert "".join(lines).replace(" ", "") == "voc2012/2007_000033_and_a_very_long_keyindeed"
    assert all(font.getlength(line) <= 80 for line in lines)


def test_a_sheet_is_drawn_again_only_when_it_shows_something_else(tmp_path):
    path, rows = tmp_path / "sheet.png", [one_row()]
    drawn(path, rows)
    before = path.stat().st_mtime_ns
    drawn(path, rows)
    assert path.stat().st_mtime_ns == before
    cell = rows[0].methods[0]
    other = replace(rows[0], methods=(replace(cell, map=255 - cell.map), *rows[0].methods[1:]))
    for change in ([other], [replace(rows[0], label="other")], [*rows, *rows]):
        content = path.read_bytes()
        drawn(path, change)
        assert path.read_bytes() != content
