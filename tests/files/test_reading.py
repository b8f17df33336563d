"""Files that were kept, and what may have become of them: one sentence each."""

from __future__ import annotations

import os

import pytest

from nybble.errors import ModelError, NybbleError, RunError
from nybble.files.reading import LARGEST, Shape, read_lines, read_object, read_shape, read_text


class Line(Shape):
    step: int
    loss: float | None = None


FAULTS = {
    "empty": (b"", "x.json is empty", ""),
    "blank": (b" \n\n", "x.json is empty", ""),
    "zeros": (bytes(512), "x.json is empty", ""),
    "garbled": (b'{"step": 1,\n"loss" 2}', "x.json is not valid JSON: Expecting ':' delimiter", ":2"),
    "cut off": (b'{"step": 1,\n"lo', "x.json is not valid JSON: Unterminated string", ":2"),
    "control": (b'{"step": "\x01"}', "x.json is not valid JSON: Invalid control character", ":1"),
    "list": (b"[1, 2]", "x.json is not a JSON object", ""),
    "text": (b'"step"', "x.json is not a JSON object", ""),
    "nul": (b'{"step": 1\0}', "x.json is not valid JSON", ":1"),
    "latin-1": (b'{\n"step": "\xe9"}', "x.json is not UTF-8: byte 0xe9", ":2"),
    "utf-16": ('{"step": 1}'.encode("utf-16"), "x.json is not UTF-8: byte 0xff", ":1"),
    "mark": (b'\xef\xbb\xbf{"step": 1}', "x.json is not valid JSON: Unexpected UTF-8 BOM", ":1"),
    "deep lists": (b"[" * 100_000, "x.json is nested too deeply", ""),
    "deep objects": (b'{"a":' * 100_000, "x.json is nested too deeply", ""),
    "digits": (b'{\n"step": ' + b"9" * 5000 + b"}", "x.json has a number of more than 4,300 digits", ":2"),
    "no step": (b'{"loss": 1}', "x.json has no step", ""),
    "text for a number": (b'{"step": "1"}', "step in x.json: should be a whole number, not '1'", ""),
    "true for a number": (b'{"step": true}', "step in x.json: should be a whole number, not True", ""),
    "list for a number": (b'{"step": 1, "loss": [2]}', "loss in x.json: should be a number, not [2]", ""),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2000000\n",
        "x.json is a git-lfs pointer: the file itself (2.0 MB) was not downloaded",
        "",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_object_is_one_sentence_with_its_location(name, tmp_path):
    content, what, line = FAULTS[name]
    file = tmp_path / "x.json"
    file.write_bytes(content)
    with pytest.raises(RunError) as caught:
        read_shape(file, Line, RunError, "copy it")
    print(caught.value)
    assert what in caught.value.what
    assert not caught.value.what.endswith((" at", " starting"))  # Python's, before a place
    assert caught.value.where == f"{file}{line}"
    assert caught.value.fix


def test_what_is_not_a_regular_file_is_refused_without_waiting(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(LARGEST + 1)
    told = {
        "folder": "folder is a folder, not a file",
        "pipe": "pipe is a pipe, not a file",
        "zero": "zero is a device, not a file",
        "link": "there is no link",
        "none": "there is no none",
        "loop": "loop cannot be read: too many levels of symbolic links",
        "large": "large has 67,108,865 bytes; the limit for such a file is 67,108,864",
    }
    for name, what in told.items():
        for read in (read_text, read_object):
            with pytest.raises(ModelError) as caught:
                read(tmp_path / name)
            print(caught.value)
            assert what in caught.value.what


def test_undamaged_files_are_read(tmp_path):
    file = tmp_path / "x.json"
    file.write_text('{"step": 1, "loss": 2, "more": {"a": NaN}}')
    assert read_object(file)["more"].keys() == {"a"}
    assert read_shape(file, Line, RunError, "copy it") == Line(step=1, loss=2.0)


def test_lines_are_read_one_by_one_and_a_damaged_one_is_an_error_among_them(tmp_path):
    file = tmp_path / "x.jsonl"
    assert list(read_lines(file, Line, RunError)) == []
    file.write_bytes(b'{"step": 1}\n\n{"step"\n[]\n{"loss": 1}\n{"step": 2, "loss": 0.5}\n{"step": "\xff"}\n{"st')
    found = list(read_lines(file, Line, RunError))
    assert [line for line in found if isinstance(line, Line)] == [Line(step=1), Line(step=2, loss=0.5)]
    faults = [fault for fault in found if isinstance(fault, NybbleError)]
    print(*faults, sep="\n")
    assert [fault.where for fault in faults] == [f"{file}:{line}" for line in (3, 4, 5, 7, 8)]
    assert f"sed -i 5d {file}" in faults[2].fix
