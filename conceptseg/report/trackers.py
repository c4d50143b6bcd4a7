"""Finished tables as scalars of an experiment tracker, through accelerate. Off unless report.trackers names one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from conceptseg.errors import ConfigError, one_of
from conceptseg.report.results import Results

TRACKERS = ("tensorboard", "wandb", "mlflow")


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is unknown or not installed, before anything is computed."""
    from importlib.util import find_spec

    for name in names:
        one_of("report.trackers", name, TRACKERS)
        for package in ("accelerate", name):
            if find_spec(package) is None:
                raise ConfigError(
                    f'report.trackers: "{name}" needs the package {package}, which is not installed here. '
                    f"pip install accelerate {name}, or leave report.trackers=[]."
                )


def track(table: Results, names: Sequence[str], folder: Path) -> None:
    """Log every computed number as <block>/<row>/<metric>, points of a curve under their series with x as the step.

    Quoted numbers are not logged. folder: where TensorBoard and MLflow write. Called by one process only.
    """
    check_trackers(names)
    if not names:
        return
    from accelerate import tracking

    with _one_process():
        for name in names:
            if name == "tensorboard":
                tracker = tracking.TensorBoardTracker(table.table, str(folder))
            elif name == "wandb":
                tracker = tracking.WandBTracker("conceptseg", name=table.table, dir=str(folder))
            else:
                tracker = tracking.MLflowTracker("conceptseg", logging_dir=str(folder), run_name=table.table)
            tracker.start()
            tracker.store_init_configuration({"table": table.table, "command": table.command, "conceptseg": table.conceptseg})
            for step, values in _scalars(table):
                tracker.log(values, step=step)
            tracker.finish()


def _scalars(table: Results) -> Iterator[tuple[int, dict[str, float]]]:
    computed = {column.name for column in table.columns if column.kind != "quoted"}
    for block in table.blocks:
        curves: dict[str, int] = {}
        for row in block.ordered_rows:
            values = {name: value.value for name, value in row.values.items() if name in computed}
            name = row.series or row.name
            # Timesteps are no whole numbers, so a point's step is its place on the axis; x itself is logged beside it.
            step = curves.setdefault(name, 0)
            curves[name] += 1
            if row.x is not None:
                values["x"] = row.x
            if values:
                yield step, {f"{block.name}/{name}/{metric}": value for metric, value in values.items()}


@contextmanager
def _one_process() -> Iterator[None]:
    """accelerate's state without torchrun's variables: it would wait for processes that have nothing to log."""
    from accelerate.state import PartialState

    held = {key: os.environ.pop(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if key in os.environ}
    try:
        PartialState(cpu=True)
        yield
    finally:
        os.environ.update(held)
