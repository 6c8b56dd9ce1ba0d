"""The result of arithmetic on adapters: an approximation of updates and its error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from melora_jax.checkpoints.adapter_state import AdapterTree
from melora_jax.core.report import table


@dataclasses.dataclass(frozen=True)
class Loss:
    """The error of an approximation of one site's ΔW, as squared Frobenius norms.

    Attributes:
      energy: ‖ΔW‖².
      off_blocks: the part outside the diagonal blocks, which minis can't represent.
      inside: the part inside the blocks that exceeds the requested rank.
    """

    energy: float
    off_blocks: float
    inside: float

    @property
    def error(self) -> float:
        """‖ΔW - its approximation‖ / ‖ΔW‖, 0 for an update that is zero."""
        return float(np.sqrt((self.off_blocks + self.inside) / self.energy)) if self.energy else 0.0


@dataclasses.dataclass(frozen=True)
class Approximation:
    """An adapter that approximates updates, and its errors. Prints as a table.

    Attributes:
      tree: the adapter.
      losses: by site path.
      left_out: names of parameters that changed and that the adapter has no place for, with ‖change‖².
    """

    tree: AdapterTree
    losses: Mapping[str, Loss]
    left_out: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("site", "off blocks", "inside", "error")]
        for path, loss in self.losses.items():
            shares = [part / loss.energy if loss.energy else 0.0 for part in (loss.off_blocks, loss.inside)]
            rows.append((path, f"{shares[0]:.2%}", f"{shares[1]:.2%}", f"{loss.error:.4f}"))
        lines = [table(rows)]
        lines += [f"left out: {name} (norm of its change {change**0.5:.4g})" for name, change in self.left_out.items()]
        return "\n".join(lines)
