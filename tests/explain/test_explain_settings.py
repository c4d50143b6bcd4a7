"""Refuse bad settings before the model runs, and constant maps, in conceptseg-explain and ConceptAttention.explain."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_flux, tiny_sd3

from conceptseg.backbones.settings import device_of
from conceptseg.cli.explain import explain, parse
from conceptseg.errors import ConfigError, DataError, ViewError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.extractors.explanation import remarks_on
from conceptseg.extractors.loading import load_extractor

IMAGE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def method(tmp_path_factory):
    return ConceptAttention.from_pretrained(tiny_flux(tmp_path_factory.mktemp("flux")), image_size=32, text_tokens=12)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("size=32", r"size is 32; wanted \[height,width\]"),
        ("size=[32]", r"size is \[32\]; wanted \[height,width\]"),
        ("size=[32,0]", "size is 0; wanted a whole number of at least 1"),
        ("size=[32,48.5]", "size is 48.5; wanted a whole number"),
        ("timesteps=0.5", r"timesteps is 0\.5; wanted a list of noise levels"),
        ("timesteps=[half]", "timesteps is 'half'; wanted a number"),
        ("draws=1.5", "draws is 1.5; wanted a whole number"),
        ("draws=0", "draws is 0; wanted a whole number of at least 1"),
        ("seed=99999999999999999999", "wanted a whole number of at least 0 and at most"),
        ("blur=-1", "blur is -1; wanted a number of at least 0"),
        ("blur=.inf", "blur is inf; wanted a number"),
        ("seed=abc", "seed is 'abc'; wanted a whole number"),
        ("seed=-1", "seed is -1; wanted a whole number"),
        ("seed=true", "seed is True; wanted a whole number"),
        ("concepts=[kite,grass", r'concepts: "\[kite,grass" can.t be read.*Is a bracket'),
        ("concepts=[on,boat]", r"concepts\.0: the bool True was read.*in quotes"),
        ("concepts=[boat,12:30]", r"concepts\.1: the int 750 was read.*in quotes"),
        ("concepts=[null]", r"concepts\.0: an empty value was read.*in quotes"),
        ("concepts=[kite,kite]", 'names "kite" twice'),
        ("concepts=[Kite,'kite ']", '"kite" and "kite"|"Kite" and "kite", which are one word'),
        ("concepts=['',kite]", r"concepts\.0: the word '' is empty"),
        ("concepts=[]", "wanted a list of concepts"),
        ("out=", "out is empty; wanted where pictures go"),
        ("out=x.pdf", r'out: saving to "x\.pdf": unknown ending "\.pdf"'),
        ("out=x.safetensors", 'unknown ending ".safetensors"'),
        ("maps=x.npy", r'maps: saving to "x\.npy": unknown ending'),
        ("out=/dev/null/x.png", '"/dev/null" is no folder'),
        ("device=mps", "sees no Apple GPU"),
        ("device=gpu", r'unknown "gpu"'),
        ("device=vulkan", "Choices: cpu"),
        ("steps=4", r"steps changes nothing here, it goes with prompt="),
    ],
)
def test_a_wrong_setting_is_one_clear_error_before_the_model_runs(said, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(ConceptAttention, "read_cells", lambda *a, **k: pytest.fail("the model ran"))
    words = ["image=photo.png", said] + ([] if said.startswith("concepts") else ["concepts=[kite,boat]"])
    with pytest.raises(ConfigError, match=wanted):
        explain(parse(words))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("steps=0", "steps is 0; wanted a whole number of at least 1"),
        ("steps=two", "steps is 'two'; wanted a whole number"),
        ("guidance=high", "guidance is 'high'; wanted a number"),
        ("guidance=-1", "guidance is -1; wanted a number of at least 0"),
        ("timesteps=[0.5]", r"timesteps changes nothing here, it goes with image="),
        ("prompt=a boat", "prompt is given twice"),
    ],
)
def test_wrong_settings_for_a_prompt_are_refused(said, wanted):
    with pytest.raises(ConfigError, match=wanted):
        parse(["prompt=a kite on grass", "concepts=[kite,grass]", said])


@pytest.mark.parametrize(
    ("settings", "error", "wanted"),
    [
        ({"size": 32}, ConfigError, r"size is 32; wanted \[height, width\]"),
        ({"size": (32,)}, ConfigError, "size is"),
        ({"size": (32, 33)}, ConfigError, "multiple of 4"),
        ({"timesteps": 0.5}, ConfigError, "timesteps is 0.5; wanted a list"),
        ({"timesteps": [2]}, ViewError, "out of range"),
        ({"steps": 4}, ConfigError, "steps=4 would change nothing"),
        ({"guidance": 3.0}, ConfigError, "guidance=3.0 would change nothing"),
        ({"prompt": "a boat"}, ConfigError, "wanted one of image"),
        ({"image": "a boat"}, ConfigError, r'no file and no URL.*prompt="a boat"'),
        ({"image": None, "prompt": "a boat", "steps": 0}, ConfigError, "steps is 0"),
        ({"image": None, "prompt": "a boat", "guidance": float("nan")}, ConfigError, "guidance is nan"),
        ({"image": None, "prompt": "a boat", "caption": "a boat"}, ConfigError, "caption='a boat' would change nothing"),
        ({"image": None, "prompt": "a boat", "timesteps": [0.5]}, ConfigError, "timesteps=.* would change nothing"),
        ({"seed": "abc"}, ConfigError, "^seed is 'abc'"),
        ({"seed": -(2**63) - 1}, ConfigError, "^seed is -9223372036854775809; wanted a whole number of at least -9"),
        ({"seed": -(2**63), "blur": -1}, ConfigError, "^blur is -1"),
        ({"blurr": 1}, ConfigError, "^blurr: a view has no such setting.*blur"),
        ({"blur": -1}, ConfigError, "blur is -1"),
        ({"draws": "two"}, ConfigError, "draws is 'two'"),
        ({"space": ["output", "cross"]}, ConfigError, "2 views"),
        ({"space": None}, ConfigError, "space is None; wanted a name"),
        ({"layers": 1.5}, ConfigError, "layers is 1.5"),
        ({"softmax": "per_cell", "words": ["kite"]}, ConfigError, '"kite" is the only concept'),
        ({"normalize": "linear", "words": ["kite"]}, ConfigError, '"kite" is the only concept'),
        ({"words": ["Kite", "kite "]}, ConfigError, "one word but for case and blanks"),
        ({"words": ["kite", ""]}, ConfigError, "is empty"),
        ({"words": ["kite", False]}, ConfigError, "the bool False was read"),
    ],
)
def test_the_same_settings_are_refused_from_python(method, monkeypatch, settings, error, wanted):
    monkeypatch.setattr(method, "read_cells", lambda *a, **k: pytest.fail("the model ran"))
    given = {"image": IMAGE, "words": ["kite", "boat"], **settings}
    with pytest.raises(error, match=wanted):
        method.explain(**given)


def test_settings_of_the_method_are_taken_and_misspelt_ones_refused_with_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (written,) = explain(parse(["extractor=naclip", "sigma=3.0", "extractor.backbone.dtype=float32", "maps=a.safetensors"]))[:1]
    assert written.exists() and Path("a.safetensors").stat().st_size > 0
    explain(parse(["extractor=naclip", "extractor.sigma=0.5", "maps=b.safetensors"]))
    assert Path("a.safetensors").read_bytes() != Path("b.safetensors").read_bytes()
    held = parse(["image=a.png", "concepts=[kite]", "extractor=gem", "layers=all", "extractor.layers=2"])
    assert held["layers"] == "all" and held["of_method"] == {"layers": 2}, "one name may be the view's and the method's"
    for words, wanted in (
        (["extractor=naclip", "sgma=3"], r'can.t read "sgma=3": .* nor of naclip. Did you mean "sigma"'),
        (["extractor=[naclip,gem]", "sigma=3"], "nor of gem"),
        (["extractor=naclip", "extractor.sigma=1", "sigma=3"], "sigma is given twice"),
        (["extractor=naclip", "sigma=[3"], r'sigma: "\[3" can.t be read'),
        (["extractor=naclip", "sigma=wide"], "^sigma is 'wide'; NACLIP wants"),
        (["extractor=naclip", "extractor.backbone.dtpye=float32"], 'dtpye: no such setting. Did you mean "dtype"'),
        (["extractor=daam", "backbone@extractor.backbone=sd2"], "Write model=sd2"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            explain(parse(words))
    with pytest.raises(ConfigError, match=r'sgma: no such setting. Did you mean "sigma"'):
        load_extractor("naclip", sgma=3)


def test_a_single_concept_is_scored_without_a_softmax(method):
    found = method.explain(IMAGE, ["kite"])
    assert "softmax" not in found.about["view"] and found["kite"].std() > 0 and "only word" in found.notes[0]
    shares = method.explain(IMAGE, ["kite"], background=["boat"], softmax="per_cell")
    assert list(shares) == ["kite"] and 0 < shares["kite"].max() < 1 and shares.others.shape[0] == 1
    assert torch.equal(found.scores, method.explain(IMAGE, ["kite"], softmax="none").scores)


def test_a_size_beyond_the_models_positions_is_refused(tmp_path):
    method = ConceptAttention.from_pretrained(tiny_sd3(tmp_path), image_size=16, text_tokens=12, clip_tokens=12)
    most = method.backbone.largest_grid * method.backbone.pixels_per_token
    with pytest.raises(ConfigError, match=f"at most {most} pixels"):
        method.explain(IMAGE, ["kite", "boat"], size=(16, most + method.backbone.pixels_per_token))


def test_a_model_that_answers_nan_is_refused_as_in_a_run(tmp_path):
    method = ConceptAttention.from_pretrained(tiny_flux(tmp_path), image_size=32, text_tokens=12)
    with torch.no_grad():
        next(method.backbone.transformer.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="the map holds NaN or infinity"):
        method.explain(IMAGE, ["kite", "boat"])
    with pytest.raises(DataError, match="NaN or infinity"):
        method.explain(prompt="a kite", words=["kite", "boat"], steps=1)


def test_maps_that_are_the_same_everywhere_are_refused_or_named():
    varied = torch.rand(1, 3, 4)
    with pytest.raises(DataError, match=r"the maps of a, b are the same number everywhere.*softmax=none"):
        remarks_on(["a", "b"], torch.stack([torch.ones(3, 4), torch.zeros(3, 4)]))
    (note,) = remarks_on(["a", "b"], torch.cat([varied, torch.zeros(1, 3, 4)]))
    assert note.startswith('the map of "b" is the same number everywhere')
    assert not remarks_on(["a"], varied)


@pytest.mark.parametrize("name", ["mps", "cuda:99", "gpu", "vulkan"])
def test_devices_that_are_not_here_are_refused(name, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        device_of(name)
    assert device_of("cpu").type == "cpu" and device_of("cuda:0").index == 0


def test_a_place_that_cannot_be_written_is_refused_before_the_model_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(ConceptAttention, "read_cells", lambda *a, **k: pytest.fail("the model ran"))
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "x_image.png").mkdir()
    for place in (tmp_path / "taken.png", tmp_path / "file" / "x.png", Path("/proc/x.png"), Path("/dev/null/x.png")):
        with pytest.raises(ConfigError, match="Name another place"):
            explain(parse([f"image={Path(__file__)}", "concepts=[kite,boat]", f"out={place}"]))
    with pytest.raises(ConfigError, match=r"x_image\.png(.|\n)*Name another place"):
        explain(parse(["prompt=a kite", "concepts=[kite,boat]", f"out={tmp_path / 'x.png'}"]))
    assert not list(tmp_path.glob("tmp*"))
