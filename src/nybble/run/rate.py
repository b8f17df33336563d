"""learning_rate.json: how the learning rate of a run was found, where its recipe said train.learning_rate=auto."""

from __future__ import annotations

from nybble.run.records import AnyText, FrozenShape, RunRecord


class RatePoint(FrozenShape):
    """A step of the search."""

    rate: float
    loss: float
    """Of the step, before its update, in nats per token."""
    before: float
    """Loss of the untrained model on the same rows."""
    terms: int
    """Terms of the loss, such as trained tokens."""

    @property
    def change(self) -> float:
        """By how much the loss differs from the untrained model's."""
        return self.loss - self.before


class FoundRate(RunRecord):
    """A suggested learning rate, why it was suggested, and the curve behind it."""

    rate: float
    reason: AnyText
    curve: list[RatePoint]
    smoothed: list[float]
    """The change of the loss at each point of the curve, smoothed."""
