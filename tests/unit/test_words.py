"""Words mean one thing: how they are compared, read from YAML, and found where an extractor put them."""

import numpy as np
import pytest
import yaml
from diffusers import StableDiffusionPipeline
from test_trace import FOLDER

from conceptseg.backbones.word_tokens import occurrences, placed, positions_of
from conceptseg.data.hub import HubTable
from conceptseg.errors import ConfigError, DataError
from conceptseg.protocols import Excluded, SegmentationProtocol
from conceptseg.segment.segmenter import Segmenter
from conceptseg.types import Concepts, Sample, checked_word, folded


def protocol(**settings):
    given = {"name": "p", "version": 1, "task": "single", "background": ["grass", "tree"], "segmenters": [Segmenter("mean")]}
    return SegmentationProtocol(**{**given, **settings})


def sample(words, *classes):
    mask = np.zeros((8, 8), np.uint8)
    for row, label in enumerate(classes):
        mask[row] = label
    return Sample("set/1", np.zeros((8, 8, 3), np.uint8), mask, words)


@pytest.mark.parametrize("word", ["Tree", "TREE", "tree ", "\ttree", "tree\u00a0", "tree, "])
def test_a_class_word_spelt_like_a_background_word_is_asked_for_once(word):
    task = protocol(order="background_first").prepare(sample({1: word}, 1))
    assert list(map(folded, task.concepts.names)) == ["grass", "tree"] and task.concepts.labels == (0, 1)
    assert task.concepts.target == 1


@pytest.mark.parametrize("word", ["tree ", " tree", "tree\n"])
def test_blanks_around_a_word_change_nothing(word):
    plain, spaced = (protocol().prepare(sample({1: one}, 1)) for one in ("tree", word))
    assert spaced.concepts == plain.concepts and spaced.caption == plain.caption == "a tree"


def test_other_forms_of_a_letter_are_the_same_word_and_invisible_characters_are_refused():
    for word in ("\uff54\uff52\uff45\uff45", "tree\u00a0", "\u202ftree", "tree\u3000"):
        assert checked_word(word, "words.1") == "tree"
    assert checked_word("cafe\u0301", "words.1") == "caf\u00e9" and checked_word("\ufb01sh", "words.1") == "fish"
    for word in ("tr\u200bee", "\ufefftree", "tr\u00adee", "tree\u2060", "tree\ufe0f", "\u200etree", "tree\0", "tr\x1bee"):
        for error in (ConfigError, DataError):
            with pytest.raises(error, match=r"words\.1: .*invisible character U\+"):
                checked_word(word, "words.1", error)
        with pytest.raises(DataError, match="invisible"):
            protocol().prepare(sample({1: word}, 1))
    assert checked_word("\u0645\u06cc\u200c\u062e", "words.1") == "\u0645\u06cc\u200c\u062e"


@pytest.mark.parametrize("words", [("Kite", "kite"), ("kite", "kite"), ("hot dog", "Hot  Dog"), ("a", " ")])
def test_concepts_refuse_a_word_twice_or_empty(words):
    with pytest.raises(DataError, match=r"twice|one word but for case|is empty"):
        Concepts(words, (1, 0))
    with pytest.raises(DataError, match="is empty"):
        Concepts((), ())
    with pytest.raises(ConfigError, match=r"protocol\.background"):
        protocol(background=words)
    with pytest.raises(DataError, match=r"set/1"):
        protocol(task="multi", background=[]).prepare(sample(dict(enumerate(words, 1)), 1, 2))


UNQUOTED = ["no", "yes", "on", "off", "null", "~", "true", "12:30", "1_000", "3", "1.5", ".nan", "2024-01-01"]
READ_AS_TEXT = ["0o7", "1e3", "nay", "12-30"]


@pytest.mark.parametrize("word", UNQUOTED)
def test_a_word_that_yaml_read_as_something_else_is_refused_with_the_quotes_to_set(tmp_path, word):
    read = yaml.safe_load(f"{{7: {word}}}")
    assert not isinstance(read[7], str)
    with pytest.raises(ConfigError, match=r'dataset\.words\.7: .*put the word in quotes, such as "no"'):
        HubTable(tmp_path, "val", words=read)
    with pytest.raises(ConfigError, match=r"protocol\.background\.1: .*in quotes"):
        protocol(background=["grass", read[7]])
    assert HubTable(tmp_path, "val", words=yaml.safe_load(f'{{7: "{word}"}}')).words == {7: word}


