"""scripts/rehearse.py and random_checkpoint.py on toy geometries: layouts are the libraries', bytes the same, a row comes."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from composing import plainly
from transformers import AutoTokenizer

from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.data.digests import Extent, content_digests
from conceptseg.data.made import made_scenes, write_voc
from conceptseg.targets import instantiate

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import random_checkpoint
import rehearse

KL = {
    "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4, "scaling_factor": 0.36, "shift_factor": 0.1,
}  # fmt: skip
TEXT = {
    "vocab_size": 49408, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 77,
}  # fmt: skip
T5 = {
    "vocab_size": 2128,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
QWEN = {
    "vocab_size": 200, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True,
}  # fmt: skip
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4, "image_size": 32}
BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 3000}
DINO = {
    "backbone_config": {**SWIN, "out_features": ["stage1", "stage2"]}, "text_config": BERT, "d_model": 32, "num_queries": 4,
    "num_feature_levels": 3, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
FLUX = {
    "pipeline": "FluxPipeline", "dtype": "bfloat16",
    "transformer": {
        "model": "diffusers.FluxTransformer2DModel", "shard": 1e-5,
        "config": {
            "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
            "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [2, 2, 4],
        },
    },
    "vae": {"model": "diffusers.AutoencoderKL", "config": KL},
    "text_encoder": {"model": "transformers.CLIPTextModel", "prefix": "text_model.", "config": TEXT},
    "text_encoder_2": {"model": "transformers.T5EncoderModel", "config": T5},
    "tokenizer": {"tokenizer": "clip", "pad": "<|endoftext|>"},
    "tokenizer_2": {"tokenizer": "t5", "pieces": 2000},
    "scheduler": {"scheduler": "FlowMatchEulerDiscreteScheduler", "config": {"num_train_timesteps": 1000}},
}  # fmt: skip
MODELS = {
    **{name: part for name, part in FLUX.items() if isinstance(part, dict) and "model" in part},
    "qwen": {"model": "transformers.Qwen3ForCausalLM", "shard": 1e-5, "config": QWEN},
    "grounding_dino": {"model": "transformers.GroundingDinoForObjectDetection", "config": DINO},
}
LAYOUTS = {
    "repositories": {"black-forest-labs/FLUX.1-schnell": FLUX},
    "sheets": {
        "flux_schnell": {
            "run": [
                "experiment=ca_voc_single_standard", "extractor.backbone.load=encode_only",
                "extractor.backbone.text_encoders=release",
            ]
        }
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_pool():
    """Few numbers to draw from: toys fill no files, and tensors that go round the pool are tested too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_checkpoint, "POOL", (1 << 16) + 43)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_written_as_its_class_reads_it(name, tmp_path):
    about = MODELS[name]
    random_checkpoint.write_model(tmp_path, about, "bfloat16")
    package, _, kind = about["model"].rpartition(".")
    model, found = getattr(importlib.import_module(package), kind).from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    sharded = [*tmp_path.glob("*.index.json")]
    assert len(sharded) == ("shard" in about)
    if sharded:
        places = json.loads(sharded[0].read_text())["weight_map"]
        assert len(set(places.values())) > 1 and all((tmp_path / file).is_file() for file in places.values())


def test_vocabularies_have_the_class_and_the_size_of_the_real_ones(tmp_path):
    layouts = yaml.safe_load(rehearse.LAYOUTS.read_text(encoding="utf-8"))
    for name, about, size, kind in [
        ("clip", layouts["parts"]["bpe"], 49408, "CLIPTokenizer"),
        ("t5", layouts["parts"]["pieces"], 32100, "T5Tokenizer"),
        ("t5", {**layouts["parts"]["pieces"], "files": "spiece"}, 32100, "T5Tokenizer"),
        ("qwen", {"tokenizer": "qwen", "pieces": 151643}, 151669, "Qwen2Tokenizer"),
        ("bert", {"tokenizer": "bert", "pieces": 30522}, 30522, "BertTokenizer"),
    ]:
        folder = tmp_path / f"{name}{len(about)}"
        random_checkpoint.write_tokenizer(folder, about)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert (len(tokenizer), type(tokenizer).__name__) == (size, kind)
        ids = tokenizer("a photo of a dog").input_ids
        assert tokenizer.unk_token_id not in ids[1:-1] and max(ids) < size
        assert "dog" in tokenizer.decode(ids)


def test_every_rehearsed_sheet_is_one_of_the_packages_and_has_a_layout():
    layouts = yaml.safe_load(rehearse.LAYOUTS.read_text(encoding="utf-8"))
    read = [(name, "backbone") for name in layouts["sheets"]]
    read += [(sheet, key) for about in layouts["sheets"].values() for key, sheet in about.get("models", {}).items()]
    assert [name for name, _ in read if rehearse.settings_of(name)["path"] not in layouts["repositories"]] == []


