"""Chroma from a tiny repository: texts, masks and images are those of its stock pipeline."""

import json

import torch
from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

from conceptseg.backbones.sheets import backbone_of
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.lab.models import word_tokenizer
from conceptseg.saliency.views import Softmax, View

CAPTIONS, TOKENS = ["a fish and a boat", "a sky"], 12
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


def tiny(folder):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(16)
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4, eos_token_id=1)
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(2, 4, 2), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32, scaling_factor=1.5, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        spread = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
        torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0, spread)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_shift=1.15)
    pipe = ChromaPipeline(scheduler, vae, T5EncoderModel(config).eval(), tokenizer, transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return pipe


def test_texts_and_images_are_those_of_the_stock_pipeline(tmp_path):
    pipe = tiny(tmp_path)
    backbone = backbone_of(str(tmp_path), image_size=32, text_tokens=TOKENS)
    assert backbone.kind == "chroma"
    prompts = backbone.prompts(CAPTIONS)
    with torch.inference_mode():
        hidden, _, mask, *_ = pipe.encode_prompt(CAPTIONS, max_sequence_length=TOKENS, do_classifier_free_guidance=False)
    torch.testing.assert_close(prompts.hidden, hidden, **CLOSE)
    assert torch.equal(prompts.present, mask.bool()) and not mask.bool().all()
    torch.testing.assert_close(backbone.concepts([["fish", "boat"]]).tokens[0, 1], backbone.texts["boat"]["tokens"][0])
    view, size = View("output", (0, 1), (0.5,), softmax=Softmax.PER_CELL), (24, 32)
    noise = torch.stack([torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(3 + b)) for b in range(2)])
    tokens = noise.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    for guidance in (0.0, 4.0):
        images, (maps,) = ConceptAttention(backbone, seed=3).generate(
            CAPTIONS, [["fish", "boat"], ["sky", "boat"]], [view], 3, size, guidance, negative="grass"
        )
        wanted = pipe(
            CAPTIONS, negative_prompt=["grass"] * 2, height=24, width=32, num_inference_steps=3, guidance_scale=guidance,
            latents=tokens, output_type="pt", max_sequence_length=TOKENS,
        ).images  # fmt: skip
        torch.testing.assert_close(images, wanted, **CLOSE)
        assert images.std() > 0.01 and maps.scores.shape == (2, 2, 6, 8) and maps.scores.std() > 1e-3
