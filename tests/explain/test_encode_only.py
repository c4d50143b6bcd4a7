"""Encode-only loading: less of the model is read, nothing of the result changes, and the plan for FLUX.1 fits a small card."""

import gc
import weakref

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from tiny import tiny_flux

from conceptseg.backbones.transformers.encode_only import FoldedModulation, WeightFiles, cut_flux, planned_bytes
from conceptseg.backbones.transformers.flux import FluxBackbone
from conceptseg.errors import ConfigError
from conceptseg.evaluation.loop import Shard, evaluate
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.protocols import SegmentationProtocol
from conceptseg.saliency.views import Normalize, Softmax, View
from conceptseg.segment.segmenter import Segmenter
from conceptseg.store.run import RunStore
from conceptseg.types import Sample

# transformer/config.json of black-forest-labs/FLUX.1-schnell at 741f7c3c.
SCHNELL = {
    "attention_head_dim": 128, "guidance_embeds": False, "in_channels": 64, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["one file", "sharded, with guidance"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    tiny_flux(path, guidance=request.param)
    if request.param:  # real checkpoints come in shards with an index
        file = path / "transformer" / "diffusion_pytorch_model.safetensors"
        model = FluxTransformer2DModel.from_pretrained(path / "transformer")
        file.unlink()
        model.save_pretrained(path / "transformer", max_shard_size="60KB")
        assert (path / "transformer" / f"{file.name}.index.json").exists()
    return str(path)


def read(folder, views, load, **more):
    backbone = FluxBackbone(folder, load=load, image_size=32, text_tokens=8, **more)
    extractor = ConceptAttention(backbone, guidance=2.5 if backbone.config["guidance_embeds"] else 0.0)
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(1))
    prompts, concepts = backbone.prompts(["a fish", "a boat"]), backbone.concepts([["fish", "sky", "sand"]] * 2)
    cells = extractor.read_cells(backbone.latents(images), prompts, concepts, ["a", "b"], views)
    return [cells.read(view, (8, 6)) for view in views], backbone


VIEWS = [
    View("output", (0, 1), (0.5,), draws=3, normalize=Normalize.LINEAR, softmax=Softmax.PER_CELL),
    View("output_projected", (1,), (0.5, 0.25)), View("cross", (0,), (0.75,)),
]  # fmt: skip


def test_the_result_is_the_whole_models_to_the_last_bit(folder):
    whole, _ = read(folder, VIEWS, "whole")
    cut, backbone = read(folder, VIEWS, "encode_only")
    assert all(torch.equal(one, two) for one, two in zip(whole, cut, strict=True))
    assert len(backbone.transformer.transformer_blocks) == 2  # of three
    assert not len(backbone.transformer.single_transformer_blocks)


def test_a_later_layer_is_read_when_a_view_asks_for_it(folder):
    _, backbone = read(folder, VIEWS[2:], "encode_only")
    assert len(backbone.transformer.transformer_blocks) == 1
    extractor = ConceptAttention(backbone)
    prompts, concepts = backbone.prompts(["a fish"]), backbone.concepts([["fish", "sky"]])
    view = View("output", (2,), (0.5,))
    latents = backbone.latents(torch.zeros(1, 3, 32, 32))
    extractor.read_cells(latents, prompts, concepts, ["a"], [view])
    assert len(backbone.transformer.transformer_blocks) == 3


def test_only_tensors_that_are_needed_are_opened(folder, monkeypatch):
    opened, original = [], WeightFiles.tensors

    def noted(self, names):
        for name, tensor in original(self, names):
            opened.append(name)
            yield name, tensor

    monkeypatch.setattr(WeightFiles, "tensors", noted)
    _, backbone = read(folder, [View("output", (0, 1), (0.5,))], "encode_only")
    stray = ("single_transformer_blocks", "transformer_blocks.2", "transformer_blocks.1.ff", "norm_out", "proj_out")
    assert opened and len(set(opened)) == len(opened)
    assert not [name for name in opened if name.startswith(stray)]
    assert not any(weight.is_meta for weight in backbone.transformer.parameters())
    assert not [n for n, _ in backbone.transformer.named_parameters() if ".norm1" in n]  # matrices are multiplied out


def test_folded_modulation_is_the_live_one(folder):
    backbone = FluxBackbone(folder, load="encode_only", image_size=32, text_tokens=8)
    whole = FluxBackbone(folder, image_size=32, text_tokens=8).transformer
    conditions = (0.3, 1.5, 6)
    vector = backbone._conditioning(whole, *conditions)
    model = backbone.cut.at(1, conditions, lambda model: backbone._conditioning(model, *conditions))
    folded = [name for name, m in model.named_modules() if isinstance(m, FoldedModulation)]
    assert len(folded) == 4
    for name in folded:
        live = whole.get_submodule(name)(torch.nn.functional.silu(vector))
        assert torch.equal(model.get_submodule(name)(vector), live)


def test_an_image_cannot_be_made_and_captions_cannot_modulate(folder):
    backbone = FluxBackbone(folder, load="encode_only", image_size=32, text_tokens=8)
    with pytest.raises(ConfigError, match=r"Use load=whole to generate\."):
        ConceptAttention(backbone).generate(["a fish"], [["fish", "sky"]], [View("output", (0,), (0.5,))], 2)
    with pytest.raises(ConfigError, match=r"Use pooled=zeros or load=whole\."):
        FluxBackbone(folder, load="encode_only", pooled="caption")
    with pytest.raises(ConfigError, match=r"Use single_blocks=false or load=whole\."):
        FluxBackbone(folder, load="encode_only", single_blocks=True)


def test_a_missing_weight_is_named(folder):
    with pytest.raises(ConfigError, match=r'its transformer has no weight "nothing\.weight"'):
        list(WeightFiles(FluxBackbone(folder).checkpoint, "transformer").tensors(["nothing.weight"]))


def test_reading_flux_takes_at_most_eight_and_a_half_gigabytes_of_weights():
    """Blocks 0 to 17, the paper's last layer, in bfloat16; the whole pipeline takes 34 GB."""
    planned = planned_bytes(SCHNELL, 17, torch.bfloat16)
    model = cut_flux(SCHNELL, 17)
    assert all(weight.is_meta for weight in model.parameters())
    print(f"\nplanned for FLUX.1 schnell, blocks 0-17, bf16: {planned / 1e9:.2f} GB")
    assert 7.5e9 < planned <= 8.5e9
    with torch.device("meta"):
        whole = FluxTransformer2DModel.from_config(SCHNELL)
    assert sum(w.numel() for w in whole.parameters()) * 2 > 23e9


# ---------------------------------------------------------------- texts


def test_texts_are_kept_on_disk_by_encoder_and_string(folder, tmp_path):
    first, _ = read(folder, VIEWS[:1], "whole", text_cache=str(tmp_path))
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 5 and len({f.parent for f in files}) == 1  # two captions and three words
    again, other = read(folder, VIEWS[:1], "whole", text_cache=str(tmp_path))
    assert "text_encoder" not in other.__dict__ and torch.equal(first[0], again[0])
    assert sorted(tmp_path.rglob("*.safetensors")) == files
    FluxBackbone(folder, text_tokens=16, text_cache=str(tmp_path)).prompts(["a fish"])
    assert len({f.parent for f in tmp_path.rglob("*.safetensors")}) == 2  # another length is another embedding


def test_a_torn_file_is_written_anew(folder, tmp_path):
    backbone = FluxBackbone(folder, text_tokens=8, text_cache=str(tmp_path))
    wanted = backbone.prompts(["a fish"]).hidden
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:20])
    again = FluxBackbone(folder, text_tokens=8, text_cache=str(tmp_path)).prompts(["a fish"]).hidden
    assert torch.equal(wanted, again) and torch.equal(load_file(file)["tokens"], wanted[0])


