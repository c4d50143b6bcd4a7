"""Metrics and families of installed packages: found by entry point, measured, kept in rows, and refused where they can't be."""

from importlib import metadata

import numpy as np
import pytest

from conceptseg.backbones import sheets
from conceptseg.data.drawn import Scenes
from conceptseg.entry_points import BACKBONES, METRICS
from conceptseg.errors import ConfigError
from conceptseg.evaluation.assemble import check_measured
from conceptseg.metrics import installed
from conceptseg.metrics.definitions import Rows, definition_of
from conceptseg.metrics.installed import MapMetric
from conceptseg.metrics.reported import metric
from conceptseg.protocols import SegmentationProtocol
from conceptseg.segment.segmenter import Segmenter
from conceptseg.store.lines import row_fault

PEAK = MapMetric("peak", "peak", 3, lambda task, scores, labels: float(scores.max()), "Greatest score.", "This test.", False)
EMPTY = MapMetric("empty", "empty", 1, lambda task, scores, labels: float("nan"), "Undefined everywhere.", "This test.")
OTHER = MapMetric("another", "other", 1, lambda task, scores, labels: 0.0, "Named otherwise.", "This test.")


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    values = {"peak": "PEAK", "empty": "EMPTY", "misnamed": "OTHER", "broken": "NOWHERE"}
    points = metadata.EntryPoints(metadata.EntryPoint(n, f"{__name__}:{v}", METRICS) for n, v in values.items())
    families = metadata.EntryPoints([metadata.EntryPoint("MyTransformer2DModel", "my_family:MyBackbone", BACKBONES)])
    held = {METRICS: points, BACKBONES: families}
    for module in (installed, sheets):
        monkeypatch.setattr(module, "entry_points", lambda group: held[group])


def protocol(*measures):
    return SegmentationProtocol("here", 1, "single", ["sea"], [Segmenter("mean")], select="one_class", measures=measures)


def records(*measures):
    """Rows of three scenes whose greatest score is 1, 2 and 3."""
    data, found = Scenes(count=3, objects=(1, 1), size=32), []
    for number, key in enumerate(data.keys(), 1):
        here = protocol(*measures)
        task = here.prepare(data.read(key))
        maps = number * np.linspace(0, 1, 2 * 16, dtype=np.float32).reshape(2, 4, 4)
        ((segmenter, record, _),) = here.score(task, maps)
        found.append({"sample": key, "view": "map", "segmenter": segmenter.key, "status": "ok", **record})
    return found


def test_a_metric_of_maps_is_measured_kept_and_reported_as_its_mean():
    rows = records("peak", "empty")
    assert [row["measured"] for row in rows] == [{"peak": float(n), "empty": None} for n in (1, 2, 3)]
    assert all(row_fault(row) is None for row in rows)
    assert definition_of("peak", "columns").value(Rows.from_records(rows)) == 2
    assert np.isnan(definition_of("empty", "columns").value(Rows.from_records(rows)))
    object_ = metric("peak")
    object_.update(rows)
    assert float(object_.compute()) == 2 and int(object_.n) == 3


def test_measures_are_part_of_the_run_and_rows_without_them_lack_the_field():
    assert "measures" not in protocol().identity() and "measured" not in records()[0]
    assert protocol("peak").identity()["measures"] == {"peak": 3}


def test_a_column_that_the_protocol_does_not_measure_is_refused():
    check_measured(protocol("peak"), ["accuracy", "peak"])
    with pytest.raises(
        ConfigError, match=r'"empty" is measured from maps.*measures peak\. Set protocol\.measures=\[peak,empty\]'
    ):
        check_measured(protocol("peak"), ["empty"])


def test_what_no_package_adds_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r'columns: unknown metric "peek"\. Did you mean "peak"\?'):
        definition_of("peek", "columns")
    with pytest.raises(ConfigError, match=r'protocol\.measures: no metric "accuracy" is measured from maps'):
        protocol("accuracy")
    with pytest.raises(ConfigError, match=r'"misnamed" of conceptseg\.metrics gives .* which is named "another"'):
        definition_of("misnamed", "columns")
    with pytest.raises(ConfigError, match=r'"broken" can.t be loaded from .*NOWHERE: AttributeError'):
        definition_of("broken", "columns")


@pytest.mark.parametrize(
    ("measured", "fault"), [([], "numbers by name"), ({"peak": "1"}, r"measured\.peak"), ({"peak": -np.inf}, "finite")]
)
def test_a_damaged_number_is_no_row(measured, fault):
    row = records("peak")[0]
    assert fault.replace("\\", "") in row_fault({**row, "measured": measured})


def test_families_of_installed_packages_are_known_and_replace_none_of_ours():
    assert sheets.families() == {**sheets.FAMILIES, "MyTransformer2DModel": "my_family.MyBackbone"}
