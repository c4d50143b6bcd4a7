"""Tiny random models with chat text in the layout of their repositories, each with its stock text model."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = "a dragon on the rock fire engine sky user assistant system fish boat sand"
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content[0].text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ m.content[0].text }}[/INST]{% endif %}{% endfor %}"
)


def learned(text):
    """A byte-level BPE in which every word of the text is one token; other words fall into pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([text, "\n".join(text.split())] * 2, trainer)
    return tokenizer


def qwen_tokenizer():
    nothing = [None] * 5
    template = QwenImagePipeline(*nothing).prompt_template_encode + OvisImagePipeline(*nothing).system_prompt
    for mark in (*SPECIAL, "{}"):
        template = template.replace(mark, "\n")
    found = json.loads(learned(f"{template}\n{WORDS}").to_str())["model"]
    vocabulary = {**found["vocab"], **{mark: len(found["vocab"]) + k for k, mark in enumerate(SPECIAL)}}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[tuple(pair) for pair in found["merges"]],
        chat_template=QWEN_CHAT,
        extra_special_tokens=SPECIAL[1:],
    )


def mistral_processor():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learned(f"{SYSTEM_MESSAGE}\n{WORDS}"), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", chat_template=MISTRAL_CHAT,
        additional_special_tokens=[
            f"[{mark}]" for mark in ("INST", "/INST", "SYSTEM_PROMPT", "/SYSTEM_PROMPT", "IMG", "IMG_BREAK", "IMG_END")
        ],
    )  # fmt: skip
    return PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=2, chat_template=MISTRAL_CHAT)


def text_sizes(words, layers):
    return {
        "vocab_size": words, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "max_position_embeddings": 2048,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


def autoencoder(kind, **options):
    return kind(
        latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4, sample_size=32, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    )  # fmt: skip


def flux2_parts(guidance):
    vae = autoencoder(AutoencoderKLFlux2)
    nn.init.normal_(vae.bn.running_mean)
    nn.init.uniform_(vae.bn.running_var, 0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=24,
        axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=32, guidance_embeds=guidance,
    )  # fmt: skip
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0), vae, transformer


def flux2_klein():
    tokenizer = qwen_tokenizer()
    scheduler, vae, transformer = flux2_parts(False)
    text_model = Qwen3ForCausalLM(Qwen3Config(**text_sizes(len(tokenizer), 27)))
    return Flux2KleinPipeline(scheduler, vae, text_model, tokenizer, transformer)


def flux2():
    processor = mistral_processor()
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4,
        "patch_size": 2, "image_size": 8,
    }  # fmt: skip
    config = Mistral3Config(
        text_config={"model_type": "mistral", **text_sizes(len(processor.tokenizer), 30)},
        vision_config={"model_type": "pixtral", **vision},
        image_token_index=processor.tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    scheduler, vae, transformer = flux2_parts(True)
    return Flux2Pipeline(scheduler, vae, Mistral3ForConditionalGeneration(config), processor, transformer)


def qwen_vl(words):
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8, "patch_size": 2,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={**text_sizes(words, 2), "rope_parameters": rope}, vision_config=vision, vocab_size=words
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def unpooled(kind, **options):
    transformer = kind(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        axes_dims_rope=(2, 4, 2), **options,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_shift=1.15)
    return scheduler, autoencoder(AutoencoderKL, scaling_factor=1.5, shift_factor=0.1), transformer


def longcat_image():
    tokenizer = qwen_tokenizer()
    scheduler, vae, transformer = unpooled(LongCatImageTransformer2DModel)
    return LongCatImagePipeline(scheduler, vae, qwen_vl(len(tokenizer)), tokenizer, None, transformer)


def ovis_image():
    tokenizer = qwen_tokenizer()
    scheduler, vae, transformer = unpooled(OvisImageTransformer2DModel, out_channels=16)
    return OvisImagePipeline(scheduler, vae, Qwen3Model(Qwen3Config(**text_sizes(len(tokenizer), 3))), tokenizer, transformer)


def qwen_image():
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.2, 0.8],
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8,
        axes_dims_rope=(2, 4, 2),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9)
    return QwenImagePipeline(scheduler, vae, qwen_vl(len(tokenizer)), tokenizer, transformer)


def z_image():
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8, axes_dims=[4, 6, 6],
        axes_lens=[128, 32, 32],
    )  # fmt: skip
    vae = autoencoder(AutoencoderKL, scaling_factor=1.5, shift_factor=0.1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, vae, Qwen3Model(Qwen3Config(**text_sizes(len(tokenizer), 3))), tokenizer, transformer)


def saved(build, folder):
    """The stock pipeline with random weights, every one of which does something, and as its repository holds it."""
    torch.manual_seed(0)
    pipeline = build()
    for model in (pipeline.transformer, pipeline.text_encoder):
        for name, weight in model.named_parameters():
            spread = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
            nn.init.normal_(weight, 1.0 if weight.ndim == 1 and "norm" in name and name.endswith("weight") else 0.0, spread)
        model.eval()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return pipeline
