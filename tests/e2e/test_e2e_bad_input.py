"""Handle bad input: a bad sample is left out and recorded; a bad run ends with an error that names a remedy."""

from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
from composing import composed
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict
from PIL import Image

from conceptseg.config import plain
from conceptseg.data.drawings import OBJECTS
from conceptseg.data.made import made_scenes, mask_png, voc_mask, write_hub, write_mat, write_voc
from conceptseg.errors import ConceptSegError
from conceptseg.evaluation.assemble import assemble

CA = ("extractor=concept_attention", "backbone@extractor.backbone=lab_flux", "runtime.keep_maps=false")
SCENES = made_scenes(5)
MULTI = ("extractor=constant", "protocol=voc_multi_standard")


@pytest.fixture
def kit(tmp_path):
    """A development kit whose samples a test damages; its files by kind."""
    return write_voc(tmp_path / "voc", SCENES) / "VOC2012"


def refusal(ended) -> str:
    """An error of ours: one message, no frames."""
    assert ended.code == 1 and "Traceback" not in ended.err and 'File "' not in ended.err
    return ended.said


def refused(setting: str, *composed_with: str) -> str:
    """The error of an evaluation with one more setting, with its class; the composition of the others is shared."""
    config = deepcopy(composed(*composed_with))
    override = OverridesParser.create().parse_override(setting)
    with open_dict(config):
        OmegaConf.update(config, override.key_or_group, override.value(), merge=False, force_add=True)
    with pytest.raises(ConceptSegError) as refusal:
        assemble(plain(config))
    return " ".join(f"{refusal.typename}: {refusal.value}".split())


def failed(commands) -> dict[str, str]:
    return {r["sample"]: r["error"] for r in commands.rows() if r["status"] == "failed"}


def image_of(kit, number):
    return kit / "JPEGImages" / f"2012_{number:06d}.jpg"


def mask_of(kit, number):
    return kit / "SegmentationClass" / f"2012_{number:06d}.png"


# ------------------------------------------------------------ samples

PAINTED = mask_png(voc_mask(SCENES[1]), "rgb")
DAMAGES = {
    "an image that is no picture": (lambda kit, n: image_of(kit, n).write_bytes(b"no picture"), "can't be decoded"),
    "an image cut short": (lambda kit, n: image_of(kit, n).write_bytes(image_of(kit, n).read_bytes()[:300]), "can't be decoded"),
    "an empty image": (lambda kit, n: image_of(kit, n).write_bytes(b""), "can't be decoded"),
    "a missing image": (lambda kit, n: image_of(kit, n).unlink(), "missing"),
    "a missing mask": (lambda kit, n: mask_of(kit, n).unlink(), "missing"),
    "a mask of another size": (lambda kit, n: Image.open(mask_of(kit, n)).crop((0, 0, 9, 9)).save(mask_of(kit, n)), "9 x 9"),
    "a mask in colours": (lambda kit, n: mask_of(kit, n).write_bytes(PAINTED), "dataset.mask_encoding=rgb"),
    "a mask with an unknown class": (
        lambda kit, n: Image.fromarray(np.full((48, 64), 77, np.uint8)).save(mask_of(kit, n)),
        "77",
    ),
    "a mask of 16 bits": (
        lambda kit, n: Image.fromarray(np.zeros((48, 64), np.uint16)).save(mask_of(kit, n)),
        "mode I;16",
    ),
}


def test_damaged_samples_get_failed_rows_and_the_others_are_scored(commands, tmp_path):
    """One of each kind, in one run."""
    kit = write_voc(tmp_path / "voc", made_scenes(len(DAMAGES) + 2)) / "VOC2012"
    for number, (spoil, _) in enumerate(DAMAGES.values(), 1):
        spoil(kit, number)
    said = commands.run(*MULTI, "dataset=pascal_voc", f"dataset.root={kit}", f"runtime.max_failures={len(DAMAGES) + 1}")
    errors = failed(commands)
    told = {damage: errors.pop(f"voc2012/2012_{number:06d}", "scored") for number, damage in enumerate(DAMAGES, 1)}
    assert {damage: error for damage, error in told.items() if DAMAGES[damage][1] not in error} == {} == errors
    assert sum(r["status"] == "ok" for r in commands.rows()) == 2 and f"{len(DAMAGES)} failed" in said.said


