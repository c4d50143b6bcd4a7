"""Check the training batches of lab models: their scenes, and the captions of those scenes."""

import numpy as np
import pytest
import torch

from conceptseg.data.drawings import GROUNDS, OBJECTS, TINTS
from conceptseg.data.scenes import draw_hard_scene, draw_scene
from conceptseg.errors import ConfigError
from conceptseg.lab.captions import GLUE, NOUNS, describe, list_names, question
from conceptseg.lab.contrastive import CLIPTrainer
from conceptseg.lab.denoising import UNetTrainer
from conceptseg.lab.recipes import load_recipe
from conceptseg.lab.train import Trainer, make_trainer


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene("train", 0, index, size=32) for index in range(60)]


def said_of(scenes, **how):
    rng = np.random.default_rng(0)
    return [(scene, describe(scene, rng, **how)) for scene in scenes for _ in range(20)]


def test_a_description_is_true_of_its_scene(scenes):
    for scene, caption in said_of(scenes):
        known = {o.word for o in scene.objects} | {o.tint for o in scene.objects} | {scene.ground} | set(GLUE)
        assert set(caption.words) <= known and not any(caption.swapped)


def test_a_colour_stands_before_the_object_that_has_it(scenes):
    for scene, caption in said_of(scenes, tint=1.0):
        pairs = {(o.tint, o.word) for o in scene.objects}
        assert all((w, caption.words[i + 1]) in pairs for i, w in enumerate(caption.words) if w in TINTS)


def test_a_list_names_every_object_and_tells_two_of_a_kind_apart(scenes):
    rng = np.random.default_rng(2)
    pairs = [draw_hard_scene("train", 0, index, size=32, kind="tint").scene for index in range(20)]
    seen = set()
    for scene in [*scenes, *pairs]:
        caption = list_names(scene, rng)
        assert sorted(w for w in caption.words if w in OBJECTS) == sorted(o.word for o in scene.objects)
        assert not set(caption.words) & set(GLUE) and not any(caption.swapped)
        tinted = [(w, caption.words[i + 1]) for i, w in enumerate(caption.words) if w in TINTS]
        assert set(tinted) <= {(o.tint, o.word) for o in scene.objects}
        kinds = [o.word for o in scene.objects]
        assert all((o.tint, o.word) in tinted for o in scene.objects if kinds.count(o.word) > 1)
        seen.add(len(set(caption.words) & set(GROUNDS)))
    assert seen == {0, 1, len(GROUNDS)}


def test_the_u_net_is_told_lists_in_the_phase_that_asks_for_them(scenes, monkeypatch):
    recipe = load_recipe("sd", ["batch=24", "sizes.channels=[16,16,16]", "sizes.norm_groups=4"])
    assert recipe["list_share"] == 0 and recipe["phases"][-1]["list_share"] > 0
    trainer = make_trainer(recipe)
    told = []
    predict = trainer.predicted_velocity
    monkeypatch.setattr(trainer, "predicted_velocity", lambda n, at, said: told.append(said) or predict(n, at, said))
    shown = [draw_scene("train", 0, index, size=32, objects=(3, 3)) for index in range(24)]
    for step in (0, recipe["steps"] - 1):
        trainer.step = step
        trainer.losses(shown, np.random.default_rng(0), torch.Generator().manual_seed(0))
    before, after = (sum(len(s.split()) > 3 and not set(s.split()) & set(GLUE) for s in said) for said in told)
    assert before == 0 < after < 24


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["flux", "sd3", "sd", "sdxl", "clip", "vit", "dino"])
def test_every_phase_of_a_recipe_begins_and_learns_until_the_next(name, device):
    recipe = load_recipe(name, device=device)
    trainer = Trainer.__new__(UNetTrainer)
    trainer.recipe = recipe
    begins = [phase["from"] for phase in recipe.get("phases", [])]
    assert begins == sorted(begins) and all(0 < begin < recipe["steps"] for begin in begins)
    for last in [*(begin - 1 for begin in begins), recipe["steps"] - 1]:
        trainer.step = last
        assert trainer.rate() > 0
    trainer.step = recipe["steps"]
    assert trainer.rate() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "overrides", [["plain_scenes=0"], ["plain_scenes=0", "plain_share=0", "phases=[{from: 2, plain_share: 0.5}]"]]
)
def test_a_share_of_plain_scenes_where_there_are_none_is_refused(overrides):
    with pytest.raises(ConfigError, match="Set plain_scenes, or plain_share=0"):
        load_recipe("vit", overrides)
    assert load_recipe("vit", ["plain_scenes=0", "plain_share=0", "phases=[]"])["plain_scenes"] == 0


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_share_of_lone_names_is_what_was_asked(scenes, share):
    captions = [c for _, c in said_of(scenes, lone=share)]
    lone = [c for c in captions if c.words in {(w,) for w in OBJECTS} | {("a", w) for w in OBJECTS}]
    # Of whole captions a few shrink to a lone name too: one object, no colour, no ground.
    assert share - 0.04 < len(lone) / len(captions) < share + 0.1
    assert not [c for c, told in ((c, t) for _, c in said_of(scenes, tint=0.0) for t in TINTS) if told in c.words]


