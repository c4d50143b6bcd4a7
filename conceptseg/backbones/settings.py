"""Checks of settings that backbones share; each refusal names the setting and the nearest choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from conceptseg.errors import ConfigError, DataError, did_you_mean, one_of

DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")
"""Kinds of devices that models run on; "meta" holds no values, for counting."""


def device_of(name: str) -> torch.device:
    """Raises ConfigError for a device that torch does not know or see."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f'runtime.device: unknown "{name}". {did_you_mean(name, ["cpu", "cuda", "cuda:0", "mps"])}') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'runtime.device is "{name}", but torch sees no CUDA device here. Use runtime.device=cpu.')
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(
            f'runtime.device is "{name}", but torch sees {torch.cuda.device_count()} CUDA devices here, numbered from 0.'
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f'runtime.device is "{name}", but torch sees no Apple GPU (MPS) here. Use runtime.device=cpu.')
    if device.type not in DEVICES:
        raise ConfigError(f'runtime.device is "{name}". {did_you_mean(name, DEVICES)}')
    return device


def dtype_of(name: str, key: str) -> torch.dtype:
    """Raises ConfigError for a name that is no floating-point type."""
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    one_of(f"extractor.backbone.{key}", name, choices)
    return choices[name]


def check_length(tokenizer: Any, texts: Sequence[str], longest: int, setting: str) -> None:
    """Raises DataError for a text with more than `longest` tokens, begin and end marks included.

    What lies past them is never encoded: a map of such a text would be that of a shorter one. setting: what sets the limit.
    """
    for text in texts:
        count = token_count(tokenizer, text)
        if count > longest:
            raise too_long(text, count, longest, setting)


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of a text with its begin and end marks, before anything is cut off or padded."""
    return len(tokenizer(text, truncation=False, padding=False, verbose=False).input_ids)


def too_long(text: str, count: int, longest: int, setting: str) -> DataError:
    """The error for a text that a text encoder would cut."""
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    return DataError(
        f'encoding the text "{shown}": it has {count} tokens, begin and end marks included, and the text encoder reads {longest} '
        f"({setting}); what follows would be cut off. Use a shorter word or caption, or use fewer words at a time."
    )
