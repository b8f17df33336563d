"""Where the processes of a run first meet: the store at MASTER_ADDR and MASTER_PORT, before there is a process group."""

from __future__ import annotations

import datetime
import os

from torch.distributed import DistError, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from nybble.distributed.launcher import MEETING, ProcessPlace, join_by_variables
from nybble.errors import DeviceError

# Until here a process only loads libraries and checks its arguments. torchrun does not tell a machine that those of another one
# have ended, and the process group's own time limit is hours, since the first process of a machine prepares what is cached.
ARRIVAL = datetime.timedelta(minutes=10)


def meet(place: ProcessPlace) -> Store:
    """Wait until all processes have arrived.

    Args:
        place: of this process.

    Returns:
        The store. The process group will meet at the same one, so keep it until then.

    Raises:
        DeviceError: one has not arrived in time, or the first one cannot be reached.
    """
    join_by_variables(place)
    where = ":".join(os.environ[name] for name in MEETING)
    minutes = f"{ARRIVAL.total_seconds() / 60:.0f} minutes"
    fix = (
        "see what the other processes say; MASTER_ADDR must be the machine of process 0, and its MASTER_PORT reachable"
    )
    store: Store | None = None
    try:
        store, _, _ = next(rendezvous("env://", timeout=ARRIVAL))
        store.set(_arrived(place.rank), "")
        store.wait([_arrived(rank) for rank in range(place.size)], ARRIVAL)
    except DistError as error:
        if store is None:
            reason = str(error).splitlines()[0]
            what = f"the {place.size} processes did not meet: {reason}"
        else:
            late = ", ".join(str(rank) for rank in range(place.size) if not store.check([_arrived(rank)]))
            what = f"of {place.size} processes these did not arrive within {minutes}: {late}"
        raise DeviceError(what, where=where, fix=fix) from error
    return store


def _arrived(rank: int) -> str:
    return f"arrived-{rank}"
