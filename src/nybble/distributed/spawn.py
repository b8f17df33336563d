"""One process per device, started by torch's own elastic launcher."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
import tempfile
import uuid
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from nybble.distributed.environment import environment_restored
from nybble.distributed.failures import error_of, stuck_error
from nybble.distributed.reports import VARIABLE
from nybble.distributed.watch import PATIENCE, Watch
from nybble.errors import LostProcessError, NybbleError
from nybble.installed import module_command


def run_processes(count: int, arguments: Sequence[str], run: pathlib.Path, patience: float = PATIENCE) -> int:
    """Run `nybble ARGUMENTS` in `count` processes on this machine; when one fails, all are ended.

    Args:
        count: how many processes.
        arguments: of the command.
        run: the folder of the run that they train.
        patience: seconds without progress of any process after which the run is ended.

    Returns:
        The exit status: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        NybbleError: the error of the process that failed first, or what ended it.
        ProcessError: that process had an unexpected error.
    """
    relay = _Relay()
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said in one error
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, relay)
    with tempfile.TemporaryDirectory(prefix="nybble-processes-", ignore_cleanup_errors=True) as folder:
        watch = Watch(pathlib.Path(folder), count, patience)
        try:
            with environment_restored(), watch:
                os.environ[VARIABLE] = f"{os.getpid()}:{folder}"
                # Warnings in C++ come after the run's last line; NCCL warns of a group that is not left after an error.
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
                # Otherwise the processes would compete for cores.
                os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
                python, *command = module_command("nybble", *arguments)
                elastic_launch(_config(count, folder), python)(*command)
        except ChildFailedError as failed:
            if watch.stuck:
                raise stuck_error(watch.stuck, watch.idle, count, run, arguments) from None
            error = error_of(failed.failures, pathlib.Path(folder), run, arguments)
            if relay.status and (isinstance(error, LostProcessError) or not isinstance(error, NybbleError)):
                return relay.status  # processes that stop at once may lose each other before they have stopped
            if isinstance(error, int):
                return error
            raise error from None
        except SignalException as error:
            return relay.status or 128 + error.sigval
    return 0


def _config(count: int, folder: str) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,  # otherwise torch makes one, and warns
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(log_dir=folder),  # otherwise a folder that nobody removes
        signals_to_handle="SIGHUP,SIGQUIT",  # on the others the launcher would end the processes after 30 seconds
    )


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
