"""Docstrings of the numeric core give a shape for every tensor, and no docstring begins with "What"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = ("backbones", "extractors", "saliency", "segment", "metrics", "trace", "protocols.py")
ARRAYS = {"Tensor", "torch.Tensor", "np.ndarray"}
SHAPE = re.compile(r"\[[^\[\]]+\]")
"""Axes in a docstring, such as [B C h w]."""


@dataclass(frozen=True)
class Function:
    """A public function, or a method of a public class, that takes or returns arrays."""

    place: str
    owner: str | None
    node: ast.FunctionDef
    annotations: tuple[ast.expr, ...]


def sources() -> Iterator[Path]:
    for name in CORE:
        path = ROOT / "conceptseg" / name
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def is_array(annotation: ast.AST) -> bool:
    return ast.unparse(annotation) in ARRAYS


def bare_arrays(annotation: ast.AST) -> Iterator[ast.AST]:
    """Arrays in an annotation that are not in a jaxtyping annotation, which gives their shape."""
    if is_array(annotation):
        yield annotation
        return
    if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
        first, *rest = annotation.slice.elts
        if is_array(first) and len(rest) == 1 and isinstance(rest[0], ast.Constant):
            return
    for child in ast.iter_child_nodes(annotation):
        yield from bare_arrays(child)


@cache
def functions() -> tuple[list[Function], dict[str, tuple[list[str], set[str]]]]:
    """Public functions with arrays; and of every class its bases and the methods that it documents."""
    found, classes = [], {}
    for path in sources():
        for top in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(top, ast.ClassDef):
                methods = [node for node in top.body if isinstance(node, ast.FunctionDef)]
                bases = [ast.unparse(base).split("[")[0].split(".")[-1] for base in top.bases]
                classes[top.name] = bases, {node.name for node in methods if ast.get_docstring(node)}
                candidates = [(top.name, node) for node in methods if not top.name.startswith("_")]
            else:
                candidates = [(None, top)] if isinstance(top, ast.FunctionDef) else []
            for owner, node in candidates:
                given = node.args
                arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
                annotations = [argument.annotation for argument in arguments if argument] + [node.returns]
                with_arrays = tuple(a for a in annotations if a and any(is_array(inner) for inner in ast.walk(a)))
                if with_arrays and not node.name.startswith("_"):
                    place = f"{path.relative_to(ROOT).as_posix()}:{node.lineno} {node.name}"
                    found.append(Function(place, owner, node, with_arrays))
    return found, classes


def is_documented(owner: str | None, name: str) -> bool:
    """Whether a class or one of its bases documents a method."""
    bases, documented = functions()[1].get(owner or "", ([], set()))
    return name in documented or any(is_documented(base, name) for base in bases)


def test_public_arrays_have_a_shape():
    """In their annotation, or in the docstring."""
    bare = [
        function.place
        for function in functions()[0]
        if any(list(bare_arrays(a)) for a in function.annotations) and not SHAPE.search(ast.get_docstring(function.node) or "")
    ]
    assert len(functions()[0]) > 200 and bare == []


def test_public_functions_of_arrays_are_documented():
    """With a docstring of their own, or that of the method which they override."""
    undocumented = [
        function.place
        for function in functions()[0]
        if not ast.get_docstring(function.node) and not is_documented(function.owner, function.node.name)
    ]
    assert undocumented == []


def test_docstrings_say_what_a_thing_is_or_does():
    begin = re.compile(r'^\s*r?"""What\b', re.MULTILINE)
    paths = [path for part in ("conceptseg", "benchmarks", "scripts", "tests") for path in (ROOT / part).rglob("*.py")]
    found = [path.relative_to(ROOT).as_posix() for path in paths if begin.search(path.read_text(encoding="utf-8"))]
    assert len(paths) > 100 and found == []
