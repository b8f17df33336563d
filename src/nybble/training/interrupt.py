"""Ctrl-C and SIGTERM while a run trains: the step in progress ends, and a checkpoint of it is saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nybble.distributed.group import all_reduce_number, barrier, in_group
from nybble.terminal import tell


class Stopped(KeyboardInterrupt):
    """A signal ended the run."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        """The signal's."""


class Interruption(TrainerCallback):  # type: ignore[misc]
    """At the first signal the run stops once the step in progress is done and saved, at the second at once.

    Before a run's first step is done, or a resumed run's next one, there is nothing to save, and the first signal is enough.
    Of several processes each gets the signal at another moment, so they ask each other before each optimiser step.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._asked: int | None = None
        self._unsaved = False
        self._agreed = False
        self._stopping = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; a handler that somebody else has set stays, and an ignored signal stays ignored.

        With several processes SIGTERM keeps its handler: it comes when another process has failed, and then no step can
        be finished.
        """
        usual = {signal.SIGINT: signal.default_int_handler}
        if not in_group():
            usual[signal.SIGTERM] = signal.SIG_DFL  # type: ignore[assignment]
        elsewhere = threading.current_thread() is not threading.main_thread()  # where Python takes no handlers
        taken = {} if elsewhere else {name: old for name, old in usual.items() if signal.getsignal(name) == old}
        for name in taken:
            signal.signal(name, self._receive)
        try:
            yield
        finally:
            for name, old in taken.items():
                signal.signal(name, old)

    def raise_if_stopped(self) -> None:
        """Leave the run where a signal ended it; all processes together, since a launcher ends them all with the first.

        Raises:
            Stopped: it did.
        """
        if self._stopping:
            barrier()
            raise Stopped(self._asked or signal.SIGINT)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree on whether this is the last step."""
        self._agree(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here, if that was agreed on; where an evaluation is due, after it."""
        self._unsaved = True
        if not control.should_evaluate:
            self._stop(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A signal during an evaluation is not answered a step later."""
        self._agree(args.device)
        self._stop(control)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None or not self._unsaved:
            raise Stopped(number)
        self._asked = number
        # From a thread: the signal may have come while this one was writing to the terminal.
        text = "stopping  after this step, with a checkpoint; Ctrl-C again stops at once, without one"
        threading.Thread(target=tell, args=(self.console, text), daemon=True).start()

    def _agree(self, device: torch.device) -> None:
        self._agreed = all_reduce_number(int(self._asked is not None), device) > 0

    def _stop(self, control: TrainerControl) -> None:
        if not in_group():
            self._agreed = self._asked is not None
        if self._agreed and not control.should_training_stop:  # a run that ends here by itself is finished
            self._stopping = control.should_save = control.should_training_stop = True
