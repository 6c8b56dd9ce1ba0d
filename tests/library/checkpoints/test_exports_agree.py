"""One function in three programs: our logits, PEFT's on the export, transformers' on the merged folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import melora_jax as mj
from tests.support import decoder_fixtures as decoders
from tests.support import models_fixtures as encoders
from tests.support import tiny

pytestmark = [pytest.mark.slow, pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ENCODER, LABELS = "roberta", 3
METHODS: dict[str, dict[str, Any]] = {
    "MELoRA": {"r": [1, 3], "alpha": [3, 7]},
    "total": {"r": 2, "scaling": "total"},
    "shuffle, rslora": {"r": 4, "mixer": "shuffle", "scaling": "rslora", "alpha": [2, 5]},
    "all": {"r": 3, "mixer": "all"},
    "a head": {"r": 2, "modules_to_save": True},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a random model of each name and dtype, written once."""
    written: dict[tuple[str, str], Path] = {}

    def base(name: str, dtype: str = "float32") -> Path:
        if (name, dtype) not in written:
            folder = tmp_path_factory.mktemp(name)
            if name == ENCODER:
                # two minis divide it, which no other test of encoders wants
                sizes = encoders.CONFIGS[name] | {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 34}
                model = mj.models.model_from_config(sizes, num_labels=LABELS, rngs=nnx.Rngs(0))
                mj.save_pretrained(tiny_values(model), folder)
            else:
                decoders.checkpoint(folder, name)
            if dtype == "bfloat16":
                halve(folder)
            written[name, dtype] = folder
        return written[name, dtype]

    return base


def tiny_values(model: Any) -> Any:
    """The model with weights large enough to matter."""
    rng = np.random.default_rng(4)
    state = nnx.state(model, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        drawn = 0.2 * rng.standard_normal(variable.shape) + (1.0 if path[-1] == "scale" else 0.0)
        variable[...] = jnp.asarray(drawn, jnp.float32)
    nnx.update(model, state)
    return model


def halve(folder: Path) -> None:
    """Makes a checkpoint one of bfloat16."""
    tensors = load_file(folder / "model.safetensors")
    half = {key: value.astype(jnp.bfloat16) for key, value in tensors.items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    (folder / "config.json").write_text(json.dumps(config | {key: "bfloat16"}))


def adapted(base: Path, name: str, dtype: str, **settings: Any) -> Any:
    encoder = name == ENCODER
    task = {"num_labels": LABELS} if encoder else {"task": "causal-lm"}
    model: Any = mj.from_pretrained(base, dtype=dtype, **task)
    targets = ["query", "value"] if encoder else ["q_proj", "v_proj", "down_proj"]
    if settings.pop("modules_to_save", None):
        tied = not encoder and model.sizes.tied
        settings["modules_to_save"] = ["classifier" if encoder else "embed_tokens" if tied else "lm_head"]
    mj.adapt(model, mj.MELoRAConfig(**({"n": 2, "targets": targets} | settings)), rngs=nnx.Rngs(0))
    tiny.stirred(model)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] == "kernel" or path[-1] == "embedding":
            variable[...] = variable[...] * 1.25
    return model


def inputs_of(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Inputs by name, and which positions of the output count."""
    if name == ENCODER:
        return encoders.batch(name), np.ones(3, bool)
    ids, mask, positions = decoders.padded()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, mask == 1


def torch_logits(folder: Path, name: str, adapter: Path | None, dtype: str, inputs: dict[str, np.ndarray]) -> Any:
    import peft
    import torch
    import transformers

    kind = "AutoModelForSequenceClassification" if name == ENCODER else "AutoModelForCausalLM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = getattr(transformers, kind).from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(**{key: torch.from_numpy(value).long() for key, value in inputs.items()}).logits.float()


def check(name: str, dtype: str, bases: Any, folder: Path, tolerance: float, **settings: Any) -> None:
    base, (inputs, counted) = bases(name, dtype), inputs_of(name)
    model = adapted(base, name, dtype, **settings)
    ours = np.asarray(nnx.jit(lambda model: model(**inputs))(model), np.float32)[counted]
    plain = mj.from_pretrained(base, dtype=dtype, **({} if name == ENCODER else {"task": "causal-lm"}))
    scale = abs(ours).max()
    assert abs(ours - np.asarray(plain(**inputs), np.float32)[counted]).max() > 0.05 * scale
    mj.export_peft(model, folder / "peft")
    mj.save_pretrained(mj.merge(model), folder / "merged")
    in_peft = torch_logits(base, name, folder / "peft", dtype, inputs).numpy()[counted]
    in_transformers = torch_logits(folder / "merged", name, None, dtype, inputs).numpy()[counted]
    np.testing.assert_allclose(in_peft, ours, rtol=0, atol=tolerance * max(scale, 1.0))
    np.testing.assert_allclose(in_transformers, ours, rtol=0, atol=tolerance * max(scale, 1.0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [ENCODER, "llama", "qwen2"])
def test_three_programs_give_the_same_logits(name: str, method: str, bases: Any, tmp_path: Path) -> None:
    check(name, "float32", bases, tmp_path, 1e-5, **METHODS[method])


@pytest.mark.parametrize("name", [ENCODER, "llama", "qwen2"])
def test_they_agree_on_a_bfloat16_base(name: str, bases: Any, tmp_path: Path) -> None:
    # weak adapters, since strong ones make these random models amplify the base's own rounding
    check(name, "bfloat16", bases, tmp_path, 2e-2, r=[1, 3], alpha=[0.6, 1.5])


@pytest.mark.parametrize("method", ["total", "shuffle, rslora"])
def test_peft_gives_the_same_logits_on_blocks(method: str, bases: Any, tmp_path: Path) -> None:
    base, (inputs, counted) = bases("llama"), inputs_of("llama")
    model = adapted(base, "llama", "float32", **METHODS[method])
    ours = np.asarray(nnx.jit(lambda model: model(**inputs))(model))[counted]
    mj.export_peft(model, tmp_path / "plain")
    mj.export_peft(model, tmp_path / "blocks", "bdlora")
    found = torch_logits(base, "llama", tmp_path / "blocks", "float32", inputs).numpy()[counted]
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-5 * abs(ours).max())
    sizes = [(tmp_path / kind / "adapter_model.safetensors").stat().st_size for kind in ("plain", "blocks")]
    assert sizes[1] < 0.8 * sizes[0]
