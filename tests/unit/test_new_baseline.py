"""scripts/new_baseline.py writes a method that works at once."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "new_baseline.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("new_baseline", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    (tmp_path / "conceptseg" / "extractors").mkdir(parents=True)
    (tmp_path / "conf" / "extractor").mkdir(parents=True)
    return tmp_path


def test_the_written_class_is_a_method(script, root):
    code, sheet = script.write("edge_energy", root)
    names: dict = {}
    exec(compile(code.read_text(), code, "exec"), names)
    method = names["EdgeEnergy"](grid=4)
    assert method.version == 1 and method.axes().spaces == ("map",)
    assert "_target_: conceptseg.extractors.edge_energy.EdgeEnergy" in sheet.read_text()
    assert sheet.read_text().startswith("# ")


def test_a_taken_name_is_refused_and_nothing_is_overwritten(script, root):
    code, _ = script.write("edge_energy", root)
    code.write_text("mine")
    with pytest.raises(SystemExit, match="is there already"):
        script.write("edge_energy", root)
    assert code.read_text() == "mine"


@pytest.mark.parametrize("name", ["Edge", "edge-energy", "../edge", ""])
def test_a_name_that_is_no_module_name_is_refused(script, root, name):
    with pytest.raises(SystemExit, match="no module name"):
        script.write(name, root)
