"""Hosts that change: right maps, or a TapError that names the cause."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from test_trace import FOLDER, PROMPT, SAME, SIDE, run, traced
from torch import nn

from conceptseg.backbones.taps import TapSet
from conceptseg.backbones.unets.attention_maps import CrossAttentionTap, cross_attentions
from conceptseg.errors import TapError
from conceptseg.trace import trace


@pytest.fixture
def pipe():
    found = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    found.set_progress_bar_config(disable=True)
    return found


# ---------------------------------------------------------------- textual inversion

TOY = "a <toy> and a cat near a wombat"


def with_toy(pipe, vectors):
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion(0.05 * torch.randn(vectors, width, generator=torch.Generator().manual_seed(1)), token="<toy>")
    return pipe


@pytest.mark.parametrize("vectors", [1, 3])
def test_words_behind_a_textual_inversion_are_read_where_they_were_encoded(pipe, vectors):
    with_toy(pipe, vectors)
    full = pipe.tokenizer(pipe.maybe_convert_prompt(TOY, pipe.tokenizer)).input_ids
    said = pipe.tokenizer.convert_ids_to_tokens(full)
    given = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda _, a, k: given.extend(a or [k["input_ids"]]), with_kwargs=True)
    tr = traced(pipe, TOY)
    hook.remove()
    assert given[0][0, : len(full)].tolist() == full  # `said` is what the text encoder read
    maps = tr.prompt_maps().maps
    assert len(maps) == len(said)
    for word, pieces in (("<toy>", [t for t in said if "toy" in t]), ("cat", ["cat</w>"]), ("wombat", said[-3:-1])):
        places = [said.index(piece) for piece in pieces]
        assert len(places) == {"<toy>": vectors, "cat": 1, "wombat": 2}[word]
        torch.testing.assert_close(tr.word_map(word).values, maps[places].mean(0), **SAME)
    # The same ids through the text encoder itself. encode_prompt(full) is no reference: it writes the vectors out once more.
    pad = pipe.tokenizer("", padding="max_length").input_ids
    with torch.no_grad():
        embeds, none = (pipe.text_encoder(torch.tensor([[*ids, *pad[len(ids) :]]]))[0] for ids in (full, pad))
    with trace(pipe, **SIDE) as by_ids:
        run(pipe, None, prompt_embeds=embeds, negative_prompt_embeds=none)
    for position in range(len(full)):
        assert torch.equal(by_ids.token_map([position]).values, maps[position])


def test_embeddings_made_inside_a_trace_keep_the_text_that_was_encoded(pipe):
    with_toy(pipe, 3)
    said = traced(pipe, TOY, guidance_scale=1.0).word_map("cat").values
    with trace(pipe, **SIDE) as tr:
        embeds = pipe.encode_prompt(TOY, "cpu", 1, False)[0]
        run(pipe, None, prompt_embeds=embeds, guidance_scale=1.0)
    torch.testing.assert_close(tr.word_map("cat").values, said, **SAME)


def test_maps_are_not_read_by_another_tokenizer_than_that_of_the_run(pipe):
    with_toy(pipe, 3)
    tr = traced(pipe, TOY)
    pipe.unload_textual_inversion("<toy>")
    with pytest.raises(TapError, match="textual inversion was loaded or unloaded since"):
        tr.word_map("cat")


def test_a_pipeline_that_encodes_another_text_than_its_prompt_is_refused(pipe, monkeypatch):
    """As pipelines do that weigh or rewrite prompts."""
    original = type(pipe).encode_prompt

    def rewritten(self, prompt, *args, **kwargs):
        return original(self, f"best quality, {prompt}", *args, **kwargs)

    monkeypatch.setattr(type(pipe), "encode_prompt", rewritten)
    with pytest.raises(TapError, match="text encoder was given other tokens than those of"), trace(pipe, **SIDE):
        pipe.encode_prompt(PROMPT, "cpu", 1, False)


# ---------------------------------------------------------------- adapters


class Adapter(nn.Module):
    """A linear layer and what an adapter adds to it, as LoRA layers are built."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.added = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)
        nn.init.normal_(self.added.weight, 0, 0.2)

    def forward(self, x):
        return self.base_layer(x) + self.added(x)


def attention_of(pipe):
    return pipe.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2


def load(pipe):
    torch.manual_seed(0)
    attention_of(pipe).to_q = Adapter(attention_of(pipe).to_q)


