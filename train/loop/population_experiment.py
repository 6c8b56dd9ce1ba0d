"""A population's parts, made and checked before its first step: its members' runs over one base and one set of data."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

import melora_jax as mj
from melora_jax.training import Members, make_members, make_population_eval, make_population_step, population_state
from train.config.methods import penalty, rank_budget, with_method
from train.config.run_config import RunConfig
from train.data.batching import Batch
from train.loop.losses import make_loss
from train.loop.setup import Experiment, dropout_key, make_tx, prepare
from train.loop.steps import Steps, compile_widths

# On CPU more tokens at a time cost more in missed caches than they save. Eight MiniLM members' steps over one of theirs
# together: of 64 tokens each 1.26 and 1.39; of 256, all at a time 1.02 and 1.18, two 1.24; of 1,024, all 0.76, two 1.09
# and 1.14, one 1.03 (paired rounds on a busy machine of 2 cores).
_CPU_TOKENS = 512
_RATES = ("learning_rate", "head_learning_rate", "b_learning_rate", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Population:
    """Everything a population needs: its members' runs, which share data and base, and what they differ in."""

    experiments: list[Experiment]
    members: Members
    state: mj.TrainState
    frozen: nnx.State
    at_once: int

    @property
    def own_streams(self) -> bool:
        """Whether each member sees its own order of rows."""
        return len({experiment.config.data_seed for experiment in self.experiments}) > 1

    def batch(self, step: int) -> tuple[int, Batch, list[Any]]:
        """The width and the arrays of a step, and the rows of each member's batch."""
        rows = [experiment.material.plan.batch(step) for experiment in self.experiments]
        if not self.own_streams:
            return rows[0].width, self.experiments[0].feed(self.experiments[0].material.train, rows[0]), rows
        batches = [one.feed(one.material.train, own) for one, own in zip(self.experiments, rows, strict=True)]
        return rows[0].width, jax.tree.map(lambda *arrays: np.stack(arrays), *batches), rows

    def compile(self) -> Steps:
        """The steps of all members, ahead."""
        first = self.experiments[0]
        step = make_population_step(
            first.model,
            lambda rates: _tx(first, rates),
            make_loss(first.measure, penalty(first.config)),
            streams="own" if self.own_streams else "shared",
            accumulate=first.config.train.accumulate,
            at_once=self.at_once,
        )
        evaluate = make_population_eval(first.model, first.measure, at_once=self.at_once)
        lead = (len(self.experiments),) if self.own_streams else ()

        def stacked(batch: Batch) -> Batch:
            return {name: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype) for name, x in batch.items()}

        return compile_widths(
            first,
            lambda batch: step.lower(self.state, self.frozen, stacked(batch), self.members),
            lambda batch: evaluate.lower(self.state, self.frozen, batch, self.members),
        )


def prepare_population(configs: Sequence[RunConfig], at_once: int | None = None) -> Population:
    """Reads the data once, and each member's start over one base; arguments as for `run_population`.

    Raises:
      ValueError: as for `prepare`; or own orders of rows over batches of several widths.
    """
    members, experiments = _members(configs), []

    def models() -> Iterator[nnx.Module]:
        for config in configs:
            with _quietly() if experiments else contextlib.nullcontext():
                experiments.append(prepare(config, experiments[0] if experiments else None))
            if len({one.config.data_seed for one in experiments}) > 1:
                _require_one_width(experiments[0])
            yield experiments[-1].model

    first: list[Experiment] = experiments
    state, frozen = population_state(models(), lambda rates: _tx(first[0], rates), members)
    for experiment in experiments:
        nnx.update(experiment.model, frozen)  # one base in memory, and not one a member
    return Population(experiments, members, state, frozen, at_once or as_many_as_pay(len(configs), _tokens(first[0])))


def as_many_as_pay(members: int, tokens: int) -> int:
    """Of so many members, how many to compute at a time, where each sees `tokens` of them."""
    return members if jax.default_backend() != "cpu" else min(members, max(2, _CPU_TOKENS // tokens))


def _tokens(experiment: Experiment) -> int:
    """Tokens that a member sees at a time, at most."""
    train = experiment.config.train
    return train.batch_size // train.accumulate * max(experiment.material.plan.widths)


def _members(configs: Sequence[RunConfig]) -> Members:
    """What the runs differ in. Rates that follow the learning rate are resolved."""
    rates = {name: [_rate(config, name) for config in configs] for name in _RATES}
    alphas, dropouts = ([getattr(config.melora, name) for config in configs] for name in ("alpha", "dropout"))
    return make_members(
        [dropout_key(config) for config in configs],
        optim=rates,
        alpha=[alpha / alphas[0] for alpha in alphas] if len({*map(repr, alphas)}) > 1 else None,
        dropout=dropouts if len(set(dropouts)) > 1 else None,
    )


def _rate(config: RunConfig, name: str) -> float:
    own = getattr(with_method(config.optim, config.adapter), name)
    return config.optim.learning_rate if own is None else own


def _tx(experiment: Experiment, rates: Any) -> Any:
    optim, total = dataclasses.replace(experiment.config.optim, **rates), experiment.total_steps
    return make_tx(experiment.model, optim, total, rank_budget(experiment.config, total))[1]


def _require_one_width(experiment: Experiment) -> None:
    widths = experiment.material.plan.widths
    if len(widths) > 1:
        raise ValueError(
            f"runs that differ in train.data_seed see batches of different widths at one step ({min(widths)} to "
            f"{max(widths)} tokens), and padded ones would draw other dropout masks than their lone runs; set "
            f"data.buckets=[{max(widths)}], for one width, or one train.data_seed for all"
        )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The first member said what there was to say."""
    logger = logging.getLogger("melora_jax")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
