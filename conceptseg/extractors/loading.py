"""Extractors by the name of their sheet: the method that `conceptseg extractor=<name>` runs, for use from Python."""

from __future__ import annotations

from typing import Any

from conceptseg.backbones.in_memory import backbone_from
from conceptseg.backbones.sheets import backbone_of
from conceptseg.errors import ConfigError, did_you_mean
from conceptseg.extractors.base import Extractor
from conceptseg.extractors.explaining import python_names
from conceptseg.extractors.sheets import extractor_sheet
from conceptseg.targets import check_types, settings_of


def load_extractor(
    name: str, backbone: Any = None, *, revision: str | None = None, device: str = "cpu", **settings: Any
) -> Extractor:
    """The method of a sheet of conf/extractor, with its settings and models.

    backbone: in place of the sheet's own model, the name of a sheet of conf/backbone, a repository, a folder, or a model or
        pipeline that is in memory. revision: of a repository that no sheet names. device: where models run.
    settings: of the method, or else of its backbone. Weights are read when they are first needed.
    Raises ConfigError for an unknown method or setting, and for a model that the method can't read.

    >>> load_extractor("naclip", sigma=3.0).sigma
    3.0
    """
    with python_names():
        sheet = extractor_sheet(name)
        kind = sheet.kind
        known = [key for key in settings_of(kind) if key not in sheet.models]
        own = {key: settings.pop(key) for key in list(settings) if key in known}
        check_types(own, kind, "extractor")
        given = {**sheet.settings, **own}
        if not sheet.models and (backbone is not None or settings):
            key = "backbone" if backbone is not None else next(iter(settings))
            raise ConfigError(f"{key}: {kind.__name__} takes no such setting. {did_you_mean(key, known)}")
        for key, (option, changed) in sheet.models.items():
            model, mine = (backbone, settings) if key == "backbone" else (settings.pop(key, None), {})
            if model is not None and not isinstance(model, str):
                if mine:
                    raise ConfigError(f"{next(iter(mine))}: no setting of {kind.__name__}, and its model is in memory already.")
                given[key] = backbone_from(model)
            else:
                fixed = {**changed, **mine}
                pinned = revision if key == "backbone" else None
                given[key] = backbone_of(model or option, pinned, device, kind.family, known, **fixed)
        found: Extractor = kind(**given)
    return found