def unload(pipe):
    attention_of(pipe).to_q = attention_of(pipe).to_q.base_layer


def test_an_adapter_that_is_loaded_before_the_trace_is_in_its_maps(pipe):
    plain = traced(pipe).word_map("wombat").values
    load(pipe)
    adapted = traced(pipe).word_map("wombat").values
    assert (adapted - plain).abs().max() > 1e-3
    layer = attention_of(pipe).to_q
    with torch.no_grad():
        layer.base_layer.weight += layer.added.weight
        layer.added.weight.zero_()  # fused: the numbers stay
    torch.testing.assert_close(traced(pipe).word_map("wombat").values, adapted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", [load, unload])
def test_an_adapter_that_is_loaded_or_unloaded_inside_a_trace_is_refused(pipe, change):
    if change is unload:
        load(pipe)
    with pytest.raises(TapError, match=r"to_q was .*Adapter|to_q was .*Linear.*Adapter") as raised, trace(pipe, **SIDE):
        change(pipe)
        run(pipe)
    assert "adapters (LoRA) were loaded or unloaded" in str(raised.value)


def test_another_u_net_and_fused_projections_inside_a_trace_are_refused(pipe):
    with pytest.raises(TapError, match="unfuse_qkv_projections"), trace(pipe, **SIDE):
        pipe.unet.fuse_qkv_projections()
        run(pipe)
    pipe.unet.unfuse_qkv_projections()
    other = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    with pytest.raises(TapError, match="its U-Net was replaced"), trace(pipe, **SIDE):
        pipe.unet = other.unet
        run(pipe)


# ---------------------------------------------------------------- compiled blocks


def compile_block(pipe):
    attention_of(pipe)  # the block around it is what compile_repeated_blocks compiles
    pipe.unet.up_blocks[0].attentions[0].transformer_blocks[0].compile(backend="eager")


def wrap_block(pipe):
    blocks = pipe.unet.up_blocks[0].attentions[0].transformer_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("change", [compile_block, wrap_block])
def test_compiled_blocks_are_named_as_the_cause(pipe, change, inside):
    if not inside:
        change(pipe)
    with pytest.raises(TapError, match=r"transformer_blocks\.0.*compiled by torch\.compile"), trace(pipe, **SIDE):
        change(pipe)
        run(pipe)


# ---------------------------------------------------------------- positions that are not the grid's


def merging(attention, rows, around=None):
    """The attention sees only some of the image's positions, as when tokens are merged, and gives all of them an answer."""
    original = attention.forward

    def forward(hidden, *args, **kwargs):
        positions = hidden.shape[1]
        found = original(hidden[:, :rows], *args, **kwargs)
        return found[:, torch.arange(positions) % rows]

    attention.forward = forward


@pytest.mark.parametrize("rows", [32, 48, 45])  # 32 of 64 would be laid out as 8 x 4
def test_merged_tokens_in_cross_attention_are_refused(pipe, rows):
    merging(pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2, rows)
    with (
        pytest.raises(TapError, match=rf"attn2: {rows} queries of the image.* 8 x 8.*tomesd"),
        trace(pipe, **SIDE),
    ):
        run(pipe)


def test_merged_tokens_in_self_attention_leave_words_maps_and_spoil_only_those_of_self_attention(pipe):
    block = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0]
    merging(block.attn1, 32)
    assert traced(pipe).word_map("cat").values.shape == (16, 16)
    (layer,) = [one for one in cross_attentions(pipe.unet.config) if pipe.unet.get_submodule(one.path) is block.attn2]
    with TapSet(pipe.unet) as taps, pytest.raises(TapError, match="attn1: 32 queries of the image"):
        CrossAttentionTap([layer.self_attention], lambda attended: None).attach(taps)
        pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 77, 32))


def test_attention_in_windows_is_refused(pipe):
    attention = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    original = attention.forward

    def windows(hidden, encoder_hidden_states=None, **kwargs):
        rows = hidden.shape[0]
        parts = hidden.reshape(4 * rows, -1, hidden.shape[-1])
        return original(parts, encoder_hidden_states.repeat_interleave(4, 0), **kwargs).reshape(hidden.shape)

    attention.forward = windows
    with pytest.raises(TapError, match=r"16 queries of the image, but its grid of 8 x 8"), trace(pipe, **SIDE):
        run(pipe)
