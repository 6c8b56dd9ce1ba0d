"""Runs that are trained in one step: a lone run, which is a cohort of one, or the members of a population."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import melora_jax as mj
from melora_jax.nn import batch_sharding
from melora_jax.training import (
    Members,
    make_members,
    make_population_eval,
    make_population_step,
    member_state,
    population_state,
)
from train.config.run_config import RunConfig
from train.data.batching import Batch
from train.hosts.hosts import whole_on_host
from train.loop.losses import make_eval_step
from train.loop.setup import Experiment, prepare, quietly

# On CPU more tokens at a time cost more in missed caches than they save.
_CPU_TOKENS = 512
_COMPILED_AT_ONCE = 4  # each compilation takes about a core and some hundred MB
_RATES = ("learning_rate", "head_learning_rate", "b_learning_rate", "weight_decay")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Executables by batch width, compiled ahead, so that nothing compiles in mid-run."""

    train: Mapping[int, Any]
    evaluate: Mapping[int, Any]


@dataclasses.dataclass
class Cohort:
    """Runs that are trained in one step, over one base and one set of data.

    Attributes:
      members: the runs.
      folder: where checkpoints go.
      state: what a step changes, as it is now.
      frozen: what no step changes.
      step: jitted, `(state, frozen, batch, *arguments) -> (state, metrics)`; it donates `state`.
      evaluate: jitted, `(state, frozen, batch, *evaluate_arguments) -> Measure`.
      arguments: the key of a lone run's dropout, or what members differ in.
      evaluate_arguments: those of `evaluate`.
      at_once: members whose activations are in memory at a time; None for a lone run, whose arrays have no axis of
        members, and which alone may lie on a mesh.
    """

    members: Sequence[Experiment]
    folder: Path
    state: mj.TrainState
    frozen: nnx.State
    step: Any
    evaluate: Any
    arguments: tuple[Any, ...]
    evaluate_arguments: tuple[Any, ...] = ()
    at_once: int | None = None

    @property
    def first(self) -> Experiment:
        """The member that stands for all in what they have in common."""
        return self.members[0]

    @property
    def own_streams(self) -> bool:
        """Whether each member sees its own order of rows."""
        return _own_streams([member.config for member in self.members])

    def batch(self, step: int) -> tuple[list[Any], Batch]:
        """The rows of each member's batch at a step, and the arrays of all."""
        rows = [member.material.plan.batch(step) for member in self.members]
        if not self.own_streams:
            return rows, self.first.feed(self.first.material.train, rows[0])
        batches = [member.feed(member.material.train, own) for member, own in zip(self.members, rows, strict=True)]
        return rows, jax.tree.map(lambda *arrays: np.stack(arrays), *batches)

    def compile(self) -> Steps:
        """The training step for each width of the plan, the evaluation step for each width of the held-out rows."""
        material, mesh, sizes, lowered = self.first.material, self.first.mesh, self.first.config.train, {}
        for width in material.plan.widths:
            batch = self._shapes(sizes.batch_size, width, self.own_streams)
            lowered["train", width] = self.step.lower(self.state, self.frozen, batch, *self.arguments)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            for width in {rows.width for rows in material.held_out}:
                batch = self._shapes(sizes.eval_batch_size, width)
                more = self.evaluate_arguments
                lowered["evaluate", width] = self.evaluate.lower(self.state, self.frozen, batch, *more)
        with ThreadPoolExecutor(_COMPILED_AT_ONCE) as pool:
            compiled = dict(zip(lowered, pool.map(lambda one: one.compile(), lowered.values()), strict=True))
        by_kind = {kind: {w: run for (k, w), run in compiled.items() if k == kind} for kind in ("train", "evaluate")}
        return Steps(**by_kind)

    def _shapes(self, rows: int, width: int, own_streams: bool = False) -> Batch:
        """The shapes of a batch, where it lies."""
        lead = (len(self.members),) if own_streams else ()
        where = None if self.first.mesh is None else batch_sharding(self.first.mesh)
        return {
            name: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=where)
            for name, x in self.first.run.batch(rows, width).items()
        }

    def by_member(self, tree: Any) -> list[Any]:
        """A tree of what a step or an evaluation gives, for each member."""
        if self.at_once is None:
            return [tree]
        return [jax.tree.map(lambda x, member=member: x[member], tree) for member in range(len(self.members))]

    def trained(self, member: int) -> nnx.State:
        """Copies of what a member trains, as it is now. On many hosts every process must call it."""
        if self.at_once is None:
            return whole_on_host(self.state.trainable)
        return member_state(self.state, member).trainable