def test_encoders_and_transformer_are_never_in_memory_together(folder, monkeypatch):
    alive = {}
    gc.collect()
    gc.freeze()  # what is there already need not be gone through before every reading

    def watched(name):
        original = next(kind.__dict__[name] for kind in FluxBackbone.__mro__ if name in kind.__dict__)

        def get(self):
            if name not in self.__dict__:
                gc.collect()
                assert not [n for n, ref in alive.items() if n != name and ref() is not None], f"{name} beside {alive}"
                self.__dict__[name] = original.func(self)
                alive[name] = weakref.ref(self.__dict__[name])
            return self.__dict__[name]

        return property(get)

    for name in ("transformer", "text_encoder"):
        monkeypatch.setattr(FluxBackbone, name, watched(name))
    views = [View("output", (0,), (0.5,))]
    backbone = FluxBackbone(folder, image_size=32, text_tokens=8, text_encoders="release")
    extractor, maps = ConceptAttention(backbone), []
    for word in ("fish", "boat", "fish"):
        latents = backbone.latents(torch.zeros(1, 3, 32, 32))
        prompts, concepts = backbone.prompts([f"a {word}"]), backbone.concepts([[word, "sky"]])
        maps.append(extractor.read_cells(latents, prompts, concepts, ["a"], views).read(views[0], (8, 8)))
    assert torch.equal(maps[0], maps[2]) and set(alive) == {"transformer", "text_encoder"}


NOUNS = ["fish", "boat", "tree", "kite", "glorp"]
"""The last is a word that the tokenizer does not know."""


class Pictures:
    """Ten images, a new word every other one."""

    name = "pictures"

    def keys(self):
        return [f"pictures/{k}" for k in range(10)]

    def read(self, key):
        number, mask = int(key.split("/")[1]), np.zeros((32, 32), np.uint8)
        mask[:9] = 1
        return Sample(key, np.full((32, 32, 3), 20 * number, np.uint8), mask, {1: NOUNS[number // 2]})


@pytest.mark.parametrize("pooled", ["zeros", "caption"])
def test_all_texts_of_a_run_are_encoded_before_the_transformer_is_read(tmp_path, monkeypatch, pooled):
    """Through the loop itself: new words in each of five batches, and encoders and transformer are read once."""
    log, part = [], FluxBackbone.part

    def noted(self, name, *args, **options):
        log.append(name)
        return part(self, name, *args, **options)

    monkeypatch.setattr(FluxBackbone, "part", noted)
    backbone = FluxBackbone(
        tiny_flux(tmp_path / "model", clip=True), image_size=32, text_tokens=8, text_encoders="release", pooled=pooled
    )
    protocol = SegmentationProtocol("single", 1, "single", ["grass", "sky"], [Segmenter("argmax")])
    with RunStore(tmp_path) as store:
        views = {"one": View("output", (0,), (0.5,))}
        tally = evaluate(store, Pictures(), ConceptAttention(backbone), protocol, views, Shard(0, 1, 2))
    assert tally.computed == 8 and tally.failed == 2  # of the unknown word, and no other
    read = [name for name in log if not name.startswith("tokenizer")]
    assert read == ["text_encoder_2", *(["text_encoder"] if pooled == "caption" else []), "vae", "transformer"]
    assert "text_encoder" not in backbone.__dict__ and "clip" not in backbone.__dict__
