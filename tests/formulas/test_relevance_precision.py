"""Relevance as the sheets set it does not depend on how a processor rounds, nor on the precision that it may take products in."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from composing import plainly
from torch.utils._python_dispatch import TorchDispatchMode

import conceptseg.backbones.encoders.relevance as relevance
from conceptseg.backbones.encoders.relevance import full_precision
from conceptseg.backbones.encoders.tower import Weights
from conceptseg.backbones.encoders.vit import ViTBackbone
from conceptseg.errors import ConfigError
from conceptseg.extractors.loading import load_extractor
from conceptseg.targets import instantiate
from conceptseg.types import Batch

SHEETS = ("lrp", "lrp_clip", "partial_lrp", "partial_lrp_clip", "transinterp", "transinterp_clip", "transinterp_given")
SCENES = (8, 14, 31, 37)
"""Of the lab table's first block. In float32 one unit in the last place moves an LRP or TransInterp map of theirs visibly."""
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm: "matmul", ATEN.addmm: "matmul", ATEN.bmm: "matmul", ATEN.baddbmm: "matmul", ATEN.convolution: "conv"}


class OtherRounding(TorchDispatchMode):
    """A processor that sums products in another order: each result is off by about one unit in the last place."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket not in PRODUCTS:
            return found
        noise = torch.randn(found.shape, generator=self.drawn, dtype=found.dtype)
        return found * (1 + torch.finfo(found.dtype).eps * noise)


class Bfloat16Units(TorchDispatchMode):
    """A processor that takes float32 products in bfloat16 where torch's settings let it."""

    def __init__(self) -> None:
        super().__init__()
        self.reduced = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = PRODUCTS.get(function.overloadpacket)
        if kind and getattr(torch.backends.mkldnn, kind).fp32_precision in ("bf16", "tf32"):
            self.reduced += 1
            args = [a.bfloat16().to(a.dtype) if isinstance(a, torch.Tensor) and a.dtype == torch.float32 else a for a in args]
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=[0, 1], ids=["torch's old setting", "torch's new settings"])
def bfloat16_allowed(request):
    """Reduced precision is asked for, as a program around conceptseg may."""
    settings = [(part, part.fp32_precision) for part in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)]
    try:
        if request.param:
            for part, _ in settings:
                part.fp32_precision = "bf16"
        else:
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        for part, before in settings:
            part.fp32_precision = before


def scene_batch(config):
    data, protocol = (instantiate(config[part], part) for part in ("dataset", "protocol"))
    return Batch(tuple(protocol.prepare(data.read(data.keys()[number])) for number in SCENES))


@cache
def shown(sheet, dtype="float64"):
    """(The method, the scenes that it is shown.)"""
    method = load_extractor(sheet, dtype=dtype)
    assert method.backbone.dtype == getattr(torch, dtype)
    return method, scenes()


@cache
def scenes():
    return scene_batch(plainly("dataset=scenes", "dataset.objects=[1,1]", "dataset.count=64", "protocol=scenes_single"))


@cache
def in_full_precision(sheet):
    method, batch = shown(sheet, "float32")
    with full_precision():
        return method.saliency(batch)


def difference(maps, wanted):
    """Largest over images, relative to an image's largest value."""
    return float(((maps - wanted).flatten(1).abs().amax(1) / wanted.flatten(1).abs().amax(1)).max())


@pytest.mark.parametrize("sheet", SHEETS)
def test_maps_do_not_depend_on_how_matrix_products_are_rounded(sheet):
    """Measured: at most 5e-8 of a map's largest value; in float32 8e-6 (partial LRP) to 2 (LRP)."""
    method, batch = shown(sheet)
    wanted = method.saliency(batch)
    with OtherRounding():
        maps = method.saliency(batch)
    assert 0 < difference(maps, wanted) < 1e-6


@pytest.mark.parametrize("sheet", SHEETS)
def test_reduced_precision_that_is_allowed_elsewhere_changes_no_bit_in_float32(sheet, bfloat16_allowed):
    method, batch = shown(sheet, "float32")
    wanted = in_full_precision(sheet)
    with Bfloat16Units() as units:
        assert torch.equal(method.saliency(batch), wanted) and not units.reduced
        torch.ones(2, 2) @ torch.ones(2, 2)
        assert units.reduced == 1, "outside it is allowed still"


def test_full_precision_gives_back_every_setting():
    read = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    read += [part for library in (torch.backends.cudnn, torch.backends.mkldnn) for part in (library.conv, library.rnn)]

    def said():
        return [part.fp32_precision for part in read]

    try:
        for setting in ("none", "ieee", "tf32"):
            torch.backends.fp32_precision = setting
            before = said()
            with pytest.raises(ZeroDivisionError), full_precision():
                assert said() == ["ieee"] * len(read)
                raise ZeroDivisionError
            assert said() == before
    finally:
        torch.backends.fp32_precision = "none"


def test_products_of_equal_sign_lose_few_digits_on_the_lab_s_models(monkeypatch):
    """One product in place of two cancels where little is of equal sign. Measured: 3e-14 in float64."""
    plain, off = relevance.equal_signs, []

    def compared(x, weights: Weights, value):
        found, weight = plain(x, weights, value), weights.weight
        wanted = x.clamp(min=0) @ weight.clamp(min=0).T + x.clamp(max=0) @ weight.clamp(max=0).T
        off.append(float(((found - wanted).abs() / wanted.clamp(min=1e-300)).max()))
        return found

    monkeypatch.setattr(relevance, "equal_signs", compared)
    for sheet in ("transinterp", "transinterp_clip"):
        method, batch = shown(sheet)
        method.saliency(batch)
    assert len(off) > 20 and max(off) < 1e-12


def test_float32_is_warned_of_and_float64_is_refused_where_the_device_has_none(caplog, monkeypatch):
    instantiate(plainly("extractor=lrp")["extractor"], "extractor")
    assert not caplog.records
    instantiate(plainly("extractor=lrp", "extractor.backbone.dtype=float32")["extractor"], "extractor")
    assert "numbers differ between machines" in caplog.text and "float64" in caplog.text
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"runtime.device \"mps\"(.|\n)*runtime.device=cpu"):
        ViTBackbone("lab:vit", "class labels", dtype="float64", device="mps")
