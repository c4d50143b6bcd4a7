"""Files of optimised tokens: for a word two text states, that of everything else and that of the object, for one model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from conceptseg.errors import ConfigError


def read_tokens(file: Path, model: Mapping[str, Any]) -> dict[str, Float[Tensor, "2 d"]]:
    """Return two states of width d per word. Raises ConfigError if the file is not there or was made for another model."""
    if not file.exists():
        raise ConfigError(f'extractor.tokens "{file}": no such file. Make one with: conceptseg-study optimise-token')
    with safe_open(file, "pt") as opened:
        made_for = json.loads((opened.metadata() or {}).get("model", "null"))
        if made_for != dict(model):
            raise ConfigError(
                f'extractor.tokens "{file}": its tokens were optimised for {made_for}, this model is {dict(model)}. Tokens serve '
                f"the model they were made for: change extractor.backbone, or optimise them again."
            )
        return {word: opened.get_tensor(word) for word in opened.keys()}  # noqa: SIM118  (no mapping: it can't be iterated)


def write_tokens(file: Path, tokens: Mapping[str, Float[Tensor, "2 d"]], model: Mapping[str, Any]) -> None:
    """Write tokens, beside those of other words that the file holds already. Raises ConfigError as `read_tokens`."""
    held = read_tokens(file, model) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    ready = {word: one.detach().float().cpu().contiguous() for word, one in {**held, **tokens}.items()}
    save_file(ready, file, metadata={"model": json.dumps(dict(model))})


def digest_of(file: Path) -> str:
    """Return the digest that names a file of tokens in a run id."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
