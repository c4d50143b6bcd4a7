"""A table's column of paired differences: each row less one row of its block, on the same images."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_module

from conceptseg.config import plain, register
from conceptseg.errors import ConfigError
from conceptseg.evaluation.readings import scored
from conceptseg.metrics.definitions import Rows
from conceptseg.tables import table
from conceptseg.tables.sheet import read_sheet
from conceptseg.tables.table import compute_table

ROWS = ("constant", "centre_prior", "colour_contrast", "oracle")
COLUMN = "ap_image over centre_prior"
TABLE = {
    "title": "controls",
    "columns": ["accuracy", "ap_image"],
    "against": [{"row": "centre_prior", "metric": "ap_image"}],
    "blocks": [
        {
            "name": "one object", "data": "drawn scenes", "text": "", "segmenter": "mean@mask/bilinear",
            "overrides": ["dataset=scenes", "dataset.objects=[1,1]", "dataset.count=12", "protocol=scenes_single"],
            "rows": [{"name": name, "group": "controls", "overrides": [f"extractor={name}"]} for name in ROWS],
        }
    ],
}  # fmt: skip


@pytest.fixture
def compute(tmp_path):
    register()
    with initialize_config_module("conceptseg.conf", version_base="1.3"):

        def made(against, *extra):
            def composed(overrides):
                return plain(compose("evaluate", overrides=[*overrides, f"runtime.runs={tmp_path}", *extra]))

            return compute_table(
                "controls", read_sheet({**TABLE, "against": list(against)}), composed, [], tmp_path, "conceptseg"
            )

        yield made


def values(results):
    return {row.name: row.values for row in results.blocks[0].rows}


def test_a_row_less_another_on_the_same_images(compute):
    results = compute(TABLE["against"])
    column = results.columns[-1]
    assert (column.name, column.kind, column.label) == ("ap_image over centre_prior", "difference", "mAP over centre_prior")
    found = values(results)
    assert column.name not in found["centre_prior"]
    for name in ("constant", "colour_contrast", "oracle"):
        difference = found[name][column.name]
        apart = found[name]["ap_image"].value - found["centre_prior"]["ap_image"].value
        assert difference.value == pytest.approx(apart) and difference.n == 12
        assert difference.low <= difference.value <= difference.high
    assert found["oracle"][column.name].low > 0 > found["constant"][column.name].high


def test_pairing_takes_out_how_hard_an_image_is(compute):
    """The oracle's AP is 1 on every image: its difference is as wide as the other's own interval, no wider."""
    found = values(compute(TABLE["against"]))
    own, difference = found["centre_prior"]["ap_image"], found["oracle"][COLUMN]
    assert (difference.low, difference.high) == (pytest.approx(1 - own.high), pytest.approx(1 - own.low))


def test_whole_groups_of_words_are_drawn_where_the_report_asks_for_it(compute):
    images, words = (values(compute(TABLE["against"], f"report.draw={draw}")) for draw in ("images", "words"))
    a, b = (found["oracle"][COLUMN] for found in (images, words))
    assert a.value == b.value and (a.low, a.high) != (b.low, b.high)


def test_a_row_that_shares_no_image_has_no_difference(compute, monkeypatch):
    """Such as a run that was stopped before it came to the images of the other."""

    def parted(evaluation, reading):
        rows = scored(evaluation, reading)
        half = type(evaluation.extractor).__name__ == "Oracle"
        records = [r for r in evaluation.store.rows().values() if r["status"] == "ok" and r["segmenter"] == reading.segmenter]
        return Rows.from_records(r for r in records if (r["sample"] in rows.samples[:6]) == half)

    monkeypatch.setattr(table, "scored", parted)
    found = values(compute(TABLE["against"]))
    assert COLUMN not in found["oracle"] and found["constant"][COLUMN].n == 6


@pytest.mark.parametrize(
    ("against", "message"),
    [
        ({"row": "centre prior", "metric": "ap_image"}, 'table.against.row: .*Did you mean "centre_prior"'),
        ({"row": "centre_prior", "metric": "ap_imag"}, 'table.against.metric: .*Did you mean "ap_image"'),
    ],
    ids=["row", "metric"],
)
def test_what_a_table_does_not_print_is_refused(compute, against, message):
    with pytest.raises(ConfigError, match=message):
        compute([against])
