"""Batches on their way to the devices, assembled from the rows that each process holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from melora_jax.nn import batch_sharding
from train.data.batching import Batch
from train.data.dataset import Rows

Feed = Callable[[Rows, Any], Batch]


def make_feed(mesh: Mesh | None) -> Feed:
    """A function of a split's rows and those of one batch to its arrays: on `mesh`, or on the host without one.

    With several processes, all must call it for the same batch: each contributes what it holds (see
    `train.hosts.shares`) and gets the rows that belong on its devices.
    """
    if mesh is None:
        return lambda source, rows: source.batch(rows)
    if jax.process_count() == 1:
        return lambda source, rows: jax.device_put(source.batch(rows), batch_sharding(mesh))
    exchange = make_exchange(mesh, jax.local_device_count())
    return lambda source, rows: exchange(source.batch(rows))


def make_exchange(mesh: Mesh, here: int) -> Callable[[Batch], Batch]:
    """A function of this process's part of a batch to the whole batch, on `mesh`; `here` counts its own devices.

    At least one process knows each place of a batch; the others have a lesser value there, `ABSENT`, or 0 for a weight.
    The whole is the largest value of each place.
    """
    one_a_device = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def largest(said: Batch) -> Batch:
        return {name: array.max(0) for name, array in said.items()}

    together = jax.jit(largest, out_shardings=batch_sharding(mesh))

    def exchange(batch: Batch) -> Batch:
        said: dict[str, Any] = {
            name: jax.make_array_from_process_local_data(
                one_a_device, np.broadcast_to(array, (here, *array.shape)), (mesh.size, *array.shape)
            )
            for name, array in batch.items()
        }
        return together(said)

    return exchange
