"""Show the doctests of docstrings as code: a griffe extension for the API reference (mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any

import griffe

DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n).*)*", re.MULTILINE)


class FencedDoctests(griffe.Extension):
    """Put each block of doctest lines, with its output, into a Markdown code fence."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(lambda block: f"```pycon\n{block.group()}\n```", obj.docstring.value)
