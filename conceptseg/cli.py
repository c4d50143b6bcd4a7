"""Four thin commands: conceptseg (evaluate and print tables), conceptseg-report, conceptseg-lab, conceptseg-doctor.

Nothing heavy is imported before it is known what to do: `--help` must answer at once.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig

from conceptseg.config import explain_refusal, plain, register
from conceptseg.errors import ConceptSegError, guarded

if TYPE_CHECKING:
    from conceptseg.report.results import Results

log = logging.getLogger(__name__)

QUIET = ("runtime.", "report.", "hydra.", "hydra/", "launcher=", "launcher.")
"""Overrides that say how a run is done, not what is run."""
LAB_FILL = {"backbone=lab/*": "table.backbones=lab"}
"""Another way to say that the lab fills a paper's table."""


def _calm() -> None:
    """Loaders' progress bars and notices about a missing hub are noise between our lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("httpx").setLevel(logging.WARNING)


@guarded
def evaluate() -> int:
    """conceptseg [overrides]: one evaluation, or table=<name>; alone it means table=lab."""
    _calm()
    register()
    sys.argv[1:] = [LAB_FILL.get(a, a) for a in sys.argv[1:]]
    said = [a for a in sys.argv[1:] if not a.startswith("-")]
    asks = [a for a in sys.argv[1:] if a in ("--help", "-h", "--hydra-help", "--version", "--info", "--cfg", "-c", "--resolve")]
    if not asks and all(a.lstrip("+~").startswith(QUIET) for a in said):
        sys.argv.append("table=lab")
    if "--version" in asks:
        from conceptseg import __version__

        print(f"conceptseg {__version__}")
        return 0
    return _run_hydra(_evaluate, "evaluate")


def _run_hydra(task: Callable[[DictConfig], int], config_name: str) -> int:
    """Run a Hydra main; its composition errors become one readable message."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from conceptseg.errors import ConfigError

    codes: list[int] = []
    errors: list[ConceptSegError] = []

    overrides = [a for a in sys.argv[1:] if not a.startswith("-") and "=" in a]
    started: list[bool] = []

    def run(config: DictConfig) -> None:
        started.append(True)
        try:
            codes.append(task(config))
        except ConceptSegError as error:  # carried out of Hydra, which would print it a second time
            errors.append(error)

    try:
        hydra.main(version_base="1.3", config_path="pkg://conceptseg.conf", config_name=config_name)(run)()
    except (HydraException, OmegaConfBaseException) as error:
        if isinstance(error.__cause__, ConceptSegError):
            raise error.__cause__ from None
        raise ConfigError(explain_refusal(overrides) or _readable(error)) from error
    except ValueError as error:
        if started:
            raise
        raise ConfigError(explain_refusal(overrides) or f"{', '.join(overrides)}: {error}") from error
    if errors:
        raise errors[0]
    return max(codes, default=0)


def _readable(error: Exception) -> str:
    """Hydra's message and what lies behind it, without frames."""
    lines = [str(error)]
    cause = error.__cause__
    while cause is not None:
        if str(cause) and str(cause) not in lines:
            lines.append(str(cause))
        cause = cause.__cause__
    return "\n  ".join(lines)