@pytest.mark.parametrize("word", READ_AS_TEXT)
def test_a_word_that_yaml_reads_as_text_needs_no_quotes(tmp_path, word):
    assert HubTable(tmp_path, "val", words=yaml.safe_load(f"{{7: {word}}}")).words == {7: word}


@pytest.mark.parametrize("words", [{True: "cat"}, {1.5: "cat"}, {None: "cat"}, {"1": "cat", 1: "dog"}, {1: " "}, ["cat"]])
def test_labels_that_are_no_numbers_and_empty_words_are_refused(tmp_path, words):
    with pytest.raises(ConfigError, match=r"dataset\.words"):
        HubTable(tmp_path, "val", words=words)


# ---------------------------------------------------------------- one object, several classes


@pytest.mark.parametrize("variant", ["standard", "released"])
def test_one_object_protocols_never_merge_two_classes(variant):
    one = protocol(select="any", variant=variant)
    found = one.prepare(sample({8: "cat", 12: "dog"}, 8, 12))
    assert found == Excluded("set/1", "2 foreground classes (cat, dog), wanted at most one")
    assert one.prepare(sample({8: "cat", 12: "dog"}, 12, 12)).concepts.names[-1] == "dog"


def test_two_classes_of_which_one_vanishes_when_the_mask_is_resized_are_one_object():
    found = protocol(select="any", mask_size=4).prepare(sample({8: "cat", 12: "dog"}, 12, 8, 0, 8))
    assert found.concepts.names[-1] == "cat" and (found.truth == 1).any()


# ---------------------------------------------------------------- where a word stands in a prompt


@pytest.fixture(scope="module")
def tokenizer():
    return StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True).tokenizer


def read(template, caption, words, concept="a {concept}", join=", ", others=()):
    one = placed(template, caption, words, concept, join, others)
    return [[one.text[start:end] for start, end in spans] for spans in one.spans], [spans for spans in one.spans], one


@pytest.mark.parametrize("words", [("boat", "red boat"), ("red boat", "boat"), ("dog", "hot dog"), ("hot dog", "dog", "hot")])
def test_a_word_inside_another_stands_where_the_list_put_it(tokenizer, words):
    said, spans, one = read("{concepts}", "", words)
    assert said == [[word] for word in words]
    starts = [first for ((first, _),) in spans]
    assert starts == sorted(starts)  # each in its own place, in the order of the list
    places = positions_of("exact", tokenizer, one)
    assert len({place for found in places for place in found}) == sum(len(found) for found in places)  # none is shared


def test_two_words_side_by_side_are_not_a_third():
    _, spans, one = read("{concepts}", "", ("hot", "dog", "hot dog"), concept="{concept}", join=" ")
    assert one.text == "hot dog hot dog" and spans == [((0, 3),), ((4, 7),), ((8, 15),)]


def test_words_of_a_caption_are_pooled_with_those_of_the_list_the_longest_first():
    said, _, one = read("{caption}: {concepts}", "a hot dog and a Dog", ("dog", "hot dog"))
    assert one.text == "a hot dog and a Dog: a dog, a hot dog"
    assert said == [["Dog", "dog"], ["hot dog", "hot dog"]]
    alone, _, _ = read("{caption}", "a hot dog and a dog", ("dog",), others=("dog", "hot dog"))
    assert alone == [["dog"]]


def test_a_word_without_a_token_or_a_place_is_refused(tokenizer):
    with pytest.raises(DataError, match=r'looking for "boat".*it is not there'):
        positions_of("exact", tokenizer, placed("{caption}", "a dog", ("boat",), "{concept}", " "))


@pytest.mark.parametrize(
    ("text", "word", "found"),
    [
        ("an at-shirt and a T-shirt", "t-shirt", [(18, 25)]), ("a go-ed, a go-e", "go-e", [(11, 15)]),
        ("catnip, tomcat, Cat", "cat", [(16, 19)]), ("c++x", "c++", [(0, 3)]),
    ],
)  # fmt: skip
def test_a_word_is_no_part_of_a_longer_one_whatever_its_second_letter_is(text, word, found):
    assert occurrences(text, word) == found
