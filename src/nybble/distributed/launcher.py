"""Which process this is, and of how many: read from the variables of torchrun, accelerate launch or srun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from nybble.errors import DeviceError

# How threads of GNU's OpenMP, which comes with torch, wait for each other. By default each spins for 300,000 rounds; while they
# spin, threads that they wait for may get no core if other processes need the cores too (bench/busy.py measures both settings).
SPIN_SETTINGS = {"GOMP_SPINCOUNT": "100000"}
RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# Slurm also sets SLURM_PROCID and SLURM_NTASKS in a batch script, which is a single process; the size of a step comes from srun.
SLURM = {RANK: "SLURM_PROCID", LOCAL_RANK: "SLURM_LOCALID", WORLD_SIZE: "SLURM_STEP_NUM_TASKS"}
# How Accelerate 1.15's launcher passes on what shards a model over processes.
SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
TRUE = ("1", "true", "yes", "on", "y", "t")  # as Accelerate reads them


@dataclass(frozen=True)
class ProcessPlace:
    """This process among those that train together."""

    rank: int = 0
    """Its number among all of them; the first one writes the run folder."""
    local_rank: int = 0
    """Its number on its machine, and that of its GPU; the first one there writes the cache."""
    size: int = 1
    """How many train together, on all machines."""
    launcher: str | None = None
    """What started it: torchrun, accelerate launch or srun; None if it was started by hand, alone."""


def wait_without_spinning() -> None:
    """Make the threads of this process, and of processes that it starts, leave the cores to others while they wait.

    The library reads its environment when it is loaded, so call this before torch is imported. Existing settings stay.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(SPIN_SETTINGS)


def placement() -> ProcessPlace:
    """This process's place by its environment; torchrun's variables win over Slurm's, since srun may start torchrun.

    Raises:
        DeviceError: the variables do not fit together.
    """
    by_srun = not any(_is_set(name) for name in (RANK, LOCAL_RANK, WORLD_SIZE))
    names = SLURM if by_srun else {name: name for name in SLURM}
    if by_srun and not _is_set(names[WORLD_SIZE]):
        return ProcessPlace(launcher="accelerate launch" if _is_accelerate() else None)
    size = _number(names[WORLD_SIZE]) if _is_set(names[WORLD_SIZE]) else None
    if size == 1 and not _is_set(names[LOCAL_RANK]) and os.environ.get(names[RANK], "0") == "0":
        return ProcessPlace()  # operators of Kubernetes describe a job of one machine so, and start no processes in it
    if by_srun and size == 1:
        return ProcessPlace()  # one task, which may start a process for each GPU
    _refuse_missing(names)
    found = ProcessPlace(
        _number(names[RANK]), _number(names[LOCAL_RANK]), _number(names[WORLD_SIZE]),
        "srun" if by_srun else "accelerate launch" if _is_accelerate() else "torchrun",
    )  # fmt: skip
    _check_fit(found, names)
    return found


def join_by_variables(place: ProcessPlace) -> None:
    """Write the place into the variables that torch and Accelerate read; with srun they are not set."""
    if place.launcher == "srun":
        numbers = {RANK: place.rank, LOCAL_RANK: place.local_rank, WORLD_SIZE: place.size}
        os.environ.update({name: str(number) for name, number in numbers.items()})


def world_size() -> int:
    """Number of processes that the launcher started; 1 without a launcher."""
    return placement().size


def local_size() -> int | None:
    """How many of them are on this machine; None where the launcher does not say."""
    return _number(LOCAL_WORLD_SIZE) if _is_set(LOCAL_WORLD_SIZE) else None


def rank() -> int:
    """This process's number among them; 0 without a launcher."""
    return placement().rank


def process_label() -> str:
    """How messages name this process; empty for the first one, and where its number cannot be told."""
    try:
        number = rank()
    except DeviceError:
        return ""
    return f"process {number}: " if number else ""


