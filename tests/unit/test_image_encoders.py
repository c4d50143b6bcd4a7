"""Encoders of timm and open_clip: what they read, what they refuse and how, and text vectors."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import batch, tiny_clip, tiny_vit, write_clip, write_vit

from conceptseg.backbones.encoders.clip import CLIPBackbone
from conceptseg.backbones.encoders.tower import resized_positions
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.errors import ConfigError, DataError, TapError
from conceptseg.extractors.clearclip import ClearCLIP
from conceptseg.extractors.gem import GEM
from conceptseg.extractors.legrad import LeGrad
from conceptseg.extractors.lrp import LRP
from conceptseg.extractors.maskclip import MaskCLIP
from conceptseg.extractors.naclip import NACLIP
from conceptseg.extractors.object_discovery import LOST, TokenCut
from conceptseg.extractors.osp import OSP
from conceptseg.extractors.pearl import PEARL
from conceptseg.extractors.resclip import ResCLIP
from conceptseg.extractors.rollout import Rollout
from conceptseg.extractors.sclip import SCLIP
from conceptseg.extractors.self_attention import SelfAttention
from conceptseg.extractors.textspan import TextSpan
from conceptseg.extractors.transinterp import TransInterp


def test_a_folder_that_is_not_there_and_a_repository_without_revision_are_refused():
    with pytest.raises(ConfigError, match=r"no such folder"):
        _ = ViTBackbone("./weights/none", "images").model
    with pytest.raises(ConfigError, match=r"extractor.backbone.revision is empty(.|\n)*conceptseg \.\.\. extractor"):
        _ = ViTBackbone("timm/vit_base_patch16_224.orig_in21k_ft_in1k", "class labels").model


def test_the_documentation_names_every_sheet_without_a_commit():
    root = Path(__file__).parents[2]
    unpinned = [f.stem for f in (root / "conf" / "backbone").glob("*.yaml") if "revision: main" in f.read_text(encoding="utf-8")]
    said = (root / "docs" / "baselines.md").read_text(encoding="utf-8")
    listed = said[said.index("None was found for") : said.index("their sheets say")]
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(unpinned)


def test_missing_and_broken_weights_are_named(tmp_path):
    folder = write_vit(tmp_path / "vit")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"wanted model.safetensors in .*, which holds card.json, config.json"):
        _ = ViTBackbone(str(folder), "class labels").model
    (folder / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=r"can't be read"):
        _ = ViTBackbone(str(folder), "class labels").model


def test_weights_of_another_model_are_refused(tmp_path):
    folder = write_vit(tmp_path / "vit")
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "blocks.2" not in k}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"are not those of the VisionTransformer that its config.json describes"):
        _ = ViTBackbone(str(folder), "class labels").model


def test_a_text_tower_without_tokenizer_files_says_where_they_belong(tmp_path):
    backbone = CLIPBackbone(str(write_clip(tmp_path / "clip", tokenizer=False)), templates=["a {}"], labels="scenes")
    with pytest.raises(ConfigError, match=r"no tokenizer that can be read(.|\n)*tokenizer.json(.|\n)*tokenizer=bpe"):
        TextSpan(backbone).saliency(batch(1))


def test_a_word_that_the_tokenizer_does_not_know_is_named(tmp_path):
    with pytest.raises(DataError, match=r'"aple" is unknown to this tokenizer. Did you mean "apple"\?'):
        tiny_clip(tmp_path / "clip").text_vectors(["aple"])


def test_a_vit_without_class_token_is_refused(tmp_path):
    backbone = tiny_vit(tmp_path / "vit", class_token=False, global_pool="avg", classes=0)
    with pytest.raises(TapError, match=r"has no class token, and the method reads that token's row"):
        Rollout(backbone).saliency(batch(1))


def test_a_model_that_is_no_plain_vit_is_refused(tmp_path):
    folder = write_vit(tmp_path / "vit")
    text = (folder / "config.json").read_text().replace("vit_tiny_patch16_224", "resnet18")
    (folder / "config.json").write_text(text)
    with pytest.raises((TapError, ConfigError), match=r"resnet18"):
        _ = ViTBackbone(str(folder), "class labels").model


@pytest.mark.parametrize("settings", [{"qk_norm": True}, {"init_values": 0.1}, {"reg_tokens": 4}])
def test_parts_that_no_rule_is_stated_for_are_refused(tmp_path, settings):
    with pytest.raises(TapError, match=r"normalises inside the attention|learnt layer scale|tokens before its patches"):
        LRP(tiny_vit(tmp_path / "vit", **settings)).saliency(batch(1))


def test_registers_and_layer_scale_are_read_past_by_self_attention(tmp_path):
    backbone = tiny_vit(tmp_path / "vit", "images", reg_tokens=4, init_values=0.1, no_embed_class=True)
    assert backbone.tower.prefix == 5 and SelfAttention(backbone).saliency(batch(2)).shape == (2, 3, 3, 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_relevance_in_reduced_precision_is_refused(tmp_path, dtype):
    for method in (LRP, TransInterp):
        with pytest.raises(ConfigError, match=rf"extractor.backbone.dtype is {dtype}: relevance"):
            method(tiny_vit(tmp_path / "vit", dtype=dtype)).saliency(batch(1))


def test_methods_that_read_attention_alone_stop_in_the_last_block(tmp_path):
    backbone = tiny_vit(tmp_path / "vit")
    backbone.model.blocks[-1].mlp.register_forward_hook(lambda *_: pytest.fail("the last MLP ran"))
    for method in (SelfAttention(backbone), Rollout(backbone), LOST(backbone), TokenCut(backbone)):
        assert method.saliency(batch(1)).isfinite().all()


def test_a_grid_that_is_not_square_is_read_in_rows(tmp_path):
    backbone = tiny_vit(tmp_path / "vit", image_size=[24, 40], dtype="float64")
    for method in (SelfAttention(backbone), Rollout(backbone), TransInterp(backbone)):
        assert method.saliency(batch(2)).shape == (2, 3, 3, 5)
    assert LRP(backbone).saliency(batch(1)).shape == (1, 3, 24, 40)
    clip = tiny_clip(tmp_path / "clip", image_size=[40, 24], dtype="float64")
    methods = [kind(clip) for kind in (ClearCLIP, LeGrad, MaskCLIP, NACLIP, OSP, PEARL, SCLIP)]
    methods += [GEM(clip, layers=2), ResCLIP(clip, middle=[1, 2]), TextSpan(clip, clip_at_zero=False)]
    shapes = {type(method).__name__: tuple(method.saliency(batch(1)).shape[-2:]) for method in methods}
    assert {name: shape for name, shape in shapes.items() if shape != (5, 3)} == {}


def test_patches_that_are_not_square_tile_an_image_by_rows_and_columns(tmp_path):
    config = json.loads((write_clip(tmp_path / "square") / "open_clip_config.json").read_text())["model_cfg"]
    config["vision_cfg"]["patch_size"] = [4, 8]
    clip = tiny_clip(tmp_path / "clip", image_size=[20, 24], config=config)
    assert MaskCLIP(clip).saliency(batch(1)).shape == (1, 3, 5, 3)


def test_an_image_size_that_patches_do_not_tile_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"image_size is \[25, 25\]; this model's patches are 8 x 8 pixels"):
        _ = tiny_vit(tmp_path / "vit", image_size=25).model
    with pytest.raises(ConfigError, match=r"image_size is \[20, 24\]"):
        _ = tiny_clip(tmp_path / "clip", image_size=[20, 24]).clip


def test_fused_and_unfused_attention_give_the_same_maps(tmp_path):
    backbone, shown = tiny_vit(tmp_path / "vit", dtype="float64"), batch(2)
    found = []
    for fused in (True, False):
        for block in backbone.model.blocks:
            block.attn.fused_attn = fused
        found.append(TransInterp(backbone).saliency(shown))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_method_that_reads_text_refuses_an_encoder_that_does_not(tmp_path):
    with pytest.raises(ConfigError, match=r"is a ViTBackbone, which reads no text"):
        MaskCLIP(tiny_vit(tmp_path / "vit"))


def test_a_given_word_that_is_no_class_is_refused_and_so_is_a_model_without_classes(tmp_path):
    with pytest.raises(DataError, match=r'"aple" is none of the 12 classes .*Did you mean "apple"'):
        TransInterp(tiny_vit(tmp_path / "vit"), explained_class="given").saliency(batch(1, names=("aple",), labels=(1,)))
    with pytest.raises(ConfigError, match=r"has no classifier"):
        TransInterp(tiny_vit(tmp_path / "dino", classes=0, labels=())).saliency(batch(1))


def test_a_bare_pickled_file_is_read_without_running_code(tmp_path):
    """DINO's and iBOT's own files: a state dict, in iBOT's case under "state_dict" and behind the names of wrappers."""
    architecture = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    plain, wrapped = model.state_dict(), {f"module.backbone.{k}": v for k, v in model.state_dict().items()}
    for name, held in (("plain.pth", plain), ("wrapped.pth", {"state_dict": wrapped})):
        torch.save(held, tmp_path / name)
        backbone = ViTBackbone(str(tmp_path), "images", architecture=architecture, file=name)
        assert torch.equal(backbone.model.cls_token, model.cls_token)
    torch.save({"state_dict": shutil.rmtree}, tmp_path / "evil.pth")
    with pytest.raises(ConfigError, match=r"can't be read"):
        _ = ViTBackbone(str(tmp_path), "images", architecture=architecture, file="evil.pth").model


