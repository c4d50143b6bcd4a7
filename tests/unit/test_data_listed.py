"""The base classes of data sets on disk: what a short subclass gets from them."""

import numpy as np
import pytest
from PIL import Image

from conceptseg.data.listed import FilePairs, Pair
from conceptseg.data.made import made_scenes
from conceptseg.errors import DataError
from conceptseg.reading import read_lines


class Trimaps(FilePairs):
    name = "pets"
    remedy = "Unpack annotations.tar.gz again."
    remap = {1: 1, 2: 0, 3: 255}  # noqa: RUF012  (as an author would write it)

    def __init__(self, root, split="test", limit=None):
        super().__init__(root, limit)
        self.split = split

    def entries(self):
        for name in read_lines(self.root / f"{self.split}.txt"):
            yield name, Pair(f"images/{name}.png", f"masks/{name}.png", {1: "cat"})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name, scene in zip("abc", made_scenes(3), strict=True):
        Image.fromarray(scene.image).save(tmp_path / "images" / f"{name}.png")
        stored = np.where(scene.mask == 0, 2, np.where(scene.mask == 255, 3, 1)).astype(np.uint8)
        Image.fromarray(stored).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "test.txt").write_text("a\nb\nc")
    return tmp_path


def test_keys_limit_masks_and_words(folder):
    data = Trimaps(folder, limit=2)
    assert data.keys() == ("pets/a", "pets/b") and data.problems() == []
    scene, sample = made_scenes(1)[0], data.read("pets/a")
    assert (sample.image == scene.image).all() and sample.words == {1: "cat"}
    assert (sample.mask == np.where(scene.mask == 255, 255, np.minimum(scene.mask, 1))).all()
    with pytest.raises(DataError, match=r'no sample "pets/x" among 2.*Choices: pets/a, pets/b'):
        data.read("pets/x")


def test_the_fingerprint_holds_list_words_settings_and_contents_but_no_place_and_no_limit(folder, monkeypatch):
    first = Trimaps(folder).fingerprint()
    moved = folder.rename(folder.with_name("elsewhere"))
    assert Trimaps(moved, limit=1).fingerprint() == first
    with monkeypatch.context() as patch:
        patch.setattr(Trimaps, "remap", {1: 1, 2: 0, 3: 0})
        assert Trimaps(moved).fingerprint() != first
    told = Trimaps(moved)
    told.breed = "siamese"
    assert told.fingerprint() != first
    (moved / "masks" / "c.png").write_bytes((moved / "masks" / "a.png").read_bytes())
    assert Trimaps(moved, limit=1).fingerprint() != first


def test_problems_name_what_is_absent_and_what_is_damaged(folder):
    (folder / "images" / "b.png").unlink()
    (folder / "masks" / "c.png").write_bytes(b"")
    found = Trimaps(folder).problems()
    assert found[0].startswith("1 of the 3 files") and "(b.png): unpack annotations.tar.gz again." in found[0]
    assert len(found) == 2 and "pets/c: mask" in found[1]
    (folder / "test.txt").unlink()
    assert len(found := Trimaps(folder).problems()) == 1 and "test.txt is missing" in found[0]
    (missing,) = Trimaps(folder / "nowhere").problems()
    assert missing.endswith("nowhere does not exist. Unpack annotations.tar.gz again.")


def test_a_value_that_remap_does_not_name_is_refused(folder, monkeypatch):
    monkeypatch.setattr(Trimaps, "remap", {1: 1, 2: 0})
    with pytest.raises(DataError, match=r"a\.png holds the values 3; 1, 2 were wanted.*\n.*`remap` of Trimaps"):
        Trimaps(folder).read("pets/a")


def test_a_sample_that_is_listed_twice_is_refused(folder):
    (folder / "test.txt").write_text("a\nb\na")
    with pytest.raises(DataError, match=r'names 1 samples more than once \(first: "pets/a"\)'):
        Trimaps(folder).keys()
