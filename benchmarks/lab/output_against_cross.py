"""By how much ConceptAttention's output space beats the others on the lab, image by image.

    conceptseg && python benchmarks/lab/output_against_cross.py

Paired bootstrap over the scenes of each block; positive means that the output space is better.
"""

from __future__ import annotations

import sys
from pathlib import Path

from conceptseg.metrics.definitions import DEFINITIONS, Rows
from conceptseg.metrics.intervals import paired_difference
from conceptseg.report.blocks import TableRow
from conceptseg.report.results import load
from conceptseg.store.run import RunStore

METHOD = "ConceptAttention, output space"
OTHERS = (
    "cross-attention, as released", "cross-attention, attention logits", "ConceptAttention, value space",
    "output space, no softmax", "colour contrast", "centre prior",
)  # fmt: skip


def rows_of(row: TableRow, runs: Path) -> Rows:
    """The scored rows behind one line of the table."""
    held = RunStore(runs / row.run_id).rows()
    return Rows.from_records(
        r for key, r in held.items() if key.view == row.view and key.segmenter == row.segmenter and r["status"] == "ok"
    )


def main(runs: Path) -> None:
    for block in load(Path("benchmarks/lab/results.json")).blocks:
        named = {row.name: row for row in block.rows}
        method = rows_of(named[METHOD], runs)
        for other in OTHERS:
            for metric in ("miou_dataset", "ap_image"):
                found = paired_difference(DEFINITIONS[metric], method, rows_of(named[other], runs))
                i = found.interval
                print(
                    f"{block.name}: output space minus {other}, {DEFINITIONS[metric].label}: {100 * i.value:+.1f} points "
                    f"[{100 * i.low:+.1f}, {100 * i.high:+.1f}], n={i.n}, p={found.p:.4f}"
                )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
