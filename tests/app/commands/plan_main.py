"""Planned and compiled memory of small runs, as JSON; a program of its own, because XLA's flags are read once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from train.config.run_config import RunConfig
from train.config.schema import AdapterConfig, DataConfig, ModelConfig, OutputConfig, TrainConfig
from train.lab.memory.planning import abstract_mesh, abstract_run, plan_run

ENCODER = {
    "model_type": "bert",
    "vocab_size": 701,
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 64,
}
DECODER = ENCODER | {"model_type": "llama", "num_key_value_heads": 2}


def run_config(
    folder, config: dict, dtype="float32", remat="none", batch=2, length=32, quantize=None, whole=False, **train
) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(config))
    decoder = config["model_type"] == "llama"
    targets, saved = (("q_proj", "v_proj"), ()) if decoder else (("query", "value"), ("classifier",))
    if whole:
        targets, saved = (), ("model", "lm_head") if decoder else ("bert", "classifier")
    task = "causal-lm" if decoder else "classification"
    return RunConfig(
        ModelConfig(str(folder), task=task, dtype=dtype, remat=remat, quantize=quantize),
        AdapterConfig(n=8, targets=targets, modules_to_save=saved, dropout=0.05),
        DataConfig(train="t.jsonl", validation="v.jsonl", max_length=length),
        train=TrainConfig(batch_size=batch, **train),
        output=OutputConfig("runs/planned"),
    )


SMALL = {
    "encoder": {"config": ENCODER, "batch": 8},
    "decoder": {"config": DECODER},
    "decoder with remat": {"config": DECODER, "remat": "full"},
    "bfloat16 decoder": {"config": DECODER, "dtype": "bfloat16"},
    "quantised decoder": {"config": DECODER, "quantize": "nf4"},
    "decoder, full fine-tuning": {"config": DECODER, "whole": True},
    "encoder, full fine-tuning": {"config": ENCODER, "whole": True},
}


def main(folder: Path) -> None:
    found = {}
    for name, settings in SMALL.items():
        config = run_config(folder, **settings)
        run = abstract_run(config, config.train.batch_size)
        memory = run.step.lower(*run.arguments).compile().memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        found[name] = plan_run(config, abstract_mesh(), cpu=True).total, held
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
