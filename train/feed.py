"""Batches on their way to the devices: each process makes the rows that its own devices hold, and no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

import melora_jax as mj
from train.material import Rows
from train.step import Batch

Feed = Callable[[Rows, Any], Batch]


def make_feed(mesh: Mesh | None) -> Feed:
    """A function of a split's rows and those of one batch to its arrays: on `mesh`, or on the host without one."""
    if mesh is None:
        return lambda source, rows: source.batch(rows)
    sharding = mj.batch_sharding(mesh)

    def feed(source: Rows, rows: Any) -> Batch:
        batch = source.batch(rows, own_places(sharding, rows.places))
        return {
            name: jax.make_array_from_process_local_data(sharding, array, (rows.places, *array.shape[1:]))
            for name, array in batch.items()
        }

    return feed


def own_places(sharding: NamedSharding, places: int) -> slice:
    """The places of a batch that this process's devices hold; a mesh lays them side by side."""
    held = [index[0].indices(places) for index in sharding.addressable_devices_indices_map((places,)).values() if index]
    return slice(min(start for start, _, _ in held), max(stop for _, stop, _ in held))