def refuse_other_size(processes: int) -> None:
    """Raise DeviceError where there are not as many processes as `train.processes` requests.

    A process cannot see how many were meant to be started, and some launchers start one where two were requested.
    """
    place = placement()
    if place.size == processes:
        return
    machines = "torchrun --nnodes MACHINES --nproc-per-node GPUS ... -m nybble train ..."
    if place.launcher is None:
        what = f"{processes} processes were requested, but only this one is running"
        fix = f"nybble train --processes {processes}; on several machines: {machines} train.processes={processes}"
    else:
        started = f"{place.size} process{'es' * (place.size > 1)}"
        requested = "1 process was" if processes == 1 else f"{processes} processes were"
        what = f"{requested} requested, but {place.launcher} started {started}"
        fix = f"train.processes={place.size} (with --resume: --processes {place.size}), the number on all machines together, "
        fix += f"or start {processes}"
        # Without --multi_gpu, accelerate 1.15 runs one process on a CPU, however many are requested.
        fix += f": accelerate launch --multi_gpu --num_processes {processes}" * (place.launcher == "accelerate launch")
    raise DeviceError(what, where=f"train.processes={processes}", fix=fix)


def refuse_sharding() -> None:
    """Raise DeviceError where Accelerate was asked to shard the model: nybble shards nothing but the base, and by itself."""
    for name, what in SHARDING.items():
        if os.environ.get(name, "").lower() in TRUE:
            raise DeviceError(
                f"{what} was requested of Accelerate, but nybble trains data-parallel by itself: the base is frozen in 4 bits, "
                "and only the adapters' gradients are exchanged",
                where=f"{name}={os.environ[name]}",
                fix="nybble train --processes N, or accelerate launch --multi_gpu --num_processes N -m nybble train ... "
                "train.processes=N; where the base does not fit a GPU: engine.weights=sharded (nybble plan MODEL --vram 12GB)",
            )


def _refuse_missing(names: Mapping[str, str]) -> None:
    """Raise DeviceError where the launcher has set some of its variables only."""
    missing = [name for name in names.values() if not _is_set(name)]
    if missing:
        given = ", ".join(f"{name}={os.environ[name]}" for name in names.values() if _is_set(name))
        raise DeviceError(
            f"the launcher's variables are incomplete: {given}, but no {' and no '.join(missing)}",
            where="the environment of this process",
            fix=f"start it with torchrun, which sets {RANK}, {LOCAL_RANK} and {WORLD_SIZE}, or with none of them: "
            f"unset {' '.join(name for name in names.values() if _is_set(name))}",
        )


def _check_fit(place: ProcessPlace, names: Mapping[str, str]) -> None:
    """Raise DeviceError where the numbers contradict each other, or where the processes cannot find each other."""
    where, size = "the environment of this process", place.size
    if not size:
        raise DeviceError(f"{names[WORLD_SIZE]}=0: there is at least one process", where=where, fix=_START_AGAIN)
    local_size = _number(LOCAL_WORLD_SIZE) if place.launcher != "srun" and _is_set(LOCAL_WORLD_SIZE) else size
    bound = LOCAL_WORLD_SIZE if local_size != size else names[WORLD_SIZE]
    for name, number, limit, of in (
        (names[RANK], place.rank, size, names[WORLD_SIZE]),
        (names[LOCAL_RANK], place.local_rank, local_size, bound),
    ):
        if number >= limit:
            raise DeviceError(
                f"{name}={number}, but {of}={limit}: the numbers of {limit} process{'es' * (limit > 1)} end at {limit - 1}",
                where=where,
                fix=_START_AGAIN,
            )
    missing = [name for name in MEETING if not _is_set(name)]
    if size > 1 and missing:
        first = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' if place.launcher == "srun" else "HOST"
        words = {MEETING[0]: first, MEETING[1]: "29500"}
        raise DeviceError(
            f"{size} processes must find each other, but {' and '.join(missing)} "
            f"{'are' if len(missing) > 1 else 'is'} not set",
            where=where,
            fix=f"export {' '.join(f'{name}={words[name]}' for name in missing)}, the machine of process 0 and a free port "
            "on it, the same for all",
        )
    if size > 1:
        _number(MEETING[1])


_START_AGAIN = "start all processes with one launcher, such as torchrun, and do not set its variables by hand"


def _is_set(name: str) -> bool:
    return bool(os.environ.get(name, "").strip())


def _is_accelerate() -> bool:
    return any(name.startswith("ACCELERATE_") for name in os.environ)


def _number(name: str) -> int:
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdigit()):
        raise DeviceError(f"{name}={text} is not a number", where="the environment of this process", fix=_START_AGAIN)
    return int(text)
