"""Tracing pipelines of transformers that text enters by cross-attention alone, against what stock attention was given."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Config, T5EncoderModel

from conceptseg.backbones.word_tokens import token_ids
from conceptseg.errors import ConfigError, DataError, TapError, ViewError
from conceptseg.lab.models import word_tokenizer
from conceptseg.trace import trace

PROMPTS = ["a fish near a boat", "a boat in the sky"]
BLOCKS, HEADS, WIDTH, STEPS = 2, 2, 16, 2
IMAGE = {"height": 48, "width": 64}
VIDEO = {"height": 64, "width": 64, "num_frames": 9}
GRID = {"pixart": (3, 4), "lumina": (3, 4), "hunyuan": (3, 4), "sana": (3, 4), "wan": (4, 4), "ltx": (2, 3)}
FRAMES = {"wan": 3, "ltx": 2}


def texts(length=14, begin=False, left=False):
    tokenizer = word_tokenizer(length, begin)
    tokenizer.padding_side = "left" if left else "right"
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=4, d_ff=16, num_layers=1, num_heads=4, eos_token_id=1)
    return tokenizer, T5EncoderModel(config).eval()


def pixart():
    tokenizer, encoder = texts()
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=8, num_layers=BLOCKS, cross_attention_dim=16, sample_size=8,
        caption_channels=WIDTH, norm_num_groups=2,
    )  # fmt: skip
    pipe = PixArtAlphaPipeline(tokenizer, encoder, None, model, DPMSolverMultistepScheduler())
    return pipe, {**IMAGE, "max_sequence_length": 14, "use_resolution_binning": False}


def sana():
    tokenizer, encoder = texts(begin=True)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=BLOCKS,
        num_cross_attention_heads=HEADS, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=8, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    pipe = SanaPipeline(tokenizer, encoder, None, model, FlowMatchEulerDiscreteScheduler())
    more = {"max_sequence_length": 14, "use_resolution_binning": False, "complex_human_instruction": None}
    return pipe, {"height": 96, "width": 128, **more}


def wan():
    tokenizer, encoder = texts()
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=WIDTH, freq_dim=8, ffn_dim=16,
        num_layers=BLOCKS,
    )  # fmt: skip
    return WanPipeline(tokenizer, encoder, None, FlowMatchEulerDiscreteScheduler(), model), {**VIDEO, "max_sequence_length": 14}


def ltx():
    tokenizer, encoder = texts()
    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=8, cross_attention_dim=16,
        num_layers=BLOCKS, caption_channels=WIDTH,
    )  # fmt: skip
    pipe = LTXPipeline(FlowMatchEulerDiscreteScheduler(), None, encoder, tokenizer, model)
    return pipe, {**VIDEO, "width": 96, "max_sequence_length": 14}


def lumina():
    tokenizer, encoder = texts(begin=True, left=True)
    model = LuminaNextDiT2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=BLOCKS, num_attention_heads=HEADS * 2, num_kv_heads=HEADS,
        multiple_of=8, cross_attention_dim=WIDTH,
    )  # fmt: skip
    pipe = LuminaPipeline(model, FlowMatchEulerDiscreteScheduler(), None, encoder, tokenizer)
    return pipe, dict(IMAGE)


def hunyuan():
    (first, one), (second, two) = texts(77, begin=True), texts(256)
    model = HunyuanDiT2DModel(
        num_attention_heads=HEADS, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
        num_layers=BLOCKS, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    pipe = HunyuanDiTPipeline(vae, one, first, model, DDPMScheduler(), None, None, False, two, second)
    return pipe, {**IMAGE, "use_resolution_binning": False}


PIPELINES = {"pixart": pixart, "sana": sana, "wan": wan, "ltx": ltx, "lumina": lumina, "hunyuan": hunyuan}


def built(name):
    torch.manual_seed(0)
    pipe, options = PIPELINES[name]()
    for weight in pipe.transformer.parameters():  # some begin at zero
        torch.nn.init.normal_(weight, 0, weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3)
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", **options}


class Seen:
    """Attention to text in a traced call: what stock attention was given, softmax and all, written out."""

    def __init__(self, name):
        self.pipe, options = built(name)
        self.calls, original = [], torch.nn.functional.scaled_dot_product_attention
        tokens = FRAMES.get(name, 1) * GRID[name][0] * GRID[name][1]

        def noted(query, key, value, attn_mask=None, *args, **kwargs):
            if query.shape[-2] == tokens != key.shape[-2] and self.inside:
                logits = query @ key.mT / query.shape[-1] ** 0.5
                if attn_mask is not None:
                    logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
                self.calls.append(logits.softmax(-1))
            return original(query, key, value, attn_mask, *args, **kwargs)

        self.inside = False
        model = self.pipe.transformer
        hooks = [
            model.register_forward_pre_hook(lambda *_: setattr(self, "inside", True)),
            model.register_forward_hook(lambda *_: setattr(self, "inside", False)),
        ]
        torch.nn.functional.scaled_dot_product_attention = noted
        try:
            with trace(self.pipe, steps=True) as self.traced:
                self.latents = self.pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **options)[0]
        finally:
            torch.nn.functional.scaled_dot_product_attention = original
            for hook in hooks:
                hook.remove()
        self.options = options

    def wanted(self, name):
        """Per block, [2 A T N] summed over steps, of the rows that hold the prompts."""
        each = [self.calls[k::BLOCKS] for k in range(BLOCKS)]
        if name == "wan":  # the prompts alone, then the negative ones alone
            return [sum(calls[::2]).mT for calls in each]
        return [sum(one[:2] if name == "lumina" else one[2:] for one in calls).mT for calls in each]


@pytest.fixture(scope="module", params=PIPELINES)
def case(request):
    return request.param, Seen(request.param)


CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def test_maps_are_the_attention_of_the_prompts_to_their_tokens(case):
    name, seen = case
    tr, frames, grid = seen.traced, FRAMES.get(name, 1), GRID[name]
    assert tr.steps_done == STEPS and tr.images == 2 and sorted(tr.sums.layers) == list(range(BLOCKS))
    for layer, wanted in enumerate(seen.wanted(name)):
        held = tr.sums.layers[layer]  # [I·F A K h w]
        wanted = wanted[:, :, : held.shape[2]].unflatten(3, (frames, *grid)).movedim(3, 1).flatten(0, 1)
        assert held.shape == wanted.shape
        torch.testing.assert_close(held, wanted, **CLOSE)
        assert wanted.std(-1).max() > 1e-4


def test_a_word_is_read_at_its_own_token_in_its_own_image(case):
    name, seen = case
    tokenizer, total = seen.pipe.tokenizer, sum(one.mean(1) for one in seen.wanted(name)) / BLOCKS  # [2 T N]
    for image, word in enumerate(("fish", "sky")):
        ids = list(token_ids(tokenizer, PROMPTS[image]))
        at = ids.index(tokenizer.convert_tokens_to_ids(word)) + (total.shape[1] - len(ids) if name == "lumina" else 0)
        maps = total[image, at].unflatten(0, (FRAMES.get(name, 1), *GRID[name]))
        torch.testing.assert_close(seen.traced.word_map(word, image).values, maps.mean(0), **CLOSE)
        torch.testing.assert_close(seen.traced.word_map(word, image, frame=0).values, maps[0], **CLOSE)
        steps = [seen.traced.word_map(word, image, step=step).values for step in range(STEPS)]
        torch.testing.assert_close(sum(steps), maps.mean(0), **CLOSE)
    with pytest.raises(ViewError, match="count from 0"):
        seen.traced.word_map("fish", frame=FRAMES.get(name, 1))
    assert len(seen.traced.prompt_maps().maps) == len(token_ids(tokenizer, PROMPTS[0]))


def test_the_pipeline_gives_the_same_bits_and_keeps_no_hook(case):
    _, seen = case
    again = seen.pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **seen.options)[0]
    assert torch.equal(torch.as_tensor(again), torch.as_tensor(seen.latents))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in seen.pipe.transformer.modules())
    assert not {"encode_prompt", "progress_bar"} & seen.pipe.__dict__.keys()


# ---------------------------------------------------------------- what can't be traced


def test_hosts_that_would_give_wrong_maps_are_named():
    pipe, options = built("pixart")
    attention = pipe.transformer.transformer_blocks[0].attn2
    original = attention.forward

    def merged(hidden, *args, **kwargs):
        return original(hidden[:, :6], *args, **kwargs).repeat(1, 2, 1)

    attention.forward = merged
    with pytest.raises(TapError, match=r"transformer_blocks\.0\.attn2: 6 queries .* 3 x 4"), trace(pipe):
        pipe(PROMPTS, **options)
    attention.forward = lambda hidden, **kwargs: hidden  # as a cache between steps
    with pytest.raises(TapError, match="did not project queries and keys"), trace(pipe):
        pipe(PROMPTS, **options)
    attention.forward = original
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(TapError, match="unfuse_qkv_projections"), trace(pipe):
        pass
    pipe.transformer.unfuse_qkv_projections()
    with trace(pipe, keep="map") as tr:
        pipe(PROMPTS[0], **{**options, "guidance_scale": 1.0})
    assert tr.images == 1 and tr.word_map("boat").values.shape == (3, 4)
    pipe.transformer.transformer_blocks[1].compile(backend="eager")
    with pytest.raises(TapError, match=r"transformer_blocks\.1.*compiled by torch\.compile"), trace(pipe):
        pass


def test_fused_attention_of_wan_and_its_second_transformer_are_refused():
    pipe, _ = built("wan")
    pipe.transformer.blocks[1].attn2.fuse_projections()
    with pytest.raises(TapError, match=r"blocks\.1\.attn2: its projections are fused"), trace(pipe):
        pass
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(TapError, match="second transformer"):
        trace(pipe)


def test_text_of_unknown_place_is_refused():
    pipe, options = built("sana")
    with pytest.raises(TapError, match="complex_human_instruction=None"), trace(pipe):
        pipe("fish", **{**options, "complex_human_instruction": ["a boat"]})
    with pytest.raises(TapError, match="other text than encode_prompt returned"), trace(pipe):
        encode = pipe.encode_prompt
        pipe.encode_prompt = lambda *a, **k: (lambda first, *rest: (first + 1, *rest))(*encode(*a, **k))
        pipe(PROMPTS, **options)
    with trace(pipe) as tr:
        pipe("the sky " * 8 + "boat", **options)
    with pytest.raises(DataError, match="lies past the 14 tokens"):
        tr.word_map("boat")
    for wrong in ({"cfg_rows": "all"}, {"token_match": "reference"}):
        with pytest.raises(ConfigError, match="unknown"):
            trace(pipe, **wrong)
