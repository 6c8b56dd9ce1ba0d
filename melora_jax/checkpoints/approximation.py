"""What arithmetic on adapters returns: an adapter that approximates updates, and what it leaves out of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from melora_jax.checkpoints.adapter_state import AdapterTree


@dataclasses.dataclass(frozen=True)
class Loss:
    """What an approximation of one site's ΔW leaves out, as squared Frobenius norms.

    Attributes:
      energy: ‖ΔW‖².
      off_blocks: the part of it outside the diagonal blocks, which minis can't represent.
      inside: what the wanted rank leaves out inside the blocks.
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
    """An adapter that approximates updates, and what it leaves out. Prints as a table.

    Attributes:
      tree: the adapter.
      losses: by site path.
      left_out: names of parameters that changed and that the adapter has no place for, with ‖change‖².
    """

    tree: AdapterTree
    losses: Mapping[str, Loss]
    left_out: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        width = max((len(path) for path in [*self.losses, "site"]), default=4)
        lines = [f"{'site':{width}}  {'off blocks':>10}  {'inside':>8}  {'error':>8}"]
        for path, loss in self.losses.items():
            shares = [part / loss.energy if loss.energy else 0.0 for part in (loss.off_blocks, loss.inside)]
            lines.append(f"{path:{width}}  {shares[0]:>10.2%}  {shares[1]:>8.2%}  {loss.error:>8.4f}")
        lines += [f"left out: {name} (norm of its change {change**0.5:.4g})" for name, change in self.left_out.items()]
        return "\n".join(lines)
