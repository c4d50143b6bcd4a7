"""One table over the jobs of a multirun."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conceptseg.keys import digest
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.results import Results

Job = tuple[Sequence[str], Results, Path]
"""Overrides of a job, its table, and the folder of its runs (runtime.runs)."""


def joint_table(jobs: Sequence[Job], command: str) -> Results:
    """Rows of all jobs, each under what its job was told and others were not; a block for each data set and protocol.

    Jobs that share a run and its views, such as shards, are one row.
    """
    said = [set(overrides) for overrides, _, _ in jobs]
    shared = set.intersection(*said)
    blocks: dict[tuple[str, str], dict[tuple[str, str, str], TableRow]] = {}
    for overrides, table, _ in jobs:
        own = ", ".join(word for word in overrides if word not in shared)
        for block in table.blocks:
            rows = blocks.setdefault((block.dataset, block.protocol), {})
            for row in block.rows:
                name = f"{row.name} ({own})" if own else row.name
                rows[row.run_id, row.view, row.segmenter] = replace(row, name=name)
    first = jobs[0][1]
    columns = {column.name: column for _, table, _ in jobs for column in table.columns}
    found = []
    for (dataset, protocol), rows in blocks.items():
        found.append(Block(f"{dataset}, {protocol}", dataset, protocol, "", _told_apart(list(rows.values()))))
    name = f"multirun-{digest([list(overrides) for overrides, _, _ in jobs], 6)}"
    title = f"{len(jobs)} jobs of a multirun"
    return Results(
        name, title, command, first.conceptseg, tuple(columns.values()), tuple(found), (), first.interval
    )  # fmt: skip


def _told_apart(rows: Sequence[TableRow]) -> tuple[TableRow, ...]:
    """Rows under names of their own: with the run id where two share one."""
    names = [row.name for row in rows]
    return tuple(row if names.count(row.name) == 1 else replace(row, name=f"{row.name}, {row.run_id}") for row in rows)


def commands_to_compare(table: Results, runs: Path) -> list[str]:
    """A command for each block with several runs; it names a view where they have several."""
    commands = []
    for block in table.blocks:
        ids = list(dict.fromkeys(row.run_id for row in block.rows if row.status == "ok"))
        views = {run: list(dict.fromkeys(row.view for row in block.rows if row.run_id == run)) for run in ids}
        if len(ids) > 1:
            named = [f"{run}::{views[run][0]}" if len(views[run]) > 1 else run for run in ids]
            folder = [] if runs == Path("runs") else ["--folder", str(runs)]
            more = max(map(len, views.values())) - 1
            said = f"  # or one of {more} other views" if more else ""
            commands.append(shlex.join(["conceptseg-compare", *named, *folder]) + said)
    return commands
