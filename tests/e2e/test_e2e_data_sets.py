"""The real data sets' layouts, written from drawn scenes, through the whole command."""

from __future__ import annotations

import json

import pytest

from conceptseg.data.made import made_scenes, write_hub, write_mat, write_parquet, write_voc, write_voc_tar

CA = ("extractor=concept_attention", "backbone@extractor.backbone=lab_flux", "runtime.keep_maps=false")
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


def accounted_for(commands, count: int, segmenters: int) -> int:
    """Every sample has its rows, or one row that says why not; returns how many were scored."""
    rows = commands.rows()
    scored = {r["sample"] for r in rows if r["status"] == "ok"}
    left_out = {r["sample"] for r in rows if r["status"] == "excluded"}
    assert len(rows) == len(scored) * segmenters + len(left_out) and len(scored) + len(left_out) == count
    assert not [r for r in rows if r["status"] == "failed"]
    return len(scored)


@pytest.mark.parametrize(
    ("protocol", "segmenters"),
    [("voc_single_released", 2), ("voc_single_standard", 2), ("voc_multi_released", 2), ("voc_multi_standard", 1)],
)
def test_pascal_voc_runs_under_each_of_its_protocols(commands, kit, protocol, segmenters):
    said = commands.run(*CA, "dataset=pascal_voc", f"dataset.root={kit}", f"protocol={protocol}")
    assert accounted_for(commands, 5, segmenters) > 0 and f"{protocol} v1" in said.said


def test_the_tar_gives_the_run_and_the_rows_of_its_folder(commands, kit, tar):
    for root, runs in ((kit, "folder"), (tar, "tar")):
        commands.run(*CA, "dataset=pascal_voc", f"dataset.root={root}", "protocol=voc_multi_standard", f"runtime.runs={runs}")
    assert commands.rows("folder") == commands.rows("tar")
    assert commands.the_run("folder").name == commands.the_run("tar").name


@pytest.mark.parametrize("protocol", ["imagenet_released", "imagenet_standard"])
def test_imagenet_segmentation_runs_under_both_protocols(commands, mat, protocol):
    said = commands.run(*CA, "dataset=imagenet_segmentation", f"dataset.root={mat}", f"protocol={protocol}")
    assert accounted_for(commands, 5, 1 if protocol.endswith("released") else 2) == 5 and f"{protocol} v1" in said.said


def test_truth_is_scored_at_the_size_that_the_protocol_names(commands, mat):
    commands.run("extractor=constant", "dataset=imagenet_segmentation", f"dataset.root={mat}", "protocol=imagenet_released")
    assert {r["valid"] + r["void"] for r in commands.rows()} == {224 * 224}


def test_truth_is_scored_at_its_own_size_where_none_is_named(commands, mat):
    commands.run("extractor=constant", "dataset=imagenet_segmentation", f"dataset.root={mat}", "protocol=imagenet_standard")
    assert {r["valid"] + r["void"] for r in commands.rows()} == {48 * 64}


@pytest.mark.parametrize("write", [write_hub, write_parquet], ids=["save_to_disk", "parquet"])
def test_a_local_table_runs(commands, tmp_path, write):
    commands.run(*CA, "dataset=hub", f"dataset.path={write(tmp_path / 'table', SCENES)}")
    assert accounted_for(commands, 5, 1) == 5


def test_the_oracle_is_right_on_every_layout(commands, kit, mat, hub):
    places = (("pascal_voc", "root", kit), ("imagenet_segmentation", "root", mat), ("hub", "path", hub))
    for dataset, key, place in places:
        commands.run("extractor=oracle", f"dataset={dataset}", f"dataset.{key}={place}", f"runtime.runs={dataset}")
        (reading, *_) = json.loads((commands.the_run(dataset) / "readings.json").read_text())["readings"]
        assert reading["values"]["accuracy"]["value"] == 1


def test_a_limit_takes_the_first_samples_of_the_same_run(commands, kit):
    args = ("extractor=constant", "dataset=pascal_voc", f"dataset.root={kit}", "runtime.batch_size=1")
    commands.run(*args, "dataset.limit=2")
    assert len({r["sample"] for r in commands.rows()}) == 2
    commands.run(*args)
    assert len({r["sample"] for r in commands.rows()}) == 5


def test_masks_in_voc_colours_are_scored_as_their_indices(commands, kit, tmp_path):
    painted = write_voc(tmp_path / "painted", SCENES, encoding="rgb")
    args = ("extractor=centre_prior", "dataset=pascal_voc", "protocol=voc_multi_standard")
    commands.run(*args, f"dataset.root={kit}", "runtime.runs=index")
    commands.run(*args, f"dataset.root={painted}", "dataset.mask_encoding=rgb", "runtime.runs=rgb")
    assert commands.rows("index") == commands.rows("rgb")


# ------------------------------------------------------------ the doctor


def test_the_doctor_passes_a_whole_data_set(commands, kit):
    said = commands.run("dataset=pascal_voc", f"dataset.root={kit}", name="conceptseg-doctor")
    assert "5 samples, nothing missing" in said.out


def test_the_doctor_of_an_absent_data_set_says_how_to_get_it(commands):
    said = commands.run("dataset=imagenet_segmentation", "dataset.root=nowhere.mat", name="conceptseg-doctor", code=1)
    assert "nowhere.mat does not exist" in said.said and "scripts/fetch_imagenet_segmentation.py" in said.said


def test_the_doctor_names_files_that_are_missing(commands, tmp_path):
    kit = write_voc(tmp_path / "broken", SCENES)
    (kit / "VOC2012" / "JPEGImages" / "2012_000001.jpg").unlink()
    (kit / "VOC2012" / "SegmentationClass" / "2012_000003.png").write_bytes(b"no picture")
    said = commands.run("dataset=pascal_voc", f"dataset.root={kit}", name="conceptseg-doctor", code=1)
    assert "2012_000001.jpg" in said.said and "2012_000003" in said.said


def test_the_doctor_leaves_nothing_behind(commands, kit):
    commands.run("dataset=pascal_voc", f"dataset.root={kit}", name="conceptseg-doctor")
    assert not list(commands.folder.iterdir())


def test_the_doctor_refuses_a_misspelt_key(commands):
    said = commands.run("dataset=pascal_voc", "dataset.rot=x", name="conceptseg-doctor", code=1)
    assert said.err.startswith("ConfigError") and "rot" in said.err
