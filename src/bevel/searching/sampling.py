"""Which values a trial gets: Optuna's samplers, or every combination where there are few.

What trial n gets is a function of (seed, n, the trials before it), so that a search that was killed
goes on as it would have gone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import Trial, TrialState

from bevel.core.recipe import Range
from bevel.searching.space import Dimensions, combinations, is_whole, label, on_step

POPULATION = 16
"""Trials of one generation of NSGA-II: searches here are of tens of trials, not thousands."""


class Sampler:
    """Gives trials of an Optuna study their values.

    With at most `total` combinations in the space each of them is tried once; else TPE (one
    objective, Bergstra et al. 2011) or NSGA-II (several, Deb et al. 2002) chooses.
    """

    def __init__(
        self, study: optuna.Study, dimensions: Dimensions, *, seed: int, total: int
    ) -> None:
        self.study, self.dimensions, self.seed = study, dimensions, seed
        self.distributions = {key: _distribution(d) for key, d in dimensions.items()}
        self.grid = combinations(dimensions, limit=total)

    def ask(self) -> Trial | None:
        """A new trial; None after the last combination."""
        trials = self.study.get_trials(deepcopy=False)
        if self.grid is not None and not any(t.state == TrialState.WAITING for t in trials):
            seen = [self.values(trial.params) for trial in trials]
            new = [values for values in self.grid if values not in seen]
            if not new:
                return None
            self.study.enqueue_trial(self._params(new[0]))
        seed = int(np.random.SeedSequence([self.seed, len(trials)]).generate_state(1)[0])
        self.study.sampler = _sampler(len(self.study.directions), seed)
        return self.study.ask(self.distributions)

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's values that an Optuna trial's parameters stand for."""
        found = {}
        for key, dimension in self.dimensions.items():
            if key not in params:
                continue
            if isinstance(dimension, Range):
                found[key] = on_step(params[key], dimension)
            else:
                labels = [label(value) for value in dimension]
                found[key] = dimension[labels.index(params[key])]
        return found

    def _params(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `values`."""
        return {
            key: value if isinstance(self.dimensions[key], Range) else label(value)
            for key, value in values.items()
        }


def _distribution(dimension: Sequence[Any] | Range) -> BaseDistribution:
    if not isinstance(dimension, Range):
        return CategoricalDistribution([label(value) for value in dimension])
    low, high, step = dimension.low, dimension.high, dimension.step
    if is_whole(dimension):
        return IntDistribution(int(low), int(high), log=dimension.log, step=int(step or 1))
    return FloatDistribution(low, high, log=dimension.log, step=step)


def _sampler(objectives: int, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if objectives == 1:
            return optuna.samplers.TPESampler(seed=seed)
        return optuna.samplers.NSGAIISampler(population_size=POPULATION, seed=seed)
