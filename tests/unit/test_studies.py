"""The DAAM paper's experiments as commands, on a tiny random model, and their formulas on cases one can check by hand."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from conceptseg.backbones.unets.optimised_tokens import read_tokens
from conceptseg.backbones.unets.unet import UNetBackbone
from conceptseg.cli.study import study
from conceptseg.errors import ConfigError, DataError, TapError
from conceptseg.lab.models import build_sd, save
from conceptseg.studies.annotations import import_coco, mask_of, run_lengths
from conceptseg.studies.dependencies import (
    ALL_PAIRS,
    COREFERENT,
    UNRELATED,
    Overlap,
    overlaps,
    pair_rows,
    parse_with_spacy,
    read_conllu,
    relation_table,
)
from conceptseg.studies.entanglement import GROUPS, NounPair, cohyponym_table, mass_outside, noun_pairs, read_presence
from conceptseg.studies.folders import generations, read_mask, write_mask
from conceptseg.studies.generator import Generator
from conceptseg.studies.nouns import COCO80, PairScore, nouns_in, read_captions, summary
from conceptseg.studies.ratings import Item, assign, opinion_scores, ordinal_alpha, read_items, read_scores
from conceptseg.studies.replay import AttentionRecord, recording, replaying
from conceptseg.studies.token_optimisation import open_vocabulary_maps, optimise_token, recording_queries
from conceptseg.trace import PromptMaps, WordMap


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    sizes = {
        "channels": [8, 8], "reads_text": [True, True], "heads": 2, "norm_groups": 4, "text_tokens": 16, "text_width": 16,
        "text_layers": 1, "image_size": 24, "codec_patch": 2, "latent_scale": 1.5,
    }  # fmt: skip
    save(build_sd(sizes), folder)
    (folder / "card.json").write_text(json.dumps({"provenance": "random"}))
    return folder


@pytest.fixture(scope="module")
def quick(model):
    return ["--model", str(model), "--steps", "2"]


@pytest.fixture(scope="module")
def root(quick, tmp_path_factory):
    """Three generations made from captions, with the maps of the lab's nouns."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "captions.txt").write_text("one\ta red ball on grass\ntwo\ta boat and a ball\nthree\ta tree\n")
    (folder / "nouns.txt").write_text("ball\nboat\ntree\ngrass\n")
    made = folder / "made"
    arguments = ["generate", str(folder / "captions.txt"), str(made), "--nouns", str(folder / "nouns.txt"), *quick]
    assert study(arguments)["nouns"] == 5
    before = (made / "one" / "output.png").stat().st_mtime_ns
    study(arguments)
    assert (made / "one" / "output.png").stat().st_mtime_ns == before
    return made


# ---------------------------------------------------------------- noun segmentation


def test_a_set_built_from_captions_has_the_original_layout(root):
    found = generations(root)
    assert [one.id for one in found] == ["one", "three", "two"]
    assert {f.name for f in found[0].folder.iterdir()} >= {
        "output.png", "prompt.txt", "seed.txt", "ball.heat_map.png", "grass.heat_map.png", "maps.safetensors",
    }  # fmt: skip
    assert found[0].prompt == "a red ball on grass" and found[0].image.size == (24, 24)
    assert set(found[2].maps()) == {"ball", "boat"} and (root / "sheet.png").exists()


def test_nouns_are_scored_at_every_cut_over_pairs(root):
    one, two = root / "one", root / "two"
    truth = generations(root)[0].maps()["ball"].mask((24, 24), 0.4).numpy() > 0
    write_mask(one / "ball.gt.png", truth)
    write_mask(two / "fish.gt.png", truth)  # a noun whose map was not kept
    zero = {row["cut"]: row for row in study(["nouns", str(root)])["cuts"]}
    assert set(zero) == {0.3, 0.4, 0.5}
    assert zero[0.4]["miou_all"]["n"] == 2 and zero[0.4]["miou_all"]["mean"] == pytest.approx(0.5)
    assert zero[0.4]["miou80"]["n"] == 0 and zero[0.4]["miou80"]["mean"] is None and zero[0.4]["without_prediction"] == 1
    skipped = study(["nouns", str(root), "--missing", "skip", "--taus", "0.4"])["cuts"]
    assert skipped[0]["miou_all"] == {"n": 1, "mean": 1.0, "half_width": None}
    lines = (root / "noun_pairs.csv").read_text().splitlines()
    assert lines[0] == "image,noun,cut,iou,predicted" and len(lines) == 3


