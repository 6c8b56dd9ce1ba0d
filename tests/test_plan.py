"""Planning a run's memory from shapes: against what XLA plans, by hand for small programs, and on meshes."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from train.__main__ import main
from train.config import RunConfig
from train.devices import GIB, Shares, devices_from_name, rows_a_device
from train.liveness import peak_bytes
from train.plan import abstract_run, plan_run
from train.sections import AdapterConfig, DataConfig, ModelConfig, OutputConfig, TrainConfig

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


def sizes_of(name: str) -> dict:
    """The config.json of Llama models, from their published sizes."""
    hidden, inner, layers, heads, key_heads, words = {
        "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
        "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
        "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256),
    }[name]
    return {
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 4096,
    }


def run_config(folder, config: dict, dtype="float32", remat="none", batch=2, length=32, **train) -> RunConfig:
    (folder / "config.json").write_text(json.dumps(config))
    decoder = config["model_type"] == "llama"
    targets, saved = (("q_proj", "v_proj"), ()) if decoder else (("query", "value"), ("classifier",))
    return RunConfig(
        ModelConfig(str(folder), task="causal-lm" if decoder else "classification", dtype=dtype, remat=remat),
        AdapterConfig(n=8, targets=targets, modules_to_save=saved, dropout=0.05),
        DataConfig(train="t.jsonl", validation="v.jsonl", max_length=length),
        train=TrainConfig(batch_size=batch, **train),
        output=OutputConfig("runs/planned"),
    )


@pytest.mark.parametrize(
    ("config", "dtype", "remat"),
    [
        (ENCODER, "float32", "none"),
        (ENCODER, "bfloat16", "none"),
        (DECODER, "float32", "none"),
        (DECODER, "bfloat16", "dots"),
        (DECODER, "float32", "full"),
    ],
)
def test_the_plan_is_within_a_tenth_of_what_xla_plans(tmp_path, config, dtype, remat):
    settings = run_config(tmp_path, config, dtype, remat)
    planned = plan_run(settings, Shares())
    run = abstract_run(settings, 2)
    found = run.step.lower(*run.arguments).compile().memory_analysis()
    compiled = (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    print(planned.total, compiled, planned.total/compiled, planned.activations, found.temp_size_in_bytes)
    assert planned.total == pytest.approx(compiled, rel=0.1)
