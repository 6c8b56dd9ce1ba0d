"""The training steps that `python -m train bench` times: ours, and torch's with PEFT if they are installed."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import melora_jax as mj
from train.data.batching import Batch
from train.lab.bench.flops import forward_flops
from train.lab.bench.models import TASKS, Task, random_model
from train.loop.losses import make_loss, measurer
from train.run_folder.errors import RunError

# The lowest module is trained alone, so that gradients pass every layer and nothing else is computed.
_LOWEST = {"classification": "embeddings/LayerNorm", "causal-lm": "layers/0/input_layernorm"}
LIMIT, FULL, TORCH = "frozen limit", "full fine-tuning", "torch+PEFT LoRA r=8"
DROPOUT = 0.05
_TORCH_WARM_UP = 8  # torch's first steps in a fresh process are slower


class Facts(NamedTuple):
    """Facts about a step besides its time; None if unknown.

    Attributes:
      trainable: parameters that it trains.
      flops: of the model's matrix products in the step: two forward passes' worth, or three if the base is trained.
      planned_bytes: arguments and temporaries as XLA plans them.
      trace_seconds, compile_seconds, hlo_lines: of its compilation.
      strategy: the product that the first adapter's strategy chooses.
    """

    trainable: int | None = None
    flops: int | None = None
    planned_bytes: int | None = None
    trace_seconds: float | None = None
    compile_seconds: float | None = None
    hlo_lines: int | None = None
    strategy: str | None = None


class Step(NamedTuple):
    """One training step, which continues from the last at each call; `close` frees what it needs.

    Attributes:
      warm_up: how many steps to take before timing.
    """

    advance: Callable[[], Any]
    facts: Facts
    close: Callable[[], Any] = lambda: None
    warm_up: int = 1


@dataclasses.dataclass(frozen=True)
class Bench:
    """The subject that every variant is timed on: random rows without padding, the same for all.

    Attributes:
      model: a folder or hub id; "" for random weights with hidden size `width` and `depth` layers.
      task, batch_size, length, targets, dtype: as in the command's options.
    """

    model: str
    task: Task
    batch_size: int
    length: int
    targets: tuple[str, ...]
    dtype: str
    width: int = 0
    depth: int = 0

    def batch(self) -> Batch:
        """The rows."""
        rng = np.random.default_rng(0)
        shape = (self.batch_size, self.length)
        ids = rng.integers(5, 1000, shape, dtype=np.int32)
        if self.task == "causal-lm":
            weights = np.ones(shape, np.float32)
            weights[:, -1] = 0
            return {"input_ids": ids, "labels": np.roll(ids, -1, axis=1), "weights": weights}
        return {
            "input_ids": ids,
            "attention_mask": np.ones(shape, np.int32),
            "labels": rng.integers(0, 2, self.batch_size, dtype=np.int32),
            "weight": np.ones(self.batch_size, np.float32),
        }

    def load(self) -> Any:
        """The model without adapters."""
        if not self.model:
            return random_model(self.task, self.width, self.depth, self.dtype)
        labels = 2 if self.task == "classification" else None
        return mj.from_pretrained(self.model, task=TASKS[self.task], num_labels=labels, dtype=self.dtype)


def variants(bench: Bench, minis: Iterable[tuple[int, int]], detail: bool = True) -> dict[str, Callable[[], Step]]:
    """The steps by name; the first is the frozen limit, with only a forward pass and input gradients.

    Args:
      bench: the subject.
      minis: pairs of n and r; each is a step of MELoRA, or of LoRA if n is 1.
      detail: whether to add, for each n above 1, LoRA with equally many parameters and with equal rank; for the last
        pair, each strategy and dropout; and full fine-tuning and torch.
    """
    minis = tuple(minis)
    parts = nnx.split(bench.load())

    def ours(**settings: Any) -> Callable[[], Step]:
        whole = bench.targets == ("all-linear",)
        head = ("classifier",) if bench.task == "classification" else ()
        all_linear: dict[str, Any] = {"targets": "all-linear", "exclude": head}
        where: dict[str, Any] = all_linear if whole else {"targets": bench.targets}
        return lambda: _jax_step(bench, parts, mj.MELoRAConfig(**(where | settings)))

    steps = {LIMIT: ours(targets=(), exclude=(), modules_to_save=(_LOWEST[bench.task],))}
    for n, r in minis:
        for rank in (r, n * r) if detail and n > 1 else ():
            steps[f"LoRA r={rank}"] = ours(n=1, r=rank)
        steps[f"MELoRA n={n} r={r}" if n > 1 else f"LoRA r={r}"] = ours(n=n, r=r)
    if not detail:
        return steps
    n, r = minis[-1]
    for strategy in ("batched", "packed", "merged"):
        steps[f"MELoRA n={n} r={r} {strategy}"] = ours(n=n, r=r, strategy=strategy)
    steps[f"MELoRA n={n} r={r} dropout {DROPOUT}"] = ours(n=n, r=r, dropout=DROPOUT)
    steps[FULL] = lambda: _jax_step(bench, parts, None)
    if bench.model and all(importlib.util.find_spec(package) for package in ("torch", "peft")):
        steps[TORCH] = lambda: _torch_apart(bench)
    return steps


def _jax_step(bench: Bench, parts: Any, config: mj.MELoRAConfig | None) -> Step:
    """A compiled step of a model that shares its frozen arrays with the others; None trains all of it."""
    model: Any = nnx.merge(*parts)
    sites = mj.adapt(model, config, rngs=nnx.Rngs(0)).sites if config else ()
    tx = mj.make_optimizer(model, 1e-4)
    loss = make_loss(measurer(bench.task, chunk=1024))
    state, frozen = mj.train_state(model, tx)
    state = jax.tree.map(jnp.copy, state)  # the step donates its arguments
    batch, key = bench.batch(), jax.random.key(0)
    began = time.perf_counter()
    lowered = mj.make_train_step(model, tx, loss).lower(state, frozen, batch, key)
    traced = time.perf_counter()
    compiled = lowered.compile()
    done = time.perf_counter()
    held = [state]

    def advance() -> None:
        held[0], metrics = compiled(held[0], frozen, batch, key)
        jax.block_until_ready(metrics)

    plan = compiled.memory_analysis()
    graphdef, values = nnx.split(nnx.merge(*parts))
    flops = forward_flops(lambda values: loss(nnx.merge(graphdef, values), batch), values)
    facts = Facts(
        trainable=sum(leaf.size for leaf in jax.tree.leaves(state.trainable)),
        flops=(2 if config else 3) * flops,
        planned_bytes=plan and plan.argument_size_in_bytes + plan.temp_size_in_bytes,
        trace_seconds=traced - began,
        compile_seconds=done - traced,
        hlo_lines=len(str(compiled.as_text()).splitlines()),
        strategy=_strategy(model, bench.batch_size * bench.length) if sites else None,
    )
    return Step(advance, facts)


def _strategy(model: Any, tokens: int) -> str:
    """The strategy of the first layer with an adapter."""
    layers = (node for _, node in nnx.iter_graph(model) if isinstance(node, mj.MELoRADense))
    return next(layers).strategy_for(tokens)


_SERVE = "import sys, train.lab.bench.steps as steps; steps.serve_torch(sys.argv[1])"


def _torch_apart(bench: Bench) -> Step:
    """torch's step in its own process, so that neither library's threads or malloc settings affect the other.

    Raises:
      RunError: the process ended.
    """
    command = [sys.executable, "-c", _SERVE, json.dumps(dataclasses.asdict(bench))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def advance() -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write("step\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer != "done\n":
            raise RunError("the process that takes torch's steps ended; its error is printed above")

    def close() -> None:
        with process:
            process.kill()

    return Step(advance, Facts(), close, _TORCH_WARM_UP)


def serve_torch(words: str) -> None:
    """Takes one of torch's steps for each line of standard input."""
    values = json.loads(words)
    step = torch_step(Bench(**(values | {"targets": tuple(values["targets"])})))
    for _ in sys.stdin:
        step()
        print("done", flush=True)


def torch_step(bench: Bench) -> Callable[[], None]:
    """The step of torch and PEFT on the same model and rows."""
    # Both are optional: types are checked without them, and without them the bench leaves this row out.
    peft, torch = map(importlib.import_module, ("peft", "torch"))
    import transformers

    kind = {
        "classification": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[bench.task]
    model = kind.from_pretrained(bench.model, dtype=getattr(torch, bench.dtype))
    tasks = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
    targets = "all-linear" if bench.targets == ("all-linear",) else list(bench.targets)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type=tasks[bench.task])
    model = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    arrays = bench.batch()
    batch = {name: torch.from_numpy(arrays[name]).long() for name in ("input_ids", "labels")}
    if bench.task == "causal-lm":
        batch["labels"] = batch["input_ids"]  # transformers shifts them

    def advance() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return advance
