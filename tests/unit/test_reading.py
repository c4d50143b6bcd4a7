"""Text as Excel, Notepad and damaged disks leave it: read as it was meant, or refused with encoding and line."""

import os

import pytest

from conceptseg.errors import DataError
from conceptseg.reading import (
    LARGEST_TEXT,
    decode_text,
    read_json,
    read_lines,
    read_regular,
    read_rows,
    read_text,
    read_yaml,
)

TEXT = "wnid,noun\nn1,café\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_with_a_mark_or_in_utf_8_reads_the_same(encoding, end):
    assert decode_text(TEXT.replace("\n", end).encode(encoding), "a.csv") == TEXT


@pytest.mark.parametrize("order", ["le", "be"])
def test_both_byte_orders_are_told_by_their_marks(order):
    assert decode_text("\ufeffä".encode(f"utf-16-{order}"), "a") == "ä"


def test_joined_files_keep_no_mark_inside():
    assert decode_text(b"\xef\xbb\xbfa\n" * 2, "a") == "a\na\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("cp1252"), r"a\.csv, line 2: the byte 0xe9 is no UTF-8\. It is likely .* Windows-1252"),
        (TEXT.replace("\n", "\r").encode("cp1252"), r"a\.csv, line 2: "),
        (b"a\nb\0c\n", r"a\.csv, line 2: the text holds the character NUL, read as UTF-8"),
        (TEXT.replace("é", "e").encode("utf-16-le"), r"a\.csv, line 1: .* NUL.* UTF-16 without a byte order mark"),
        (b"\xff\xfea\0\n\0b", r"a\.csv, line 2: the byte 0x62 is no UTF-16-LE"),
    ],
    ids=["cp1252", "cp1252 of old Macs", "NUL", "UTF-16 without a mark", "UTF-16 cut short"],
)
def test_other_bytes_are_refused_with_encoding_and_line(content, message):
    with pytest.raises(DataError, match=message):
        decode_text(content, "a.csv")


def test_only_line_ends_end_a_line(tmp_path):
    (tmp_path / "a").write_text("a\x0bb\u2028c\n d \n", encoding="utf-8")
    assert read_lines(tmp_path / "a") == ["a\x0bb\u2028c", "d", ""]


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, reason in {"pipe": "a named pipe", "loop": "symbolic links", "zero": "a device", ".": "a folder"}.items():
        with pytest.raises(DataError, match=f"words can't be read: .*{reason}"):
            read_text(tmp_path / name, "words")
    with pytest.raises(DataError, match="words is missing"):
        read_text(tmp_path / "none", "words")


def test_a_file_that_is_too_large_is_refused_unread(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(LARGEST_TEXT + 1)  # takes no space
    with pytest.raises(DataError, match="at most 268,435,456 are read"):
        read_text(tmp_path / "a")


def rows(tmp_path, content, columns=("id", "word")):
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(tmp_path / "a.csv", columns))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_rows_are_read_whatever_separates_their_cells(tmp_path, mark):
    said = mark.join(("id", "note", "word")) + "\r\n" + mark.join(("1", '"a' + mark + ' ""b""\nc"', "cat")) + "\r\n"
    assert rows(tmp_path, said.encode("utf-16")) == [(3, {"id": "1", "note": f'a{mark} "b"\nc', "word": "cat"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,wrd\n1,cat\n", r"line 1: the columns are id, wrd; word lacking\. Did you mean \"wrd\""),
        ("", "line 1: the columns are none"),
        ("id,word,word\n1,a,b\n", 'line 1: the column "word" is named twice'),
        ("id,word\n1,cat\n2\n", "line 3: 1 cells, but the first line names 2 columns"),
        ("id,word\n1,red, blue\n", "line 2: 3 cells"),
        ('id,word\n1,"cat\n', "line 2: this is not CSV: unexpected end of data"),
        ("id,word\n1," + "x" * 200_000 + "\n", r"line 2: this is not CSV: field larger than field limit"),
        ("x" * 200_000 + "\n", r"line 1: this is not CSV: field larger than field limit"),
    ],
    ids=["a column misspelt", "empty", "a column twice", "too short", "too long", "an open quote", "a huge field", "a huge head"],
)
def test_a_table_that_does_not_hold_together_is_refused_with_its_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        rows(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "a": 2}', 'the key "a" stands twice'),
        ('{"a": NaN}', "NaN is no number"),
        ('{\n"a": }', "line 2: this is no JSON"),
        ("[" * 200_000, "nested too deeply"),
        ("9" * 5_000, "no JSON that can be read"),
    ],
)
def test_json_is_read_strictly(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: 1\nb: 2\na: 3\n", 'line 3: .*"a" stands twice'), ("a: 1\nb: [\n", r"line 3: this can't be read")],
)
def test_yaml_is_read_strictly(tmp_path, content, message):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(DataError, match=message):
        read_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes("a: {b: é}\r\n".encode("utf-16"))
    assert read_yaml(tmp_path / "a.yaml") == {"a": {"b": "é"}}


def test_a_path_with_a_nul_is_refused(tmp_path):
    with pytest.raises(DataError, match="embedded null"):
        read_regular(tmp_path / "a\0b.png", "the image")