def test_a_question_marks_exactly_the_words_that_are_not_true(scenes):
    rng = np.random.default_rng(1)
    for scene in scenes:
        caption = question(scene, rng, 0.4)
        objects = {o.word for o in scene.objects}
        for word, swapped in zip(caption.words, caption.swapped, strict=True):
            if word in NOUNS:
                assert swapped == (word not in objects | {scene.ground})


def test_half_of_a_batch_comes_from_scenes_with_one_object():
    scenes = [draw_scene("train", 0, index, size=16, objects=(2, 2) if index % 10 else (1, 1)) for index in range(50)]
    recipe = load_recipe(
        "vit", ["batch=400", "sizes.width=16", "sizes.heads=2", "sizes.layers=1", "single_share=0.5", "plain_share=0"]
    )
    trainer = make_trainer(recipe)
    lone = np.mean([len(scenes[i].objects) == 1 for i in trainer.choose(scenes, np.random.default_rng(0))])
    assert lone == pytest.approx(0.5 + 0.5 * 0.1, abs=0.07)
    crowded = [s for s in scenes if len(s.objects) == 2]
    trainer = make_trainer(recipe)
    assert len(trainer.choose(crowded, np.random.default_rng(0))) == 400  # none with one object: any will do


def test_moved_scenes_hold_what_the_scenes_held(scenes):
    recipe = load_recipe("vit", ["sizes.width=16", "sizes.heads=2", "sizes.layers=1", "shift=3"])
    trainer = make_trainer(recipe)
    whole, moved = trainer.images(scenes[:24]), trainer.moved_images(scenes[:24], np.random.default_rng(0))
    assert moved.shape == whole.shape
    places = set()
    for image, shown in zip(whole, moved, strict=True):
        middle = shown[:, 8:24, 8:24]
        found = [
            (flip, y, x)
            for flip, source in enumerate((image, image.flip(-1)))
            for y in range(5, 12)
            for x in range(5, 12)
            if torch.equal(source[:, y : y + 16, x : x + 16], middle)
        ]
        assert len(found) == 1  # mirrored or not, moved by -3 to 3 pixels each way
        places.add(found[0])
    assert len({flip for flip, _, _ in places}) == 2 and len(places) > 12


def test_a_caption_is_compared_with_the_patches_most_like_it():
    generator = torch.Generator().manual_seed(0)
    patches, texts = torch.randn(3, 5, 8, generator=generator), torch.randn(4, 8, generator=generator)
    texts = texts / texts.norm(dim=-1, keepdim=True)
    found = CLIPTrainer.by_patches(CLIPTrainer.__new__(CLIPTrainer), patches, texts)
    for image in range(3):
        for text in range(4):
            alike = [float(p @ texts[text] / p.norm()) for p in patches[image]]
            weights = np.exp(10 * np.array(alike))
            assert float(found[image, text]) == pytest.approx(float(weights @ alike / weights.sum()), abs=1e-5)


def test_the_patch_loss_learns_and_leaves_no_hook():
    scenes = [draw_scene("train", 0, index, size=48) for index in range(8)]
    sizes = ["sizes.width=16", "sizes.head_width=8", "sizes.layers=1", "sizes.text_width=8", "sizes.text_layers=1", "batch=8"]
    total = []
    for weight in (0.0, 2.0):
        trainer = make_trainer(load_recipe("clip", [*sizes, f"patch_weight={weight}"]))
        losses = trainer.losses(scenes, np.random.default_rng(0), torch.Generator().manual_seed(0))
        torch.testing.assert_close(losses["total"], losses["contrast"] + weight * losses["patches"])
        losses["patches"].backward()
        assert trainer.parts["model"].visual.proj.grad.abs().sum() > 0
        assert not trainer.parts["model"].visual.ln_post._forward_hooks
        total.append(float(losses["total"]))
    assert total[0] != total[1]
