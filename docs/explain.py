# %% [markdown]
# # Where does a model find a word in a picture?
#
# Here on the lab's models, which know a drawn world of twelve objects and six grounds and ship with the package: nothing is
# downloaded; with `"black-forest-labs/FLUX.1-schnell"` the same lines run on photographs.
# Run this file with `python docs/explain.py`, or cell by cell in an editor that knows `# %%`. Pictures go to `explained/`.

# %%
from pathlib import Path

from conceptseg import DAAM, ConceptAttention, TextSpan, example_scene, load_extractor, side_by_side

out = Path("explained")
scene = example_scene()  # an image, uint8 RGB, with its words
words = [placed.word for placed in scene.objects]

method = ConceptAttention.from_pretrained("lab:flux")
found = method.explain(scene.image, words, background=[scene.ground], draws=3)

# %% [markdown]
# `found` is a mapping from words to maps, in the order asked. With a softmax over words the maps are shares of 1.

# %%
for name, one in found.items():
    print(f"{name:10} {tuple(one.shape)} greatest share {one.max():.2f}, {found.mask(name).mean():.0%} of the image")
found.save(out / "scene.png")  # image, overlays and legend
found.overlay(words[0]).save(out / f"{words[0]}.png")
found.save(out / "scene.safetensors")  # the numbers, with names and settings

# %% [markdown]
# Other methods answer the same question. Gradient methods take the names of classes that their model knows.

# %%
others = {
    "ConceptAttention": found,
    "DAAM": DAAM.from_pretrained("lab:sdxl").explain(scene.image, words, background=[scene.ground]),
    "TextSpan": TextSpan.from_pretrained("lab:clip").explain(scene.image, words, background=[scene.ground]),
    "GradCAM": load_extractor("attention_gradcam").explain(scene.image, words),
}
side_by_side(others).save(out / "methods.png")

# %% [markdown]
# Every switch of the method is a setting of the view: which space is scored, which layers, how noisy the image is made.

# %%
for space in ("output", "cross", "value"):
    maps = method.explain(scene.image, words, space=space, timesteps=[0.1], layers="last 2")
    print(space, "winner at the centre:", maps.names[maps.winner()[maps.scores.shape[1] // 2, maps.scores.shape[2] // 2]])

# %% [markdown]
# Of a prompt the image is made, and its maps are read on the way.

# %%
made = method.explain(prompt=f"a {words[0]} on {scene.ground}", words=[words[0], scene.ground], steps=8)
made.save(out / "made.png")
print("image", made.image.shape, "maps", tuple(made.scores.shape), "view", made.about["view"])

# %% [markdown]
# The same objects are the benchmark's extractors: `conceptseg extractor=concept_attention` scores what these pictures show.
