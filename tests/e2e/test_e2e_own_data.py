"""docs/own_data.md, run as it is printed; and what a run without a number says."""

from __future__ import annotations

import re
import shlex

from commands import TESTS

BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def typed(commands, line, code=0):
    """A command with nothing added to it."""
    name, *args = shlex.split(line)
    out, err = commands.folder / "said.out", commands.folder / "said.err"
    pid = commands.warm.ask(name=name, args=args, cwd=str(commands.folder), env={}, out=str(out), err=str(err), before="")
    ended = commands.warm.ask(wait=pid)
    assert ended == code, out.read_text() + err.read_text()
    return " ".join((out.read_text() + err.read_text()).split())


def test_the_page_leads_from_photos_to_a_number(commands):
    page = (TESTS.parent / "docs" / "own_data.md").read_text(encoding="utf-8")
    (_, title, script), (_, _, lines), *_ = BLOCK.findall(page)
    (commands.folder / title).write_text(script, encoding="utf-8")
    draw, doctor, evaluate = lines.splitlines()
    assert shlex.split(draw) == ["python", title]
    commands.run_cold(title)
    assert "photos: 12 samples, nothing missing" in typed(commands, doctor)
    said = typed(commands, evaluate)
    rows = commands.rows()
    assert "photos, 12 samples" in said and "single v1" in said and len(rows) == 24
    assert {row["status"] for row in rows} == {"ok"} and {word for row in rows for word in row["words"]} > {"apple", "fish"}
    assert sum(sum(row["inter"][1:]) for row in rows) > 0

    without = evaluate.replace(" 'dataset.foreground=[255]'", "")
    refused = typed(commands, without, code=1)
    assert "DataError: no sample could be scored, of 12 under protocol single v1: 12 failed" in refused
    assert "set dataset.foreground=[255]" in refused and "Traceback" not in refused


def test_a_run_that_leaves_out_every_sample_is_an_error_with_the_reasons(commands):
    said = commands.run("extractor=centre_prior", "dataset.count=4", "dataset.objects=[2,2]", "protocol=scenes_single", code=1)
    assert "no sample could be scored, of 4 under protocol scenes_single v1: 4 left out: 2 foreground classes" in said.said
    assert "scenes/val/0/00000, scenes/val/0/00001" in said.said and "Traceback" not in said.said