def test_the_mean_is_over_pairs_and_the_interval_is_of_standard_errors():
    values = [0.2, 0.4, 0.9]
    rows = [PairScore(str(i), noun, 0.4, v, True) for i, (noun, v) in enumerate(zip(("cat", "cat", "wug"), values, strict=True))]
    (table,) = summary(rows)
    assert table["miou_all"]["mean"] == pytest.approx(0.5) and table["miou80"]["mean"] == pytest.approx(0.3)
    spread = math.sqrt(sum((v - 0.5) ** 2 for v in values) / 2)
    assert table["miou_all"]["half_width"] == pytest.approx(1.96 * spread / math.sqrt(3))
    assert len(COCO80) == 80


def test_longer_nouns_are_taken_before_the_words_in_them():
    assert nouns_in("A hot dog beside a dog, and hotdogs", COCO80) == ["hot dog", "dog"]


def test_annotations_go_out_as_coco_and_come_back_as_truth(root, tmp_path):
    file = tmp_path / "coco.json"
    assert study(["annotate", str(root), str(file)]) == {"images": 3, "categories": 4, "proposals": 5}
    body = json.loads(file.read_text())
    assert {c["name"] for c in body["categories"]} == {"ball", "boat", "tree", "grass"}
    one = body["annotations"][0]
    assert one["area"] == mask_of(one["segmentation"], (24, 24)).sum()
    assert study(["annotate", str(root), str(file), "--back"]) == {"masks": 5}
    found = generations(root)[1]
    assert np.array_equal(found.truths()["tree"], found.predictions("daam0.4")["tree"])
    for name in (f.name for f in root.glob("*/*.gt.png")):
        assert name.endswith(".gt.png")
    body["images"][0]["file_name"] = "../elsewhere/output.png"
    file.write_text(json.dumps(body))
    with pytest.raises(DataError, match="is not under"):
        study(["annotate", str(root), str(file), "--back"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"images": [], "categories": []}, "not laid out as COCO's annotations: KeyError: 'annotations'"),
        ([1], "not laid out as COCO"),
        ({"images": [{"id": 1}, {"id": 1}], "categories": [], "annotations": []}, "the id 1 stands twice among its images"),
    ],
)
def test_annotations_that_are_not_of_coco_are_refused(root, tmp_path, body, message):
    (tmp_path / "coco.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match=message):
        import_coco(root, tmp_path / "coco.json")


def test_an_annotation_that_claims_a_huge_image_takes_no_memory(root, tmp_path):
    image = {"id": 1, "file_name": "one/output.png", "height": 200_000, "width": 200_000}
    one = {"image_id": 1, "category_id": 1, "segmentation": {"counts": [4 * 10**10]}}
    body = {"images": [image], "categories": [{"id": 1, "name": "ball"}], "annotations": [one]}
    (tmp_path / "coco.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="200000 x 200000; at most"):
        import_coco(root, tmp_path / "coco.json")
    with pytest.raises(DataError, match="40000000000 pixels, its image 2 x 2"):
        mask_of(one["segmentation"], (2, 2))


def test_run_lengths_and_polygons_are_read_as_coco_means_them():
    mask = np.zeros((3, 4), bool)
    mask[1:, 0] = mask[0, 2] = True
    counts = run_lengths(mask)
    assert counts == [1, 2, 3, 1, 5] and np.array_equal(mask_of({"counts": counts}, (3, 4)), mask)
    assert run_lengths(~mask)[0] == 0
    square = mask_of([[1, 1, 3, 1, 3, 2, 1, 2]], (4, 5))
    assert square[1:3, 1:4].all() and square.sum() == 6
    with pytest.raises(DataError, match="uncompressed run lengths"):
        mask_of({"counts": "abc"}, (3, 4))


def test_a_mask_without_opacity_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gt.png")
    with pytest.raises(DataError, match="opacity"):
        read_mask(tmp_path / "a.gt.png")


# ---------------------------------------------------------------- ratings


def test_sheets_hold_every_item_three_times_and_scores_are_summed_up(root, tmp_path):
    (tmp_path / "tags.tsv").write_text("one\tball\tNOUN\none\tgrass\tNOUN\ntwo\tboat\tNOUN\nthree\ttree\tPROPN\n")
    said = study(["sheets", str(root), str(tmp_path / "tags.tsv"), str(tmp_path / "out"), "--raters", "4", "--per-item", "3"])
    assert said["items"] == 4
    sheets = [(tmp_path / "out" / f"rater-{n}.html").read_text() for n in range(1, 5)]
    assert sum(sheet.count("<section") for sheet in sheets) == 12
    assert sum('data-item="one/ball"' in sheet for sheet in sheets) == 3 and "http" not in sheets[0]
    for rater, score in (("r1", 4), ("r2", 5)):
        (tmp_path / f"{rater}.csv").write_text(f"item,rater,score\none/ball,{rater},{score}\ntwo/boat,{rater},{score - 3}\n")
    table = study(["ratings", str(tmp_path / "out" / "items.csv"), str(tmp_path / "r1.csv"), str(tmp_path / "r2.csv")])
    assert table["tags"]["NOUN"]["items"] == 2 and table["tags"]["NOUN"]["mean"] == pytest.approx(3.0)
    assert table["tags"]["NOUN"]["fair_or_better"] == 0.5 and table["tags"]["PROPN"]["mean"] is None
    (tmp_path / "r3.csv").write_text("item,rater,score\none/ball,r3,6\n")
    with pytest.raises(DataError, match="scores from 1 to 5"):
        study(["ratings", str(tmp_path / "out" / "items.csv"), str(tmp_path / "r3.csv")])


def test_scores_and_items_of_excel_are_read_and_doubled_ones_refused(tmp_path):
    scores, items = tmp_path / "scores.csv", tmp_path / "items.csv"
    scores.write_bytes("item;rater;score\r\none/café;r1;4\r\n".encode("utf-16"))
    assert read_scores([scores, scores]) == {"one/café": {"r1": 4}}  # the same file given twice counts once
    scores.write_text("item,rater,score\na,r1,4\na,r1,2\n")
    with pytest.raises(DataError, match="line 3: r1 has judged a before, with another score"):
        read_scores([scores])
    items.write_bytes(b"\xef\xbb\xbfid,generation,word,tag\r\na,g,w,NOUN\r\n")
    assert read_items(items) == [Item("a", "g", "w", "NOUN")]
    items.write_text("id,generation,word,tag\na,g,w,NOUN\na,g,w,NOUN\n")
    with pytest.raises(DataError, match='the item "a" stands twice'):
        read_items(items)


def test_presence_left_open_is_no_judgement(tmp_path):
    file = tmp_path / "pairs.csv"
    file.write_text("id,first_word,second_word,iou,first,second\na,x,y,0.1,1,1\nb,x,y,0.2,1,0\nc,x,y,0.3,,\n")
    assert read_presence(file) == {"a": True, "b": False}
    for row, message in {
        "d,x,y,0.1,yes,1": "line 5: first and second are",
        "a,x,y,0.1,1,1": "the pair a is judged twice",
    }.items():
        (tmp_path / "more.csv").write_text(file.read_text() + row + "\n")
        with pytest.raises(DataError, match=message):
            read_presence(tmp_path / "more.csv")


def test_captions_and_tags_of_windows_are_read_and_doubled_ones_refused(root, tmp_path):
    (tmp_path / "captions.txt").write_bytes("1\ta café\r\n2\ta dog\r\n".encode("utf-16"))
    assert read_captions(tmp_path / "captions.txt") == [("1", "a café"), ("2", "a dog")]
    (tmp_path / "captions.txt").write_text("../../x\ta dog\n")
    with pytest.raises(DataError, match="can't name a folder"):
        read_captions(tmp_path / "captions.txt")
    (tmp_path / "tags.tsv").write_text("one\tball\tNOUN\none\tball\tVERB\n")
    with pytest.raises(DataError, match='line 2: "ball" of one has another tag'):
        study(["sheets", str(root), str(tmp_path / "tags.tsv"), str(tmp_path / "out")])


def test_words_in_a_sheet_are_escaped(root, tmp_path):
    from conceptseg.studies.ratings import write_sheet

    write_sheet(root, [Item('one/"><script>', "one", "ball", "NOUN")], "<b>", tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert '"><script>' not in text.replace("\n<script>\n", "") and "<b>" not in text


def test_every_item_has_as_many_raters_as_asked_and_loads_are_even():
    items = [Item(str(n), "g", "w", "t") for n in range(7)]
    shares = assign(items, raters=5, per_item=3)
    assert sorted(i.id for share in shares for i in share) == sorted([str(n) for n in range(7)] * 3)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1 and all(len({i.id for i in s}) == len(s) for s in shares)


def test_ordinal_alpha_is_that_of_krippendorffs_worked_example():
    """Four coders, twelve units, ordinal: 0.815 in Krippendorff's "Computing Krippendorff's alpha-reliability" (2011), part C."""
    coders = [
        "1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .",
    ]  # fmt: skip
    columns = zip(*(line.split() for line in coders), strict=True)
    units = [[int(v) for v in column if v != "."] for column in columns]
    assert ordinal_alpha([unit for unit in units if len(unit) > 1]) == pytest.approx(0.815, abs=5e-4)
    assert ordinal_alpha([unit for unit in units]) == pytest.approx(0.815, abs=5e-4)
    assert ordinal_alpha([[3, 3], [3, 3]]) is None
    assert opinion_scores([Item("a", "g", "w", "t")], {})["all"]["mean"] is None


# ---------------------------------------------------------------- dependencies

CONLLU = """# sent_id = s1
# text = a red ball on a ball
1	a	a	DET	DT	_	3	det	3:det	_
2	red	red	ADJ	JJ	_	3	amod	3:amod	_
3	ball	ball	NOUN	NN	_	0	root	0:root	Coref=1
4	on	on	ADP	IN	_	6	case	6:case	_
5	a	a	DET	DT	_	6	det	6:det	_
6	ball	ball	NOUN	NN	_	3	nmod	3:nmod:on	Coref=1

"""


@pytest.fixture
def parsed(tmp_path):
    (tmp_path / "a.conllu").write_text(CONLLU)
    return tmp_path / "a.conllu"


class Letters:
    """A tokenizer with one token a word, for maps made by hand."""

    def __call__(self, text, **options):
        spans, at = [(0, 0)], 0
        for word in text.split():
            start = text.index(word, at)
            at = start + len(word)
            spans.append((start, at))
        return type("Encoded", (), {"offset_mapping": [*spans, (0, 0)]})


def test_pairs_are_measured_by_place_so_repeated_words_are_not_merged(parsed):
    (sentence,) = read_conllu(parsed)
    maps = torch.zeros(8, 1, 8)
    for position in range(1, 7):
        maps[position, 0, position] = 1
        maps[position, 0, 0] = 0.5
    maps[3, 0, 2] = 1  # the first ball's map takes in the adjective's
    rows = pair_rows(sentence, PromptMaps(maps, sentence.text, Letters()), threshold=0.6)
    by = {(row.dependent, row.relation): row for row in rows if row.relation not in (UNRELATED, COREFERENT)}
    amod = by["red", "amod"]
    assert (amod.head, amod.iod, amod.ioh, amod.iou) == ("ball", 1.0, 0.5, 0.5)
    assert by["ball", "nmod"].iou == 0 and len(by) == 4  # two of the relation det
    assert sum(row.relation == COREFERENT for row in rows) == 1 and sum(row.relation == UNRELATED for row in rows) == 5
    soft = pair_rows(sentence, PromptMaps(maps, sentence.text, Letters()), soft=True)
    assert next(row for row in soft if row.relation == "amod").iod == pytest.approx((0.25 + 1) / 1.5)
    whole = pair_rows(sentence, PromptMaps(maps, sentence.text, Letters()), threshold=0.4, absolute=True)
    assert next(row for row in whole if row.relation == "nmod").iou == pytest.approx(1 / 4)


def test_enhanced_relations_and_bad_files(parsed):
    (sentence,) = read_conllu(parsed, enhanced=True)
    assert sentence.words[5].relation == "nmod:on" and sentence.words[5].start == 16 and sentence.id == "s1"
    parsed.write_text(CONLLU.replace("# text = a red ball on a ball\n", ""))
    with pytest.raises(DataError, match="which is the prompt"):
        read_conllu(parsed)
    parsed.write_text(CONLLU.replace("2\tred", "2\tgreen"))
    with pytest.raises(DataError, match='the word "green"'):
        read_conllu(parsed)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("3\tamod\t", "_\tamod\t", 'line 4 .*the head of "red" is "_"; the number of a word'),
        ("3\tamod\t", "1.5\tamod\t", 'the head of "red" is "1.5"'),
        ("3\tamod\t", "nan\tamod\t", 'the head of "red" is "nan"'),
        ("3\tamod\t", "9\tamod\t", 'the head of "red" is 9; another of the words 1 to 6'),
        ("3\tamod\t", "2\tamod\t", 'the head of "red" is 2; another'),
        ("\n2\tred", "\n1\tred", "wanted the word number 2, found 1"),
        ("\tred\t", "\tr\0d\t", "line 4: the text holds the character NUL"),
    ],
)
def test_a_parse_that_does_not_hold_together_is_refused_with_its_line(parsed, old, new, message):
    assert old in CONLLU
    parsed.write_text(CONLLU.replace(old, new))
    with pytest.raises(DataError, match=message):
        read_conllu(parsed)


def test_a_parse_of_windows_is_read_and_an_empty_node_is_no_head(parsed):
    (plain,) = read_conllu(parsed)
    parsed.write_bytes(CONLLU.replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_conllu(parsed) == [plain]
    parsed.write_text(CONLLU.replace("3:amod", "5.1:amod|3:conj").replace("3:det", "5.1:det"))
    (sentence,) = read_conllu(parsed, enhanced=True)
    assert [(w.head, w.relation) for w in sentence.words[:2]] == [(0, "det"), (3, "conj")]


def test_overlaps_of_nothing_are_zero_and_the_table_has_reference_rows():
    assert overlaps(torch.zeros(2, 2), torch.zeros(2, 2)) == (0, 0, 0)
    rows = [Overlap("p", "h", "d", r, *v) for r, v in (("det", (1, 0, 0.5)), ("det", (0.5, 0.5, 0.5)), ("obj", (0, 1, 0)))]
    rows += [Overlap("p", "h", "d", UNRELATED, 0.1, 0.2, 0.3)]
    table = {row["relation"]: row for row in relation_table(rows)}
    assert list(table) == [UNRELATED, ALL_PAIRS, "det", "obj"]
    assert table["det"] == {"relation": "det", "n": 2, "miod": 75.0, "mioh": 25.0, "delta": 50.0, "miou": 50.0}
    assert table[ALL_PAIRS]["n"] == 3 and [r["relation"] for r in relation_table(rows, least=2)][-1] == "det"


def test_interactions_run_as_a_command(parsed, quick, tmp_path):
    said = study(["interactions", str(parsed), str(tmp_path / "out"), *quick])
    relations = {row["relation"]: row["n"] for row in said["relations"]}
    assert relations["det"] == 2 and relations[COREFERENT] == 1 and relations[ALL_PAIRS] == 5
    assert len((tmp_path / "out" / "pairs.csv").read_text().splitlines()) == 1 + 5 + 1 + 5
    assert (tmp_path / "out" / "sheet.png").exists()


@pytest.fixture(scope="module")
def parser(tmp_path_factory):
    """A folder with a blank spaCy pipeline whose heads are set by hand, loaded as an installed model is."""
    spacy = pytest.importorskip("spacy")

    @spacy.Language.component("heads_by_hand")
    def set_heads(doc):
        said = {"heads": [2, 2, 2, 5, 5, 2], "deps": ["det", "amod", "ROOT", "prep", "det", "pobj"], "tags": ["X"] * 6}
        return spacy.tokens.Doc(doc.vocab, [token.text for token in doc], [token.whitespace_ != "" for token in doc], **said)

    pipeline = spacy.blank("en")
    pipeline.add_pipe("heads_by_hand")
    folder = tmp_path_factory.mktemp("spacy")
    pipeline.to_disk(folder)
    return str(folder)


def test_sentences_of_spacy_are_numbered_and_placed_as_in_conllu(parser, parsed):
    (sentence,), (other,) = parse_with_spacy([("s1", "a red ball on a ball")], parser), read_conllu(parsed)
    assert (sentence.id, sentence.text) == (other.id, other.text)
    for ours, theirs in zip(sentence.words, other.words, strict=True):
        assert (ours.number, ours.form, ours.start, ours.end) == (theirs.number, theirs.form, theirs.start, theirs.end)
    assert [w.head for w in sentence.words] == [w.head for w in other.words] == [3, 3, 0, 6, 6, 3]
    assert [w.relation for w in sentence.words] == ["det", "amod", "ROOT", "prep", "det", "pobj"]


def test_captions_are_parsed_by_the_command(parser, quick, tmp_path):
    (tmp_path / "captions.txt").write_text("s1\ta red ball on a ball\n")
    said = study(["interactions", str(tmp_path / "captions.txt"), str(tmp_path / "out"), "--spacy", parser, *quick])
    relations = {row["relation"]: row["n"] for row in said["relations"]}
    assert relations["det"] == 2 and relations[ALL_PAIRS] == 5


def test_a_model_of_spacy_that_is_not_installed_is_refused():
    pytest.importorskip("spacy")
    with pytest.raises(ConfigError, match="nothing is downloaded unasked"):
        parse_with_spacy([("s1", "a ball")], "no_such_model")


# ---------------------------------------------------------------- entanglement


def test_noun_pairs_are_of_one_group_or_of_two_with_the_right_article():
    pairs = noun_pairs(200, GROUPS, seed=3, offset=7)
    group = {word: name for name, words in GROUPS.items() for word in words}
    assert sum(len(words) for words in GROUPS.values()) == len(group) == 42
    for number, pair in enumerate(pairs):
        assert (group[pair.first] == group[pair.second]) is pair.same_kind and pair.first != pair.second
        assert pair.id == f"{'cohypo' if pair.same_kind else 'diff'}-{number}" and pair.seed == number + 7
        for word in (pair.first, pair.second):
            assert f"{'an' if word[0] in 'aeiou' else 'a'} {word}" in pair.prompt
    assert 70 < sum(pair.same_kind for pair in pairs) < 130


def test_cohyponyms_run_as_a_command_and_take_judgements(quick, tmp_path):
    said = study(["cohyponyms", str(tmp_path / "out"), "--count", "4", "--lab-words", *quick])
    assert sum(row["n"] for row in said["table"]) == 4 and all(row["judged"] == 0 for row in said["table"])
    pairs = [NounPair("a", "", "x", "y", True, 0), NounPair("b", "", "x", "y", True, 1), NounPair("c", "", "x", "z", False, 2)]
    table = cohyponym_table(pairs, {"a": 0.2, "b": 0.6, "c": 0.1}, {"a": True, "b": False})
    assert table[1]["miou"] == pytest.approx(40) and table[1]["both_present"] == pytest.approx(50) and table[0]["judged"] == 0


def test_adjectives_run_as_a_command_and_replaying_a_run_on_itself_changes_nothing(quick, tmp_path):
    template = "a {adjective} ball on grass"
    said = study(["adjectives", template, "ball", "red", "blue", "--out", str(tmp_path / "out"), *quick])
    first, second = said["adjectives"]
    assert first["change_free"] == 0 and first["change_replayed"] <= 1 and 0 <= second["mass_outside_noun"] < 1
    assert (tmp_path / "out" / "sheet.png").exists()
    with pytest.raises(ConfigError, match="needs the slot"):
        study(["adjectives", "a ball", "ball", "red", "--out", str(tmp_path / "out"), *quick])


def test_mass_outside_is_the_share_off_the_noun():
    adjective, noun = torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.5]])
    assert mass_outside(WordMap("red", adjective), WordMap("ball", noun), 0.4) == pytest.approx(0.25)


