"""Fields of a row and a manifest, one sentence each."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

SCHEMA = 1
SOURCE_FORM = 2
"""Of `Manifest.source`: the statements of the files that a run imports."""

Status = Literal["ok", "failed", "excluded"]


class RowKey(NamedTuple):
    """View and segmenter of a row: one row is written for each pair."""

    sample: str
    view: str
    segmenter: str


class Row(TypedDict, total=False):
    """One line of rows-<i>of<n>.jsonl. Counts are there when status is "ok"."""

    sample: str
    """The data set's stable key."""
    view: str
    """The read-out, for example "output/L14-17/t0.5/n5/linear/softmax/mean"; "*" in rows that concern every view."""
    segmenter: str
    """The decision, for example "mean@grid/nearest"; "*" in rows that concern every segmenter."""
    status: Status
    """"ok"; "excluded" when the protocol leaves the sample out; "failed" when it could not be read or scored."""
    error: str
    """Why, for "failed" and "excluded"."""
    words: list[str]
    """The class words of the task."""
    classes: list[int]
    """Class indices that the following lists are aligned to; 0 is background."""
    inter: list[int]
    """Non-void pixels of each class predicted as that class."""
    pred: list[int]
    """Non-void pixels predicted as each class."""
    label: list[int]
    """Pixels whose truth is each class."""
    pred_void: list[int]
    """Void pixels predicted as each class."""
    valid: int
    """Non-void pixels."""
    correct: int
    """Non-void pixels predicted right."""
    void: int
    """Void pixels."""
    ap: dict[str, float | None]
    """Per-image numbers that counts can't give: average precisions "foreground" (mean over present classes), "two_channel",
    "two_channel_minmax" (released forms), and "f1_rowwise", an F1 over pixel rows."""
    measured: dict[str, float | None]
    """Per-image numbers of the installed metrics that `protocol.measures` names; absent where it names none."""
    seconds: float
    """Wall time of the sample's share of its batch: model and scoring; not part of the row's identity."""
    run: str
    """Run that the row belongs to: the name of its folder. Absent in rows of older versions, like `check`."""
    check: str
    """Digest of all other fields; a row that disagrees with it was damaged and is not read."""


class Manifest(TypedDict):
    """manifest.json of a run folder."""

    schema: int
    """Version of this layout."""
    run_id: str
    """Digest of `identity`; the folder's name."""
    identity: dict[str, Any]
    """Everything that decides what the model did."""
    config: dict[str, Any]
    """The configuration that opened the run first; settings that read the environment are not resolved, and are listed."""
    command: NotRequired[list[str]]
    """The words of the command that opened the run first, places of sheets included; absent where Python opened it."""
    provenance: str
    """Basis of the numbers: control, lab, weights, local or random."""
    weights: NotRequired[dict[str, dict[str, str | None]]]
    """Origin of each model's weights: provenance, and repository with revision, or the digest of a local folder."""
    source: dict[str, str]
    """Digest of every file that the run's numbers come from."""
    source_form: NotRequired[int]
    """How `source` was formed; absent where it holds whole folders of files as they were written."""
    versions: dict[str, str]
    """Versions of Python, torch and the libraries that were used."""
    machine: dict[str, str]
    """Kind of processor and accelerator; no host name."""
    git: dict[str, str]
    """Commit and whether the tree was clean, where it is known."""
    checked_rows: NotRequired[bool]
    """Whether every row of the folder must carry `run` and `check`; absent in folders of older versions."""


TIMING_FIELDS = ("seconds",)
"""Fields in which two runs of the same thing may differ."""
