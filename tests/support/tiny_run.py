"""A tiny BERT checkpoint with a tokenizer, and rows it can learn: what the tests of the application run on."""

from __future__ import annotations

import json
from pathlib import Path

from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from melora_jax.models.auto import model_from_config
from melora_jax.models.hub.save import save_pretrained

WORDS = ("film", "plot", "good", "bad", "fine", "dull", "warm", "cold", "very", "and", "the", "is")
SIZES = {
    "model_type": "bert",
    "vocab_size": 17,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 19,
    "max_position_embeddings": 37,
    "hidden_dropout_prob": 0.0,
}

DECODER_SIZES = {
    "model_type": "llama",
    "vocab_size": 17,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 22,
    "max_position_embeddings": 41,
}


def make_material(folder: Path, sizes: dict = SIZES) -> Path:
    """`folder` with a checkpoint in model/, and train.jsonl and held_out.jsonl."""
    make_checkpoint(folder / "model", sizes)
    make_rows(folder / "train.jsonl", 53)
    make_rows(folder / "held_out.jsonl", 19, first=100)
    return folder


def make_checkpoint(folder: Path, sizes: dict = SIZES) -> Path:
    """A folder with config.json, random weights and a word tokenizer."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.BertProcessing(ends[1], ends[0])
    save_pretrained(model_from_config(sizes, task="encoder"), folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=sizes["max_position_embeddings"],
    ).save_pretrained(folder)
    return folder


def make_decoder(folder: Path) -> Path:
    """A folder with a Llama of random weights and a word tokenizer that has a chat template."""
    special = ["[PAD]", "[UNK]", "[END]", "[USER]", "[ANSWER]"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    save_pretrained(model_from_config(DECODER_SIZES, task="causal-lm", rngs=nnx.Rngs(3)), folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="[END]",
        additional_special_tokens=["[USER]", "[ANSWER]"],
        model_max_length=DECODER_SIZES["max_position_embeddings"],
    )
    fast.chat_template = (
        "{% for m in messages %}{{ ' [USER] ' if m.role == 'user' else ' [ANSWER] ' }}{{ m.content }}"
        "{{ ' [END] ' if m.role == 'assistant' else '' }}{% endfor %}"
        "{{ ' [ANSWER] ' if add_generation_prompt else '' }}"
    )
    fast.save_pretrained(folder)
    return folder


def make_instructions(path: Path, count: int, first: int = 0) -> Path:
    """Rows of prompt and completion: the answer says the question's first words again."""
    lines = []
    for number in range(first, first + count):
        words = [WORDS[(number * 5 + place * (3 + number % 4)) % len(WORDS)] for place in range(2 + (number * 7) % 6)]
        lines.append(json.dumps({"prompt": " ".join(words), "completion": " ".join(words[:2])}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_rows(path: Path, count: int, first: int = 0) -> Path:
    """Rows of two to nineteen words; the label says whether a good word stands in the sentence."""
    lines = []
    for number in range(first, first + count):
        length = 2 + (number * 7) % 18
        words = [WORDS[(number * 5 + place * (3 + number % 4)) % len(WORDS)] for place in range(length)]
        lines.append(json.dumps({"text": " ".join(words), "label": int(bool({"good", "warm"} & set(words)))}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def recipe(folder: Path, **sections: dict) -> Path:
    """A recipe file over the tiny checkpoint and rows in `folder`, with some keys changed."""
    tables = {
        "model": {"name": str(folder / "model")},
        "adapter": {"n": 3, "r": 1, "dropout": 0.1},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "held_out.jsonl"),
            "max_length": 24,
            "buckets": [12],
        },
        "optim": {"learning_rate": 5e-3},
        "train": {"epochs": 2, "batch_size": 8, "eval_batch_size": 8, "log_every": 1, "seed": 7},
        "output": {"folder": str(folder / "run")},
    }
    for name, changes in sections.items():
        tables[name] = tables[name] | changes
    lines = [
        f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in table.items()) for name, table in tables.items()
    ]
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
