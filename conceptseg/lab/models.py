"""Stock model classes at lab size, built from a plain mapping of sizes, and their word-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from conceptseg.backbones.codec import PatchCodec
from conceptseg.data.scenes import TINTS
from conceptseg.data.words import OTHER_WORDS
from conceptseg.lab.captions import GLUE, NOUNS

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def word_tokenizer(length: int) -> PreTrainedTokenizerFast:
    """One token a word. The drawn world's words come first; words of the real data sets follow (never trained)."""
    trained = [*GLUE, *NOUNS, *TINTS]
    others = [w for w in OTHER_WORDS if w not in trained]
    vocabulary = {w: i for i, w in enumerate([PAD, END, UNKNOWN, *trained, *others])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    lower, no_marks = normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z0-9]+"), " ")
    tokenizer.normalizer = normalizers.Sequence([lower, no_marks])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=length
    )


def build_flux(sizes: dict[str, Any]) -> dict[str, Any]:
    """The parts of a Flux pipeline by the sub-folder that `from_pretrained` reads them from; weights are random."""
    tokenizer = word_tokenizer(sizes["text_tokens"])
    width = sizes["text_width"]
    text = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=width // 4, d_ff=2 * width, num_layers=sizes["text_layers"],
            num_heads=4, relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, use_cache=False,
        )
    )  # fmt: skip
    codec = PatchCodec(patch=sizes["codec_patch"], scaling_factor=sizes["latent_scale"])
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=3 * (2 * sizes["codec_patch"]) ** 2, num_layers=sizes["double_blocks"],
        num_single_layers=sizes["single_blocks"], attention_head_dim=sizes["head_width"],
        num_attention_heads=sizes["heads"], joint_attention_dim=width, pooled_projection_dim=sizes["pooled_width"],
        guidance_embeds=False, axes_dims_rope=tuple(sizes["rope"]),
    )  # fmt: skip
    for module in transformer.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        for name in ("norm", "norm1", "norm1_context"):
            if hasattr(block, name):
                torch.nn.init.zeros_(
                    block.get_parameter(f"{name}.linear.weight")
                )  # adaLN-zero: every block starts as the identity
    torch.nn.init.zeros_(transformer.norm_out.linear.weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return {
        "transformer": transformer, "text_encoder_2": text, "tokenizer_2": tokenizer, "vae": codec,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
    }  # fmt: skip


def save(parts: dict[str, Any], folder: Path) -> None:
    """Write every part as fp16 safetensors in the sub-folder that real checkpoints use."""
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.to(torch.float16)
        part.save_pretrained(folder / name)
