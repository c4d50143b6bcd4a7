"""The contract of every extractor in conf/extractor: whatever is added there is held to it without an edit here.

An extractor with a backbone gets a tiny random stock model in the layout that real checkpoints have. Add a line to `TINY`
for a new kind of backbone.
"""

import json
import shutil
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from composing import CONF, GROUPS, plainly
from tiny_encoders import write_clip, write_vit
from tiny_transformers import settings_of
from torch import nn

from conceptseg.backbones.taps import TapSet
from conceptseg.data.drawn import Scenes
from conceptseg.errors import ConfigError, DataError, ViewError
from conceptseg.evaluation.assemble import method_identity
from conceptseg.extractors.base import WITHOUT_WORDS, Extractor, Told, TrainedOn
from conceptseg.extractors.sheets import extractor_sheet
from conceptseg.keys import run_id
from conceptseg.lab.models import build_flux, build_sd, save
from conceptseg.saliency.views import expand_views
from conceptseg.targets import instantiate
from conceptseg.types import Batch, SaliencyMaps, Task

EXTRACTORS = GROUPS["extractor"]


def assert_same_maps(found, wanted):
    """Maps of one image differ by the batch it is in only because matrix products of another size are summed in another order,
    in float32 and through three blocks. So they agree to 1e-5 of the largest score: where logits of some dozens cancel to nearly
    nothing, their rounding remains.
    """
    scale = max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, atol=1e-5 * scale, rtol=1e-5)


