"""The lab's trainers at toy size: seeded, resumable, and what they write is read like a real checkpoint."""

import json
import shutil
import sys
from functools import cache

import numpy as np
import pytest
import torch
from commands import TESTS
from safetensors.torch import load_file, save_file

from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.cli.lab import lab as lab_command
from conceptseg.errors import ConfigError
from conceptseg.lab import check as checking
from conceptseg.lab import train as training
from conceptseg.lab.cards import train_and_write
from conceptseg.lab.check import check, sample_sheet
from conceptseg.lab.generation import generate, load_trained
from conceptseg.lab.recipes import load_recipe
from conceptseg.lab.train import TRAINERS, make_trainer, train

COMMON = ["steps=4", "horizon=5", "batch=4", "scenes=6", "hard_scenes=2", "plain_scenes=2", "checkpoint_every=2", "warmup=1"]
FLOW = [*COMMON, "swap_batch=2", "compile=false", "sizes.heads=2", "sizes.text_width=16", "sizes.text_layers=1"]
TOYS = {
    "flux": [
        *FLOW, "phases=[{from: 2, ask: swaps, swap_weight: 0.5}]", "sizes.double_blocks=2", "sizes.single_blocks=0",
        "sizes.head_width=8", "sizes.rope=[4,2,2]",
    ],
    "sd3": [*FLOW, "sizes.blocks=2", "sizes.dual_attention_blocks=[0]", "sizes.head_width=8", "sizes.clip_width=8"],
    "sd": [
        *COMMON, "sizes.channels=[8,8]", "sizes.reads_text=[true,true]", "sizes.norm_groups=2", "sizes.heads=2",
        "sizes.text_width=8", "phases=[{from: 2, middle: false, learning_rate: 1e-4, warmup: 2}]",
    ],
    "sdxl": [
        *COMMON, "sizes.channels=[8,8]", "sizes.reads_text=[true,true]", "sizes.transformer_layers=[1,2]", "sizes.heads=[2,2]",
        "sizes.norm_groups=2", "sizes.text_width=8", "phases=[{from: 2, list_share: 1.0}]",
    ],
    "clip": [
        *COMMON, "phases=[{from: 2, patch_weight: 1.0}]", "sizes.patch_drop=0.25", "sizes.width=16", "sizes.head_width=8",
        "sizes.layers=1", "sizes.text_width=8", "sizes.text_layers=1",
    ],
    "vit": [*COMMON, "phases=[]", "sizes.width=16", "sizes.heads=2", "sizes.layers=1"],
    "dino": [*COMMON, "sizes.width=16", "sizes.heads=2", "sizes.layers=1", "hidden=16", "prototypes=16"],
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A finished toy training of every kind: name -> (work folder, model folder)."""
    found = {}
    for name in TRAINERS:
        work = tmp_path_factory.getbasetemp() / "lab" / name
        folder = train_and_write(load_recipe(name, TOYS[name]), work)
        assert folder is not None
        found[name] = work, folder
    return found


def card_of(folder):
    return json.loads((folder / "card.json").read_text())


@pytest.mark.parametrize("name", TRAINERS)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(name, written, tmp_path):
    assert train_and_write(load_recipe(name, TOYS[name]), tmp_path / name, stop_after=2) is None
    train(load_recipe(name, TOYS[name]), tmp_path / name)
    one, two = (load_file(work / "checkpoint.safetensors") for work in (written[name][0], tmp_path / name))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_card_says_what_was_done(name, written):
    folder = written[name][1]
    card = card_of(folder)
    assert card["provenance"] == "lab" and card["steps"] == 4 and card["seed"] == 0 and card["losses"]
    assert "apple" in card["trained_words"] and card["recipe"]["scenes"] == 6
    assert "claims" in (folder / "README.md").read_text()
    assert all(tensor.dtype != torch.float32 for f in folder.rglob("*.safetensors") for tensor in load_file(f).values())


@pytest.mark.parametrize("name", TRAINERS)
def test_a_written_model_is_read_back_to_the_averaged_weights(name, written):
    folder = written[name][1]
    trainer = make_trainer(load_recipe(name, TOYS[name]))
    trainer.restore(load_file(written[name][0] / "checkpoint.safetensors"))
    trainer.take_averaged()
    trainer.finish()
    again = load_trained(card_of(folder), folder)
    kept = {"dino": ("teacher.model.", "model.")}.get(name, ("", ""))
    wanted = {k.removeprefix(kept[0]): v for k, v in trainer.trained.state_dict().items() if k.startswith(kept[0])}
    found = {k.removeprefix(kept[1]): v for k, v in again.trained.state_dict().items() if k.startswith(kept[1])}
    for key in wanted.keys() - {k for k in wanted if k.startswith("head.") and name != "vit"}:
        torch.testing.assert_close(found[key], wanted[key].half().float(), rtol=0, atol=0)


def spoil_middle(path):
    """One bit of the file's middle turned over."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def without_times(work):
    lines = [json.loads(line) for line in (work / "losses.jsonl").read_text().splitlines()]
    card = card_of(work / "model")
    return [{**line, "seconds": 0} for line in lines], {**card, "minutes": 0}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with a training of the ViT that was stopped after two steps, and its scenes beside it."""
    work = tmp_path_factory.mktemp("stopped") / "vit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CURVE_EVERY", 2)
        assert train_and_write(load_recipe("vit", TOYS["vit"]), work, stop_after=2) is None
    return work.parent


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The same training, finished: its losses and card."""
    work = tmp_path_factory.mktemp("whole") / "vit"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CURVE_EVERY", 2)
        train_and_write(load_recipe("vit", TOYS["vit"]), work)
    return without_times(work)


@pytest.fixture
def begun(stopped, tmp_path, monkeypatch):
    """A copy of the training that was stopped."""
    monkeypatch.setattr(training, "CURVE_EVERY", 2)
    shutil.copytree(stopped, tmp_path / "stopped")
    return tmp_path / "stopped" / "vit"


DAMAGE = {
    "a torn checkpoint": lambda work: (work / "checkpoint.safetensors").write_bytes(b"half"),
    "a flipped bit of the checkpoint": lambda work: spoil_middle(work / "checkpoint.safetensors"),
    "torn losses": lambda work: (work / "losses.jsonl").write_bytes((work / "losses.jsonl").read_bytes()[:9]),
    "no losses": lambda work: (work / "losses.jsonl").unlink(),
    "losses of bytes": lambda work: (work / "losses.jsonl").write_bytes(b"\xff\xfe\n"),
    "a flipped bit of the scenes": lambda work: spoil_middle(next(work.parent.glob("scenes-*.npy"))),
    "torn scenes": lambda work: next(work.parent.glob("scenes-*.npy")).write_bytes(b""),
    "no scenes": lambda work: next(work.parent.glob("scenes-*.npy")).unlink(),
    "torn words of the scenes": lambda work: next(work.parent.glob("scenes-*.json")).write_text("{"),
    "other words of the scenes": lambda work: next(work.parent.glob("scenes-*.json")).write_text('{"of": {}, "scenes": []}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_named_and_made_again(damage, begun, uninterrupted, caplog):
    DAMAGE[damage](begun)
    caplog.clear()
    train_and_write(load_recipe("vit", TOYS["vit"]), begun)
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
    assert without_times(begun) == uninterrupted


@pytest.mark.parametrize("change", ["seed=5", "learning_rate=0.5", "batch=2", "sizes.width=32"])
def test_the_checkpoint_of_another_recipe_is_refused_with_what_differs(change, begun):
    before = (begun / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=rf"another recipe: {change.split('=')[0].split('.')[0]} is(.|\n)*--work"):
        train_and_write(load_recipe("vit", [*TOYS["vit"], change]), begun)
    assert (begun / "checkpoint.safetensors").read_bytes() == before


def test_a_checkpoint_that_names_no_recipe_is_refused(begun):
    state = load_file(begun / "checkpoint.safetensors")
    save_file(state, begun / "checkpoint.safetensors")
    with pytest.raises(ConfigError, match="does not name its recipe"):
        train(load_recipe("vit", TOYS["vit"]), begun)


def test_a_training_may_be_made_longer(begun, uninterrupted):
    train_and_write(load_recipe("vit", [*TOYS["vit"], "steps=3"]), begun)
    train_and_write(load_recipe("vit", TOYS["vit"]), begun)
    assert without_times(begun)[0] == uninterrupted[0]


def test_a_middle_block_that_the_last_phase_did_without_is_not_written(written):
    folder = written["sd"][1]
    assert json.loads((folder / "unet" / "config.json").read_text())["mid_block_type"] is None
    (file,) = (folder / "unet").glob("*.safetensors")
    assert not any(key.startswith("mid_block") for key in load_file(file))
    assert any("unet.mid_block" in key for key in load_file(written["sd"][0] / "checkpoint.safetensors"))
    assert UNetBackbone(str(folder), image_size=32, resize="bicubic").layers


def test_tokenizers_are_written_as_they_were_built(written):
    files = [file for name in TRAINERS for file in written[name][1].rglob("tokenizer.json")]
    assert len(files) == 8  # one of Flux, three of SD3, one of the U-Net, two of SDXL, one of CLIP
    for file in files:
        whole = json.loads(file.read_text())
        assert whole["padding"] is None and whole["truncation"] is None


def test_a_written_flux_is_read_like_a_real_checkpoint(written):
    backbone = FluxBackbone(str(written["flux"][1]), image_size=32, resize="bicubic", text_tokens=16)
    assert backbone.provenance == "local" and backbone.layers == (0, 1)
    latents = backbone.latents(torch.rand(1, 3, 32, 32))
    assert latents.shape == (1, 12, 16, 16)
    velocity = backbone.denoise(latents, 0.5, backbone.prompts(["a apple"]))
    assert velocity is not None and velocity.shape == (1, 64, 48) and torch.isfinite(velocity).all()


def test_sdxl_is_told_in_training_what_it_is_told_in_an_evaluation(written):
    """Both encoders' states, the pooled vector, zeros for the empty caption, and the size of the image."""
    folder = written["sdxl"][1]
    trainer = load_trained(card_of(folder), folder)
    backbone = UNetBackbone(str(folder), image_size=32, resize="bicubic")
    captions = ["a red kite on snow", "ball"]
    with torch.inference_mode():
        states, added = trainer.embedded(captions)
        nothing, nothing_added = trainer.embedded([""])
    torch.testing.assert_close(states, backbone.text(captions))
    for key, value in backbone.conditions(captions, (32, 32)).items():
        torch.testing.assert_close(added[key].float(), value)
    untold, untold_added = backbone.unconditional(1, (32, 32))
    torch.testing.assert_close(nothing, untold)
    torch.testing.assert_close(nothing_added["text_embeds"], untold_added["text_embeds"])
    assert states.abs().sum() > 0 and not nothing.any()


def test_sdxl_is_told_many_sizes_in_training():
    trainer = make_trainer(load_recipe("sdxl", TOYS["sdxl"]))
    sizes = trainer.embedded(["ball"] * 64)[1]["time_ids"]
    assert sizes.shape == (64, 6) and not sizes[:, 2:4].any() and (sizes[:, :2] == sizes[:, 4:]).all()
    assert sizes[:, 0].min() >= 24 and sizes[:, 0].max() <= 64 and len(set(sizes[:, 0].tolist())) > 10


@pytest.mark.parametrize("name", ["flux", "sd3", "sd", "sdxl"])
def test_diffusion_models_make_pictures_from_captions(name, written, tmp_path):
    folder = written[name][1]
    trainer = load_trained(card_of(folder), folder)
    made = generate(trainer, ["a red kite on snow", "a ball on grass"], seed=3, steps=2)
    assert made.shape == (2, 32, 32, 3) and made.dtype == np.uint8
    assert (generate(trainer, ["a red kite on snow", "a ball on grass"], seed=3, steps=2) == made).all()
    sample_sheet([("a red kite on snow", made[0])], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_a_model_without_pictures_is_not_asked_for_any(written):
    folder = written["vit"][1]
    with pytest.raises(ConfigError, match="makes no images"):
        generate(load_trained(card_of(folder), folder), ["a kite"])


@pytest.fixture(scope="module")
def drawn_once():
    """Scenes of a check take hundredths of a second each to draw, and all models are shown the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checking, "one_object_scenes", cache(checking.one_object_scenes))
        yield


@pytest.mark.parametrize("name", ["vit", "dino"])
def test_a_check_states_chance_beside_its_finding(name, written, drawn_once, monkeypatch):
    """CLIP's is below, from the command."""
    monkeypatch.setattr(checking, "COUNT", 8)  # DINO compares eight times as many scenes, and drawing hundreds takes long
    folder = written[name][1]
    found = check(card_of(folder), folder, (card_of(folder), folder))
    assert found and all(0 <= f.value <= 1 and 0 < f.chance < 0.5 and f.n > 50 for f in found)


@pytest.mark.parametrize("name", ["flux", "sd3", "sd", "sdxl"])
def test_whatever_the_judge_says_of_pictures_it_has_said_of_drawn_scenes_too(name):
    """It never saw some objects on some grounds either: without that number, its own blindness would be the picture's fault."""
    found = card_of(TESTS.parent / "conceptseg" / "lab" / "weights" / name)["check"]
    assert len(found) == 4 and all(f["drawn"] is not None for f in found), name


def lab(monkeypatch, *said):
    """Run conceptseg-lab as the shell would; its exit code."""
    monkeypatch.setattr(sys, "argv", ["conceptseg-lab", *map(str, said)])
    with pytest.raises(SystemExit) as ended:
        lab_command()
    return ended.value.code


@pytest.mark.parametrize(("name", "cells"), [("flux", 2 * 4 * 6), ("sd3", 2 * 4 * 6), ("sdxl", 9 * 2 * 6)])
def test_a_sweep_reads_every_layer_and_noise_level_and_lands_in_the_card(name, cells, written, tmp_path, monkeypatch, capsys):
    """One of each class of backbones; SD's U-Net is SDXL's with fewer layers."""
    folder = tmp_path / name
    shutil.copytree(written[name][1], folder)
    few = [f"runtime.runs={tmp_path}", "dataset.count=2", "report.resamples=10", "runtime.progress=false"]
    assert lab(monkeypatch, "sweep", name, few[0], "--model", folder, "--write", *few[1:]) == 0
    found = card_of(folder)["sweep"]
    assert len(found["cells"]) == cells and found["n"] == 2
    assert all(0 <= cell["ap_image"][0] <= 1 for cell in found["cells"])
    assert "best at layer" in capsys.readouterr().out
    assert (folder / "sweep.png").stat().st_size > 0 and "sweep.png" in (folder / "README.md").read_text()


def test_a_setting_that_is_none_is_refused_wherever_it_stands(monkeypatch, capsys):
    assert lab(monkeypatch, "sweep", "flux", "--write", "dataset.count") == 2
    assert lab(monkeypatch, "check", "clip", "--write", "dataset.count=2") == 2
    assert capsys.readouterr().err.count("unrecognized arguments: dataset.count") == 2


def test_a_check_lands_in_the_card(written, drawn_once, tmp_path, monkeypatch, capsys):
    shutil.copytree(written["clip"][1], tmp_path / "clip")
    assert lab(monkeypatch, "check", "clip", "--model", tmp_path / "clip", "--write") == 0
    assert "chance 8.3 %" in capsys.readouterr().out
    assert "CLIP names the object" in (tmp_path / "clip" / "README.md").read_text()
    found = card_of(tmp_path / "clip")["check"]
    assert found and all(0 <= f["value"] <= 1 and 0 < f["chance"] < 0.5 and f["n"] > 50 for f in found)


def test_a_model_without_noise_levels_is_not_swept(written, monkeypatch, capsys):
    assert lab(monkeypatch, "sweep", "vit", "--model", written["vit"][1]) == 1
    assert "no noise levels" in capsys.readouterr().err


def test_a_folder_without_a_card_is_no_model(tmp_path, monkeypatch, capsys):
    assert lab(monkeypatch, "check", "clip", "--model", tmp_path) == 1
    assert "card.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRAINERS)
def test_a_recipe_says_what_a_gpu_does_otherwise(name):
    cpu, gpu = load_recipe(name), load_recipe(name, ["seed=3"], device="cuda:0")
    assert gpu["batch"] > cpu["batch"] and gpu["steps"] * gpu["batch"] > cpu["steps"] * cpu["batch"] and gpu["seed"] == 3
    assert gpu["sizes"] == cpu["sizes"] and "gpu" not in cpu


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "flux"'):
        load_recipe("fluks")


def test_a_misspelt_recipe_setting_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "steps"'):
        load_recipe("flux", ["stpes=3"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sizes.headz=3", 'Did you mean "heads"'),
        ("phases=[{from: 1, plain_sahre: 0.1}]", r'phases\[0\]: unknown key "plain_sahre"\. Did you mean "plain_share"'),
        ("phases=[{plain_share: 0.1}]", r"phases\[0\] lacks from"),
    ],
)
def test_a_misspelt_part_of_a_recipe_is_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("flux", [setting])


def test_an_unknown_kind_of_model_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match='Did you mean "sd3"'):
        make_trainer({**load_recipe("sd3"), "kind": "sd33"})
