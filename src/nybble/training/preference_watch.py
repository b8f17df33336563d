"""Notices while preferences are learnt: chosen answers that become unlikely, and rewards that move too far apart."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping

WINDOW = 10  # steps whose mean is looked at: one step has few rows
FALL = 0.5  # nats per token by which chosen answers may become less likely than under the reference
SHARE = 0.5  # by which their log-likelihood per token may fall, for an objective without a reference
APART = 8.0  # rewards whose difference is larger have a loss of 3e-4; a run at 9 had unlearnt its skill (docs/experiments.md)


class PreferenceWatch:
    """Sees the metrics of each step, and says each thing once."""

    def __init__(self) -> None:
        self._recent: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._first: float | None = None
        self._said: set[str] = set()

    def see(self, measured: Mapping[str, float]) -> list[str]:
        """The notices that a step's metrics give reason for; none for an objective without preferences."""
        if "logp_chosen" not in measured:
            return []
        self._recent.append(measured)
        if len(self._recent) < WINDOW:
            return []
        means = {
            name: sum(found) / len(found)
            for name in measured
            if (
                found := [each[name] for each in self._recent if each[name] == each[name]]
            )  # a step may have no bad answer
        }
        new = [(kind, text) for kind, text in self._notices(means) if kind not in self._said]
        self._said.update(kind for kind, _ in new)
        return [text for _, text in new]

    def _notices(self, means: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        slower = "a lower train.learning_rate, a higher preference.beta or fewer steps"
        fall = -means.get("change_chosen", 0.0)
        if fall > FALL:
            yield (
                "fall",
                f"the chosen answers have become less likely than under the reference, by {fall:.2f} nats per token: the model "
                f"moves away from both answers; {slower}, or train.objective=orpo, which imitates chosen answers as well",
            )
        elif "change_chosen" not in self._recent[-1]:
            # There a reward is proportional to the log-likelihood per token, which long answers do not lower.
            self._first = self._first or means["reward_chosen"]
            if means["reward_chosen"] < (1 + SHARE) * self._first:
                yield (
                    "fall",
                    f"the log-likelihood of chosen answers per token is {means['reward_chosen'] / self._first:.1f} times that of "
                    f"the first {WINDOW} steps: the model moves away from both answers; {slower}",
                )
        rewards = [means[name] for name in ("reward_chosen", "reward_rejected") if name in means]
        apart = rewards[0] - rewards[1] if len(rewards) == 2 else 0.0  # labels may all be good ones
        if apart > APART:
            yield (
                "apart",
                f"the rewards of chosen and rejected answers are {apart:.0f} apart, where the loss is flat: what is still learnt "
                f"is drift; {slower}",
            )