def test_a_failed_sample_is_counted_and_not_tried_again_until_asked_for(commands, kit):
    """Mended contents are another data set, and start a run of their own."""
    args = (*MULTI, "dataset=pascal_voc", f"dataset.root={kit}", "runtime.batch_size=1")
    good = image_of(kit, 1).read_bytes()
    image_of(kit, 1).write_bytes(b"x" * len(good))
    assert "4 samples computed" in commands.run(*args).said
    damaged = commands.the_run()
    (reading,) = json.loads((damaged / "readings.json").read_text())["readings"]
    assert (reading["n"], reading["failed"], reading["waiting"]) == (4, 1, 0)
    assert "5 held already, 0 excluded, 0 failed" in commands.run(*args).said
    assert "4 held already, 0 excluded, 1 failed" in commands.run(*args, "runtime.retry_failed=true").said
    image_of(kit, 1).write_bytes(good)
    assert "5 samples computed" in commands.run(*args).said
    (mended,) = {path for path in damaged.parent.iterdir() if (path / "readings.json").exists()} - {damaged}
    (reading,) = json.loads((mended / "readings.json").read_text())["readings"]
    assert (reading["n"], reading["failed"]) == (5, 0)


def test_too_many_failed_samples_stop_the_run_and_keep_their_rows(commands, kit):
    for number in range(3):
        image_of(kit, number).unlink()
    args = (*MULTI, "dataset=pascal_voc", f"dataset.root={kit}", "runtime.batch_size=1", "runtime.max_failures=2")
    said = refusal(commands.run(*args, code=1))
    assert "runtime.max_failures" in said and "runtime.retry_failed=true" in said and len(failed(commands)) == 2


def test_a_run_in_which_every_sample_fails_ends_with_the_last_reason(commands, kit):
    for number in range(5):
        image_of(kit, number).unlink()
    said = refusal(commands.run(*MULTI, "dataset=pascal_voc", f"dataset.root={kit}", code=1))
    assert "no sample could be scored" in said and ".jpg is missing" in said


def test_a_word_that_the_tokenizer_does_not_know_fails_its_samples_with_the_word(commands, tmp_path):
    table = write_hub(tmp_path / "table", SCENES)
    classes = sorted({int(v) for s in SCENES for v in np.unique(voc_mask(s)) if v not in (0, 255)})
    words = dict(zip(classes, OBJECTS, strict=False)) | {classes[0]: "zebrafish"}
    holders = [s for s in SCENES if classes[0] in np.unique(voc_mask(s))]
    assert 0 < len(holders) < len(SCENES)
    listed = ",".join(f"{label}: {word}" for label, word in words.items())
    said = commands.run(*CA, "dataset=hub", f"dataset.path={table}", f"dataset.words={{{listed}}}")
    assert len(failed(commands)) == len(holders)
    assert all('"zebrafish" is unknown' in e and "Choices:" in e for e in failed(commands).values())
    assert "zebrafish" in said.said


def test_two_classes_with_one_word_are_refused_before_a_run_begins(commands, tmp_path):
    table = write_hub(tmp_path / "table", SCENES)
    words = ",".join(f"{c}: apple" for c in range(1, 21))
    said = commands.run("extractor=constant", "dataset=hub", f"dataset.path={table}", f"dataset.words={{{words}}}", code=1)
    assert 'dataset.words names "apple" twice' in said.said and not (commands.folder / "runs").exists()


def test_an_image_without_any_foreground_is_accounted_for(commands, kit):
    """VOC names no word for it, and this protocol keeps every image."""
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(mask_of(kit, 1))
    commands.run("extractor=constant", "dataset=pascal_voc", f"dataset.root={kit}", "protocol=imagenet_standard")
    (row,) = [r for r in commands.rows() if r["sample"].endswith("000001")]
    assert row["status"] in ("excluded", "failed") and row["error"]