def test_every_name_is_encoded_once_in_every_template(tmp_path):
    backbone, seen = tiny_clip(tmp_path / "clip"), []
    backbone.clip.token_embedding.register_forward_pre_hook(lambda module, args: seen.extend(map(tuple, args[0].tolist())))
    for _ in range(2):
        backbone.text_vectors(["apple", "tree", "apple"])
    assert len(seen) == len(set(seen)) == 2 * len(backbone.templates)
    ids = backbone.token_ids([t.replace("{}", "tree") for t in backbone.templates])
    mean = torch.stack([v / v.norm() for v in backbone.encode_tokens(ids)]).mean(0)
    torch.testing.assert_close(backbone.text_vectors(["tree"])[0], mean / mean.norm())


@pytest.mark.parametrize("rule", ["timm", "dino"])
def test_positions_of_the_same_grid_are_left_alone(rule):
    positions = torch.randn(1 + 16, 8)
    assert torch.equal(resized_positions(positions, 1, (4, 4), (4, 4), rule), positions)
    assert resized_positions(positions, 1, (4, 4), (3, 5), rule).shape == (16, 8)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (4, 4), (5, 5), (3, 5)])
def test_dinos_positions_are_resampled_on_any_grid_but_the_square_of_the_native_patch_count(grid):
    """facebookresearch/dino 7c446df, vision_transformer.py, interpolate_pos_encoding, written out: `npatch == N and w == h`."""
    positions, side, (rows, columns) = torch.randn(1 + 16, 8), 4, grid
    if rows * columns == 16 and rows == columns:
        wanted = positions
    else:
        patches = positions[None, 1:].reshape(1, side, side, 8).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / side, (columns + 0.1) / side)
        resampled = torch.nn.functional.interpolate(patches.double(), scale_factor=factors, mode="bicubic").float()
        wanted = torch.cat([positions[:1], resampled.permute(0, 2, 3, 1).reshape(-1, 8)])
        assert len(wanted) == 1 + rows * columns
    assert torch.equal(resized_positions(positions, 1, (side, side), grid, "dino"), wanted)
