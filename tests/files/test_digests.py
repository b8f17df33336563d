"""What is wrong with files now, where a disk cannot even read them."""

from __future__ import annotations

from nybble.files.digests import describe, faults


def test_a_file_that_the_disk_cannot_read_is_a_fault_and_does_not_kill_the_process(tmp_path):
    """The first page of a process's memory is never there: to read it is the error of a failing disk."""
    for name in ("whole", "changed", "bad"):
        (tmp_path / name).write_text(name)
    entries = {**describe(tmp_path), "bad": {"size": 0, "digest": "0" * 32}}
    (tmp_path / "bad").unlink()
    (tmp_path / "bad").symlink_to("/proc/self/mem")
    (tmp_path / "changed").write_text("CHANGED")
    assert faults(tmp_path, entries) == [
        "bad cannot be read: input/output error",
        "changed is not what was written (its digest differs)",
    ]
