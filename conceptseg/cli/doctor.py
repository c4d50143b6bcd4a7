"""conceptseg-doctor: say what a data folder lacks."""

from __future__ import annotations

from omegaconf import DictConfig

from conceptseg.cli.composing import quiet_libraries, run_hydra
from conceptseg.config import plain, register
from conceptseg.errors import guarded, printable


@guarded
def doctor() -> int:
    """conceptseg-doctor dataset=<name> [dataset.root=...]: say what a data folder lacks, and how to mend it."""
    quiet_libraries()
    register()
    return run_hydra(_doctor, "evaluate")


def _doctor(config: DictConfig) -> int:
    from conceptseg.config import instantiate

    whole = plain(config)
    dataset = instantiate(whole["dataset"], "dataset", whole["runtime"]["allow_targets"])
    problems = dataset.problems()
    for problem in problems:
        print(printable(f"- {problem}"))
    if not problems:
        print(f"{dataset.name}: {len(dataset.keys())} samples, nothing missing (fingerprint {dataset.fingerprint()})")
    return 1 if problems else 0
