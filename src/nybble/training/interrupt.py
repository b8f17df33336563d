"""Ctrl-C and SIGTERM during training: the step in progress is finished, and a checkpoint is saved."""

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
        """The signal's number."""


class Interruption(TrainerCallback):  # type: ignore[misc]
    """On the first signal the run stops once the step in progress is done and saved; on the second it stops at once.

    Before the first step of a new or resumed run is done, there is nothing to save, so the first signal stops it at once.
    Several processes receive the signal at different moments, so they agree before each optimiser step.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._signal: int | None = None
        self._unsaved = False
        self._agreed = False
        self._stopping = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; a handler that was set before stays, and an ignored signal stays ignored.

        With several processes SIGTERM keeps its handler: the launcher sends it when another process has failed, and then no step
        can be finished.
        """
        usual = {signal.SIGINT: signal.default_int_handler}
        if not in_group():
            usual[signal.SIGTERM] = signal.SIG_DFL  # type: ignore[assignment]
        in_main = threading.current_thread() is threading.main_thread()  # Python sets handlers only there
        replaced = {name: old for name, old in usual.items() if signal.getsignal(name) == old} if in_main else {}
        for name in replaced:
            signal.signal(name, self._receive)
        try:
            yield
        finally:
            for name, old in replaced.items():
                signal.signal(name, old)

    def raise_if_stopped(self) -> None:
        """Raise Stopped if a signal ended the run; all processes at once, since a launcher ends the others after the first.

        Raises:
            Stopped: a signal ended the run.
        """
        if self._stopping:
            barrier()
            raise Stopped(self._signal or signal.SIGINT)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Agree on whether this is the last step."""
        self._agree(args.device)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step if that was agreed on; if an evaluation is due, after that."""
        self._unsaved = True
        if not control.should_evaluate:
            self._stop(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this evaluation if a signal came during it, not a step later."""
        self._agree(args.device)
        self._stop(control)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None or not self._unsaved:
            raise Stopped(number)
        self._signal = number
        # In a thread: the signal may have interrupted this one while it was writing to the terminal.
        text = "stopping  after this step, with a checkpoint; Ctrl-C again stops at once, without one"
        threading.Thread(target=tell, args=(self.console, text), daemon=True).start()

    def _agree(self, device: torch.device) -> None:
        self._agreed = all_reduce_number(int(self._signal is not None), device) > 0

    def _stop(self, control: TrainerControl) -> None:
        if not in_group():
            self._agreed = self._signal is not None
        if self._agreed and not control.should_training_stop:  # otherwise the run is finished anyway
            self._stopping = control.should_save = control.should_training_stop = True