def test_an_image_of_void_alone_is_accounted_for(commands, kit):
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(mask_of(kit, 1))
    commands.run("extractor=constant", "dataset=pascal_voc", f"dataset.root={kit}", "protocol=voc_multi_standard")
    (row,) = [r for r in commands.rows() if r["sample"].endswith("000001")]
    assert row["status"] == "excluded"


# ------------------------------------------------------------ maps

SPOIL = """
from conceptseg.extractors.controls import CentrePrior
sound = CentrePrior.saliency
def saliency(self, batch):
    maps = sound(self, batch).clone()
    for one, task in zip(maps, batch.tasks):
        number = int(task.key[-5:])
        {harm}
    return maps
CentrePrior.saliency = saliency
"""
CENTRE = ("extractor=centre_prior", "dataset.count=4", "dataset.objects=[1,1]", "runtime.batch_size=4")


def test_a_map_that_is_not_finite_fails_its_sample_and_no_other(commands):
    harm = "one[0, 0, 0] = {1: float('nan'), 2: float('inf')}.get(number, 0)"
    commands.run(*CENTRE, before=SPOIL.format(harm=harm))
    assert len(commands.rows()) == 4 and list(failed(commands)) == ["scenes/val/0/00001", "scenes/val/0/00002"]
    assert all("NaN or infinity" in error for error in failed(commands).values())


def test_a_method_that_raises_on_one_sample_fails_that_sample_alone(commands):
    commands.run(*CENTRE, before=SPOIL.format(harm="if number == 1: raise RuntimeError('shapes do not match')"))
    assert len(commands.rows()) == 4 and failed(commands) == {"scenes/val/0/00001": "RuntimeError: shapes do not match"}


def test_a_device_without_memory_is_given_smaller_batches_and_says_so(commands):
    harm = "if number == 1: import torch; raise torch.OutOfMemoryError('2 GiB')"
    said = commands.run(*CENTRE, before=SPOIL.format(harm=harm))
    assert "out of memory at 4 samples a batch" in said.said and "runtime.batch_size=2" in said.said
    assert len(commands.rows()) == 4 and failed(commands) == {"scenes/val/0/00001": "OutOfMemoryError: 2 GiB"}


def test_a_disk_that_fills_up_during_a_run_ends_it_and_what_was_written_stays(commands):
    """How it goes on when there is space is in test_e2e_killing."""
    full = """
import errno, os
write, calls = os.write, []
def limited(file, block):
    calls.append(1)
    if len(calls) > 2:
        write(file, block[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(file, block)
import conceptseg.store.run as run
run.os = type("FullDisk", (), {"__getattr__": lambda self, name: limited if name == "write" else getattr(os, name)})()
"""
    said = refusal(commands.run("extractor=random", "dataset.count=5", "runtime.batch_size=1", before=full, code=1))
    assert "StoreError" in said and "the disk is full" in said and len(commands.rows()) == 2


# ------------------------------------------------------------ runs


def test_a_missing_mat_is_refused_with_where_to_get_it(commands):
    said = refusal(commands.run("extractor=constant", "dataset=imagenet_segmentation", "dataset.root=no.mat", code=1))
    assert "DataError" in said and "no.mat does not exist" in said and "fetch_imagenet_segmentation.py" in said


@pytest.mark.parametrize("size", [0, 100, 600, 5000])
def test_a_mat_cut_short_is_refused_as_damaged(tmp_path, size):
    mat = write_mat(tmp_path / "gt.mat", SCENES)
    mat.write_bytes(mat.read_bytes()[:size])
    said = refused(f"dataset.root={mat}", "extractor=constant", "dataset=imagenet_segmentation")
    assert "DataError" in said and str(mat) in said and "fetch_imagenet_segmentation.py" in said


def test_a_missing_voc_folder_is_refused_with_where_to_get_it():
    said = refused("dataset.root=nowhere", "extractor=constant", "dataset=pascal_voc")
    assert "nowhere does not exist" in said and "fetch_voc.py" in said


