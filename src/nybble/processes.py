"""One process a device, by torch's own elastic launcher."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def run_processes(count: int, words: Sequence[str]) -> int:
    """Run `nybble WORDS` in `count` processes on this machine; when one fails, all end.

    Returns:
        The exit status: that of the first process that failed, 130 after Ctrl-C.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process says itself what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))  # or they fight for cores
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,  # else torch makes one, and warns
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "nybble", *words)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return max(1, failure.exitcode)
    except (SignalException, KeyboardInterrupt):
        return 130
    return 0