def tiny_flux(folder):
    torch.manual_seed(0)
    parts = build_flux(
        {
            "double_blocks": 3, "single_blocks": 1, "heads": 2, "head_width": 12, "rope": [4, 4, 4], "text_tokens": 8,
            "text_width": 16, "text_layers": 1, "pooled_width": 6, "codec_patch": 2, "latent_scale": 1.5,
        }
    )  # fmt: skip
    for weight in parts["transformer"].parameters():  # built as the identity; here every block must do something
        if weight.ndim == 2:
            nn.init.normal_(weight, 0, weight.shape[-1] ** -0.5)
    save(parts, folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return {"path": str(folder), "dtype": "float32", "device": "cpu", "image_size": 32, "text_tokens": 8}


def tiny_sd(folder):
    torch.manual_seed(0)
    parts = build_sd(
        {
            "channels": [8, 8], "reads_text": [True, True], "heads": 2, "norm_groups": 4, "text_tokens": 16, "text_width": 16,
            "text_layers": 1, "image_size": 32, "codec_patch": 2, "latent_scale": 1.5,
        }
    )  # fmt: skip
    save(parts, folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return {"path": str(folder), "dtype": "float32", "device": "cpu", "image_size": 32}


def tiny_vit(folder):
    # float64: relevance divides by signed activations, so that in float32 two orders of summing differ visibly.
    own = {"revision": None, "architecture": None, "file": "model.safetensors", "image_size": 24, "mean": None, "std": None}
    return {"path": str(write_vit(folder)), "dtype": "float64", "device": "cpu", **own, "labels": None}


def tiny_clip(folder):
    words = {"templates": ["a {}"], "tokenizer": "files", "labels": "scenes"}
    return {"path": str(write_clip(folder)), "revision": None, "dtype": "float64", "device": "cpu", "image_size": 24, **words}


TINY = {
    "conceptseg.backbones.encoders.clip.CLIPBackbone": tiny_clip,
    "conceptseg.backbones.encoders.transformers_model.TransformersBackbone": settings_of,
    "conceptseg.backbones.encoders.vit.ViTBackbone": tiny_vit,
    "conceptseg.backbones.transformers.flux.FluxBackbone": tiny_flux,
    "conceptseg.backbones.unets.unet.UNetBackbone": tiny_sd,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    held = {}

    def settings(target, architecture=None):
        if (target, architecture) not in held:
            assert target in TINY, f"no tiny model for {target}: add one to TINY in {__file__}"
            folder = tmp_path_factory.mktemp("tiny")
            of_transformers = target.endswith("TransformersBackbone")
            held[target, architecture] = TINY[target](folder, architecture) if of_transformers else TINY[target](folder)
        return held[target, architecture]

    return settings


def composed(name, *overrides):
    return plainly(f"extractor={name}", "protocol=scenes_single", *overrides)


def models_of(settings):
    return [p for p in settings.values() if isinstance(p, dict) and "conceptseg.backbones" in p.get("_target_", "")]


@pytest.fixture
def config(name, tiny):
    """The configuration that `conceptseg extractor=<name>` runs, on tiny models."""
    config = composed(name)
    if "backbone" in config["extractor"]:
        for part in models_of(config["extractor"]):
            part |= tiny(part["_target_"], part.get("architecture"))
    return config


def build(config):
    """An extractor and its own views."""
    extractor = instantiate(config["extractor"], "extractor")
    return extractor, list(expand_views(config["views"], extractor.axes()).values())


@dataclass
class Watched:
    """A fresh extractor's first reading of the four tasks, and what the reading did to everything within its reach."""

    extractor: Extractor
    views: list
    answers: list[SaliencyMaps]
    """One for each view."""
    passes: int
    """Forward passes that the backbone counted."""
    seen: int
    """Forward passes that a hook on the host saw."""
    weights: bool
    """Whether every weight of the host kept its value."""
    tasks: bool
    """Whether images and ground truth kept their values."""

    @property
    def maps(self):
        return [maps.scores for maps in self.answers]


@pytest.fixture(scope="module")
def held():
    """Shared by the tests of this file: loading takes longer than most tests."""
    return {}


def watch(extractor, views, tasks):
    models = hosts(extractor)
    weights = [weight.clone() for host in models for weight in host.parameters()]
    arrays = [(task.image.copy(), task.truth.copy()) for task in tasks]
    seen = []
    counted = (lambda: extractor.backbone.forward_passes) if models else (lambda: 0)
    before = counted()
    watching = [host.register_forward_pre_hook(lambda module, args: seen.append(module)) for host in models[:1]]
    answers = list(extractor.stream(Batch(tasks), views))
    for hook in watching:
        hook.remove()
    kept = all(torch.equal(a, b) for a, b in zip(weights, (w for h in models for w in h.parameters()), strict=True))
    same = all(np.array_equal(t.image, i) and np.array_equal(t.truth, m) for t, (i, m) in zip(tasks, arrays, strict=True))
    return Watched(extractor, views, answers, counted() - before, len(seen), kept, same)


@pytest.fixture
def watched(name, held, tasks, request):
    if name not in held:
        held[name] = watch(*build(request.getfixturevalue("config")), tasks)
    return held[name]


@pytest.fixture
def maps(watched):
    """The extractor's first answer to the four tasks."""
    return watched.maps


@pytest.fixture
def extractor(watched):
    return watched.extractor


@pytest.fixture
def views(watched):
    return watched.views


@pytest.fixture(scope="module")
def tasks():
    protocol = instantiate(composed("oracle")["protocol"], "protocol")
    scenes = Scenes(count=4, size=32, objects=[1, 1])
    found = [protocol.prepare(scenes.read(key)) for key in tuple(scenes.keys())]
    assert all(isinstance(task, Task) for task in found)
    return tuple(found)


def read(extractor, tasks, views):
    return [maps.scores for maps in extractor.stream(Batch(tuple(tasks)), views)]


def hosts(extractor):
    """Every model that the extractor could hang a hook on; loads them."""
    backbone = getattr(extractor, "backbone", None)
    models = [getattr(backbone, name, None) for name in ("transformer", "unet", "model", "text_encoder", "vae")]
    return [model for model in models if isinstance(model, nn.Module)]


def hooks(extractor):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for host in hosts(extractor) for m in host.modules())


def every_cell(extractor, views=()):
    """Views of everything on offer, as many as there are layers and spaces, at the noise levels of the views if given."""
    axes, levels = extractor.axes(), sorted({level for view in views for level in view.timesteps}) or [0.5]
    setting = {"space": list(axes.spaces), **({"timesteps": levels, "each": "layer"} if axes.has_timesteps else {})}
    return list(expand_views({"all": setting}, axes).values())


every_extractor = pytest.mark.parametrize("name", EXTRACTORS)


def with_backbone():
    """Read from the sheets' text: composing all of them at collection takes longer than most tests."""
    return [name for name in EXTRACTORS if "@backbone:" in (CONF / "extractor" / f"{name}.yaml").read_text(encoding="utf-8")]


def test_the_methods_with_a_backbone_are_those_whose_settings_hold_one():
    assert with_backbone() == [name for name in EXTRACTORS if "backbone" in composed(name)["extractor"]]


every_model = pytest.mark.parametrize("name", with_backbone())


# ---------------------------------------------------------------- what comes out


@every_extractor
def test_maps_are_finite_float32_with_a_channel_for_every_concept(watched, tasks):
    for maps in watched.answers:
        assert isinstance(maps, SaliencyMaps)
        assert maps.scores.dtype == torch.float32 and maps.scores.ndim == 4
        assert maps.scores.shape[:2] == (len(tasks), len(tasks[0].concepts)) and min(maps.scores.shape[2:]) > 1
        assert torch.isfinite(maps.scores).all() and not maps.scores.requires_grad


@every_extractor
def test_views_are_answered_in_the_order_asked_under_their_own_keys(extractor, views, tasks):
    asked = [*reversed(every_cell(extractor)), *views]
    assert [maps.view for maps in extractor.stream(Batch(tasks[:1]), asked)] == [view.key for view in asked]


@every_extractor
def test_another_batch_before_changes_no_map(extractor, views, tasks, maps):
    """Caches and random state carry nothing over."""
    read(extractor, tasks[2:], views)
    torch.rand(3)
    assert all(torch.equal(one, two) for one, two in zip(maps, read(extractor, tasks, views), strict=True))


@every_extractor
def test_a_batch_of_four_is_four_single_images(extractor, views, tasks, maps):
    for number, task in enumerate(tasks):
        for whole, (alone,) in zip(maps, read(extractor, [task], views), strict=True):
            assert_same_maps(whole[number], alone)


@every_extractor
def test_the_order_within_a_batch_does_not_matter(extractor, views, tasks, maps):
    for forth, back in zip(maps, read(extractor, tasks[::-1], views), strict=True):
        assert_same_maps(forth, back.flip(0))


@every_extractor
def test_adding_views_changes_no_map_and_adds_no_forward_pass(watched, extractor, views, tasks, maps):
    """Cells of the noise levels that are read already; a further level takes a further pass."""
    before = extractor.backbone.forward_passes if hosts(extractor) else 0
    beside = read(extractor, tasks, [*views, *every_cell(extractor, views)])[: len(views)]
    assert all(torch.equal(one, two) for one, two in zip(maps, beside, strict=True))
    if hosts(extractor):
        assert extractor.backbone.forward_passes - before == watched.passes > 0
    further = read(extractor, tasks[:2], [*views, *every_cell(extractor)])[: len(views)]
    for one, two in zip(read(extractor, tasks[:2], views), further, strict=True):
        assert torch.equal(one, two)


@every_extractor
def test_tasks_and_weights_are_left_as_they_were(watched):
    assert watched.tasks and watched.weights


SETTINGS = [
    ({}, {"blur": 1.0}),
    ({}, {"normalize": "unit"}),
    ({}, {"softmax": "per_cell"}),
    ({}, {"softmax": "of_mean"}),
    ({"softmax": "of_mean"}, {"softmax": "of_mean", "temperature": 1000}),
    ({"softmax": "per_cell"}, {"softmax": "per_cell", "temperature": 1000}),
]


@every_extractor
def test_a_view_setting_is_done_or_refused_but_never_ignored(extractor, tasks):
    """Views with different keys are rows under different names: equal maps would be numbers under a false name."""
    axes, ignored = extractor.axes(), []
    base = {"timesteps": [0.5]} if axes.has_timesteps else {}
    for without, setting in SETTINGS:
        try:
            (one,) = expand_views({"a": {**base, **without}}, axes).values()
            (two,) = expand_views({"a": {**base, **setting}}, axes).values()
        except (ConfigError, ViewError):
            continue
        maps, changed = read(extractor, tasks, [one, two])
        flat = bool((maps == maps[..., :1, :1]).all())  # a blur leaves the constant as it is
        if one.key != two.key and torch.equal(maps, changed) and not flat:
            ignored.append(two.key)
    assert ignored == []


@every_extractor
def test_explain_gives_named_maps_or_refuses_by_name(name, config, extractor, tasks):
    """Also of one word, where a softmax over words would be 1 everywhere."""
    sheet = extractor_sheet(name)  # what Python loads without Hydra is what a run composes
    plain = {key: value for key, value in config["extractor"].items() if key not in ("_target_", "device", *sheet.models)}
    assert {key: value for key, value in sheet.settings.items() if key != "device"} == plain
    first = dict(next(iter(config["views"].values())))
    assert sheet.view == first | ({"space": first["space"][0]} if isinstance(first["space"], list) else {})
    image = np.round(255 * tasks[0].image).astype(np.uint8)
    words = [task.concepts.names[task.concepts.target] for task in tasks]
    words = list(dict.fromkeys(words))[:2]
    if extractor.needs_truth:
        with pytest.raises(ConfigError, match=f"{type(extractor).__name__} is a control"):
            extractor.explain(image, words)
        return
    if extractor.told == "nothing":
        with pytest.raises(ConfigError, match=f"{type(extractor).__name__} reads no words"):
            extractor.explain(image, words)
        words = []
    for asked in (words, words[:1]):
        try:
            found = extractor.explain(image, asked)
        except DataError as error:  # random weights may say nothing, which is refused
            assert "the same number everywhere" in str(error)
            continue
        assert list(found) == (asked or [WITHOUT_WORDS[extractor.told]]) and found.scores.dtype == torch.float32
        assert len(asked) != 1 or found[asked[0]].std() > 0
        assert found.at_image_size().scores.shape[1:] == image.shape[:2] == found.mask(found.names[0]).shape
    ignored = {"timesteps": [0.5]} if not extractor.axes().has_timesteps else {"batch_size": 0}
    with pytest.raises(ConfigError):
        extractor.explain(image, words, **ignored)


# ---------------------------------------------------------------- what is claimed


@every_extractor
def test_provenance_and_version_are_declared(extractor):
    assert isinstance(extractor, Extractor) and isinstance(extractor.version, int) and extractor.version >= 1
    assert extractor.provenance == ("random" if hosts(extractor) else "control")
    identity = extractor.identity()
    assert identity["class"] == type(extractor).__name__ and identity["version"] == extractor.version
    json.dumps(identity)


def run_id_of(settings):
    return run_id({"method": method_identity(settings, instantiate(settings, "extractor"))})


@every_extractor
def test_a_run_id_says_nothing_of_where_a_model_lies_and_runs(config, tmp_path):
    settings = config["extractor"]
    before = run_id_of(settings)
    if "device" in settings:
        settings["device"] = "cpu:0"
    for number, part in enumerate(models_of(settings)):
        part |= {"device": "cpu:0", "path": str(shutil.copytree(part["path"], tmp_path / str(number) / "elsewhere"))}
    assert run_id_of(settings) == before


@every_extractor
def test_a_run_id_says_every_plain_setting_but_where_the_class_lies(config):
    settings = config["extractor"]
    extractor = instantiate(settings, "extractor")
    before = method_identity(settings, extractor)
    assert all("dtype" in before[name] for name, value in settings.items() if value in models_of(settings))
    names = [name for name, value in settings.items() if value not in models_of(settings)]
    moved = [name for name in names if method_identity({**settings, name: "conceptseg.moved.Class"}, extractor) != before]
    assert moved == [name for name in names if name not in ("_target_", "device")]


@every_model
def test_a_run_id_says_every_byte_of_every_model(config, tmp_path):
    settings = config["extractor"]
    found = [run_id_of(settings)]
    for number, part in enumerate(models_of(settings)):
        part["path"] = str(shutil.copytree(part["path"], tmp_path / str(number)))
        weights = max(Path(part["path"]).rglob("*.safetensors"), key=lambda file: file.stat().st_size)
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        found.append(run_id_of(settings))
    assert len(set(found)) == 1 + len(models_of(settings))


@every_extractor
def test_a_row_says_what_its_method_is_told_and_was_trained_on(extractor):
    assert extractor.told in get_args(Told) and extractor.trained_on in get_args(TrainedOn)
    assert (extractor.told == "truth") is extractor.needs_truth
    assert (extractor.trained_on == "nothing") is not bool(hosts(extractor))


@every_extractor
def test_every_map_says_whether_channels_may_be_compared(watched):
    assert all(maps.comparable is watched.extractor.comparable for maps in watched.answers)


@every_extractor
def test_only_controls_that_say_so_see_the_truth(extractor, views, tasks, maps):
    blind = [replace(task, truth=np.zeros_like(task.truth)) for task in tasks]
    hidden = read(extractor, blind, views)
    same = all(torch.equal(one, two) for one, two in zip(maps, hidden, strict=True))
    assert same is not extractor.needs_truth


@every_extractor
def test_a_method_with_a_model_is_never_shown_the_truth(extractor):
    assert not (extractor.needs_truth and hosts(extractor))


# ---------------------------------------------------------------- what happens to the host


@every_model
@pytest.mark.parametrize("kind", ["before", "after"])
def test_no_hook_stays_after_an_error_inside_a_tap_nor_after_a_reading(extractor, views, tasks, maps, monkeypatch, kind):
    """After `maps`, since transformers hangs hooks of its own on some models when they first run."""
    before, original, attached = hooks(extractor), getattr(TapSet, kind), []

    def failing(*args):
        raise ZeroDivisionError("inside a tap")

    def attach(taps, path, tap):
        attached.append(path)
        original(taps, path, failing)

    monkeypatch.setattr(TapSet, kind, attach)
    try:
        read(extractor, tasks, views)
        raised = False
    except ZeroDivisionError:
        raised = True
    assert raised is bool(attached)  # a method may need taps of one kind only, or none
    assert hooks(extractor) == before
    monkeypatch.undo()
    assert all(torch.equal(one, two) for one, two in zip(maps, read(extractor, tasks, views), strict=True))
    assert hooks(extractor) == before


@every_model
def test_the_host_computes_the_same_with_and_without_taps(extractor, views, tasks):
    """Every call of the host is repeated without taps: each module that had run must give bits that it gave then.

    A module may have run more often with taps, since concepts pass through the text stream's modules.
    """
    host = hosts(extractor)[0]
    calls, outputs = [], defaultdict(list)

    def noted(module, args, kwargs):
        calls.append((args, kwargs, torch.is_grad_enabled()))

    watching = [host.register_forward_pre_hook(noted, with_kwargs=True)]
    watching += [m.register_forward_hook(lambda m, args, output: outputs[m].append(output)) for m in host.modules()]
    read(extractor, tasks, views)
    tapped, outputs = dict(outputs), defaultdict(list)
    watching.pop(0).remove()
    for args, kwargs, gradients in calls:
        with torch.set_grad_enabled(gradients):  # torch's attention takes another path where no gradient can be asked for
            host(*args, **kwargs)
    for hook in watching:
        hook.remove()
    assert calls and len(tapped) > 10
    for module, given in tapped.items():
        for output in outputs[module]:
            assert any(same_bits(output, one) for one in given), module


def same_bits(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):  # a model output of transformers
        return one.keys() == two.keys() and all(same_bits(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(same_bits(a, b) for a, b in zip(one, two, strict=True))
    return one == two


@every_model
def test_forward_passes_are_counted_as_the_host_sees_them(watched):
    assert 0 < watched.seen == watched.passes


@pytest.mark.parametrize("name", ["concept_attention", "cross_attention", "daam", "ovam"])
def test_every_distinct_text_is_encoded_once(config, tasks):
    (extractor, views), encoded = build(config), Counter()

    def noted(module, args, kwargs):
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        encoded.update(tuple(row) for row in ids.tolist())

    extractor.backbone.text_encoder.register_forward_pre_hook(noted, with_kwargs=True)
    for _ in range(2):
        read(extractor, tasks, views)
    texts = {text for task in tasks for text in (task.caption, *task.concepts.names)}
    if hasattr(extractor, "texts"):  # a method that makes prompts of words says which
        texts = extractor.texts(Batch(tasks))
    assert set(encoded.values()) == {1} and len(encoded) == len(texts)