def lone_run(experiment: Experiment) -> Cohort:
    """A cohort of one: its step is that of `melora_jax.make_train_step`."""
    run, model, mesh = experiment.run, experiment.model, experiment.mesh
    state, frozen = mj.train_state(model, experiment.tx)
    step = mj.make_train_step(model, experiment.tx, run.loss, accumulate=run.config.train.accumulate, mesh=mesh)
    key = _dropout_key(run.config, mesh)
    evaluate = make_eval_step(model, run.measure, mesh)
    return Cohort([experiment], experiment.folder, state, frozen, step, evaluate, (key,))


def population(configs: Sequence[RunConfig], folder: Path, at_once: int | None = None) -> Cohort:
    """Reads the data once, and each member's start over one base; arguments as for `run_population`.

    Raises:
      ValueError: as for `prepare`; or own orders of rows over batches of several widths.
    """
    experiments: list[Experiment] = []

    def models() -> Iterator[nnx.Module]:
        for config in configs:
            # The first member has said what there is to say.
            with quietly() if experiments else contextlib.nullcontext():
                experiments.append(prepare(config, experiments[0] if experiments else None))
            if len(experiments) == 1 and _own_streams(configs):
                _require_one_width(experiments[0])
            yield experiments[-1].model

    def tx(rates: Any) -> Any:
        first = experiments[0]
        return first.run.optimizer(first.model, first.total_steps, rates)[1]

    members = _members(configs)
    state, frozen = population_state(models(), tx, members)
    for experiment in experiments:
        nnx.update(experiment.model, frozen)  # one base in memory, and not one a member
    first, sizes = experiments[0], experiments[0].config.train
    tokens = sizes.batch_size // sizes.accumulate * max(first.material.plan.widths)
    at_once = at_once or as_many_as_pay(len(configs), tokens)
    step = make_population_step(
        first.model,
        tx,
        first.run.loss,
        streams="own" if _own_streams(configs) else "shared",
        accumulate=sizes.accumulate,
        at_once=at_once,
    )
    evaluate = make_population_eval(first.model, first.run.measure, at_once=at_once)
    return Cohort(experiments, folder, state, frozen, step, evaluate, (members,), (members,), at_once)


def as_many_as_pay(members: int, tokens: int) -> int:
    """How many of the members to compute at a time, if each sees `tokens` tokens."""
    return members if jax.default_backend() != "cpu" else min(members, max(2, _CPU_TOKENS // tokens))


def _dropout_key(config: RunConfig, mesh: Mesh | None = None) -> jax.Array:
    """The key of a run's dropout, on all devices of its mesh."""

    def draw() -> jax.Array:
        return jax.random.fold_in(jax.random.key(config.train.seed), 2)

    return draw() if mesh is None else jax.jit(draw, out_shardings=NamedSharding(mesh, jax.P()))()


def _own_streams(configs: Sequence[RunConfig]) -> bool:
    return len({config.data_seed for config in configs}) > 1


def _members(configs: Sequence[RunConfig]) -> Members:
    """What the runs differ in. Rates that follow the learning rate are resolved."""
    rates = {name: [_rate(config, name) for config in configs] for name in _RATES}
    alphas, dropouts = ([getattr(config.method.settings, name) for config in configs] for name in ("alpha", "dropout"))
    return make_members(
        [_dropout_key(config) for config in configs],
        optim=rates,
        alpha=[alpha / alphas[0] for alpha in alphas] if len({*map(repr, alphas)}) > 1 else None,
        dropout=dropouts if len(set(dropouts)) > 1 else None,
    )


def _rate(config: RunConfig, name: str) -> float:
    own = getattr(config.method.optim, name)
    return config.optim.learning_rate if own is None else own


def _require_one_width(experiment: Experiment) -> None:
    widths = experiment.material.plan.widths
    if len(widths) > 1:
        raise ValueError(
            f"runs that differ in train.data_seed see batches of different widths at one step ({min(widths)} to "
            f"{max(widths)} tokens), and padded ones would draw other dropout masks than their lone runs; set "
            f"data.buckets=[{max(widths)}], for one width, or one train.data_seed for all"
        )
