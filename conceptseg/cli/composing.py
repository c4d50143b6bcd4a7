"""Run a command that Hydra composes, with composition errors as one message."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from conceptseg.cli.options import added_folders, searched_folders
from conceptseg.cli.refusals import explain_refusal
from conceptseg.config import check_interpolations
from conceptseg.errors import ConceptSegError, ConfigError
from conceptseg.logs import show_logs
from conceptseg.reading import LARGEST_TEXT, check_aliases, decode_text, read_regular
from conceptseg.targets import check_allowance, packages


def run_hydra(task: Callable[[DictConfig], int], config_name: str) -> int:
    """Run a Hydra main; its composition errors become one readable message."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra prints refusals in words of its own, and exits
    _check_config_files(sys.argv[1:])
    codes: list[int] = []
    errors: list[Exception] = []

    overrides = [a for a in sys.argv[1:] if not a.startswith("-") and "=" in a]
    started: list[bool] = []

    def run(config: DictConfig) -> None:
        started.append(True)
        try:
            check_interpolations(config)
            show_logs(config.runtime.verbosity)
            check_allowance(config, task_overrides())
            codes.append(task(config))
        except Exception as error:  # carried out of Hydra, which would print lines of its own
            errors.append(error)

    try:
        prepare_search_path()
        check_foreign_sources(sys.argv[1:], config_name)
        hydra.main(version_base="1.3", config_path="pkg://conceptseg.conf", config_name=config_name)(run)()
    except (HydraException, OmegaConfBaseException, *SLIPS) as error:
        if isinstance(error.__cause__, ConceptSegError):
            raise error.__cause__ from None
        if started and not isinstance(error, HydraException | OmegaConfBaseException):
            raise
        raise ConfigError(_explained(overrides) or _readable(error, overrides)) from error
    except yaml.YAMLError as error:
        if started:
            raise
        raise ConfigError(f"a configuration file can't be read as YAML: {' '.join(str(error).split())}.") from error
    if errors and isinstance(errors[0], HydraException | OmegaConfBaseException):
        raise ConfigError(_explained(overrides) or _readable(errors[0], overrides)) from errors[0]
    if errors:
        raise errors[0]
    return max(codes, default=0)


SLIPS = (ValueError, TypeError, AssertionError, AttributeError, KeyError, IndexError, OSError, RecursionError)
"""Python's own errors that Hydra and OmegaConf let out while they compose settings that make no sense."""
PRIMARY = ("--config-path", "-cp", "--config-name", "-cn")


def prepare_search_path() -> None:
    """Let Hydra search conf/ of every installed package of the entry point group."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    found = packages()
    if not found:
        return

    class InstalledPackages(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            for name in found:
                search_path.append(provider=name, path=f"pkg://{name}.conf")

    Plugins.instance().register(InstalledPackages)


def check_foreign_sources(arguments: Sequence[str], config_name: str) -> None:
    """Raises ConfigError if sheets from elsewhere would make Hydra itself run code: callbacks, launchers, log handlers.

    Hydra builds those, and resolves its own settings, before our own checks see the configuration. So the configuration is
    composed once ahead where a folder is added or Hydra's settings interpolate, and its part of Hydra must equal ours.
    """
    if chosen := [word for word in arguments if word.partition("=")[0] in PRIMARY]:
        raise ConfigError(
            f"{chosen[0]}: conceptseg reads its own primary configuration. Add a folder of sheets with --config-dir or "
            "hydra.searchpath=[file://FOLDER]."
        )
    overrides = [word for word in arguments if not word.startswith("-") and "=" in word]
    folders = added_folders(arguments)
    hydras = [word for word in overrides if word.lstrip("+~").startswith("hydra.")]
    if not folders and not any("searchpath" in word.partition("=")[0] or "${" in word for word in hydras):
        return
    from hydra import compose, initialize_config_module

    added = [f"hydra.searchpath=[{','.join(f'file://{folder}' for folder in folders)}]"] if folders else []
    GlobalHydra.instance().clear()
    with initialize_config_module("conceptseg.conf", version_base="1.3"):
        theirs = compose(config_name, overrides=[*overrides, *added], return_hydra_config=True)
        ours = compose(config_name, overrides=[o for o in overrides if o.startswith("hydra")], return_hydra_config=True)
    check_interpolations(theirs)
    for key in ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging"):
        if _plainly(ours, key) != _plainly(theirs, key):
            raise ConfigError(
                f"hydra.{key} is set by a configuration file from elsewhere, and Hydra would run what it names. Remove it from "
                "the file; set it on the command line if you trust it."
            )


def _plainly(config: DictConfig, key: str) -> Any:
    found = config.hydra.get(key)
    return OmegaConf.to_container(found, resolve=False) if found else {}


def _check_config_files(arguments: Sequence[str]) -> None:
    """Sheets from elsewhere have to be UTF-8 without a mark (of others Hydra says that their option is unknown), and no bombs.

    Raises ConfigError or DataError.
    """
    for path in (path for folder in searched_folders(arguments) for path in sorted(Path(folder).rglob("*.yaml"))):
        content = read_regular(path, str(path), LARGEST_TEXT)
        check_aliases(decode_text(content, str(path)), str(path))
        if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ConfigError(f"{path} begins with a byte order mark; save it as UTF-8 without one.")


class SheetsReadOnce(ConfigRepository):
    """Hydra's repository of sheets, which parses each file once; Hydra by itself reads all of them for every composition."""

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        self.held: dict[str, ConfigResult | None] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SheetsReadOnce:
        """Hydra copies its repository for every composition, and gives the copy other sources where a search path is added."""
        return copy(self)

    def load_config(self, config_path: str) -> ConfigResult | None:
        if config_path not in self.held:
            self.held[config_path] = super().load_config(config_path)
        if (found := self.held[config_path]) is None:
            return None
        mine = copy(found)
        mine.config = deepcopy(found.config)  # other sheets are merged into it
        return mine


def read_sheets_once() -> None:
    """For the compositions to come, until Hydra is initialised again: that of a table's row then takes a third less time."""
    loader = GlobalHydra.instance().config_loader()
    if isinstance(loader, ConfigLoaderImpl):
        loader.repository = SheetsReadOnce(loader.get_search_path())


def task_overrides() -> list[str]:
    """The overrides as they were typed: Hydra keeps them in a list of OmegaConf, which would resolve what they interpolate."""
    found = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return [str(override) for override in found] if isinstance(found, list) else []


def _explained(overrides: Sequence[str]) -> str | None:
    """Return the first override that does not fit, if it can be identified."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return explain_refusal(overrides)
    except (HydraException, OmegaConfBaseException, *SLIPS):
        return None


def _readable(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message and what lies behind it, without frames."""
    lines = [str(error) or type(error).__name__]
    cause = error.__cause__
    while cause is not None:
        if str(cause) and str(cause) not in lines:
            lines.append(str(cause))
        cause = cause.__cause__
    shown = ", ".join(overrides)
    return f"composing {shown} failed: " + "\n  ".join(lines) if isinstance(error, SLIPS) else "\n  ".join(lines)
