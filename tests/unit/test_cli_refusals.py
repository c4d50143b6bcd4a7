"""Check the error messages for command lines that `conceptseg` can't follow. In process: composing fails before anything runs."""

import shlex
import sys

import pytest

from conceptseg import __version__
from conceptseg.cli.evaluate import evaluate
from conceptseg.report.results_md import HEADER


@pytest.fixture(scope="module")
def messages():
    """Command line -> the message that it got: several tests look at one."""
    return {}


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path, messages):
    """Runs a command that must end with 1, unless it was run before; returns what it says on stderr."""

    def run(*arguments: str) -> str:
        if arguments not in messages:
            messages[arguments] = said_to(arguments)
        return messages[arguments]

    def said_to(arguments: tuple[str, ...]) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["conceptseg", *arguments])
        with pytest.raises(SystemExit) as end:
            evaluate()
        assert end.value.code == 1
        assert not list(tmp_path.iterdir()), "a refused command leaves nothing behind"
        return capsys.readouterr().err

    return run


OPTIONS = {
    "extractor=concept_atention": "concept_attention",
    "dataset=pascal_vok": "pascal_voc",
    "protocol=voc_single_releasd": "voc_single_released",
    "views=sweep/layer": "sweep/layers",
    "views=lab_unit": "lab/unet",
    "backbone@extractor.backbone=lab_flx": "lab_flux",
    "table=lba": "lab",
    "experiment=ca_imagenet_relased": "ca_imagenet_released",
}
# A key of a part that a sheet writes, of one that a class declares, of a view, and of the first level with and without a group.
KEYS = {
    "extractor.sed=1": "seed",
    "runtime.batchsize=4": "batch_size",
    "views.outptu.layers=1": "output",
    "tabel=lab": "table",
    "lanucher.x=1": "launcher",
    "extractr=oracle": "extractor",
}


@pytest.mark.parametrize(("said", "meant"), OPTIONS.items())
def test_a_misspelt_option_is_refused_with_all_options(refused, said, meant):
    assert meant in refused(said)


@pytest.mark.parametrize(("said", "meant"), OPTIONS.items())
def test_a_misspelt_option_is_refused_with_the_nearest(refused, said, meant):
    assert f'Did you mean "{meant}"?' in refused(said)


@pytest.mark.parametrize("said", KEYS)
def test_a_misspelt_key_is_refused_by_its_name(refused, said):
    assert said.partition("=")[0].split(".")[-2 if said.startswith("views") else -1] in refused(said)


@pytest.mark.parametrize(("said", "meant"), KEYS.items())
def test_a_misspelt_key_is_refused_with_the_nearest(refused, said, meant):
    assert f'Did you mean "{meant}"?' in refused(said)


OF_AN_OPTION = [
    ("views=lab/unet", "views.wrds.layers=3", 'Did you mean "words"? Choices: words, words_standardized.'),
    ("views=lab/unet", "views.words.layer=3", 'Did you mean "layers"?'),
    ("extractor=daam", "extractor.encod=separate", 'Did you mean "encode"?'),
    ("dataset=pascal_voc", "dataset.splt=val", 'Did you mean "split"?'),
]


@pytest.mark.parametrize(("option", "said", "advice"), OF_AN_OPTION)
def test_a_misspelt_key_of_a_chosen_option_is_refused_with_the_nearest_of_that_option(refused, option, said, advice):
    assert advice in refused(option, said)


@pytest.mark.parametrize("said", ["runtime.batch_size=many", "runtime.keep_maps=perhaps"])
def test_a_value_of_another_type_is_refused_with_its_key(refused, said):
    assert said.partition("=")[0].rpartition(".")[2] in refused(said)


ROWS = {
    "table.only=[dinov2]": 'table.only: the table has no row "dinov2". Did you mean "DINOv2"?',
    "+table.colums=[accuracy]": 'table: unknown key "colums".',
    "table.backbones=lba": 'table.backbones: wanted "real" or "lab", got \'lba\'. Did you mean "lab"?',
}


@pytest.mark.parametrize(("said", "advice"), ROWS.items())
def test_a_table_that_is_misspelt_is_refused_before_anything_runs(refused, said, advice):
    assert advice in refused("table=conceptattention/imagenet_segmentation", said)


def test_a_part_of_a_table_is_never_published(refused):
    message = refused("table=lab", "table.only=[DAAM]", "report.publish=yes")
    assert "report.publish=yes publishes whole tables, but table.only names 1 of the rows of lab" in message