def test_replayed_attention_is_the_recorded_one_and_comes_off(model):
    generator = Generator(UNetBackbone(str(model)), steps=2)
    unet, record = generator.backbone.unet, AttentionRecord()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()]
    one = generator.generate("a red ball", 0, around=recording(unet, record))
    free, replayed = generator.generate("a boat", 0), generator.generate("a boat", 0, around=replaying(unet, record))
    assert np.asarray(replayed.image).tobytes() != np.asarray(free.image).tobytes() and one.image.size == (24, 24)
    assert all(len(calls) == 2 for calls in record.calls.values()) and record.bytes > 0
    with pytest.raises(TapError, match="Record and replay with the same steps"):
        Generator(generator.backbone, steps=3).generate("a boat", 0, around=replaying(unet, record))
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()] == hooks


# ---------------------------------------------------------------- token optimisation


def test_open_vocabulary_maps_are_those_of_a_loop_over_layers_steps_and_heads(model):
    """Any text's states against queries of a finished generation; OVAM."""
    generator, record = Generator(UNetBackbone(str(model)), steps=2), {}
    generator.generate("a red ball", 0, around=recording_queries(generator.backbone.unet, record, "conditional"))
    states = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    want = torch.zeros(2, 12, 12)
    for layer in record.values():
        side, keys = layer.grid[0], layer.to_k(states).detach()
        assert len(layer.calls) == 2
        for queries in layer.calls:
            width = queries.shape[-1]
            for head in range(len(queries)):
                scores = queries[head] @ keys[:, head * width : (head + 1) * width].T / math.sqrt(width)
                maps = scores.softmax(-1).T.reshape(1, 2, side, side)
                want += torch.nn.functional.interpolate(maps, size=(12, 12), mode="bilinear")[0]
    torch.testing.assert_close(open_vocabulary_maps(record, states), want, atol=1e-5, rtol=1e-5)
    other = {}
    generator.generate("a red ball", 0, around=recording_queries(generator.backbone.unet, other, "unconditional"))
    assert not torch.allclose(other[0].calls[0], record[0].calls[0])


