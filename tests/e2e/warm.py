"""A parent that has imported the libraries once and forks a process for every command: seconds instead of a quarter minute.

A child is a process of its own with its own folder, environment and output, and runs what `python -m conceptseg` runs.
Requests and answers are lines of JSON on stdin and stdout.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from importlib import import_module
from typing import Any


def import_libraries() -> None:
    import datasets  # noqa: F401
    import h5py  # noqa: F401
    from diffusers import AutoencoderKL, FluxTransformer2DModel  # noqa: F401
    from transformers import AutoTokenizer, T5EncoderModel  # noqa: F401

    import conceptseg.evaluation.carry_out
    import conceptseg.extractors.concept_attention
    import conceptseg.extractors.controls
    import conceptseg.tables.table  # noqa: F401


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


def serve() -> None:
    import_libraries()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            be_the_command(request)
        print(child, flush=True)


if __name__ == "__main__":
    serve()
