"""Write a finished table in the schema of Every Eval Ever, one file a method, so that its numbers can be gathered with others'.

Source: evaleval/every_eval_ever at 21b3d1a, every_eval_ever/schemas/eval.schema.json, version 0.2.2. Quoted numbers are left
out: they were not computed here.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conceptseg.errors import ConfigError
from conceptseg.files import write_atomically
from conceptseg.report.blocks import Block, TableRow
from conceptseg.report.columns import Column, Value
from conceptseg.report.results import Results

SCHEMA_VERSION = "0.2.2"
COMPUTED = ("standard", "released")
"""Kinds of columns that are exported."""
RELATIONSHIPS = {"lab": "first_party", "weights": "third_party"}
"""Between whoever evaluates and the model, by provenance; the lab's models ship with the package."""


def write_records(results: Results, folder: Path, organization: str, seconds: int) -> list[Path]:
    """Write folder/<table>/<developer>/<model>/<id>.json for every method of the table, and return the files.

    organization: name of whoever evaluated. seconds: when the record is made, since 1970. Raises ConfigError for a table without
    computed numbers and for an organization without a name.
    """
    if not organization.strip():
        raise ConfigError("writing Every Eval Ever records: --organization is empty; wanted the name of whoever evaluated.")
    written = []
    for record in records(results, organization, seconds):
        developer, _, model = record["model_info"]["id"].partition("/")
        name = uuid.uuid5(uuid.NAMESPACE_URL, record["evaluation_id"])
        path = folder / results.table / _slug(developer) / _slug(model) / f"{name}.json"
        write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        written.append(path)
    if not written:
        raise ConfigError(f'writing Every Eval Ever records: table "{results.table}" has no computed number. {results.command}')
    return written


def records(results: Results, organization: str, seconds: int) -> Iterator[dict[str, Any]]:
    """One record per method and run of weights: all its computed numbers in all blocks of the table."""
    named: dict[tuple[str, str | None], list[tuple[Block, TableRow]]] = {}
    for block in results.blocks:
        for row in block.ordered_rows:
            if row.status == "ok":
                named.setdefault((row.name, row.backbone), []).append((block, row))
    for (name, backbone), places in named.items():
        found = [_result(results, block, row, column) for block, row in places for column in _computed(results, row)]
        if not found:
            continue
        row = places[0][1]
        model = _model_id(row)
        yield {
            "schema_version": SCHEMA_VERSION,
            "evaluation_id": f"{results.table}/{model}/{_slug(name)}/{seconds}",
            "retrieved_timestamp": str(seconds),
            "source_metadata": {
                "source_name": f"conceptseg, table {results.table}", "source_type": "evaluation_run",
                "source_organization_name": organization,
                "evaluator_relationship": RELATIONSHIPS.get(row.provenance, "other"),
            },
            "eval_library": {"name": "conceptseg", "version": results.conceptseg},
            "model_info": {
                "name": backbone or row.extractor, "id": model, **({"developer": model.partition("/")[0]} if backbone else {}),
                "additional_details": _texts(
                    method=name, extractor=row.extractor, provenance=row.provenance, trained_on=row.trained_on, group=row.group
                ),
            },
            "evaluation_results": found,
        }  # fmt: skip


def _computed(results: Results, row: TableRow) -> list[Column]:
    return [column for column in results.columns if column.kind in COMPUTED and column.name in row.values]


def _result(results: Results, block: Block, row: TableRow, column: Column) -> dict[str, Any]:
    value = row.values[column.name]
    run = next((one for one in row.runs if column.name.startswith(f"{one.kind}/")), row.runs[0])
    config: dict[str, Any] = {
        "evaluation_description": column.text, "metric_id": f"conceptseg.{column.name.replace('/', '.')}",
        "metric_name": column.label, "metric_kind": column.name.rpartition("/")[2],
        "lower_is_better": not column.higher_is_better,
        "additional_details": _texts(definition=column.source, kind=column.kind),
    }  # fmt: skip
    if column.percent:
        config |= {"metric_unit": "proportion", "score_type": "continuous", "min_score": 0, "max_score": 1}
    return {
        "evaluation_result_id": f"{run.run_id}/{run.view}/{run.segmenter}/{column.name}",
        "evaluation_name": f"{results.title}: {block.name}",
        "source_data": {
            "dataset_name": block.dataset, "source_type": "other",
            "additional_details": _texts(protocol=run.protocol or block.protocol, names_given=row.names, shown=row.told),
        },
        "metric_config": config,
        "score_details": {"score": value.value, **_uncertainty(value, results.interval), "details": _details(row, value)},
        "generation_config": {
            "generation_args": {"execution_command": results.command},
            "additional_details": _texts(run=run.run_id, view=run.view, segmenter=run.segmenter),
        },
    }  # fmt: skip


def _details(row: TableRow, value: Value) -> dict[str, str]:
    return _texts(note=row.note, mark=value.mark, excluded=str(row.excluded), failed=str(row.failed))


def _uncertainty(value: Value, interval: str) -> dict[str, Any]:
    """The interval and the number of samples, with what `interval` says of level and resamples."""
    found: dict[str, Any] = {} if value.n is None else {"num_samples": value.n}
    if value.low is not None and value.high is not None:
        bounds: dict[str, Any] = {"lower": value.low, "upper": value.high}
        if level := re.match(r"([\d.]+) %", interval):
            bounds["confidence_level"] = float(level[1]) / 100
        found["confidence_interval"] = {**bounds, **({"method": interval} if interval else {})}
        if drawn := re.search(r"([\d,]+) (?:resamples|draws)", interval):
            found["num_bootstrap_samples"] = int(drawn[1].replace(",", ""))
    return {"uncertainty": found} if found else {}


def _model_id(row: TableRow) -> str:
    """owner/name of the hub; models of the lab and controls, which no hub has, under "conceptseg"; a folder by its last part."""
    if row.backbone is None:
        return f"conceptseg/{_slug(row.extractor)}"
    if row.backbone.startswith("lab:"):
        return f"conceptseg/{_slug(row.backbone)}"
    return row.backbone if re.fullmatch(r"[\w.-]+/[\w.-]+", row.backbone) else f"local/{_slug(Path(row.backbone).name)}"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "unnamed"


def _texts(**pairs: str) -> dict[str, str]:
    """The pairs that say something; the schema wants texts."""
    return {key: value for key, value in pairs.items() if value}
