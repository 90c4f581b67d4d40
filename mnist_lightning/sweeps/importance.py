"""Find out how much each parameter of a sweep influences the monitored metric."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mnist_lightning.sweeps.results import FOLD, NUM_FOLDS, SEED, Results, Setting, Sweep, read_space
from mnist_lightning.sweeps.study import to_distribution

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)

FEWEST = 10  # trials that a search needs; from fewer, importance is noise


@dataclass(frozen=True)
class Importance:
    """The share of each parameter in the variance of the monitored metric.

    Attributes:
        shares: each parameter's share, in [0, 1], the largest first.  If ``is_whole``, all shares, ``luck``
            and ``rest`` sum to 1.
        luck: the share of differences between runs of the same setting with other seeds or folds; None if
            unknown.
        rest: the share of interactions between parameters; 0 in a search.
        method: "variance" or "PED-ANOVA".
        is_whole: whether all combinations of values were run equally often; otherwise shares overlap.
    """

    shares: dict[str, float]
    luck: float | None
    rest: float
    method: str
    is_whole: bool = True


def find_importance(results: Results) -> Importance | None:
    """Compute shares of variance for a grid, or Optuna's PED-ANOVA for a search; None with too few jobs."""
    keys = find_keys(results)
    if not keys:
        return None
    if isinstance(results, Sweep) and results.is_search:
        return search_importance(results)
    groups = [[job.status.metrics[results.metric] for job in setting.jobs] for setting in results.settings]
    levels = {key: [setting.params[key] for setting in results.settings] for key in keys}
    return share_variance(levels, groups)


def find_keys(results: Results) -> list[str]:
    """Return the parameters that differ between completed settings."""
    if len(results.settings) < 2:
        return []
    return [
        key
        for key in results.settings[0].params
        if key not in (SEED, FOLD, NUM_FOLDS)
        and len({setting.params[key] for setting in results.settings}) > 1
    ]


def share_variance(levels: dict[str, list[str]], groups: Sequence[Sequence[float]]) -> Importance | None:
    """Compute the share of each parameter in the variance of a metric, corrected for chance.

    The share is epsilon squared (Kelley 1935, "An Unbiased Correlation Ratio Measure", PNAS 21, 554–559): the
    sum of squares between the parameter's levels, minus its degrees of freedom times the mean square within
    settings, divided by the total sum of squares.  The part subtracted is counted as luck, so that the shares
    of a full grid sum to 1.

    Args:
        levels: for each parameter, its value in each setting.
        groups: for each setting, the metric of each of its runs.

    Returns:
        the shares; None if the metric is the same in all runs.
    """
    values = [value for group in groups for value in group]
    grand = statistics.fmean(values)
    total = sum((value - grand) ** 2 for value in values)
    if total == 0:
        return None

    def between(parts: Sequence[Sequence[float]]) -> float:
        return sum(len(part) * (statistics.fmean(part) - grand) ** 2 for part in parts)

    of_settings = between(groups)
    repeated = len(values) - len(groups)
    within = (total - of_settings) / repeated if repeated else 0.0  # mean square
    shares = {}
    for key, column in levels.items():
        names = list(dict.fromkeys(column))
        parts = [
            [value for level, group in zip(column, groups, strict=True) if level == name for value in group]
            for name in names
        ]
        shares[key] = max(0.0, (between(parts) - (len(names) - 1) * within) / total)
    luck = min(1.0, within * (len(values) - 1) / total) if repeated else None
    ordered = dict(sorted(shares.items(), key=lambda item: -item[1]))
    rest = max(0.0, 1 - sum(shares.values()) - (luck or 0.0))
    full = math.prod(len(set(column)) for column in levels.values()) == len(groups)
    return Importance(ordered, luck, rest, "variance", is_whole=full and len({*map(len, groups)}) == 1)


def search_importance(sweep: Sweep) -> Importance | None:
    """Compute the importance of each parameter over a search's finished trials by Optuna's PED-ANOVA.

    Watanabe, Bansal and Hutter 2023, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in
    Arbitrary Subspaces" (arXiv 2304.10255).

    Returns:
        the importance; None without Optuna, with too few trials, or if it can't be computed.
    """
    try:
        import optuna
        from optuna.importance import PedAnovaImportanceEvaluator
    except ImportError:
        return None
    try:
        swept = read_space(sweep.folder)
        space = {key: to_distribution(one) for key, one in swept.items() if key not in (SEED, FOLD)}
    except ValueError as error:
        log.warning("importance is left out: %s", error)
        return None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if sweep.maximize else "minimize")
    for setting in sweep.settings:
        params = {
            key: value for key, kind in space.items() if (value := read_param(setting, key, kind)) is not None
        }
        if params.keys() == space.keys():
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=setting.mean))
    if len(study.trials) < FEWEST:
        return None
    try:
        shares = optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError) as error:
        log.warning("importance is left out: %s", error)
        return None
    return Importance(dict(sorted(shares.items(), key=lambda item: -item[1])), None, 0.0, "PED-ANOVA")


def read_param(setting: Setting, key: str, distribution: "BaseDistribution") -> Any:
    """Parse a trial's value for its distribution; return None if the value does not belong to it."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    text = setting.params.get(key) or setting.jobs[0].params.get(key, "")
    if isinstance(distribution, CategoricalDistribution):
        return text if text in distribution.choices else None
    try:
        number = int(text) if isinstance(distribution, IntDistribution) else float(text)
    except ValueError:
        return None
    low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
    return min(max(number, low), high)  # rounding to four digits may move it past an end
