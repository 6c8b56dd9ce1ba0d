"""A run's rows and the batches that feed its steps, for every task."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from train.config.run_config import RunConfig
from train.data.batching import Batch, BatchPlan, BatchRows, bucket_widths, eval_batches, make_batch
from train.data.instructions import load_instructions
from train.data.labelled import Split, load_examples
from train.data.packing import PackedRows, PackPlan, make_token_batch, packed_eval_batches
from train.data.templates import make_template
from train.data.tokens import Examples, Tokens, load_tokenizer, read_tokenizer, tokenize, tokenize_conversations
from train.hosts.shares import ALONE, Share

# Only rows of several examples need these: in others the model derives order and positions itself, and padding comes
# last, where no token attends to it.
_OF_PACKED_ROWS = ("segment_ids", "position_ids")
_TOKENIZER = "the tokenizer"


class Rows(Protocol):
    """The rows of one split."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int32 [examples]."""
        ...

    def batch(self, rows: Any) -> Batch:
        """The arrays of a batch, with the rows that this process holds."""
        ...

    def examples(self, rows: Any) -> np.ndarray:
        """Which examples a batch holds, int [examples]."""
        ...


class Plan(Protocol):
    """Training batches: step → rows, a pure function of (seed, step)."""

    widths: tuple[int, ...]
    steps_per_epoch: int

    def batch(self, step: int) -> Any:
        """The rows of a step, with their `width` in tokens."""
        ...

    def reseeded(self, seed: int) -> Plan:
        """The plan of the same rows in another order."""
        ...


@dataclasses.dataclass(frozen=True)
class Material:
    """The data that a run trains on and is evaluated on; `notes` are lines for the user before it starts.

    Attributes:
      labels: of the held-out rows; None for a task whose labels are the text itself.
      num_labels: how many classes there are; None in the same case.
      most_id: the largest token id.
    """

    train: Rows
    validation: Rows
    plan: Plan
    held_out: Sequence[Any]
    labels: np.ndarray | None
    num_labels: int | None
    most_id: int
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """Texts with labels."""

    tokens: Tokens
    labels: np.ndarray
    pad_id: int

    @property
    def lengths(self) -> np.ndarray:
        return self.tokens.lengths

    def batch(self, rows: BatchRows) -> Batch:
        return make_batch(self.tokens, self.labels, rows.indices, rows.width, self.pad_id)

    def examples(self, rows: BatchRows) -> np.ndarray:
        return rows.indices[rows.indices >= 0]


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """Texts that the model learns to write: one a row, or several if packed."""

    tokens: Examples
    pad_id: int
    packed: bool

    @property
    def lengths(self) -> np.ndarray:
        return self.tokens.lengths

    def batch(self, rows: PackedRows | BatchRows) -> Batch:
        arrays = make_token_batch(self.tokens, rows, self.pad_id)
        unused = ("attention_mask", *(() if self.packed else _OF_PACKED_ROWS))
        return {name: array for name, array in arrays.items() if name not in unused}

    def examples(self, rows: PackedRows | BatchRows) -> np.ndarray:
        if isinstance(rows, PackedRows):
            return np.array([example for row in rows.rows for example in row], np.int64)
        return rows.indices[rows.indices >= 0]


def read_material(config: RunConfig, share: Share = ALONE) -> Material:
    """Reads and tokenises the data of a run, or this process's share, and plans its batches.

    Raises:
      ValueError: the data or the tokenizer can't be used, or differs between processes.
    """
    return (_instructions if config.model.task == "causal-lm" else _labelled)(config, share)


def _labelled(config: RunConfig, share: Share) -> Material:
    dataset = load_examples(config.data, config.model.task, share)
    tokenizer = share.together(lambda: load_tokenizer(config.model.name))
    share.agree(_TOKENIZER, lambda: _fingerprint(tokenizer))
    pad_id: Any = tokenizer.pad_token_id  # an int, which `load_tokenizer` checks
    notes = [*dataset.notes]

    def rows(split: Split, name: str) -> LabelledRows:
        tokens, report = tokenize(tokenizer, split.texts, config.data.max_length, share)
        notes.append(f"{name}: {report}")
        return LabelledRows(tokens, split.labels, pad_id)

    train, validation = rows(dataset.train, "train"), rows(dataset.validation, "held out")
    widths = bucket_widths(config.data.buckets, config.data.max_length)
    return Material(
        train,
        validation,
        BatchPlan(train.lengths, config.train.batch_size, widths, config.data_seed),
        eval_batches(validation.lengths, config.train.eval_batch_size, widths),
        validation.labels,
        dataset.num_labels,
        _largest(share, train.tokens.input_ids, validation.tokens.input_ids),
        tuple(notes),
    )


def _instructions(config: RunConfig, share: Share) -> Material:
    how, limit, sizes = config.instruction, config.data.max_length, config.train
    data = load_instructions(config.data, how.format, how.held_out, share=share)
    tokenizer = share.together(lambda: read_tokenizer(config.model.name))
    share.agree(_TOKENIZER, lambda: _fingerprint(tokenizer))
    template = make_template(tokenizer, how.template)
    notes, splits = [*data.notes], []
    for name, conversations in (("train", data.train), ("held out", data.validation)):
        examples, report = tokenize_conversations(tokenizer, template, conversations, limit, how.loss, how.lost, share)
        notes.append(f"{name}: {report}")
        splits.append(TokenRows(examples, _padding_of(tokenizer), how.pack))
    train, validation = splits
    if how.pack:
        plan: Plan = PackPlan(train.lengths, sizes.batch_size, limit, config.data_seed)
        held_out: Sequence[Any] = packed_eval_batches(validation.lengths, sizes.eval_batch_size, limit)
        notes.append(f"train: {plan}")
    else:
        widths = bucket_widths(config.data.buckets, limit)
        plan = BatchPlan(train.lengths, sizes.batch_size, widths, config.data_seed)
        held_out = eval_batches(validation.lengths, sizes.eval_batch_size, widths)
    most_id = _largest(share, train.tokens.input_ids, validation.tokens.input_ids)
    return Material(train, validation, plan, held_out, None, None, most_id, tuple(notes))


def _padding_of(tokenizer: Any) -> int:
    """The padding id; no token attends to padding, so a tokenizer without one can use any id."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _largest(share: Share, *splits: Sequence[np.ndarray | None]) -> int:
    held = [ids for split in splits for ids in split if ids is not None and len(ids)]
    return max(share.gather(lambda: max((int(ids.max()) for ids in held), default=0)))


def _fingerprint(tokenizer: Any) -> str:
    """A digest that tells tokenizers apart."""
    parts = sorted(tokenizer.get_vocab().items()), tokenizer.chat_template, tokenizer.pad_token_id
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    return hashlib.sha256(f"{parts}{backend}".encode()).hexdigest()
