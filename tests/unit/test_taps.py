"""Taps: checked when attached, able to stop the forward pass, and always taken off."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from conceptseg.backbones.taps import StopForward, TapSet
from conceptseg.backbones.transformers.concept_stream import ConceptStream
from conceptseg.backbones.transformers.flux import FluxBackbone, FluxCarrier
from conceptseg.backbones.transformers.prompts import Prompts
from conceptseg.errors import TapError


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(3, 3), "mlp": nn.Linear(3, 3)}) for _ in range(3))
        self.ran = []

    def forward(self, x, scale=1.0):
        for number, block in enumerate(self.blocks):
            x = block["mlp"](torch.tanh(block["attn"](x))) * scale
            self.ran.append(number)
        return x


@pytest.fixture
def host():
    torch.manual_seed(0)
    return Host().eval()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_module_is_found_by_its_dotted_path(host):
    assert TapSet(host).module("blocks.1.attn") is host.blocks[1]["attn"]


def test_a_wrong_path_names_the_host_the_place_and_the_nearest_name(host):
    with pytest.raises(TapError) as raised:
        TapSet(host).module("blocks.1.atn")
    said = str(raised.value)
    assert 'tapping Host: wanted "blocks.1.atn"' in said
    assert 'at blocks.1 there is no "atn"' in said
    assert 'Did you mean "attn"? Choices: attn, mlp.' in said


def test_a_wrong_first_name_is_said_to_be_at_the_top_level(host):
    with pytest.raises(TapError, match='at its top level there is no "block"'):
        TapSet(host).module("block.1")


def test_taps_see_arguments_keywords_and_output(host):
    seen = {}
    with TapSet(host) as taps:
        taps.before("blocks.0.attn", lambda module, args, kwargs: seen.update(before=args[0]))
        taps.after("blocks.0.attn", lambda module, args, kwargs, output: seen.update(after=output, module=module))
        x = torch.ones(1, 3)
        taps.run(lambda: host(x, scale=2.0))
    assert torch.equal(seen["before"], x) and torch.equal(seen["after"], host.blocks[0]["attn"](x))
    assert seen["module"] is host.blocks[0]["attn"]


def test_a_run_gives_the_hosts_output_bit_for_bit(host):
    x = torch.randn(4, 3)
    with TapSet(host) as taps:
        taps.after("blocks.2.mlp", lambda module, args, kwargs, output: None)
        assert torch.equal(taps.run(lambda: host(x)), host(x))


def test_leaving_takes_every_hook_off(host):
    with TapSet(host) as taps:
        for number in range(3):
            taps.before(f"blocks.{number}.attn", lambda *args: None)
            taps.after(f"blocks.{number}.mlp", lambda *args: None)
        assert hooks(host) == 6
    assert hooks(host) == 0


def test_leaving_by_an_error_takes_every_hook_off(host):
    def failing(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), TapSet(host) as taps:
        taps.before("blocks.0.attn", lambda *args: None)
        taps.after("blocks.1.mlp", failing)
        taps.run(lambda: host(torch.ones(1, 3)))
    assert hooks(host) == 0


def test_a_wrong_path_halfway_leaves_no_hook(host):
    with pytest.raises(TapError), TapSet(host) as taps:
        taps.before("blocks.0.attn", lambda *args: None)
        taps.before("blocks.9.attn", lambda *args: None)
    assert hooks(host) == 0


def test_other_peoples_hooks_stay(host):
    mine = []
    host.blocks[0]["attn"].register_forward_hook(lambda *args: mine.append(1))
    with TapSet(host) as taps:
        taps.after("blocks.0.attn", lambda *args: None)
    host(torch.ones(1, 3))
    assert hooks(host) == 1 and mine == [1]


def test_removing_twice_is_safe(host):
    taps = TapSet(host)
    taps.before("blocks.0", lambda *args: None)
    taps.remove()
    taps.remove()
    assert hooks(host) == 0


def test_stopping_ends_the_forward_pass_and_gives_nothing(host):
    def stop(*args):
        raise StopForward

    with TapSet(host) as taps:
        taps.before("blocks.1.attn", stop)
        assert taps.run(lambda: host(torch.ones(1, 3))) is None
    assert host.ran == [0]


def test_errors_of_the_host_pass_through(host):
    with TapSet(host) as taps, pytest.raises(RuntimeError, match="shape"):
        taps.run(lambda: host(torch.ones(1, 7)))


# ---------------------------------------------------------------- the concept stream's own checks


@pytest.fixture
def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        pooled_projection_dim=10, axes_dims_rope=(2, 4, 2),
    ).eval()  # fmt: skip


def denoise(model):
    backbone = FluxBackbone("lab:none")
    backbone.transformer, backbone.config = model, dict(model.config)
    stream = ConceptStream(torch.randn(1, 3, 12), torch.zeros(1, 10), lambda layer, found: None, last_layer=1)
    backbone.denoise(torch.randn(1, 4, 4, 4), 0.5, Prompts(torch.randn(1, 5, 12)), stream)


def test_fused_projections_are_refused_with_the_way_out(flux):
    flux.fuse_qkv_projections()
    with pytest.raises(TapError, match=r"transformer_blocks\.0\.attn: its projections are fused.*unfuse_qkv_projections\(\)"):
        denoise(flux)
    assert hooks(flux) == 0


def test_unfused_projections_are_tapped_again(flux):
    flux.fuse_qkv_projections()
    flux.unfuse_qkv_projections()
    denoise(flux)
    assert hooks(flux) == 0


@pytest.mark.parametrize("name", ["add_q_proj", "norm_added_k", "to_add_out"])
def test_a_block_without_a_text_projection_is_refused_by_name(flux, name):
    delattr(flux.transformer_blocks[1].attn, name)
    with pytest.raises(TapError, match=rf'wanted "transformer_blocks\.1\.attn\.{name}".*there is no "{name}"'):
        denoise(flux)
    assert hooks(flux) == 0


def test_a_host_that_is_no_flux_is_refused(host):
    stream = ConceptStream(torch.randn(1, 3, 12), torch.zeros(1, 10), lambda layer, found: None, last_layer=1)
    with pytest.raises(TapError, match='tapping Host: wanted "time_text_embed"'), TapSet(host) as taps:
        FluxCarrier(stream).attach(taps)
