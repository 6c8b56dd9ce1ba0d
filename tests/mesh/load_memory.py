"""The host memory that loading takes: a program to run by hand, as its checkpoint has 2 GB.

    python tests/mesh/load_memory.py FOLDER             # eight simulated devices in one process
    python tests/mesh/load_memory.py FOLDER 2           # four in each of two

Builds a random Llama in FOLDER unless one is there, loads it on fsdp=4, tensor=2, and prints for each process the bytes
that its devices hold and the most that its memory (of its own, not the cache of files) grew by. On simulated devices
what they hold is host memory, so the least that the ratio can be is 1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

import melora_jax as mj
from melora_jax.files.safetensors_io import write_tensors
from melora_jax.models import model_from_config
from melora_jax.models.hub.names import torch_name, torch_shape
from melora_jax.nn import batch_sharding
from melora_jax.nn.tree import variables_of

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 6144,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
FILES = 4


def build(folder: Path) -> None:
    """About 1 billion parameters in bfloat16, in several files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    model = nnx.eval_shape(lambda: model_from_config(CONFIG, task="causal-lm"))
    shapes = {torch_name(path): torch_shape(path, value.shape) for path, value in variables_of(model).items()}
    rng, held = np.random.default_rng(0), {}
    for part in range(FILES):
        names = sorted(shapes)[part::FILES]
        tensors = {name: rng.standard_normal(shapes[name], np.float32).astype(ml_dtypes.bfloat16) for name in names}
        file = f"model-{part}.safetensors"
        write_tensors(folder / file, tensors, {"format": "pt"})
        held |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": held}), encoding="utf-8")


class Peak:
    """The most memory of its own that the process has while entered."""

    def __enter__(self) -> Peak:
        self.start = self.most = own_memory()
        self.running = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, own_memory())
            time.sleep(0.002)

    def __exit__(self, *_: Any) -> None:
        self.running = False
        self.thread.join()


def own_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found
    return int(found[1]) * 1024


def measure(folder: Path) -> None:
    mesh = mj.make_mesh(fsdp=4, tensor=2)
    jax.block_until_ready(jax.device_put(np.ones(8), batch_sharding(mesh)) if jax.process_count() == 1 else ())
    with Peak() as peak:
        model = mj.from_pretrained(folder, task="causal-lm", dtype="bfloat16", mesh=mesh)
        jax.block_until_ready(nnx.state(model))
    arrays = jax.tree.leaves(nnx.state(model))
    held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
    grew = peak.most - peak.start
    print(json.dumps({"process": jax.process_index(), "held": held, "grew": grew, "ratio": grew / held}), flush=True)


def main(folder: Path, processes: int, process: int | None) -> None:
    if process is None and not (folder / "config.json").exists():
        build(folder)
    if process is None and processes > 1:
        again = [sys.executable, __file__, str(folder), str(processes)]
        started = [subprocess.Popen([*again, str(number)]) for number in range(processes)]
        sys.exit(max(one.wait() for one in started))
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    if processes > 1:
        jax.distributed.initialize("localhost:23456", processes, process)
    measure(folder)


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1, int(sys.argv[3]) if len(sys.argv) > 3 else None
    )
