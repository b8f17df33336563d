"""Free memory of this machine, of a container with a limit, and of a GPU."""

from __future__ import annotations

import psutil
import pytest
import torch

from nybble.plan.free_memory import allocatable_bytes, device_memory, host_memory


def container(folder, limit: str, used: int, inactive: int):
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file 77\ninactive_file {inactive}\nslab 3\n")
    return folder


def test_a_machine_without_limits(tmp_path) -> None:
    machine, found = psutil.virtual_memory(), host_memory(tmp_path / "none")
    assert found.total == machine.total
    assert found.free == pytest.approx(machine.available, rel=0.3)
    endless = host_memory(container(tmp_path / "max", "max", 1, 0))
    assert endless.total == machine.total


def test_a_container_has_what_its_limit_leaves(tmp_path) -> None:
    found = host_memory(container(tmp_path / "small", "1000000", 700_000, 0))
    assert (found.free, found.total) == (300_000, 1_000_000)
    cached = host_memory(container(tmp_path / "cached", "1000000", 950_000, 600_000))
    assert cached.free == 650_000, "files that the kernel would drop are free"
    wide = host_memory(container(tmp_path / "wide", str(2**60), 1000, 0))
    assert wide.total == psutil.virtual_memory().total
    full = host_memory(container(tmp_path / "full", "1000", 1200, 0))
    assert full.free == 0, "a limit that was lowered"


def test_the_cpu_s_memory_is_the_host_s() -> None:
    assert device_memory("cpu").total == device_memory(torch.device("cpu")).total == host_memory().total


@pytest.mark.gpu
def test_what_is_allocated_is_no_longer_allocatable() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.empty_cache()
    before, memory = allocatable_bytes(device), device_memory(device)
    assert 0 < before <= memory.total
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert before - allocatable_bytes(device) == pytest.approx(block.nbytes, abs=2**22)
    del block
    assert allocatable_bytes(device) == pytest.approx(before, abs=2**22), "what the allocator keeps can be had again"
    assert before - allocatable_bytes(device, 0.05) == pytest.approx(0.05 * memory.total, rel=0.01)
    torch.cuda.set_per_process_memory_fraction(0.25, device)
    try:
        assert allocatable_bytes(device) <= 0.25 * memory.total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
