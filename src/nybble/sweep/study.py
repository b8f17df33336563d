"""The study of a sweep: Optuna's, in an SQLite file, where every trial is recorded before it starts and when it ends."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from nybble.errors import RunError
from nybble.files.disk_errors import explained_disk_errors
from nybble.run.start import differences
from nybble.sweep.request import STUDY
from nybble.sweep.space import Choices, Range, Settings, Space, combinations

NAME = "nybble"
DAMAGED = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
NUMBER = "number"  # of a trial that trains; settings that had been tried before are not trained, and have none
FAILED = 1_000_000  # the number under which a failed trial has NaN for its loss
STARTUP = 3  # a third of the trials, at least 3, are random; the sampler has nothing to go by before
RETRIES = 3  # settings whose process was killed are tried again; those that kill it themselves not for ever
EARLIEST = 2  # no trial is ended before this evaluation: a low rate starts slowly

Outcome = Literal["complete", "pruned", "failed", "killed"]


@dataclass(frozen=True)
class TrialResult:
    """A trial that has ended."""

    number: int
    settings: Settings
    outcome: Outcome
    """killed: its process died in it, and its settings were tried again."""
    loss: float | None
    """Held-out loss of the adapter that the run kept; of a pruned trial, the last that was measured."""
    why: str
    """Why it failed or was ended."""
    seconds: float
    losses: Sequence[float]
    """Held-out loss at each evaluation."""


class OngoingTrial:
    """A trial while it trains."""

    def __init__(self, trial: optuna.trial.Trial, settings: Settings) -> None:
        self.settings = settings
        self.was_pruned = False
        self.trial = trial
        """Optuna's."""

    @property
    def number(self) -> int:
        """The number of its folder."""
        number: int = self.trial.user_attrs[NUMBER]
        return number

    def watch(self, evaluation: int, loss: float, is_last: bool) -> bool:
        """Record a held-out loss; returns whether to end the trial, because it is worse than the median of the others there."""
        if not math.isfinite(loss):
            return False  # the guards of the run end it
        self.trial.report(loss, evaluation)
        self.was_pruned = not is_last and bool(self.trial.should_prune())
        return self.was_pruned


