"""What a search over pruning settings found: a trial for each setting, and whether pruning helped.

The verdict is a paired test, on the validation records, between the winner and no pruning (or,
where that won, the best that prunes). How candidates trained is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorakit.merging.search import Candidate
from lorakit.scoring.significance import bootstrap, interval_of, p_values
from lorakit.scoring.statistics import Statistics, weighted_mean
from lorakit.settings import LOSS, SignificanceSettings

SIGNIFICANT = 0.05
StatisticsOf = Callable[[Candidate], Statistics]  # over the validation records, at its best epoch


@dataclass(frozen=True)
class Trial:
    """What a search reports about a candidate: its setting, its steps and its value by `metric`.

    `value` keeps the sign of its metric: a lower loss is better.
    """

    name: str
    option: str
    amount: float
    steps: int
    metric: str
    value: float
    stopped: bool
    best: bool

    @classmethod
    def of(cls, candidate: Candidate, metric: str, is_best: bool) -> Trial:
        """Return the trial of a candidate."""
        return cls(
            candidate.name,
            candidate.pruning.amount_option,
            float(candidate.pruning.value),
            candidate.steps,
            metric,
            -candidate.value if metric == LOSS else candidate.value,
            candidate.stopped,
            is_best,
        )

    def fields(self) -> dict[str, object]:
        """Return the trial as it appears in the history, in the log and in a plot's data."""
        return {
            self.option: self.amount,
            "steps": self.steps,
            self.metric: self.value,
            "stopped": self.stopped,
            "best": self.best,
        }

    def line(self) -> str:
        """Return a line about the trial for the user."""
        mark = ", best" if self.best else ", stopped early" if self.stopped else ""
        text = f"{words(self.option)} {self.amount}: {self.metric} {self.value:.4f}"
        return f"{text} after {self.steps} steps{mark}"


def words(option: str) -> str:
    """Return a setting's name as words: `prune ratio`."""
    return option.replace("_", " ")


@dataclass(frozen=True)
class Verdict:
    """The paired test between the best candidate and `rival`, one of which prunes nothing.

    `difference` is the best's value minus the rival's, in the metric's own unit and sign.
    """

    best: Candidate
    rival: Candidate
    difference: float
    p: float
    settings: SignificanceSettings

    def fields(self) -> dict[str, object]:
        """Return the test as it appears in the history."""
        return {
            "against": float(self.rival.pruning.value),
            "difference": self.difference,
            "p_value": self.p,
            "trials": self.settings.trials,
            "seed": self.settings.seed,
        }

    def line(self) -> str:
        """Return what the test says, in words."""
        p = f"(p = {self.p:.4f})"
        best, rival = _pruning(self.best), _pruning(self.rival)
        if self.p >= SIGNIFICANT:
            return f"no difference shown between {best} and {rival} {p}"
        if self.best.pruning.prunes:
            return f"{best} is better than {rival} {p}"
        return f"pruning does not help: {best} is better than {rival} {p}"


def _pruning(candidate: Candidate) -> str:
    """Return a candidate's setting in words."""
    if not candidate.pruning.prunes:
        return "no pruning"
    unit = "threshold " if candidate.pruning.by_threshold else ""
    return f"pruning at {unit}{candidate.name}"


def judge_pruning(
    candidates: Sequence[Candidate],
    best: Candidate,
    statistics_of: StatisticsOf,
    settings: SignificanceSettings,
) -> Verdict | None:
    """Return the verdict on the best candidate; None where there is nothing to compare it with.

    A winner that prunes is compared with the candidate that does not, and that one, where it wins,
    with the best of those that prune and were not stopped early. The p-value is of these two
    settings, and not corrected for the number of settings tried.
    """
    rivals = [c for c in candidates if c.is_complete and c.pruning.prunes != best.pruning.prunes]
    if not rivals:
        return None
    rival = max(rivals, key=lambda candidate: candidate.value)
    ours, theirs = statistics_of(best), statistics_of(rival)
    (p,) = p_values([[ours]], [[theirs]], settings)
    return Verdict(best, rival, ours.value - theirs.value, p, settings)


def interval(statistics: Statistics, settings: SignificanceSettings) -> list[float]:
    """Return the ends of the 95 % interval of a value, its records drawn with replacement."""
    (values,) = bootstrap([[statistics]], settings)
    ends = interval_of(values)
    return [ends.low, ends.high]


def loss_statistics(means: Sequence[float], targets: Sequence[int]) -> Statistics:
    """Return the statistics of the mean loss over all completion tokens.

    `means` are the mean losses of the records, `targets` their numbers of tokens. A test swaps
    records, and a longer one weighs more, as it does in the loss that decides.
    """
    totals = [mean * count for mean, count in zip(means, targets, strict=True)]
    return weighted_mean(totals, list(map(float, targets)), "loss|mean:tokens")
