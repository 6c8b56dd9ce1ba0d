"""The training steps that `python -m train bench` times: ours, and torch's with PEFT where they are installed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

import melora_jax as mj
from train.step import Batch, make_loss, measurer

Task = Literal["classification", "causal-lm"]
_TASKS = {"classification": "sequence-classification", "causal-lm": "causal-lm"}
# The lowest module, trained alone: so gradients pass every layer and there is nothing else to compute.
_LOWEST = {"classification": "embeddings/LayerNorm", "causal-lm": "layers/0/input_layernorm"}


class Step(NamedTuple):
    """One training step, going on from the last at each call; the bytes that XLA plans for it, None where unknown."""

    advance: Callable[[], Any]
    planned_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Bench:
    """What every variant is timed on: float arrays of random rows, the same for all."""

    model: str
    task: Task
    batch_size: int
    length: int
    targets: tuple[str, ...]
    dtype: str

    def batch(self) -> Batch:
        """Random rows without padding."""
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


def variants(bench: Bench) -> dict[str, Callable[[], Step]]:
    """The steps by name; the first is the frozen limit, forward pass and input gradients alone."""
    targets = bench.targets

    def ours(**settings: Any) -> Callable[[], Step]:
        return lambda: _jax_step(bench, mj.MELoRAConfig(**settings))

    steps = {
        "frozen limit": ours(targets=(), modules_to_save=(_LOWEST[bench.task],)),
        "LoRA r=8": ours(n=1, r=8, targets=targets),
        "MELoRA n=8 r=1": ours(n=8, r=1, targets=targets),
        "MELoRA n=8 r=1 batched": ours(n=8, r=1, strategy="batched", targets=targets),
        "MELoRA n=8 r=1 packed": ours(n=8, r=1, strategy="packed", targets=targets),
        "MELoRA n=8 r=8": ours(n=8, r=8, targets=targets),
    }
    return steps | {"torch+PEFT LoRA r=8": lambda: _torch_step(bench)}


def _jax_step(bench: Bench, config: mj.MELoRAConfig) -> Step:
    model = mj.from_pretrained(
        bench.model,
        task=_TASKS[bench.task],
        num_labels=2 if bench.task == "classification" else None,
        dtype=bench.dtype,
    )
    mj.adapt(model, config, rngs=nnx.Rngs(0))
    tx = mj.make_optimizer(model, 1e-4)
    step = mj.make_train_step(model, tx, make_loss(measurer(bench.task, chunk=1024)))
    state, frozen = mj.train_state(model, tx)
    batch, key = bench.batch(), jax.random.key(0)
    compiled = step.lower(state, frozen, batch, key).compile()
    held = [state]

    def advance() -> None:
        held[0], metrics = compiled(held[0], frozen, batch, key)
        jax.block_until_ready(metrics)

    plan = compiled.memory_analysis()
    planned = plan and plan.argument_size_in_bytes + plan.temp_size_in_bytes
    return Step(advance, planned)


def _torch_step(bench: Bench) -> Step:
    # Neither comes with the application: types are checked without them, and the bench leaves this row out.
    peft, torch = map(importlib.import_module, ("peft", "torch"))
    import transformers

    kind = {
        "classification": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
    }[bench.task]
    model = kind.from_pretrained(bench.model, dtype=getattr(torch, bench.dtype))
    tasks = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(bench.targets), task_type=tasks[bench.task])
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

    return Step(advance, None)
