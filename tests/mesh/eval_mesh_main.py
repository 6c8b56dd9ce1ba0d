"""Scores and answers of one decoder on one device and on meshes of eight; run by test_lm_eval.py, prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from flax import nnx
from lm_eval.api.instance import Instance

import melora_jax as mj
from melora_jax.models import model_from_config
from tests.mesh.mesh_runs import DECODER
from tests.support.chat import byte_tokenizer
from tests.support.tiny import stirred
from train.harness.model import JaxLM

MESHES = ({"data": 2, "fsdp": 2, "tensor": 2},)
CONTEXTS = ["ab ab: " * 24 + end for end in ("a", "b b", "aé", "abab", "")]


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, 0) for one in arguments]  # pyright: ignore[reportArgumentType]


def found(folder: str, mesh: Any, names: Sequence[str]) -> dict[str, Any]:
    tokenizer = byte_tokenizer(None)
    model = mj.from_pretrained(folder, task="causal-lm", mesh=mesh)
    mj.adapt(model, mj.MELoRAConfig(n=8, r=1, targets=list(names)), rngs=nnx.Rngs(0))
    lm = JaxLM(stirred(model), tokenizer, batch_size=4, mesh=mesh)
    pairs = [(context, end) for context in CONTEXTS for end in (" a", "b: ab")]
    settings = {"until": ["zz"], "max_gen_toks": 6}
    scores = lm.loglikelihood(requests("loglikelihood", *pairs))
    return {
        "scores": [score for score, _ in scores],
        "answers": lm.generate_until(requests("generate_until", *((one, settings) for one in CONTEXTS))),
    }


def main() -> None:
    folder = sys.argv[1]
    sizes = {"vocab_size": 272, "max_position_embeddings": 193, "initializer_range": 0.6}
    mj.save_pretrained(model_from_config(DECODER | sizes, task="causal-lm", rngs=nnx.Rngs(1)), folder)
    meshes = [None, *(mj.make_mesh(**sizes) for sizes in MESHES)]
    print(json.dumps([found(folder, mesh, ["q_proj", "o_proj", "down_proj"]) for mesh in meshes]))


if __name__ == "__main__":
    main()
