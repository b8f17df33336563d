"""One process per device, started by torch's own elastic launcher."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nybble.distributed.environment import environment_restored
from nybble.installed import module_command


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run `nybble ARGUMENTS` in `count` processes on this machine; when one fails, all are ended.

    Returns:
        The exit status: that of the first process that failed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    relay = _Relay()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process reports its own error
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,  # otherwise torch makes one, and warns
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle="SIGHUP,SIGQUIT",  # on the others the launcher would end the processes after 30 seconds
    )
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, relay)
    python, *command = module_command("nybble", *arguments)
    try:
        with environment_restored():
            # Otherwise the processes would compete for cores.
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
            elastic_launch(config, python)(*command)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return relay.status or max(1, failure.exitcode)
    except SignalException as error:
        return relay.status or 128 + error.sigval
    return 0


class _Relay:
    """Passes the first signal on to the processes, which finish their step and save it, however long that takes
    (`nybble.training.interrupt`); on the second signal the launcher ends them."""

    def __init__(self) -> None:
        self.status = 0
        """The exit status after the first signal; 0 before it."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.status:
            raise SignalException("a second signal", signal.SIGINT)
        self.status = 128 + number
        for child in psutil.Process().children():
            child.send_signal(signal.SIGINT)  # the launcher sends SIGTERM when another process has failed
