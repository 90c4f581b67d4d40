"""Which parameters of a sweep mattered, and which mattered less than luck."""

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

FEWEST = 10  # trials of a search, below which its importance is noise


@dataclass(frozen=True)
class Importance:
    """Shares by parameter, the largest first.

    Attributes:
        shares: of each parameter, in [0, 1]; together with ``luck`` and ``rest`` 1 where they are whole.
        luck: what differs between runs of one setting, with other seeds or folds; None: not known.
        rest: what parameters do together and not alone; of a search 0.
        method: "variance" or "PED-ANOVA".
        is_whole: whether all values were combined with each other as often; else shares overlap.
    """

    shares: dict[str, float]
    luck: float | None
    rest: float
    method: str
    is_whole: bool = True


def find_importance(results: Results) -> Importance | None:
    """Shares of variance for a grid, Optuna's PED-ANOVA for a search; None where too few jobs are done."""
    keys = find_keys(results)
    if not keys:
        return None
    if isinstance(results, Sweep) and results.is_search:
        return search_importance(results)
    groups = [[job.status.metrics[results.metric] for job in setting.jobs] for setting in results.settings]
    levels = {key: [setting.params[key] for setting in results.settings] for key in keys}
    return share_variance(levels, groups)


def find_keys(results: Results) -> list[str]:
    """The parameters that differ between settings that have finished."""
    if len(results.settings) < 2:
        return []
    return [
        key
        for key in results.settings[0].params
        if key not in (SEED, FOLD, NUM_FOLDS)
        and len({setting.params[key] for setting in results.settings}) > 1
    ]


def share_variance(levels: dict[str, list[str]], groups: Sequence[Sequence[float]]) -> Importance | None:
    """The share of each factor in the variance of a metric, freed of what chance alone would give it.

    Each factor's sum of squares between its levels, less its degrees of freedom times the mean square
    within settings: epsilon squared, Kelley 1935, "An Unbiased Correlation Ratio Measure", PNAS 21, 554–559.
    What is taken away belongs to luck, so that the shares of a full grid sum to 1.

    Args:
        levels: of each parameter, its value in each setting.
        groups: the metric of each setting's runs.

    Returns:
        None where all runs are equal.
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
    """Watanabe, Bansal and Hutter 2023, "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in
    Arbitrary Subspaces" (arXiv 2304.10255), as Optuna has it, over a search's finished trials."""
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
    """A trial's value as its distribution has it; None where it is none of its."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    text = setting.params.get(key) or setting.jobs[0].params.get(key, "")
    if isinstance(distribution, CategoricalDistribution):
        return text if text in distribution.choices else None
    try:
        number = int(text) if isinstance(distribution, IntDistribution) else float(text)
    except ValueError:
        return None
    low, high = distribution.low, distribution.high  # type: ignore[attr-defined]
    return min(max(number, low), high)  # four digits may round it past an end
