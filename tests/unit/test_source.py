"""conceptseg/source.py: what is digested of a run's code, and what may change without costing it its rows."""

import time
from pathlib import Path

import pytest
from composing import GROUPS, plainly, sheet

import conceptseg
from conceptseg.extractors.sheets import extractor_sheet
from conceptseg.source import NO_NUMBERS, _read, source_digests
from conceptseg.targets import targets

PACKAGE = Path(conceptseg.__file__).parent
EVERY_RUN = {
    "evaluation/loop.py", "extractors/base.py", "metrics/average_precision.py", "metrics/counts.py", "protocols.py",
    "saliency/views.py", "segment/segmenter.py", "types.py",
}  # fmt: skip
METHOD = '''"""A method."""

import math
from typing import TYPE_CHECKING

from .shared import scaled

if TYPE_CHECKING:
    from lab_of_mine.only_types import Kind


class Method:
    """Says little."""

    version = 1
    """Raised whenever the numbers change."""

    def maps(self, x: float) -> float:
        """One number."""
        from lab_of_mine import late

        return scaled(x) + late.more(math.pi)  # a sum
'''
FILES = {
    "__init__.py": "",
    "method.py": METHOD,
    "shared.py": "from conceptseg.saliency.normalize import unit_length\n\n\ndef scaled(x):\n    return 2 * x\n",
    "late.py": "def more(x):\n    return x\n",
    "only_types.py": "Kind = int\n",
    "another.py": "def other():\n    return 3\n",
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package of someone's own, on the search path and never imported."""
    folder = tmp_path / "lab_of_mine"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    from conceptseg import source

    source._top.cache_clear()
    yield folder
    source._top.cache_clear()


def of_mine():
    return source_digests(["lab_of_mine.method.Method"])


def changed_by(folder, name, old, new):
    """Files whose digest differs after replacing text in one."""
    before = of_mine()
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    _read.cache_clear()  # a coarse clock may not see two writes
    after = of_mine()
    return {file for file in before.keys() | after.keys() if before.get(file) != after.get(file)}


def targets_of(extractor):
    """Classes that a method's sheet names, its models' among them. Read without Hydra: 59 compositions take ten seconds."""
    found = extractor_sheet(extractor)
    own = [target for _, target in targets({"_target_": found.target, **found.settings})]
    return own + [sheet("backbone", option)["_target_"] for option, _ in found.models.values()]


def of_sheet(extractor):
    whole = plainly()
    others = [target for part in ("dataset", "protocol") for _, target in targets(whole[part])]
    return source_digests(others + targets_of(extractor))


# ---------------------------------------------------------------- which files


@pytest.mark.parametrize("extractor", ["oracle", "concept_attention", "proxyclip"])
def test_a_sheet_names_the_classes_that_are_composed(extractor):
    """Of no model, of one and of two."""
    composed = plainly(f"extractor={extractor}")["extractor"]
    assert sorted(targets_of(extractor)) == sorted(target for _, target in targets(composed))


@pytest.mark.parametrize("extractor", GROUPS["extractor"])
def test_a_run_answers_for_its_own_classes_the_loop_and_nothing_of_other_methods(extractor):
    found = set(of_sheet(extractor))
    wanted = {"/".join(target.split(".")[1:-1]) + ".py" for target in targets_of(extractor)}
    assert EVERY_RUN | wanted <= found
    assert not [file for file in found if file.partition("/")[0] in ("cli", "report", "store", "tables", "lab", "studies")]
    methods = {file for file in found if file.startswith("extractors/")}
    assert len(methods) <= 7 and len(found) < len(list(PACKAGE.rglob("*.py"))) / 3


def test_controls_answer_for_no_model():
    found = set(of_sheet("oracle"))
    assert {f for f in found if f.startswith("backbones/")} <= {
        "backbones/__init__.py",
        "backbones/base.py",
        "backbones/random_weights.py",
    }
    assert {f for f in found if f.startswith("data/")} == {
        "data/__init__.py", "data/base.py", "data/drawings.py", "data/drawn.py", "data/images.py", "data/scenes.py",
    }  # fmt: skip


def test_a_run_on_files_answers_for_what_reads_text_and_pictures():
    """Readers decide samples and words; what writes files decides nothing."""
    found = source_digests(["conceptseg.data.pascal_voc.PascalVOC"])
    assert {"reading.py", "data/images.py", "data/pascal_voc.py"} <= found.keys() and "files.py" not in found


def test_every_module_that_makes_no_number_exists():
    for name in NO_NUMBERS:
        at = PACKAGE.joinpath(*name.split(".")[1:])
        assert at.with_suffix(".py").exists() or (at / "__init__.py").exists(), name


def test_a_package_of_ones_own_answers_for_what_it_imports_also_late_and_by_dots(mine):
    found = of_mine()
    assert {f for f in found if f.startswith("lab_of_mine")} == {
        "lab_of_mine/__init__.py", "lab_of_mine/late.py", "lab_of_mine/method.py", "lab_of_mine/shared.py",
    }  # fmt: skip
    assert "saliency/normalize.py" in found  # only shared.py imports it


def test_nothing_is_imported_for_it(mine):
    (mine / "__init__.py").write_text("raise RuntimeError('imported')\n")
    assert "lab_of_mine/method.py" in of_mine()


# ---------------------------------------------------------------- what counts as a change


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("method.py", '"""A method."""', '"""Another word."""'),
        ("method.py", '"""A method."""\n', ""),
        ("method.py", '"""Says little."""', '"""Says more."""'),
        ("method.py", '"""One number."""\n', "\n"),
        ("method.py", '"""Raised whenever the numbers change."""', ""),
        ("method.py", "  # a sum", ""),
        ("method.py", "x: float) -> float", "x: int) -> int"),
        ("method.py", "import Kind", "import Sort"),
        ("method.py", "\n\n\nclass", "\n\n# a line\n\n\nclass"),
        ("method.py", "scaled(x) + late.more(math.pi)", "(scaled(x) + late.more(\n            math.pi\n        ))"),
        ("another.py", "return 3", "return 4"),
        ("only_types.py", "int", "str"),
    ],
)
def test_what_makes_no_number_costs_no_rows(mine, name, old, new):
    assert changed_by(mine, name, old, new) == set()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("method.py", "version = 1", "version = 2"),
        ("method.py", "math.pi", "math.e"),
        ("method.py", "+ late", "- late"),
        ("method.py", "scaled(x)", "scaled(x, )[0]"),
        ("shared.py", "2 * x", "2.0 * x"),
        ("shared.py", "def scaled(x)", "def scaled(x=None)"),
        ("late.py", "return x", "return"),
        ("late.py", "return x", "return 'x'"),
        ("late.py", "return x", "yield x"),
    ],
)
def test_a_changed_statement_is_seen_in_the_file_that_holds_it(mine, name, old, new):
    assert changed_by(mine, name, old, new) == {f"lab_of_mine/{name}"}


def test_a_new_file_is_answered_for_once_it_is_imported(mine):
    assert changed_by(mine, "late.py", "return x", "import lab_of_mine.another\n    return x") == {
        "lab_of_mine/late.py", "lab_of_mine/another.py",
    }  # fmt: skip


def test_a_second_run_of_a_process_costs_little():
    of_sheet("concept_attention")
    start = time.process_time()
    for _ in range(20):
        source_digests(["conceptseg.extractors.concept_attention.ConceptAttention"])
    assert (time.process_time() - start) / 20 < 0.05
