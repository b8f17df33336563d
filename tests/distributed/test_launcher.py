"""What nybble reads from the environment of torchrun, accelerate launch and srun, and what it says where it does not fit."""

from __future__ import annotations

import inspect

import accelerate.commands.launch
import accelerate.utils.launch
import pytest

from nybble.distributed.launcher import (
    SHARDING,
    ProcessPlace,
    join_by_variables,
    placement,
    process_label,
    refuse_other_size,
    refuse_sharding,
)
from nybble.errors import DeviceError

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", **MEETING}
SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node[1-2]"}
STEP = {**SLURM, "SLURM_STEP_NUM_TASKS": "8"}  # srun adds it
POD = {"RANK": "0", "WORLD_SIZE": "1", **MEETING}


@pytest.fixture
def started(monkeypatch):
    """Sets the variables that a launcher would have set, and no others."""

    def start(variables):
        for name in [*TORCHRUN, *STEP, *SHARDING, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU"]:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ProcessPlace()),
        (TORCHRUN, ProcessPlace(3, 1, 4, "torchrun")),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, ProcessPlace(3, 1, 4, "accelerate launch")),
        ({"ACCELERATE_USE_CPU": "True"}, ProcessPlace(0, 0, 1, "accelerate launch")),
        ({**STEP, **MEETING}, ProcessPlace(5, 1, 8, "srun")),
        ({**STEP, **TORCHRUN}, ProcessPlace(3, 1, 4, "torchrun")),
        (SLURM, ProcessPlace()),  # a batch script, which is one process
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, ProcessPlace()),
        (POD, ProcessPlace()),  # one pod: nybble may start its processes itself
        ({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, ProcessPlace(0, 0, 1, "torchrun")),
        ({"RANK": "", "WORLD_SIZE": " "}, ProcessPlace()),
    ],
)
def test_the_place_of_a_process(variables, expected, started):
    started(variables)
    assert placement() == expected
    assert process_label() == (f"process {expected.rank}: " if expected.rank else "")


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


FAULTS = {
    "no size": (without(TORCHRUN, "WORLD_SIZE"), "incomplete: RANK=3, LOCAL_RANK=1, but no WORLD_SIZE", "unset RANK LOCAL"),
    "no rank": (without(TORCHRUN, "RANK"), "incomplete: LOCAL_RANK=1, WORLD_SIZE=4, but no RANK", "torchrun, which sets"),
    "no local rank": (
        without(TORCHRUN, "LOCAL_RANK"), "incomplete: RANK=3, WORLD_SIZE=4, but no LOCAL_RANK", "torchrun, which sets"),
    "size only": ({"WORLD_SIZE": "2"}, "incomplete: WORLD_SIZE=2, but no RANK and no LOCAL_RANK", "unset WORLD_SIZE"),
    "rank too high": ({**TORCHRUN, "RANK": "4"}, "RANK=4, but WORLD_SIZE=4: the numbers of 4 processes end at 3", "one launcher"),
    "rank of one": ({**POD, "RANK": "1", "LOCAL_RANK": "0"}, "RANK=1, but WORLD_SIZE=1: the numbers of 1 process end at 0", ""),
    "local rank too high": (
        {**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, but LOCAL_WORLD_SIZE=2: the numbers of 2 processes end at 1", ""),
    "no process": ({**TORCHRUN, "WORLD_SIZE": "0"}, "WORLD_SIZE=0: there is at least one process", "one launcher"),
    "no number": ({**TORCHRUN, "RANK": "first"}, "RANK=first is not a number", "one launcher"),
    "negative": ({**TORCHRUN, "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is not a number", "one launcher"),
    "no port number": ({**TORCHRUN, "MASTER_PORT": "auto"}, "MASTER_PORT=auto is not a number", ""),
    "no address": (
        without(TORCHRUN, "MASTER_ADDR"), "4 processes must find each other, but MASTER_ADDR is not set",
        "export MASTER_ADDR=HOST, the machine of process 0"),
    "srun alone": (
        STEP, "8 processes must find each other, but MASTER_ADDR and MASTER_PORT are not set",
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500, the machine'),
    "srun without a number": (without(STEP, "SLURM_LOCALID"), "but no SLURM_LOCALID", "torchrun, which sets"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_together_is_one_error(name, started):
    variables, what, fix = FAULTS[name]
    started(variables)
    with pytest.raises(DeviceError) as caught:
        placement()
    print(caught.value)
    assert what in caught.value.what
    assert caught.value.where == "the environment of this process"
    assert fix in caught.value.fix
    assert process_label() == "", "a message about it needs no number"


@pytest.mark.parametrize(
    ("variables", "requested", "what", "fix"),
    [
        ({}, 2, "2 processes were requested, but only this one is running", "nybble train --processes 2; on several"),
        (
            TORCHRUN,
            2,
            "2 processes were requested, but torchrun started 4 processes",
            "train.processes=4 (with --resume: --processes 4), the number on all",
        ),
        ({**STEP, **MEETING}, 1, "1 process was requested, but srun started 8 processes", "train.processes=8"),
        ({"ACCELERATE_USE_CPU": "True"}, 2, "but accelerate launch started 1 process", "--multi_gpu --num_processes 2"),
    ],
)
def test_another_number_of_processes_than_requested_is_an_error(variables, requested, what, fix, started):
    started(variables)
    refuse_other_size(placement().size)
    with pytest.raises(DeviceError) as caught:
        refuse_other_size(requested)
    print(caught.value)
    assert what in caught.value.what
    assert caught.value.where == f"train.processes={requested}"
    assert fix in caught.value.fix


def test_torch_and_accelerate_read_sruns_numbers_under_their_own_names(started, monkeypatch):
    started({**STEP, **MEETING})
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that they are restored
    join_by_variables(placement())
    assert placement() == ProcessPlace(5, 1, 8, "torchrun")


@pytest.mark.parametrize("name", SHARDING)
def test_what_shards_a_model_is_refused_by_its_name(name, started, here, tiny_llama, rows, tmp_path):
    source = inspect.getsource(accelerate.utils.launch) + inspect.getsource(accelerate.commands.launch)
    assert f'"{name}"] = "true"' in source, "as the launcher passes it on"
    started({name: "false"})
    refuse_sharding()
    started({name: "true"})
    said = here("train", tiny_llama, rows, f"out={tmp_path / 'run'}")
    print(said.stderr)
    assert said.returncode == 1
    text = " ".join(said.stderr.split())
    assert f"{SHARDING[name]} was requested of Accelerate, but nybble trains data-parallel by itself" in text
    assert f"where: {name}=true" in text
    assert "fix: nybble train --processes N" in text
    assert not (tmp_path / "run").exists()


def test_the_command_line_says_it_before_anything_is_loaded(started, here, tiny_llama, rows, tmp_path):
    started({"RANK": "3"})
    said = here("train", tiny_llama, rows, f"out={tmp_path / 'run'}")
    assert said.returncode == 1
    assert "incomplete: RANK=3, but no LOCAL_RANK and no WORLD_SIZE" in " ".join(said.stderr.split())
