"""What tests have the generator's process load; light, since it starts anew each time."""

from __future__ import annotations

import logging
import os
import pathlib
import signal
import time

import torch

from bench.stub import load_stub


def die_while_loading(observer):
    """In the generator's process: what the system does when memory runs out, after a record for the log."""
    logging.getLogger("nybble.chat").warning("loading %d", 7)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def load_gated(observer, *, gate: pathlib.Path, **arguments):
    """In the generator's process: the pipeline, which starts no batch while there is a file `gate`."""
    from nybble.serve.loading import load_pipeline

    engine = load_pipeline(observer=observer, **arguments)
    compute = engine.worker.generator._compute

    def wait(batch):
        while gate.exists():
            time.sleep(0.005)
        compute(batch)

    engine.worker.generator._compute = wait
    return engine


def load_broken(observer, *, folder):
    """In the generator's process: a stub that fails at its first step."""
    engine = load_stub(observer, folder=folder, pause=0)
    engine.worker.generator.step = lambda: 1 / 0
    return engine


def load_forever(observer, *, mark: pathlib.Path):
    """In the generator's process: a minute of loading, which leaves `tidy` in a file however it ends."""
    mark.write_text("loading")
    try:
        time.sleep(60)
    finally:
        mark.write_text("tidy")


def load_lost(observer, *, folder):
    """In the generator's process: a stub whose card is lost at its first step, and answers with the same error ever after."""

    def fail(*ignored):
        raise torch.AcceleratorError(
            "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later"
        )

    engine = load_stub(observer, folder=folder, pause=0)
    engine.worker.generator.step = torch.cuda.synchronize = fail
    return engine
