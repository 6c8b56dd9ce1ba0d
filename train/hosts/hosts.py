"""Many hosts as one run: joining, agreeing, and who of them speaks and writes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.config.schema import DistributedConfig
from train.hosts.shares import Share

# A host that is silent this long counts as dead, and ends the others.
_SILENCE_SECONDS = 25
_JOINING_SECONDS = 300


def join_hosts(config: DistributedConfig) -> None:
    """Makes this process one of many, where the configuration says so; before anything else uses a device.

    Raises:
      ValueError: the others were not found.
    """
    if config.cluster == "none" and config.coordinator is None:
        return
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process,
            initialization_timeout=_JOINING_SECONDS,
            heartbeat_timeout_seconds=_SILENCE_SECONDS,
            shutdown_timeout_seconds=_SILENCE_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        remedy = "start every process within five minutes, with the same coordinator and number of processes"
        raise ValueError(f"the processes of the run did not find each other; {remedy}: {reason}") from error
    if not is_first():
        logging.getLogger("melora_jax").setLevel(logging.ERROR)


def is_first() -> bool:
    """Whether this process is the one that prints, and writes all files but checkpoints."""
    return jax.process_index() == 0


def meet(place: str) -> None:
    """Waits until every process has come to `place`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def require_equal(parts: Mapping[str, str | bytes], remedy: str) -> None:
    """Raises ValueError, in every process, unless all of them have the same parts; the message names the first other.

    Args:
      parts: what must be equal, by the name that the message has for it.
      remedy: what to do otherwise.
    """
    if jax.process_count() == 1:
        return
    digests = [hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest() for part in parts.values()]
    everyone = multihost_utils.process_allgather(np.array([np.frombuffer(digest, np.uint32) for digest in digests]))
    for place, name in enumerate(parts):
        differ = np.flatnonzero((everyone[:, place] != everyone[0, place]).any(axis=-1))
        if len(differ):
            raise ValueError(f"{name} of process {differ[0]} differs from that of process 0; {remedy}")


def own_share() -> Share:
    """The part of the data that this process reads."""
    return Share(jax.process_index(), jax.process_count(), _exchange)


def _exchange(text: str) -> list[str]:
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(own), np.int32)).reshape(-1)
    everyone = multihost_utils.process_allgather(np.pad(own, (0, int(sizes.max()) - len(own))))
    rows = np.reshape(everyone, (len(sizes), -1))
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes, strict=True)]


def whole_on_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy, also arrays that lie on several processes; every process must call it."""
    if jax.process_count() == 1:
        return jax.tree.map(np.array, tree)
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))
