"""ImageNet-Segmentation: the MATLAB file, its words, and what is wrong with it."""

import multiprocessing
import pickle
import tracemalloc
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress

import h5py
import numpy as np
import pytest

from conceptseg.data.base import SegmentationDataset
from conceptseg.data.drawings import OBJECTS
from conceptseg.data.imagenet_segmentation import ImageNetSegmentation
from conceptseg.data.made import WNID, made_scenes, main_word, write_mat
from conceptseg.data.words import imagenet_nouns
from conceptseg.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def scenes():
    return made_scenes(4, seed=3)


@pytest.fixture()
def mat(tmp_path, scenes):
    return write_mat(tmp_path / "gtsegs_ijcv.mat", scenes)


def test_image_mask_and_word_come_as_they_were_written(mat, scenes):
    data = ImageNetSegmentation(mat)
    assert isinstance(data, SegmentationDataset) and data.problems() == []
    for row, (key, scene) in enumerate(zip(data.keys(), scenes, strict=True)):
        sample, word = data.read(key), main_word(scene)
        assert key == f"imagenet_segmentation/{WNID[word]}_{row}"
        assert (sample.image == scene.image).all() and sample.image.shape == (48, 64, 3)
        assert (sample.mask == (scene.mask == OBJECTS.index(word) + 1)).all()
        lemma, noun = imagenet_nouns()[WNID[word]]
        assert sample.words == {1: noun} and sample.about == {"wnid": WNID[word], "lemma": lemma}


def test_the_made_file_has_the_layout_of_the_published_one(mat):
    assert mat.read_bytes()[:10] == b"MATLAB 7.3" and mat.read_bytes()[512:516] == b"\x89HDF"
    with h5py.File(mat) as file:
        assert file["value/img"].shape == (4, 1) and file[file["value/img"][0, 0]].shape == (3, 64, 48)
        assert file[file["value/gt"][0, 0]].shape == (1, 1)


def test_the_folder_of_the_file_is_a_root_too(mat, scenes):
    assert ImageNetSegmentation(mat.parent).keys() == ImageNetSegmentation(mat).keys()
    mat.rename(mat.with_name("other.mat"))
    assert ImageNetSegmentation(mat.parent).problems() == []
    write_mat(mat.with_name("another.mat"), scenes)
    assert "2 .mat files (another.mat, other.mat)" in ImageNetSegmentation(mat.parent).problems()[0]


def test_every_drawn_object_has_an_id_with_a_noun():
    assert set(WNID) == set(OBJECTS) and set(WNID.values()) <= set(imagenet_nouns())


def test_listing_reads_no_image(mat):
    with h5py.File(mat, "r+") as file:
        file["value/img"][0, 0] = h5py.Reference()  # points to nothing
    data = ImageNetSegmentation(mat)
    assert len(data.keys()) == 4
    with pytest.raises(DataError, match=r"reading row 0"):
        data.read(data.keys()[0])


def test_an_id_that_comes_again_gets_a_key_of_its_own(tmp_path, scenes):
    ids = ["n02981792_1", "n00471613_2", "n02981792_1", "n02981792_1"]
    data = ImageNetSegmentation(write_mat(tmp_path / "twice.mat", scenes, ids))
    assert [key.rpartition("/")[2] for key in tuple(data.keys())] == [
        "n02981792_1",
        "n00471613_2",
        "n02981792_1@2",
        "n02981792_1@3",
    ]
    assert data.read(data.keys()[3]).about["wnid"] == "n02981792" and data.problems() == []
    assert (data.read(data.keys()[3]).image == scenes[3].image).all()


def test_keys_are_the_same_under_a_limit(mat):
    assert ImageNetSegmentation(mat, limit=2).keys() == ImageNetSegmentation(mat).keys()[:2]
    with pytest.raises(ConfigError, match=r"dataset\.limit is 0"):
        ImageNetSegmentation(mat, limit=0)


def test_an_unknown_word_is_named_with_the_setting(tmp_path, scenes):
    data = ImageNetSegmentation(
        write_mat(tmp_path / "x.mat", scenes, ["n99999999_1", "n02981792_1", "n02981792_2", "n02981792_3"])
    )
    with pytest.raises(DataError, match=r'n99999999_1: unknown word: WordNet id "n99999999" .*\s+.*dataset\.words'):
        data.read(data.keys()[0])
    assert len(data.problems()) == 1 and data.problems()[0].startswith("Unknown words: 1 WordNet ids")


