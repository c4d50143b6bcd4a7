"""Explaining one image or prompt: from Python, from the shell, and in the tour of docs/."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny import tiny_flux, tiny_sd3

from conceptseg.backbones.base import Backbone
from conceptseg.backbones.sheet_files import sheets
from conceptseg.backbones.sheets import backbone_of
from conceptseg.backbones.transformers.prompts import pooled_tokens
from conceptseg.cli.explain import SETTINGS, explain, parse
from conceptseg.errors import ConfigError, DataError
from conceptseg.extractors.concept_attention import ConceptAttention
from conceptseg.extractors.proxyclip import ProxyCLIP
from conceptseg.saliency.views import expand_views
from conceptseg.types import Batch, Concepts, Task

DOCS = Path(__file__).parents[2] / "docs"
WORDS = ["fish", "boat", "sky"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def method(folder):
    return ConceptAttention.from_pretrained(folder, image_size=32, resize="bicubic", text_tokens=12)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)).save(path)
    return path


def test_maps_have_names_and_the_images_proportions(method, photo):
    found = method.explain(photo, WORDS)
    assert list(found) == WORDS and len(found) == 3 and found.image.shape == (50, 90, 3)
    assert found["boat"].shape == (6, 11) and torch.equal(found["boat"], found.scores[1])  # 24 x 44 px: 50 x 90 at 32 x 32's area
    torch.testing.assert_close(found.scores.sum(0), torch.ones(6, 11))  # shares of 1
    assert found.winner().shape == (6, 11) and found.about["provenance"] == "random"
    with pytest.raises(ConfigError, match=r'there is no map of "bat"\. Did you mean "boat"'):
        found["bat"]


def test_a_path_a_picture_and_its_bytes_are_explained_alike(method, photo):
    one = method.explain(photo, WORDS).scores
    picture = Image.open(photo)
    for same in (picture, np.asarray(picture), np.asarray(picture).astype(np.float32) / 255):
        assert torch.equal(one, method.explain(same, WORDS).scores)


def test_explaining_is_what_the_benchmark_reads(method):
    """The same object is the extractor: an image of the model's own size gives the maps of a batch of one."""
    image = np.random.default_rng(1).random((32, 32, 3), np.float32)
    image = np.round(255 * image) / 255
    view = {"space": "output", "layers": "last half", "timesteps": [0.5], "softmax": "per_cell"}
    concepts = Concepts(tuple(WORDS), (1, 0, 0))
    task = Task("explained", image.astype(np.float32), np.zeros((32, 32), np.uint8), concepts, "a fish", (0, 1))
    (maps,) = method.stream(Batch((task,)), list(expand_views({"v": view}, method.axes()).values()))
    assert torch.equal(maps.scores[0], method.explain(image, WORDS, caption="a fish").scores)


def test_view_settings_size_and_caption_are_used(method, photo):
    plain = method.explain(photo, WORDS)
    for other in ({"layers": "0"}, {"space": "cross"}, {"draws": 2}, {"timesteps": [0.2]}, {"blur": 1.0}, {"caption": "a fish"}):
        assert not torch.equal(plain.scores, method.explain(photo, WORDS, **other).scores), other
    assert method.explain(photo, WORDS, size=(16, 40)).scores.shape == (3, 4, 10)
    with pytest.raises(ConfigError, match="layrs"):
        method.explain(photo, WORDS, layrs="0")


def test_a_string_is_a_prompt_and_its_image_comes_along(method):
    found = method.explain(prompt="a fish on sky", words=WORDS, steps=2, size=(24, 32))
    assert found.image.shape == (24, 32, 3) and found.scores.shape == (3, 6, 8) and found.about["prompt"] == "a fish on sky"
    assert "t1," in found.about["view"]  # the levels that were read


@pytest.mark.parametrize(
    ("image", "words", "error", "said"),
    [
        (np.zeros((5, 4, 2)), WORDS, DataError, r"shape \[5, 4, 2\]: wanted \[height, width, 3\]"),
        (np.full((4, 4, 3), 7.0), WORDS, DataError, "wanted uint8, or float in 0..1"),
        (Path("nowhere.jpg"), WORDS, DataError, "nowhere.jpg is missing"),
        (np.zeros((8, 8, 3)), [], ConfigError, "wanted a list of words"),
        (np.zeros((8, 8, 3)), "fish", ConfigError, "wanted a list of words"),
        (np.zeros((8, 8, 3)), ["fsh", "sky"], DataError, '"fsh" is unknown.*fish'),
    ],
)
def test_what_cannot_be_explained_is_refused_with_the_reason(method, image, words, error, said):
    with pytest.raises(error, match=said):
        method.explain(image, words)


def test_pictures_and_numbers_are_written(method, photo, tmp_path):
    found = method.explain(photo, WORDS)
    over = found.overlay("fish")
    assert over.size == (90, 50) and not np.array_equal(np.asarray(over), found.image)
    assert np.array_equal(np.asarray(found.overlay("fish", opacity=0.0)), found.image)
    with Image.open(found.save(tmp_path / "new" / "sheet.png")) as sheet:
        assert sheet.size[0] > 4 * 90 and sheet.size[1] > 2 * 50
    with safe_open(found.save(tmp_path / "maps.safetensors"), "pt") as opened:
        assert torch.equal(opened.get_tensor("maps"), found.scores) and json.loads(opened.metadata()["names"]) == WORDS
    with pytest.raises(ConfigError, match=r'unknown ending ".gif"'):
        found.save(tmp_path / "maps.gif")


# ---------------------------------------------------------------- words of several tokens

