"""Where messages go: the screen says what a reader needs, a file in each run folder keeps everything."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conceptseg.errors import one_of, printable

LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}
"""Setting runtime.verbosity -> least level of our messages on the screen."""
NOISY = (
    "absl", "accelerate", "datasets", "diffusers", "filelock", "fsspec", "h5py", "httpcore", "httpx", "httpx2", "huggingface_hub",
    "matplotlib", "open_clip", "PIL", "timm", "torch", "torchao", "transformers", "urllib3",
)  # fmt: skip
"""Libraries whose warnings concern their callers, not who runs a command; they are kept in the file."""


def quiet_libraries() -> None:
    """Silence progress bars and notices of libraries in the process of a command. Call it before they are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TORCH_LOGS", "-all")  # errors only
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.setLogRecordFactory(PrintableRecord)
    logging.raiseExceptions = False  # a log that can't be written is no reason for a traceback


class PrintableRecord(logging.LogRecord):
    """A line of the log, which may quote words and names of other people's files."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


class _Screen(logging.Handler):
    """Writes to what sys.stderr is now, so that lines come out above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):  # nobody listens any more
            pass

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        return level + super().format(record)


def show_logs(verbosity: str = "normal") -> None:
    """Show our messages on stderr from `verbosity` on, and of libraries warnings; verbose shows theirs too.

    Raises ConfigError for an unknown verbosity.
    """
    one_of("runtime.verbosity", verbosity, LEVELS)
    root, ours = logging.getLogger(), logging.getLogger("conceptseg")
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _Screen)]
    screen = _Screen(LEVELS[verbosity])
    if verbosity != "verbose":
        screen.addFilter(lambda record: record.levelno >= logging.ERROR or record.name.partition(".")[0] not in NOISY)
    root.addHandler(screen)
    root.setLevel(logging.INFO if verbosity == "verbose" else logging.WARNING)
    ours.setLevel(logging.DEBUG)


@contextmanager
def logged_to(file: Path) -> Iterator[None]:
    """Keep every message in a file too, with its time; the file is made with the first one."""
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