def test_words_of_ones_own_replace_the_shipped_ones(tmp_path, scenes):
    mat = write_mat(tmp_path / "x.mat", scenes[:1], ["n99999999_1"])
    own = tmp_path / "words.csv"
    own.write_text("wnid,lemma,noun\nn99999999,unicorn,horse\n")
    data = ImageNetSegmentation(mat, words=own)
    assert data.read(data.keys()[0]).words == {1: "horse"} and data.fingerprint() != ImageNetSegmentation(mat).fingerprint()
    own.write_text("wnid,name\nn99999999,unicorn\n")
    assert "lemma, noun lacking" in ImageNetSegmentation(mat, words=own).problems()[0]
    assert "none.csv is missing" in ImageNetSegmentation(mat, words=tmp_path / "none.csv").problems()[0]


def test_a_missing_file_says_how_to_get_it(tmp_path):
    data = ImageNetSegmentation(tmp_path / "gtsegs_ijcv.mat")
    with pytest.raises(
        DataError, match=r"does not exist\.\s+Fetch it with scripts/fetch_imagenet_segmentation\.py, or set dataset"
    ):
        data.keys()
    (tmp_path / "gtsegs_ijcv.mat.partial").touch()
    assert "unfinished download" in data.problems()[0]
    assert "no .mat file" in ImageNetSegmentation(tmp_path).problems()[0]


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_a_truncated_file_is_named(mat, keep):
    whole = mat.read_bytes()
    mat.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(DataError, match=r"gtsegs_ijcv\.mat, listing the ids: the file is damaged or cut short at \d+ bytes"):
        ImageNetSegmentation(mat).keys()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"<html>404</html>", "is not an HDF5 file"), (b"MATLAB 5.0 MAT-file" + bytes(600), "is a MATLAB 5 file")],
)
def test_a_file_of_another_kind_is_named(tmp_path, content, said):
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(DataError, match=said):
        ImageNetSegmentation(tmp_path / "x.mat").keys()


def test_an_hdf5_file_with_other_contents_is_named(tmp_path):
    with h5py.File(tmp_path / "x.mat", "w") as file:
        file["pixels"] = [1, 2]
    assert "not laid out as gtsegs_ijcv.mat" in ImageNetSegmentation(tmp_path / "x.mat").problems()[0]


def test_a_mask_of_another_size_is_named(mat):
    _replace(mat, "gt1", np.zeros((48, 64), np.uint8))
    data = ImageNetSegmentation(mat)
    with pytest.raises(DataError, match=r"_1: the mask is 64 x 48 .* its image is 48 x 64"):
        data.read(data.keys()[1])


def test_a_mask_value_beyond_one_is_named(mat):
    _replace(mat, "gt1", np.full((64, 48), 9, np.uint8))
    data = ImageNetSegmentation(mat)
    with pytest.raises(DataError, match="holds the values 9; 0, 1 and 255"):
        data.read(data.keys()[1])


def test_an_image_of_another_kind_is_named(mat):
    _replace(mat, "img1", np.zeros((3, 64, 48), np.float32))
    data = ImageNetSegmentation(mat)
    with pytest.raises(DataError, match=r"the image is float32 \(3, 64, 48\)"):
        data.read(data.keys()[1])


def test_a_grey_image_becomes_rgb(mat):
    _replace(mat, "img1", np.full((64, 48), 7, np.uint8))
    data = ImageNetSegmentation(mat)
    assert (data.read(data.keys()[1]).image == np.full((48, 64, 3), 7)).all()


def _replace(mat, name, values):
    """Overwrites one array of the file, references included."""
    with h5py.File(mat, "r+") as file:
        del file[f"#refs#/{name}"]
        fresh = file.create_dataset(f"#refs#/{name}", data=values)
        if name.startswith("gt"):
            file[f"#refs#/gtcell{name[2:]}"][0, 0] = fresh.ref
        else:
            file["value/img"][int(name[3:]), 0] = fresh.ref


def test_a_copy_opens_the_file_for_itself(mat):
    data = ImageNetSegmentation(mat)
    before = data.read(data.keys()[0])
    copy = pickle.loads(pickle.dumps(data))
    assert not hasattr(copy._handles, "held")
    assert (copy.read(copy.keys()[0]).image == before.image).all() and copy._handles.held[1] is not data._handles.held[1]


def test_worker_processes_read_the_same(mat):
    data = ImageNetSegmentation(mat)
    before = data.read(data.keys()[0])
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        after = pool.submit(data.read, data.keys()[0]).result(timeout=120)
    assert (after.image == before.image).all() and (after.mask == before.mask).all() and after.words == before.words