class SweepStudy:
    """All trials of a sweep.

    Args:
        folder: of the sweep; an existing study in it is continued.
        space: what is searched.
        recipe: what every trial has in common.
        trials: how many are wanted.
        seed: of the sampler, which depends on it and on the trials so far: a sweep that was interrupted tries what it would have.

    Raises:
        RunError: the study in the folder is another one, or damaged.
    """

    def __init__(self, folder: pathlib.Path, space: Space, recipe: Mapping[str, Any], trials: int, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._startup = max(STARTUP, trials // 3)
        self._seed = seed
        with explained_study_errors(folder):
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDY).resolve()}")
            pruner = optuna.pruners.MedianPruner(self._startup, n_warmup_steps=EARLIEST)
            self._study = optuna.create_study(
                storage=self._storage, study_name=NAME, load_if_exists=True, pruner=pruner
            )
            self._check_same({"space": {key: str(each) for key, each in space.items()}, "recipe": dict(recipe)}, folder)

    def close(self) -> None:
        """Close the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _check_same(self, now: dict[str, Any], folder: pathlib.Path) -> None:
        then = self._study.user_attrs.get("sweep")
        if then is None:
            self._study.set_user_attr("sweep", now)
        elif changes := differences(then, now):
            raise RunError(
                f"{folder} is another sweep:\n" + "\n".join(f"  - {change}" for change in changes),
                fix="the same command continues it; for another sweep: out=ANOTHER",
            )

    def retry_killed(self) -> list[int]:
        """Mark the trials whose process died as failed, and put their settings first; returns their numbers."""
        dead = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in dead:
            tries = _tries(trial)
            if trial.params and tries < RETRIES:
                self._study.enqueue_trial(trial.params, user_attrs={"tries": tries + 1})
            self._study.tell(trial.number, state=TrialState.FAIL)
        return [trial.user_attrs[NUMBER] for trial in dead if NUMBER in trial.user_attrs]

    def start_with(self, settings: Settings) -> None:
        """Let the first trial of a new study have these settings; those of other options are drawn."""
        if settings and not self._study.get_trials(deepcopy=False):
            self._enqueue(settings)

    def _enqueue(self, settings: Settings) -> None:
        self._study.enqueue_trial({key: self._space[key].parsed(text) for key, text in settings.items()})

    def ask(self) -> OngoingTrial:
        """The next trial. In a finite space none is tried twice."""
        ended = self.results()
        # With one seed for all, a continued sweep would draw again what it has drawn.
        seed = self._seed + sum(each.outcome != "killed" for each in ended)
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=self._startup, seed=seed)
        trial = self._study.ask(self._distributions())
        settings = self._settings(trial.params)
        tried = [dict(each.settings) for each in ended if each.outcome != "killed"]
        untried = [each for each in combinations(self._space) if dict(each) not in tried]
        if untried and dict(settings) in tried:
            self._study.tell(trial, state=TrialState.FAIL)
            self._enqueue(untried[seed % len(untried)])
            trial = self._study.ask(self._distributions())
            settings = self._settings(trial.params)
        trial.set_user_attr(NUMBER, len(ended))
        return OngoingTrial(trial, settings)

    def tell(self, ongoing: OngoingTrial, loss: float | None, why: str, seconds: float) -> TrialResult:
        """Record the end of a trial.

        Args:
            ongoing: the trial.
            loss: of the adapter that was kept; None if there is none.
            why: why it failed; empty if it did not.
            seconds: how long it took.
        """
        trial = ongoing.trial
        outcome: Outcome = "failed" if loss is None else "pruned" if ongoing.was_pruned else "complete"
        for key, value in {"outcome": outcome, "why": why, "seconds": round(seconds, 1), "loss": loss}.items():
            trial.set_user_attr(key, value)
        if outcome == "complete":
            self._study.tell(trial, loss)
        else:
            if outcome == "failed":  # the sampler counts it as the worst, and learns to keep away
                trial.report(math.nan, FAILED)
            self._study.tell(trial, state=TrialState.PRUNED)
        return self.results()[-1]

    def results(self) -> list[TrialResult]:
        """Every trial that has ended, in the order in which they started."""
        trials = self._study.get_trials(
            deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        )
        return [self._result(trial) for trial in trials if NUMBER in trial.user_attrs]

    def importance(self) -> dict[str, float]:
        """The share of each option in how much the loss varied (PED-ANOVA, Watanabe et al. 2023); empty where too few trials say
        something of it."""
        losses = {trial.value for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
        if len(losses) < len(self._space) + 2:
            return {}
        return optuna.importance.get_param_importances(self._study)

    def _result(self, trial: optuna.trial.FrozenTrial) -> TrialResult:
        attributes = trial.user_attrs
        died = trial.state == TrialState.FAIL  # `tell` never says so; it may have been killed before it had said all
        gave_up = died and _tries(trial) >= RETRIES
        losses = [loss for _, loss in sorted(trial.intermediate_values.items()) if math.isfinite(loss)]
        return TrialResult(
            number=attributes[NUMBER],
            settings=self._settings(trial.params),
            outcome="failed" if gave_up else "killed" if died else attributes["outcome"],
            loss=None if died else attributes.get("loss"),
            why=f"its process was killed, {RETRIES} times" if gave_up else attributes.get("why", ""),
            seconds=attributes.get("seconds", 0.0),
            losses=losses,
        )

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {key: _distribution(each) for key, each in self._space.items()}

    def _settings(self, params: Mapping[str, Any]) -> dict[str, str]:
        """Optuna's values as they are written into a recipe, in the order of the space."""
        return {key: each.text(params[key]) for key, each in self._space.items() if key in params}


@contextlib.contextmanager
def explained_study_errors(folder: pathlib.Path) -> Iterator[None]:
    """Turn errors of the study's file, damaged, locked or on a full disk, into one message.

    Raises:
        RunError: it cannot be read or written.
        StorageError: the disk is full.
    """
    try:
        with explained_disk_errors(folder):
            yield
    except DAMAGED as error:
        raise RunError(
            f"the study cannot be read or written: {str(error.__cause__ or error).splitlines()[0]}",
            where=str(folder / STUDY),
            fix="the same command once more, which continues the sweep; if that does not help: out=ANOTHER",
        ) from error


def best(results: Sequence[TrialResult]) -> TrialResult | None:
    """The complete trial with the least held-out loss; None before there is one."""
    complete = [each for each in results if each.outcome == "complete" and each.loss is not None]
    return min(complete, key=lambda each: (each.loss, each.number), default=None)


def _distribution(each: Range | Choices) -> BaseDistribution:
    if isinstance(each, Choices):
        return CategoricalDistribution(each.texts)
    if each.is_integer:
        return IntDistribution(int(each.low), int(each.high), log=each.is_log)
    return FloatDistribution(each.low, each.high, log=each.is_log)


def _tries(trial: optuna.trial.FrozenTrial) -> int:
    return int(trial.user_attrs.get("tries", 1))