def _evaluate(config: DictConfig) -> int:
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task)
    if config.get("launcher"):
        _launch(config, overrides)
    if config.get("table"):
        return _table(config, overrides)
    from conceptseg.assemble import assemble
    from conceptseg.report.results import save
    from conceptseg.report.terminal import print_table
    from conceptseg.report.trackers import check_trackers, track
    from conceptseg.run import carry_out, check_decisions, draw_sheet, readings, write_results
    from conceptseg.tables import single_table

    whole = plain(config)
    check_trackers(whole["report"]["trackers"])
    evaluation = assemble(whole)
    check_decisions(evaluation)
    carry_out(evaluation)
    found = readings(evaluation, whole["report"]["columns"])
    write_results(evaluation, found)
    if evaluation.shard.index != 0:
        return 0
    if not any(r.n or r.failed or r.waiting for r in found):
        reason = next(row["error"] for row in evaluation.store.rows().values() if row["status"] == "excluded")
        print(f"protocol {evaluation.protocol.label} left out all {found[0].excluded} samples; the first because: {reason}")
        return 0
    table = single_table(evaluation, found, shlex.join(["conceptseg", *overrides]))
    save(evaluation.store.folder / "table.json", table)
    track(table, whole["report"]["trackers"], evaluation.store.folder / "trackers")
    name = next(iter(evaluation.views))
    segmenter = next(r.segmenter for r in found if r.n)
    sheet = draw_sheet(
        evaluation.store.folder / "sheet.png",
        [(name, evaluation, evaluation.views[name].key, segmenter)],
        whole["report"]["pictures"],
    )
    print_table(table)
    print(f"rows, results.json and manifest: {evaluation.store.folder}")
    if sheet:
        print(f"pictures: {sheet}")
    return 0


def _launch(config: DictConfig, overrides: Sequence[str]) -> None:
    """Has everything computed elsewhere; what follows finds it done."""
    from conceptseg.config import check_targets, instantiate
    from conceptseg.launch import launch

    whole = plain(config)
    check_targets(whole, whole["runtime"]["allow_targets"])
    launch(instantiate(whole["launcher"], "launcher"), [o for o in overrides if not o.lstrip("+~").startswith("launcher")])


def _table(config: DictConfig, overrides: Sequence[str]) -> int:
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    from conceptseg.compositions import Compositions
    from conceptseg.config import composing_source
    from conceptseg.finished import FinishedTable
    from conceptseg.keys import digest
    from conceptseg.report.trackers import check_trackers

    name = str(HydraConfig.get().runtime.choices["table"])
    whole = plain(config)
    report = whole["report"]
    check_trackers(report["trackers"])
    extra = [o for o in overrides if not o.lstrip("+~").startswith("table")]
    of_table = [o for o in overrides if o.lstrip("+~").startswith("table.")]
    meaningful = [o for o in extra if not o.lstrip("+~").startswith(QUIET)]
    meaningful += [o for o in of_table if not o.startswith("table.backbones=")]
    publish = report["publish"] == "yes" or (report["publish"] == "auto" and not meaningful)
    on_lab = whole["table"].get("backbones") == "lab"
    place = name.replace("/", "-") + ("-lab" if on_lab else "")
    if publish:
        folder = Path(report["benchmarks"]) / place
    else:
        folder = Path(whole["runtime"]["runs"]) / "tables" / f"{place}-{digest(sorted(meaningful), 6)}"

    tables, source = Path(whole["runtime"]["runs"]) / "tables", composing_source()
    share = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]  # only the first of several processes prints
    written = [folder / "sheet.png", *([Path(report["results_md"])] if publish else [])]
    finished = FinishedTable(
        tables / "finished" / f"{place}-{digest(sorted(overrides), 6)}.json", folder / "results.json", written,
        Path(whole["runtime"]["runs"]), None if source is None or report["trackers"] else [source, whole, overrides, share],
    )  # fmt: skip
    if (results := finished.read()) is not None:
        log.info("nothing that %s was made from has changed: it is printed as it stands", folder / "results.json")
        _show_table(results, folder, report["results_md"] if publish else None)
        return 0

    from conceptseg.assemble import shard_of
    from conceptseg.paper_table import compute_paper_table
    from conceptseg.report.results import save
    from conceptseg.report.results_md import update
    from conceptseg.report.trackers import track
    from conceptseg.tables import compute_table

    def compose_anew(overrides: Sequence[str]) -> dict[str, Any]:
        found: dict[str, Any] = plain(compose(config_name="evaluate", overrides=[*overrides]))
        return found

    composed = Compositions(tables / f"{place}.configs.json", source, compose_anew)

    def with_runtime(more: Sequence[str]) -> dict[str, Any]:
        return composed(*more, *(o for o in extra if o.startswith(("runtime.", "report."))))

    settings = [o for o in extra if not o.lstrip("+~").startswith(QUIET)]
    command = shlex.join(["conceptseg", f"table={name}", *of_table, *settings])
    compute = compute_paper_table if "published" in whole["table"] else compute_table
    results = compute(place, whole["table"], with_runtime, settings, folder, command)
    composed.keep()
    if shard_of(whole["runtime"]).index != 0:
        return 0
    save(folder / "results.json", results)
    track(results, report["trackers"], Path(whole["runtime"]["runs"]) / "trackers" / place)
    if publish:
        update(Path(report["results_md"]), results)
    finished.keep(results, composed.asked())
    _show_table(results, folder, report["results_md"] if publish else None)
    return 0