def test_one_step_of_optimisation_follows_the_slope_and_the_best_states_are_kept(model):
    """The slope by differences of the loss, which is restated pixel by pixel."""
    generator, record = Generator(UNetBackbone(str(model)), steps=1), {}
    generator.generate("a red ball", 0, around=recording_queries(generator.backbone.unet, record))
    for layer in record.values():
        layer.to_k = copy.deepcopy(layer.to_k).double()
        layer.calls = [queries.double() for queries in layer.calls]
    truth = torch.zeros(12, 12, dtype=torch.bool)
    truth[2:6, 3:9] = True

    def loss(states):
        maps = open_vocabulary_maps(record, states, (12, 12))
        low, high = float(maps.min()), float(maps.max())
        total = 0.0
        for y in range(12):
            for x in range(12):
                nothing, thing = ((float(one) - low) / (high - low) for one in maps[:, y, x])
                total -= math.log(math.exp(thing if truth[y, x] else nothing) / (math.exp(thing) + math.exp(nothing)))
        return total / 144

    start, along = torch.randn(2, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (loss(start + 1e-4 * along) - loss(start - 1e-4 * along)) / 2e-4
    moved = optimise_token(record, start, truth, epochs=2, rate=1e-3, step=1)
    assert moved.losses[0] == pytest.approx(loss(start), abs=1e-5) and moved.losses[1] < moved.losses[0]
    assert float(((start - moved.states) / 1e-3 * along).sum()) == pytest.approx(slope, rel=1e-2)
    assert optimise_token(record, start, truth, epochs=1).states.equal(start)


def test_a_token_is_optimised_by_a_command_on_an_annotated_generation(root, quick, tmp_path):
    truth = np.zeros((24, 24), bool)
    truth[4:16, 4:16] = True
    write_mask(root / "one" / "ball.gt.png", truth)
    file, arguments = tmp_path / "tokens.safetensors", [str(root), "one", "ball"]
    said = study(["optimise-token", *arguments, str(file), "--epochs", "12", *quick])
    assert said["loss_optimised"] < said["loss_before"] and file.with_suffix(".png").exists()
    identity = UNetBackbone(quick[1]).checkpoint.identity()
    assert read_tokens(file, identity)["ball"].shape == (2, 16)
    with pytest.raises(DataError, match="another image comes out"):
        study(["optimise-token", *arguments, str(file), *quick[:2], "--steps", "1"])
    with pytest.raises(DataError, match="no truth mask of boat"):
        study(["optimise-token", str(root), "one", "boat", str(file), *quick])
