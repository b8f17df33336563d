"""A server in this process, whose generator's process has a stub: a program for tests that kill or interrupt it.

    python -m tests.serve.process_server TOKENIZER

Writes the port and the id of the generator's process to standard output.
"""

from __future__ import annotations

import pathlib
import sys

from rich.console import Console

from bench.stub import QUEUE, stub_engine
from nybble.serve.app import Limits
from nybble.serve.guard import AccessRules
from nybble.serve.metrics import Metrics
from nybble.serve.process.messages import LoadingJob
from nybble.serve.process.start import start_process
from nybble.serve.server import listen, run_server

PAUSE = 0.02  # seconds a step


def main() -> None:
    folder, metrics = pathlib.Path(sys.argv[1]), Metrics()
    worker, _ = start_process(LoadingJob("bench.stub:load_stub", {"folder": folder, "pause": PAUSE}), metrics)
    listener = listen("127.0.0.1", 0)
    engine = stub_engine(worker, folder)
    print(listener.getsockname()[1], worker.process.pid, flush=True)
    try:
        run_server(engine, metrics, Limits(queue=QUEUE), AccessRules(), listener, Console())
    except KeyboardInterrupt:
        print("ended", flush=True)
    finally:
        engine.close()
        listener.close()


if __name__ == "__main__":
    main()
