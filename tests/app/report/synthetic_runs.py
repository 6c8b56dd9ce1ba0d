"""Run folders with made-up but plausible contents, for the tests of reports and comparisons."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from train.run_folder.log import MetricsLog

D_MODEL, LAYERS, FROZEN = 384, 6, 22_565_376
CONFIG = """\
[model]
name = {model}
task = "classification"

[adapter]
n = {n}
r = {r}
alpha = 16.0
mixer = "identity"
targets = ["query", "value"]

[data]
train = {data}

[optim]
learning_rate = {learning_rate}

[train]
epochs = 2
batch_size = 32
"""


def make_run(folder: Path, n: int = 8, r: int = 8, score: float = 0.86, **changes: Any) -> Path:
    """Writes a finished run of `n` minis of rank `r` (n=0: the head alone) that ends near accuracy `score`."""
    config = {"model": "all-MiniLM-L6-v2", "data": "train.jsonl", "learning_rate": 1e-3, **changes}
    folder.mkdir(parents=True)
    quoted = {key: json.dumps(value) for key, value in config.items()}  # a JSON string is a TOML string
    (folder / "config.toml").write_text(CONFIG.format(n=n, r=r, **quoted), encoding="utf-8")
    paths = [f"bert/encoder/layer/{k}/attention/self/{name}" for k in range(LAYERS) for name in ("query", "value")]
    sites = [_site(path, n, r) for path in paths] if n else []
    adapter = sum(site["parameters"] for site in sites)
    head = 148_610
    counts = {"trainable": adapter + head, "adapter": adapter, "head": head, "frozen": FROZEN}
    write_json(folder / "sites.json", {"sites": sites, **counts})
    write_json(folder / "versions.json", {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8", "melora_jax": "0.1.0"})
    shown = sites[1::4]
    write_json(folder / "spectra.json", {site["path"]: _spectrum(k, site["rank"]) for k, site in enumerate(shown)})
    with MetricsLog(folder) as log:
        for event in _events(score):
            log.write(event)
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _site(path: str, n: int, r: int) -> dict[str, Any]:
    sizes = {"d_in": D_MODEL, "d_out": D_MODEL, "n": n, "r": [r] * n, "rank": n * r}
    parameters = r * 2 * D_MODEL
    how = {"scaling": [16.0 / r] * n, "mixer": "identity", "strategy": "packed"}
    return {"path": path, **sizes, "parameters": parameters, **how}


def _spectrum(seed: int, rank: int) -> list[float]:
    values = np.random.default_rng(seed).gamma(2.0, 0.08, rank) * np.exp(-np.arange(rank) / (0.6 * rank))
    return np.sort(values)[::-1].tolist()


def _events(score: float) -> list[dict[str, Any]]:
    """470 steps in two epochs; logged every five, evaluated every 94."""
    rng = np.random.default_rng(round(score * 1000))
    events: list[dict[str, Any]] = []
    for step in range(5, 471, 5):
        loss = 0.30 + 0.41 * math.exp(-step / 110) + 0.05 * rng.normal()
        rate = 1e-3 * min(step / 28, (470 - step) / 442)
        speed = {"examples_per_second": 92.0, "tokens_per_second": 2400.0, "memory_bytes": 1 << 30}
        at = {"step": step, "epoch": step / 235}
        events.append({"kind": "train", **at, "loss": loss, "learning_rate": rate, **speed, "seconds": step * 0.35})
        if step % 94 < 5 and step > 5:
            done = 1 - math.exp(-step / 130)
            scores = {"loss": 0.62 - 0.28 * done, "accuracy": 0.60 + (score - 0.60) * done + 0.004 * rng.normal()}
            scores |= {"macro_f1": scores["accuracy"] - 0.006, "matthews": 2 * scores["accuracy"] - 1.01}
            best = scores["accuracy"] > max((e["accuracy"] for e in events if e["kind"] == "eval"), default=0.0)
            events.append({"kind": "eval", **at, **scores, "seconds": 6.2, "best": best})
    return events
