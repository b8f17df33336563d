"""git-lfs pointers in place of files."""

from __future__ import annotations

import pytest

from nybble.files.lfs import pointer_fault

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4ec71fd53e99766de38f24753b30c9e8\nsize 9976578928\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_pointer_is_named_with_the_size_of_its_file_and_the_command(tmp_path, end):
    folder = tmp_path / "my models"
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes(POINTER.replace("\n", end).encode())
    what, fix = pointer_fault(file)
    print(what, fix)
    assert what == "model.safetensors is a git-lfs pointer: the file itself (10.0 GB) was not downloaded"
    assert fix.startswith(f"git -C '{folder}' lfs pull")


@pytest.mark.parametrize("content", [b"", b"version 2", b"\x00\x01" * 2000, b'{"text": "version https://git-lfs"}'])
def test_other_files_are_not_pointers(tmp_path, content):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    assert pointer_fault(file) is None
