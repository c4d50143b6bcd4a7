"""Run a command that Hydra composes: quiet libraries, and composition errors as one message."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

import hydra
from omegaconf import DictConfig

from conceptseg.cli.refusals import explain_refusal
from conceptseg.errors import ConceptSegError


def quiet_libraries() -> None:
    """Loaders' progress bars and notices about a missing hub are noise between our lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def run_hydra(task: Callable[[DictConfig], int], config_name: str) -> int:
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
