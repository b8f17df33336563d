"""Where the processes of a run first meet: the store at MASTER_ADDR and MASTER_PORT, before there is a process group."""

from __future__ import annotations

import datetime
import os

from torch.distributed import DistError, DistStoreError, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from nybble.distributed.launcher import MEETING, ProcessPlace, join_by_variables
from nybble.errors import DeviceError, LostProcessError

# Until here a process only loads libraries and checks its arguments. torchrun does not tell a machine that those of another one
# have ended, and the process group's own time limit is hours, since the first process of a machine prepares what is cached.
ATTEMPT = "TORCHELASTIC_RESTART_COUNT"  # of torchrun --max-restarts
ARRIVAL = datetime.timedelta(minutes=10)


def meet(place: ProcessPlace, purpose: str, said: str = "") -> Store:
    """Wait until all processes have arrived.

    Args:
        place: of this process.
        purpose: names this meeting; each has keys of its own in the store, which torchrun keeps when it starts processes again.
        said: what all processes must say alike.

    Returns:
        The store for this purpose. The process group will meet at the same one, so keep it until then.

    Raises:
        DeviceError: one has not arrived in time, or says something else, or the first one cannot be reached.
        LostProcessError: the first one has ended meanwhile.
    """
    join_by_variables(place)
    where = ":".join(os.environ[name] for name in MEETING)
    minutes = f"{ARRIVAL.total_seconds() / 60:.0f} minutes"
    fix = (
        "see what the other processes say; MASTER_ADDR must be the machine of process 0, and its MASTER_PORT reachable"
    )
    try:
        whole, _, _ = next(rendezvous("env://", timeout=ARRIVAL))
    except DistError as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"the {place.size} processes did not meet: {reason}", where=where, fix=fix) from error
    store = PrefixStore(f"nybble-{os.environ.get(ATTEMPT, '0')}-{purpose}", whole)
    keys = [f"arrived-{rank}" for rank in range(place.size)]
    try:
        store.set(keys[place.rank], said)
        try:
            store.wait(keys, ARRIVAL)
        except DistStoreError as error:  # the time is over
            late = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
            what = f"of {place.size} processes these did not arrive within {minutes}: {late}"
            raise DeviceError(what, where=where, fix=fix) from error
        answers = [store.get(key).decode() for key in keys]
    except DistError as error:
        what = "the process at the meeting point has ended while the others were arriving"
        raise LostProcessError(what, where=where, fix=fix) from error
    other = next((rank for rank, answer in enumerate(answers) if answer != answers[0]), None)
    if other is not None:
        what = f"process 0 computes on {answers[0]}, but process {other} on {answers[other]}"
        raise DeviceError(what, where=where, fix="the same kind of device everywhere: nybble doctor on each machine")
    return store
