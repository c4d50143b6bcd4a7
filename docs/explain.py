# %% [markdown]
# # Where does a model find a word in a picture?
#
# Three lines do it. Here on the lab's Flux, which knows a drawn world of twelve objects and six grounds and ships with the
# package, so that nothing is downloaded; with `"black-forest-labs/FLUX.1-schnell"` the same lines run on photographs.
# Run this file with `python docs/explain.py`, or cell by cell in an editor that knows `# %%`. Pictures go to `explained/`.

# %%
from pathlib import Path

from conceptseg.data.scenes import draw_scene
from conceptseg.extractors.concept_attention import ConceptAttention

out = Path("explained")
scene = draw_scene("val", 0, 3, 64)  # an image, uint8 RGB, with its words
words = [*(placed.word for placed in scene.objects), scene.ground]

method = ConceptAttention.from_pretrained("lab:flux")
found = method.explain(scene.image, words, timesteps=[0.1], draws=3)

# %% [markdown]
# `found` is a mapping from names to maps, in the order asked. With a softmax over concepts the maps are shares of 1.

# %%
for name, one in found.items():
    print(f"{name:10} {tuple(one.shape)} greatest share {one.max():.2f}")
found.save(out / "scene.png")  # image, maps and overlays side by side
found.overlay(words[0]).save(out / f"{words[0]}.png")
found.save(out / "scene.safetensors")  # the numbers, with names and settings

# %% [markdown]
# Every switch of the method is a setting of the view: which space is scored, which layers, how noisy the image is made.

# %%
for space in ("output", "cross", "value"):
    maps = method.explain(scene.image, words, space=space, timesteps=[0.1], layers="last 2")
    print(space, "winner at the centre:", maps.names[maps.winner()[maps.maps.shape[1] // 2, maps.maps.shape[2] // 2]])

# %% [markdown]
# A string is a prompt: the image is made, and its maps are read on the way.

# %%
made = method.explain(f"a {words[0]} on {words[-1]}", [words[0], words[-1]], steps=8)
made.save(out / "made.png")
print("image", made.image.shape, "maps", tuple(made.maps.shape), "view", made.about["view"])

# %% [markdown]
# The same object is the benchmark's extractor: `conceptseg extractor=concept_attention` scores what these pictures show.