def test_a_hub_table_without_a_commit_is_refused_by_its_key():
    assert "dataset.revision" in refused("dataset.path=owner/name", "extractor=constant", "dataset=hub")


REFUSED = {
    "views.output.layers=9": ("ViewError", "views.layers", "0-3"),
    "views.output.layers=last 9": ("ViewError", "views.layers"),
    "views.output.timesteps=[1.5]": ("ViewError", "views.output.timesteps"),
    "views.output.timesteps=[]": ("ViewError", "views.output.timesteps"),
    "+views.output.draws=0": ("ViewError", "views.output.draws"),
    "views.output.space=outptu": ("ViewError", "views.output.space", 'Did you mean "output"'),
    "views.output.softmax=per_sell": ("ConfigError", "views.output.softmax", 'Did you mean "per_cell"'),
    "+views.output.layrs=1": ("ConfigError", "views.output.layrs", 'Did you mean "layers"'),
    "protocol.background=[grass,sky,grass]": ("ConfigError", "protocol.background", "grass"),
    "protocol.segmenters=[]": ("ConfigError", "protocol.segmenters"),
    "protocol.task=mutli": ("ConfigError", "protocol.task", 'Did you mean "multi"'),
    "extractor.noise=per_smaple": ("ConfigError", "extractor.noise", 'Did you mean "per_sample"'),
    "extractor.backbone.dtype=float23": ("ConfigError", "extractor.backbone.dtype", 'Did you mean "float32"'),
    "extractor.backbone.path=lab:flx": ("ConfigError", "extractor.backbone.path", 'Did you mean "flux"'),
    "extractor._target_=os.system": ("ConfigError", "runtime.allow_targets"),
    "dataset.split=vla": ("ConfigError", "dataset.split", 'Did you mean "val"'),
    "dataset.count=0": ("ConfigError", "dataset.count"),
    "dataset.objects=[0,9]": ("ConfigError", "dataset.objects"),
    "runtime.batch_size=0": ("ConfigError", "runtime.batch_size"),
    "report.columns=[acuracy]": ("ConfigError", 'Did you mean "accuracy"'),
    "report.resamples=0": ("ConfigError", "report.resamples"),
    "report.level=2": ("ConfigError", "report.level"),
    "runtime.device=cdua": ("ConfigError", "runtime.device"),
    "extractor.backbone.resize=bikubic": ("ConfigError", "extractor.backbone.resize", 'Did you mean "bicubic"'),
    "runtime.runs=/proc/nowhere": ("StoreError", "runtime.runs"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_cannot_be_is_refused_by_its_key(setting):
    said = refused(setting, "backbone@extractor.backbone=lab_flux", "dataset.count=2")
    for expected in REFUSED[setting]:
        assert expected in said


def test_an_image_size_that_the_model_can_not_have_is_refused_by_its_key(commands):
    said = refusal(commands.run("backbone@extractor.backbone=lab_flux", "extractor.backbone.image_size=63", code=1))
    assert "ConfigError" in said and "extractor.backbone.image_size" in said


@pytest.mark.parametrize("protocol", ["scenes_single", "scenes_multi"])
def test_no_background_word_at_all_is_a_legal_question(commands, protocol):
    commands.run("extractor=constant", f"protocol={protocol}", "protocol.background=[]", "dataset.count=4")
    assert {r["status"] for r in commands.rows()} <= {"ok", "excluded"}


def test_views_that_are_empty_are_refused(commands):
    said = refusal(commands.run("extractor=constant", "views=null", "dataset.count=2", code=1))
    assert "views" in said


def test_a_refused_setting_leaves_no_run_behind(commands):
    said = refusal(commands.run("backbone@extractor.backbone=lab_flux", "views.output.layers=9", code=1))
    assert all(part in said for part in REFUSED["views.output.layers=9"]) and not commands.runs()


def test_a_method_without_comparable_maps_is_refused_where_only_words_compete(commands):
    said = refusal(commands.run("extractor=dino", "dataset.count=2", code=1))
    assert "SelfAttention's maps of different words can't be compared" in said and "protocol=scenes_single" in said