def test_every_rehearsal_scores_what_its_method_gives():
    refused = []
    for name, about in yaml.safe_load(rehearse.LAYOUTS.read_text(encoding="utf-8"))["sheets"].items():
        sheets = {"backbone": name, **about.get("models", {})}
        given = [] if any(word.startswith("experiment=") for word in about["run"]) else ["dataset=pascal_voc"]
        config = plainly(*given, *about["run"], *(f"backbone@extractor.{key}={one}" for key, one in sheets.items()))
        protocol, extractor = (instantiate(config[part], part) for part in ("protocol", "extractor"))
        if not extractor.comparable and all(one.decision.startswith("argmax") for one in protocol.segmenters):
            refused.append(name)
    assert refused == []


def test_a_rehearsal_ends_in_a_row_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rehearse, "free_bytes", lambda place: 10**12)  # room is asked for by the real model's size
    voc = write_voc(tmp_path, [scene for scene in made_scenes(8) if len(set(scene.mask.flat) - {0, 255}) == 1][:1])
    layouts, results, into = tmp_path / "toy.yaml", tmp_path / "results.json", tmp_path / "into"
    layouts.write_text(yaml.safe_dump(LAYOUTS), encoding="utf-8")
    status = rehearse.main([
        "flux_schnell", "extractor.backbone.image_size=32", "extractor.backbone.text_tokens=16", "--data", str(voc), "--into",
        str(into), "--layouts", str(layouts), "--json", str(results), "--leave", "0.2",
    ])  # fmt: skip
    assert status == 0, capsys.readouterr().out
    assert not [*into.iterdir()]
    (result,) = json.loads(results.read_text()).values()
    assert result["status"] == "row" and result["provenance"] == "random"
    assert result["peak_bytes"] > result["peak_own_bytes"] > 1e8 and result["seconds"]["forward"] > 0
    assert result["dtypes"]["backbone"]["dtype"] == "bfloat16"
    names = [step["what"] for step in result["steps"]]
    encoder, transformer = (next(n for n, w in enumerate(names) if part in w) for part in ("encoding", "of the transformer"))
    assert encoder < transformer and str(tmp_path) not in results.read_text()


def test_the_same_layout_gives_the_same_bytes(tmp_path):
    def digests(folder):
        random_checkpoint.write_repository(folder, {"timm": "vit_tiny_patch16_224", "settings": {"depth": 1}})
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {
            path.name: digest for path, digest in zip(files, content_digests([Extent(f) for f in files], folder), strict=True)
        }

    one = digests(tmp_path / "one")
    random_checkpoint.pool.cache_clear()
    random_checkpoint._scaled.cache_clear()
    assert one == digests(tmp_path / "two") and len(one) == 3
    model = ViTBackbone(str(tmp_path / "one"), "class labels").model  # timm writes num_classes into model_args too
    assert model.num_classes == 1000
    assert abs(float(model.blocks[0].attn.qkv.weight.detach().std()) * 192**0.5 - 1) < 0.5


def test_the_page_has_the_results():
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks" / "rehearsal" / "figures.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "rehearsal.md").read_text(encoding="utf-8")
    assert "\n".join(rehearse.table_of(results)) in page
    assert {one["status"] for one in results.values()} == {"row"} and {one["provenance"] for one in results.values()} == {
        "random"
    }


def test_steps_within_encoding_are_counted_once():
    lines = [
        (1.0, "encoding 3 texts with T5 ..."), (1.1, "reading text_encoder_2 of x ..."),
        (4.1, "reading text_encoder_2 of x: 3.0 s"),
        (9.0, "encoding 3 texts with T5: 2 of 3"), (11.0, "encoding 3 texts with T5: 10.0 s"),
        (11.5, "reading transformer of x ..."), (13.5, "reading transformer of x: 2.0 s"), (14.0, "Took 1 min 2 s. In x: y"),
    ]  # fmt: skip
    steps = rehearse.steps_of(lines)
    assert [(step.start, step.end) for step in steps] == [(1.1, 4.1), (1.0, 11.0), (11.5, 13.5)]
    cost = {"stages": {"model": 6.0, "metrics": 1.0}}
    spent = rehearse.stages_of(steps, cost, 18.0)
    assert spent == {"digest": 0, "load": 5.0, "encode": 7.0, "forward": 4.0, "score": 1.0}
    inside = [(1.0, "encoding 2 names with CLIP ..."), (5.0, "encoding 2 names with CLIP: 4.0 s")]
    assert rehearse.stages_of(rehearse.steps_of(inside), cost, 8.0)["forward"] == 2.0