LONG = torch.tensor([[1.0, 4.0], [3.0, 0.0]])
SHORT = torch.tensor([[5.0, 5.0]])


@pytest.mark.parametrize(
    ("pooling", "one"), [("first", [1.0, 4.0]), ("last", [3.0, 0.0]), ("mean", [2.0, 2.0]), ("max", [3.0, 4.0])]
)
def test_a_word_of_several_tokens_is_one_token_by_its_pooling(pooling, one):
    found = pooled_tokens([[LONG, SHORT]], pooling)
    assert found.tokens.tolist() == [[one, [5.0, 5.0]]] and found.words is None and found.present is None


def test_joint_tokens_all_travel_and_their_words_are_scored():
    found = pooled_tokens([[LONG, SHORT], [SHORT, SHORT]], "joint")
    assert found.tokens.shape == (2, 3, 2) and found.present.tolist() == [[True] * 3, [True, True, False]]
    vectors = torch.arange(18.0).reshape(2, 3, 3)
    words = found.by_word(vectors)
    assert torch.equal(words[0], torch.stack([vectors[0, :2].mean(0), vectors[0, 2]])) and torch.equal(words[1], vectors[1, :2])


@pytest.mark.parametrize("pooling", ["first", "last", "mean", "max", "joint"])
def test_every_pooling_runs_and_long_words_leave_the_other_rows_alone(folder, pooling):
    """Padding of the shorter row joins no attention: beside a longer row its maps are what they are alone."""
    method = ConceptAttention.from_pretrained(folder, image_size=32, text_tokens=8, concept_pooling=pooling)
    task = {"image": np.full((32, 32, 3), 0.3, np.float32), "truth": np.zeros((32, 32), np.uint8), "classes": (0, 1)}
    rows = [
        Task("a", concepts=Concepts(("red fish", "blue sky"), (1, 0)), caption="a fish", **task),
        Task("b", concepts=Concepts(("boat", "sand"), (1, 0)), caption="a boat", **task),
    ]
    settings = {"v": {"space": ["output", "cross"], "timesteps": [0.5], "normalize": "linear"}}
    views = list(expand_views(settings, method.axes()).values())
    together = [maps.scores for maps in method.stream(Batch(tuple(rows)), views)]
    for number, row in enumerate(rows):
        for maps, alone in zip(together, method.stream(Batch((row,)), views), strict=True):
            torch.testing.assert_close(maps[number], alone.scores[0], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- which model


def test_a_known_repository_brings_its_pinned_sheet_and_given_settings_win():
    schnell = backbone_of("black-forest-labs/FLUX.1-schnell")
    assert schnell.checkpoint.revision == "741f7c3ce8b383c54771c7003378a50191e9efe9" and schnell.text_tokens == 256
    assert backbone_of("flux_dev").text_tokens == 512 and backbone_of("flux_dev", text_tokens=99).text_tokens == 99
    assert backbone_of("black-forest-labs/FLUX.1-schnell", revision="abc").checkpoint.revision == "abc"
    assert all(isinstance(backbone_of(name), Backbone) for name, _ in sheets())


def test_a_folder_is_known_by_its_transformer(folder, tmp_path):
    assert backbone_of(folder).kind == "flux" and backbone_of(tiny_sd3(tmp_path)).kind == "sd3"
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace("SD3Transformer2DModel", "MochiTransformer3DModel"))
    with pytest.raises(ConfigError, match="its transformer is a MochiTransformer3DModel"):
        backbone_of(str(tmp_path))


def test_a_method_on_two_models_brings_the_other_one_of_its_sheet():
    assert ProxyCLIP.from_pretrained("lab:clip").proxy.checkpoint.path == "lab:vit"


def test_settings_that_no_one_takes_are_refused(folder):
    with pytest.raises(ConfigError, match=r"image_siz: no such setting.*image_size"):
        ConceptAttention.from_pretrained(folder, image_siz=32)


# ---------------------------------------------------------------- the shell


def test_the_shell_writes_a_sheet_the_image_and_the_numbers(folder, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"image={photo}", "concepts=[fish, boat]", f"model={folder}", "timesteps=[0.3]", "layers=0-1", "size=[32,40]"]
    assert [p.name for p in explain(parse([*words, "maps=m.safetensors"]))] == ["explained.png", "m.safetensors"]
    made = [f"prompt=a {WORDS[0]}", "concepts=[fish]", f"model={folder}", "steps=1", "size=[32,32]", "out=x/made.png"]
    assert [p.name for p in explain(parse(made))] == ["made.png", "made_image.png"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["imag=a.jpg"], 'can\'t read "imag=a.jpg".*image'),
        (["photo.jpg", "concepts=[a]"], r"Write image=photo\.jpg\."),
        (["image=a.jpg", "prompt=b", "concepts=[c]"], "one of image="),
        (["image=a.jpg"], r"concepts=\[dragon,rock\]"),
        (["image=a.jpg", "concepts=dragon"], r"concepts=\[dragon,rock\]"),
    ],
)
def test_the_shell_refuses_with_what_is_wanted(words, said):
    with pytest.raises(ConfigError, match=said):
        parse(words)


def test_the_shells_help_names_every_setting_and_loads_no_torch():
    code = (
        "import sys; sys.argv = ['x', '--help']; from conceptseg.cli.explain import main; "
        "main(); assert 'torch' not in sys.modules"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and all(f"{key}=" in said.stdout for key in SETTINGS), said.stderr


def test_the_tour_runs_on_the_labs_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(DOCS / "explain.py"))
    assert {"scene.png", "scene.safetensors", "made.png"} <= set(os.listdir(tmp_path / "explained"))
    assert "greatest share" in capsys.readouterr().out
