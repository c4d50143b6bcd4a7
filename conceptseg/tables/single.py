"""One evaluation from Python: what `conceptseg <overrides>` computes, as the table that it would print."""

from __future__ import annotations

import shlex

from conceptseg.config import composed
from conceptseg.errors import ConfigError
from conceptseg.evaluation.assemble import assemble
from conceptseg.evaluation.carry_out import carry_out
from conceptseg.evaluation.readings import readings, write_readings
from conceptseg.report.results import Results, save
from conceptseg.tables.table import columns_of_evaluation, single_table


def evaluate(*overrides: str) -> Results:
    """Compute one evaluation, or read it where it is done, and return its rows with intervals.

    overrides: as on the command line, such as "extractor=daam", "dataset=scenes", "dataset.count=8". Rows are kept below
    `runtime.runs`, so the same call again computes nothing. Raises ConfigError for overrides that do not fit and for a table,
    and DataError if no sample could be scored.

    >>> evaluate("extractor=naclip", "dataset=scenes", "dataset.count=4").blocks[0].rows[0].values  # doctest: +SKIP
    """
    config = composed(overrides)
    for group in ("table", "launcher"):
        if config.get(group):
            raise ConfigError(f"evaluate: {group}=... is carried out from the command line: conceptseg {shlex.join(overrides)}")
    evaluation = assemble(config)
    carry_out(evaluation)
    found = readings(evaluation, columns_of_evaluation(config["report"]))
    write_readings(evaluation, found)
    table = single_table(evaluation, found, shlex.join(["conceptseg", *overrides]))
    save(evaluation.store.folder / "table.json", table)
    return table
