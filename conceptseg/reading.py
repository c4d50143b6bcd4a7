"""Read regular files whole, and text as people write it. These readers decide samples and words, so they make numbers."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from conceptseg.errors import DataError, did_you_mean

LARGEST_FILE = 1 << 30
"""Bytes of the largest picture file that is read into memory."""
LARGEST_TEXT = 1 << 28
"""Bytes of the largest text file that is read."""
MOST_NODES = 100_000
"""Most values that a YAML text may stand for, each alias counted as what it repeats."""

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
# The longer marks first: the UTF-32 one begins with the UTF-16 one.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip


@contextmanager
def open_regular(path: Path | str) -> Iterator[BinaryIO]:
    """A regular file, open for reading bytes. Opening never waits: a named pipe, a socket or a device is refused unopened.

    Raises FileNotFoundError where nothing is, and OSError for anything else that can't be opened or is no regular file.
    """
    _check_kind(os.stat(path))
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        _check_kind(os.fstat(handle))  # it may have been replaced in between
        yield file


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'no regular file')}; a regular file was wanted")


def read_regular(path: Path, where: str, largest: int = LARGEST_FILE) -> bytes:
    """The whole content of a regular file of at most `largest` bytes; `where` names it in messages. Raises DataError."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > largest:
                raise DataError(f"{where} has {size:,} bytes; at most {largest:,} are read.\n  Is it the right file?")
            return file.read()
    except FileNotFoundError as error:
        raise DataError(f"{where} is missing.\n  Restore it from the source, or correct the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)  # "Too many levels of symbolic links" for a loop of links
        raise DataError(f"{where} can't be read: {reason}.\n  Look at the path, the file's permissions and its disk.") from error


def decode_text(content: bytes, where: str) -> str:
    r"""Text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; lines end with "\n", the mark is taken off.

    `where` names the file in messages. Raises DataError with the encoding and the line for bytes that do not fit and for NUL.

    >>> decode_text(b"\xef\xbb\xbfa\r\nb", "list.txt")
    'a\nb'
    """
    mark, encoding = next(((mark, name) for mark, name in _MARKS if content.startswith(mark)), (b"", "utf-8"))
    body = content[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + _lines(body[: error.start].decode(encoding, errors="replace"))
        likely = " It is likely to be in Windows-1252 or another legacy encoding." if not mark and b"\0" not in body else ""
        raise DataError(
            f"{where}, line {line}: the byte 0x{body[error.start]:02x} is no {encoding.upper()}.{likely}\n"
            '  Save the file as UTF-8 (Excel: "CSV UTF-8"; Notepad: "Encoding: UTF-8").'
        ) from error
    if "\0" in text:
        line = 1 + _lines(text[: text.index("\0")])
        raise DataError(
            f"{where}, line {line}: the text holds the character NUL, read as {encoding.upper()}. It is damaged, or in UTF-16 "
            "without a byte order mark.\n  Save the file as UTF-8."
        )
    # A mark inside stands where files were joined; it is no character of the text.
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def _lines(text: str) -> int:
    return text.replace("\r\n", "\n").replace("\r", "\n").count("\n")


def read_text(path: Path, where: str = "", largest: int = LARGEST_TEXT) -> str:
    """A text file of at most `largest` bytes; see `decode_text`. Raises DataError."""
    return decode_text(read_regular(path, where or str(path), largest), where or str(path))


def read_lines(path: Path, where: str = "") -> list[str]:
    r"""Every line of a text file, without its end and surrounding blanks; empty lines are kept. Only "\n" and "\r" end one."""
    return [line.strip() for line in read_text(path, where).split("\n")]


def read_rows(path: Path, columns: Sequence[str], where: str = "") -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV file whose first line names `columns`, in any order and with others beside them.

    Separated by comma, semicolon or tab, whichever gives the columns in the first line. Raises DataError with the line for a
    column that is absent or named twice, a row of another length, an unclosed quote, or a field above 128 KiB.
    """
    where = where or str(path)
    text = read_text(path, where)
    first = text.partition("\n")[0]
    try:
        heads = {mark: [head.strip() for head in next(csv.reader([first], delimiter=mark), [])] for mark in (",", ";", "\t")}
    except csv.Error as error:
        raise DataError(f"{where}, line 1: this is not CSV: {error}.\n  The first line must be: {','.join(columns)}.") from error
    mark = next((mark for mark, names in heads.items() if set(columns) <= set(names)), ",")
    names = heads[mark]
    lacking = [column for column in columns if column not in names]
    if lacking:
        raise DataError(
            f"{where}, line 1: the columns are {', '.join(names) or 'none'}; {', '.join(lacking)} lacking. "
            f"{did_you_mean(lacking[0], names)}\n  The first line must be: {','.join(columns)}."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f'{where}, line 1: the column "{twice[0]}" is named twice.\n  Leave one of them out.')
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        next(reader)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{where}, line {reader.line_num}: {len(cells)} cells, but the first line names {len(names)} columns.\n"
                    "  Quote cells that hold the separator."
                )
            yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(
            f"{where}, line {reader.line_num}: this is not CSV: {error}.\n  Fix the line, or save the file again."
        ) from error


def path_inside(folder: Path, name: str) -> Path | None:
    """Return the file that a list or table names, relative names taken in `folder`; None if it lies in another folder.

    Links in the folder are followed: its owner set them, the list's author did not.
    """
    if "\0" in name:
        return None
    whole = os.path.normpath(os.path.join(os.path.abspath(folder), name))
    try:
        resolved = os.path.realpath(whole)
    except UnicodeEncodeError:  # half a surrogate, as JSON can write it: no file has that name
        return None
    for place, root in ((whole, os.path.abspath(folder)), (resolved, os.path.realpath(folder))):
        if Path(place).is_relative_to(root):
            return Path(whole)
    return None


def read_json(path: Path, where: str = "", largest: int = LARGEST_TEXT) -> Any:
    """Return the contents of a JSON file of at most `largest` bytes.

    Raises DataError for invalid JSON, a duplicate key, NaN and infinity.
    """
    where = where or str(path)
    text = read_text(path, where, largest)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise DataError(f'{where}: the key "{next(k for k in keys if keys.count(k) > 1)}" stands twice in one object.')
        return found

    def finite(name: str) -> float:
        raise DataError(f"{where}: {name} is no number of JSON.")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=finite)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}, line {error.lineno}: this is no JSON: {error.msg}.\n  Export the file again.") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise DataError(f"{where}: this is no JSON that can be read: {error}.\n  Export the file again.") from error
    except RecursionError as error:
        raise DataError(f"{where}: its brackets are nested too deeply to be read.\n  Export the file again.") from error


def read_yaml(path: Path, where: str = "") -> Any:
    """Return the contents of a YAML file, plain data only. Raises DataError for invalid YAML and a duplicate key."""
    return parse_yaml(read_text(path, where or str(path)), where or str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Return the contents of a YAML text; see `read_yaml`. Raises DataError, also for what `check_aliases` refuses."""
    import yaml

    class Once(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key.value, str) and key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f'the key "{key.value}" stands twice', key.start_mark)
                if isinstance(key.value, str):
                    seen.add(key.value)
            return super().construct_mapping(node, deep)

    check_aliases(text, where)
    try:
        return yaml.load(text, Once)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DataError(f"{where}{line}: this can't be read as YAML: {problem}.\n  Mend the line.") from error


def check_aliases(text: str, where: str) -> None:
    """Raise DataError for a YAML text whose aliases, written out, are more than `MOST_NODES` values, or hold themselves.

    A few lines can stand for billions of values; the text is parsed, not built. Text that is no YAML is left to its reader.
    """
    import yaml

    if "*" not in text or "&" not in text:
        return
    sizes: dict[int, int] = {}
    within: set[int] = set()

    def size(node: Any) -> int:
        """Values that a node stands for, itself included."""
        if id(node) in within:
            raise DataError(f"{where}: an alias stands for a value that it is itself a part of. Write the value out.")
        if id(node) not in sizes:
            within.add(id(node))
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
            within.remove(id(node))
        return sizes[id(node)]

    try:
        nodes = list(yaml.compose_all(text, yaml.SafeLoader))
        total = sum(size(node) for node in nodes if node is not None)
    except (yaml.YAMLError, RecursionError):
        return
    if total > MOST_NODES:
        raise DataError(
            f"{where}: its aliases stand for {total:.3g} values; at most {MOST_NODES:,} are read. Write out what they stand for."
        )