def test_a_command_line_that_cannot_be_read_is_refused(refused):
    assert "ConfigError" in refused("extractor=[")


UNQUOTED = {
    "extractor.concept=a {concept}": "'extractor.concept=\"a {concept}\"'",
    "extractor.prompt={caption},{concepts}": "'extractor.prompt=\"{caption},{concepts}\"'",
    'extractor.concept=a "kind" of {concept}': shlex.quote("extractor.concept='a \"kind\" of {concept}'"),
}


@pytest.mark.parametrize(("said", "written"), UNQUOTED.items())
def test_a_value_that_wants_quotes_is_refused_as_such_and_the_quotes_are_shown(refused, said, written):
    message = refused("extractor=daam", said)
    assert f"{said}: the value of {said.partition('=')[0]} can't be read" in message and written in message
    assert "no such key" not in message


def test_the_quotes_that_are_shown_make_it_readable():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for said, written in UNQUOTED.items():
        (override,) = OverridesParser.create().parse_overrides(shlex.split(written))
        assert override.value() == said.partition("=")[2]


@pytest.mark.parametrize("said", ["extractor=concept_atention", "runtime.batchsize=4", "extractor=["])
def test_a_refusal_has_no_traceback(refused, said):
    message = refused(said)
    assert message.startswith("ConfigError: ") and "Traceback" not in message and 'File "' not in message


def test_the_version_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["conceptseg", "--version"])
    with pytest.raises(SystemExit) as end:
        evaluate()
    assert end.value.code == 0 and capsys.readouterr().out == f"conceptseg {__version__}\n"


def run_report(monkeypatch, folder, *arguments) -> int:
    from conceptseg.cli.report import report

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["conceptseg-report", *arguments])
    with pytest.raises(SystemExit) as end:
        report()
    return int(end.value.code or 0)


def test_a_report_of_nothing_says_so(monkeypatch, capsys, tmp_path):
    assert run_report(monkeypatch, tmp_path) == 1
    assert "there is no table in benchmarks or runs/tables" in capsys.readouterr().err


def test_a_section_without_its_table_fails_the_check(monkeypatch, capsys, tmp_path):
    text = HEADER + "\n<!-- conceptseg:begin gone -->\n## x\n<!-- conceptseg:end gone -->\n"
    (tmp_path / "RESULTS.md").write_text(text)
    assert run_report(monkeypatch, tmp_path, "--check") == 1
    assert "gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf# @package _global_\n", "own.yaml begins with a byte order mark; save it as UTF-8 without one"),
        ("# @package _global_\n".encode("utf-16"), "own.yaml begins with a byte order mark"),
        (b"# @package _global_\n# caf\xe9\n", "own.yaml, line 2: the byte 0xe9 is no UTF-8"),
        (b"# @package _global_\nreport:\n  level: 0.9\0\n", "own.yaml, line 3: the text holds the character NUL"),
        (b"# @package _global_\nreport:\n  level: 0.9\n  level: 0.8\n", "found duplicate key level"),
    ],
    ids=["UTF-8 with a mark", "UTF-16", "Windows-1252", "NUL", "a key twice"],
)
def test_a_configuration_file_in_another_encoding_is_named(refused, tmp_path_factory, content, message):
    folder = tmp_path_factory.mktemp("own")
    (folder / "experiment").mkdir()
    (folder / "experiment" / "own.yaml").write_bytes(content)
    said = refused("--config-dir", str(folder), "experiment=own")
    assert message in said and "Traceback" not in said


def test_an_order_by_no_column_is_refused_before_anything_is_computed(refused):
    said = refused("extractor=centre_prior", "dataset.count=1", "report.sort=bets")
    assert "report.sort" in said and '"bets"' in said and 'Did you mean "best"?' in said


def test_what_only_the_weights_tell_is_refused_without_a_run_folder(refused):
    for method, blocks in (("concept_attention", 5), ("daam", 6), ("naclip", 4), ("rollout", 4)):
        message = refused(
            f"extractor={method}",
            "protocol=scenes_single",
            "dataset.objects=[1,1]",
            "+extractor.backbone.randomise={seed:0,from_block:99}",
        )
        assert "from_block is 99, but lab:" in message and f"has {blocks} blocks" in message, method
    message = refused("extractor=naclip", "dataset=scenes", "dataset.count=1", "extractor.backbone.image_size=50")
    assert "extractor.backbone.image_size" in message
    assert "nothing is downloaded" in refused("extractor=naclip", "backbone@extractor.backbone=clip_vit_b_16_openai")