def test_every_thread_has_its_own_handle(mat):
    data = ImageNetSegmentation(mat)
    alone = [data.read(key).mask for key in tuple(data.keys())]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda key: data.read(key).mask, data.keys() * 5))
    assert all((mask == alone[n % 4]).all() for n, mask in enumerate(together))


def test_the_fingerprint_follows_the_content(tmp_path, mat, scenes):
    before = ImageNetSegmentation(mat).fingerprint()
    assert ImageNetSegmentation(write_mat(tmp_path / "same.mat", scenes)).fingerprint() == before
    assert ImageNetSegmentation(write_mat(tmp_path / "less.mat", scenes[:3])).fingerprint() != before
    assert ImageNetSegmentation(mat, limit=2).fingerprint() == before
    with mat.open("r+b") as file:  # one flipped byte of a small file is within the sampled blocks
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert ImageNetSegmentation(mat).fingerprint() != before


def test_an_unknown_key_offers_the_nearest(mat):
    data = ImageNetSegmentation(mat)
    with pytest.raises(DataError, match=f'Did you mean "{data.keys()[0]}"'):
        data.read(data.keys()[0][:-1])


def test_the_fingerprint_sees_any_byte_of_the_file(mat):
    with h5py.File(mat, "r+") as file:
        file["pad"] = np.zeros(4 << 20, np.uint8)
    before, whole = ImageNetSegmentation(mat).fingerprint(), bytearray(mat.read_bytes())
    for place in np.random.default_rng(0).integers(2048, len(whole), 20):
        whole[place] ^= 1
        mat.write_bytes(whole)
        with suppress(DataError):  # where the ids can't be listed any more
            assert ImageNetSegmentation(mat).fingerprint() != before
        whole[place] ^= 1
    mat.write_bytes(whole)
    assert ImageNetSegmentation(mat).fingerprint() == before


def hostile(mat, kind, outside):
    with h5py.File(mat, "r+") as file:
        if kind == "30 GB":
            stored = file.create_dataset("#refs#/huge", (3, 100_000, 100_000), "u1", chunks=(1, 1_000, 1_000))
        elif kind == "a block of 4 GB":
            shape = (3, 8, 8)
            stored = file.create_dataset("#refs#/huge", shape, "u1", chunks=(1, 65_536, 65_000), maxshape=(None,) * 3)
        elif kind == "external storage":
            stored = file.create_dataset("#refs#/outside", (3, 8, 8), "u1", external=[(str(outside), 0, 192)])
        else:
            layout = h5py.VirtualLayout((3, 8, 8), "u1")
            layout[:] = h5py.VirtualSource(str(outside), "x", (3, 8, 8), "u1")
            stored = file.create_virtual_dataset("#refs#/outside", layout)
        file["value/img"][0, 0] = stored.ref


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("30 GB", "claims 30,000,000,000 values"),
        ("a block of 4 GB", "claims 4,259,840,000 values"),
        ("external storage", "keeps its values in other files"),
        ("a virtual data set", "keeps its values in other files"),
    ],
)
def test_what_a_file_claims_is_checked_before_it_is_read(mat, tmp_path, kind, message):
    (tmp_path / "secret").write_bytes(bytes(192))
    hostile(mat, kind, tmp_path / "secret")
    data = ImageNetSegmentation(mat)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"reading row 0: .*{message}"):
        data.read(data.keys()[0])
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("link", [h5py.ExternalLink("other.mat", "value"), h5py.SoftLink("/#refs#")])
def test_links_to_other_places_are_not_followed(mat, tmp_path, scenes, link):
    write_mat(mat.with_name("other.mat"), scenes)
    with h5py.File(mat, "r+") as file:
        del file["value"]
        file["value"] = link
    with pytest.raises(DataError, match=f"value is a link \\({type(link).__name__}\\)"):
        ImageNetSegmentation(mat).keys()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_words_of_excel_are_read_and_a_doubled_id_is_refused(tmp_path, scenes, encoding):
    mat = write_mat(tmp_path / "x.mat", scenes[:1], ["n99999999_1"])
    own = tmp_path / "words.csv"
    own.write_bytes("wnid;lemma;noun\r\nn99999999;éléphant;elephant\r\n".encode(encoding))
    data = ImageNetSegmentation(mat, words=own)
    assert data.read(data.keys()[0]).about["lemma"] == "éléphant"
    own.write_text("wnid,lemma,noun\nn99999999,a,cat\nn99999999,b,dog\n")
    assert 'line 3: n99999999 is "cat" above and "dog" here' in ImageNetSegmentation(mat, words=own).problems()[0]