def _show_table(results: Results, folder: Path, published: str | None) -> None:
    from conceptseg.report.terminal import print_table

    print_table(results)
    print(f"results: {folder / 'results.json'}" + (f", {published}" if published else ""))
    if (folder / "sheet.png").exists():
        print(f"pictures: {folder / 'sheet.png'}")


@guarded
def report() -> int:
    """conceptseg-report [--check | --write | --export FOLDER]: print, check, write or export the tables of benchmarks/."""
    import argparse

    parser = argparse.ArgumentParser(prog="conceptseg-report", description=report.__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if RESULTS.md is not what benchmarks/ gives")
    parser.add_argument("--write", action="store_true", help="bring RESULTS.md up to date from benchmarks/")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write each table as CSV, LaTeX and an HTML page")
    parser.add_argument("--table", action="append", help="only this one, or a results.json anywhere; may be given several times")
    parser.add_argument("--pictures", type=int, help="at most so many samples of a block in a page; all unless said")
    parser.add_argument("--runs", default="runs", type=Path, help="folder of the run folders that pages show")
    parser.add_argument("--results", default="RESULTS.md", type=Path)
    parser.add_argument("--benchmarks", default="benchmarks", type=Path)
    said = parser.parse_args()
    from conceptseg.report.results import load
    from conceptseg.report.results_md import check, update
    from conceptseg.report.terminal import print_table

    if said.check:
        problems = check(said.results, said.benchmarks)
        for problem in problems:
            print(problem, file=sys.stderr)
        print(f"{said.results}: " + (f"{len(problems)} stale or missing" if problems else "up to date"))
        return 1 if problems else 0
    asked = [Path(name) if name.endswith(".json") else said.benchmarks / name / "results.json" for name in said.table or ()]
    found = [load(path) for path in asked or sorted(said.benchmarks.glob("*/results.json"))]
    if said.export:
        return _export(found, said.runs, said.export, said.pictures)
    for table in found:
        if said.write:
            update(said.results, table)
        else:
            print_table(table)
    print(f"{len(found)} tables in {said.benchmarks}" + (f", written to {said.results}" if said.write else ""))
    return 0


def _export(tables: Sequence[Any], runs: Path, folder: Path, pictures: int | None) -> int:
    _calm()
    from conceptseg.html_report import write_html
    from conceptseg.report.exports import to_csv, to_latex
    from conceptseg.report.results import write_atomically

    for table in tables:
        write_atomically(folder / f"{table.table}.csv", to_csv(table).encode())
        write_atomically(folder / f"{table.table}.tex", to_latex(table).encode())
        print(f"{write_html(table, runs, folder, pictures)}, {table.table}.csv, {table.table}.tex")
    return 0


@guarded
def doctor() -> int:
    """conceptseg-doctor dataset=<name> [dataset.root=...]: say what a data folder lacks, and how to mend it."""
    _calm()
    register()
    return _run_hydra(_doctor, "evaluate")


def _doctor(config: DictConfig) -> int:
    from conceptseg.config import check_targets, instantiate

    whole = plain(config)
    check_targets(whole, whole["runtime"]["allow_targets"])
    dataset = instantiate(whole["dataset"], "dataset")
    problems = dataset.problems()
    for problem in problems:
        print(f"- {problem}")
    if not problems:
        print(f"{dataset.name}: {len(dataset.keys())} samples, nothing missing (fingerprint {dataset.fingerprint()})")
    return 1 if problems else 0


@guarded
def lab() -> int:
    """conceptseg-lab train | check | sweep <name>: train a lab model, measure what it can do, and where it keeps it."""
    import argparse

    parser = argparse.ArgumentParser(prog="conceptseg-lab", description=lab.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train, or go on from the last checkpoint, then write the model")
    training.add_argument("name", help="a recipe of conf/lab, for example flux")
    training.add_argument("overrides", nargs="*", help="recipe settings, for example steps=500")
    training.add_argument("--work", type=Path, default=Path("lab_runs"), help="folder of checkpoints and the loss curve")
    training.add_argument("--device", default="cpu")
    training.add_argument("--ship", action="store_true", help="copy the finished model into the package")
    training.add_argument("--stop-after", type=int, default=None, help="stop at this step, to go on another time")
    checking = commands.add_parser("check", help="measure what a model can do, against chance and drawn scenes")
    sweeping = commands.add_parser(
        "sweep", help="layer x timestep x space of a diffusion model, on scenes of unseen combinations"
    )
    for command in (checking, sweeping):
        command.add_argument("name", help="a shipped model, for example flux")
        command.add_argument("--model", type=Path, default=None, help="its folder, if it is not the shipped one")
        command.add_argument("--write", action="store_true", help="write the findings and pictures into its card")
    checking.add_argument("--judge", type=Path, default=None, help="folder of the CLIP that judges generated scenes")
    sweeping.add_argument("overrides", nargs="*", help="settings of the evaluation, for example dataset.count=16")
    said, rest = parser.parse_known_args()
    if strange := [a for a in rest if a.startswith("-") or "=" not in a or said.command == "check"]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    said.overrides = [*getattr(said, "overrides", []), *rest]  # settings may stand behind options
    _calm()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return {"train": _lab_train, "check": _lab_check, "sweep": _lab_sweep}[said.command](said)


def _lab_train(said: Any) -> int:
    from conceptseg.lab.recipes import load_recipe
    from conceptseg.lab.train import train_and_write

    recipe = load_recipe(said.name, said.overrides, said.device)
    folder = train_and_write(recipe, said.work / said.name, said.device, said.stop_after)
    if folder:
        if said.ship:
            from conceptseg.lab.cards import ship

            print(f"shipped: {ship(folder, said.name)}")
        print(f"model: {folder}")
        print(f"what it can do: conceptseg-lab check {said.name} --model {folder}")
    return 0


def _lab_check(said: Any) -> int:
    from conceptseg.lab.cards import add_to_card, model_folder, read_card
    from conceptseg.lab.check import check

    folder = model_folder(said.name, said.model)
    judge = folder if said.name == "clip" else model_folder("clip", said.judge)
    found = check(read_card(folder), folder, (read_card(judge), judge), folder / "samples.png" if said.write else None)
    for finding in found:
        print(f"{said.name}: {finding}")
    if said.write:
        add_to_card(folder, "check", [finding.plain() for finding in found])
        print(f"written: {folder / 'card.json'}")
    return 0


def _lab_sweep(said: Any) -> int:
    from hydra import compose, initialize_config_module

    from conceptseg.lab.cards import add_to_card, model_folder, read_card
    from conceptseg.lab.sweep import heat_map, overrides_for, sweep

    folder = model_folder(said.name, said.model)
    register()
    overrides = [*overrides_for(said.name)]
    if said.model:
        side = read_card(folder)["recipe"]["image_size"]
        overrides += [f"extractor.backbone.path={folder}", f"extractor.backbone.image_size={side}"]
    overrides += said.overrides
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        found = sweep(plain(compose("evaluate", overrides=overrides)))
    for line in found.lines():
        print(line)
    if said.write:
        heat_map(found, folder / "sweep.png")
        add_to_card(folder, "sweep", found.plain())
        print(f"written: {folder / 'sweep.png'}")
    return 0
