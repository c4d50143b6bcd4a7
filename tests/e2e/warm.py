"""A parent that has imported the libraries once and forks a process for every command: a second instead of a quarter minute.

A child is a process of its own with its own folder, environment and output, and runs what `python -m conceptseg` runs.
Requests and answers are lines of JSON on stdin and stdout. One kind of request forks another parent, which is asked through two
named pipes: with this package imported, or for another tree of it, which each of its children imports as it is then.
`warm.py --package` begins as the former.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import sys
from importlib import import_module
from typing import Any

LIBRARIES = (
    "beartype.door", "datasets", "h5py", "diffusers.models.autoencoders", "diffusers.models.transformers",
    "diffusers.models.unets", "hydra", "matplotlib.pyplot", "open_clip.model", "rich.progress",
    "transformers.models.auto.tokenization_auto", "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
)  # fmt: skip
PACKAGE = (
    "backbones.codec", "backbones.encoders.clip", "backbones.transformers.flux", "cli.evaluate", "cli.refusals", "data.drawn",
    "evaluation.carry_out", "extractors.concept_attention", "extractors.controls", "extractors.daam", "extractors.naclip",
    "lab", "report.exports", "report.html", "report.publish", "report.terminal", "report.trackers", "tables.page",
    "tables.paper", "tables.sweeps", "tables.table",
)  # fmt: skip
CLASSES = (
    "backbones.encoders.clip.CLIPBackbone", "backbones.transformers.flux.FluxBackbone", "data.drawn.Scenes",
    "extractors.concept_attention.ConceptAttention", "extractors.controls.Constant", "extractors.naclip.NACLIP",
)  # fmt: skip
"""Their source is read once here; a child reads those files again that were written since."""


def import_libraries() -> None:
    from PIL import Image

    for name in LIBRARIES:
        import_module(name)
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("t5")  # compiles a thousand patterns
    Image.init()


def import_package() -> None:
    """And do once what each command would do anew: start the parser of overrides, read the source, translate pages' templates."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    from conceptseg.config import register
    from conceptseg.evaluation.assemble import git_state
    from conceptseg.keys import versions
    from conceptseg.report.html import templates
    from conceptseg.source import source_digests

    for name in PACKAGE:
        import_module(f"conceptseg.{name}")
    register()
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        compose("evaluate", overrides=["extractor=constant"])
    GlobalHydra.instance().clear()
    source_digests(f"conceptseg.{name}" for name in CLASSES)
    versions()
    git_state()
    for name in templates().list_templates():
        templates().get_template(name)


def be_the_command(request: dict[str, Any]) -> None:
    """In the child: never returns."""
    code: Any = 70
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        for path, stream in ((request["out"], 1), (request["err"], 2)):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, stream)
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        sys.argv = [request["name"], *request["args"]]
        sys.path.insert(0, request["cwd"])  # as `python -m` does
        exec(request["before"], {})
        try:
            if request["name"] == "conceptseg":
                runpy.run_module("conceptseg", run_name="__main__", alter_sys=True)
            else:
                name = request["name"].removeprefix("conceptseg-")
                getattr(import_module(f"conceptseg.cli.{name}"), name)()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code if isinstance(code, int) else 1)


def be_another_parent(request: dict[str, Any]) -> None:
    """In the child: answers through its own pipes until they are closed; never returns."""
    for name, flag, stream in (("asked", os.O_RDONLY, 0), ("answered", os.O_WRONLY, 1)):
        os.dup2(os.open(request[name], flag), stream)
    sys.path[:0] = request["tree"]
    os.environ["PYTHONPATH"] = os.pathsep.join([*request["tree"], os.environ["PYTHONPATH"]])
    serve(package=not request["tree"])
    os._exit(0)


def serve(package: bool) -> None:
    if package:
        import_package()
    gc.collect()
    gc.freeze()  # or every child would go through the libraries' million objects again and again
    gc.set_threshold(50_000)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            be_another_parent(request) if "tree" in request else be_the_command(request)
        print(child, flush=True)


if __name__ == "__main__":
    import_libraries()
    serve(package="--package" in sys.argv)
    os._exit(0)  # taking all libraries down takes seconds
