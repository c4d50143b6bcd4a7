"""The real data sets' layouts, written from drawn scenes, through the whole command."""

from __future__ import annotations

import json

import pytest

from conceptseg.data.made import made_scenes, write_hub, write_mat, write_parquet, write_voc, write_voc_tar

RANDOM = ("extractor=random", "runtime.keep_maps=false")
"""A map for each word, and no two alike: equal rows are of equal samples."""
SCENES = made_scenes(5)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    return write_voc(tmp_path_factory.mktemp("voc"), SCENES)


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    return write_voc_tar(tmp_path_factory.mktemp("tar") / "VOCtrainval_11-May-2012.tar", SCENES)


@pytest.fixture(scope="module")
def mat(tmp_path_factory):
    return write_mat(tmp_path_factory.mktemp("mat") / "gtsegs_ijcv.mat", SCENES)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("hub") / "table", SCENES)


@pytest.fixture(scope="module")
def from_folder(shared, kit):
    """A run on the folder under the protocol that other forms of it are run under too: its name and its rows."""
    shared.run(*RANDOM, "dataset=pascal_voc", f"dataset.root={kit}", "protocol=voc_multi_standard", "runtime.runs=folder")
    return shared.the_run("folder").name, shared.rows("folder")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet") / "table", SCENES)


def accounted_for(rows, count: int, segmenters: int) -> int:
    """Every sample has its rows, or one row that says why not; returns how many were scored."""
    scored = {r["sample"] for r in rows if r["status"] == "ok"}
    left_out = {r["sample"] for r in rows if r["status"] == "excluded"}
    assert len(rows) == len(scored) * segmenters + len(left_out) and len(scored) + len(left_out) == count
    assert not [r for r in rows if r["status"] == "failed"]
    return len(scored)


@pytest.mark.parametrize("protocol", ["voc_single_released", "voc_single_standard", "voc_multi_released"])
def test_pascal_voc_runs_under_each_of_its_protocols(commands, kit, protocol):
    said = commands.run(*RANDOM, "dataset=pascal_voc", f"dataset.root={kit}", f"protocol={protocol}")
    assert accounted_for(commands.rows(), 5, segmenters=2) > 0 and f"{protocol} v1" in said.said


def test_the_tar_gives_the_run_and_the_rows_of_its_folder(commands, tar, from_folder):
    said = commands.run(*RANDOM, "dataset=pascal_voc", f"dataset.root={tar}", "protocol=voc_multi_standard")
    assert accounted_for(commands.rows(), 5, segmenters=1) > 0 and "voc_multi_standard v1" in said.said
    assert (commands.the_run().name, commands.rows()) == from_folder


@pytest.mark.parametrize(
    ("protocol", "segmenters", "pixels"), [("imagenet_released", 1, 224 * 224), ("imagenet_standard", 2, 48 * 64)]
)
def test_imagenet_segmentation_runs_under_both_protocols(commands, mat, protocol, segmenters, pixels):
    """Truth is scored at the size that the protocol names, or at its own where it names none."""
    said = commands.run(*RANDOM, "dataset=imagenet_segmentation", f"dataset.root={mat}", f"protocol={protocol}")
    assert accounted_for(commands.rows(), 5, segmenters) == 5 and f"{protocol} v1" in said.said
    assert {r["valid"] + r["void"] for r in commands.rows()} == {pixels}


LAYOUTS = {
    "pascal_voc": ("dataset=pascal_voc", "root", "kit"),
    "imagenet_segmentation": ("dataset=imagenet_segmentation", "root", "mat"),
    "save_to_disk": ("dataset=hub", "path", "hub"),
    "parquet": ("dataset=hub", "path", "parquet"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_oracle_is_right_on_every_layout(commands, layout, request):
    dataset, key, place = LAYOUTS[layout]
    commands.run("extractor=oracle", dataset, f"dataset.{key}={request.getfixturevalue(place)}")
    (reading, *others) = json.loads((commands.the_run() / "readings.json").read_text())["readings"]
    assert reading["values"]["accuracy"]["value"] == 1
    assert accounted_for(commands.rows(), 5, segmenters=1 + len(others)) == reading["n"]


def test_a_limit_takes_the_first_samples_of_the_same_run(commands, kit):
    args = ("extractor=constant", "dataset=pascal_voc", f"dataset.root={kit}", "runtime.batch_size=1")
    commands.run(*args, "dataset.limit=2")
    assert len({r["sample"] for r in commands.rows()}) == 2
    commands.run(*args)
    assert len({r["sample"] for r in commands.rows()}) == 5


def test_masks_in_voc_colours_are_scored_as_their_indices(commands, tmp_path, from_folder):
    painted = write_voc(tmp_path / "painted", SCENES, encoding="rgb")
    args = (*RANDOM, "dataset=pascal_voc", "protocol=voc_multi_standard", "dataset.mask_encoding=rgb")
    commands.run(*args, f"dataset.root={painted}")
    assert commands.rows() == from_folder[1]


# ------------------------------------------------------------ the doctor


def test_the_doctor_passes_a_whole_data_set_and_leaves_nothing_behind(commands, kit):
    said = commands.run("dataset=pascal_voc", f"dataset.root={kit}", name="conceptseg-doctor")
    assert "5 samples, nothing missing" in said.out and not list(commands.folder.iterdir())


def test_the_doctor_of_an_absent_data_set_says_how_to_get_it(commands):
    said = commands.run("dataset=imagenet_segmentation", "dataset.root=nowhere.mat", name="conceptseg-doctor", code=1)
    assert "nowhere.mat does not exist" in said.said and "scripts/fetch_imagenet_segmentation.py" in said.said


def test_the_doctor_names_files_that_are_missing(commands, tmp_path):
    kit = write_voc(tmp_path / "broken", SCENES)
    (kit / "VOC2012" / "JPEGImages" / "2012_000001.jpg").unlink()
    (kit / "VOC2012" / "SegmentationClass" / "2012_000003.png").write_bytes(b"no picture")
    said = commands.run("dataset=pascal_voc", f"dataset.root={kit}", name="conceptseg-doctor", code=1)
    assert "2012_000001.jpg" in said.said and "2012_000003" in said.said


def test_the_doctor_refuses_a_misspelt_key(commands):
    said = commands.run("dataset=pascal_voc", "dataset.rot=x", name="conceptseg-doctor", code=1)
    assert said.err.startswith("ConfigError") and "rot" in said.err
