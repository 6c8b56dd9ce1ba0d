"""`python -m melora_jax COMMAND`: adapter folders in, out, merged, compressed and looked at."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from melora_jax import commands
from melora_jax.checkpoints.inspect import inspect_adapter

_EXAMPLES = {
    "export": "python -m melora_jax export runs/first/adapter my-peft-adapter",
    "merge": "python -m melora_jax merge my-peft-adapter my-model --base FacebookAI/roberta-base",
    "import": "python -m melora_jax import my-peft-adapter my-adapter",
    "inspect": "python -m melora_jax inspect my-adapter",
    "compress": "python -m melora_jax compress my-tuned-model my-adapter --base my-model --n 8 --r 2",
}
_BASE = "folder or hub id of the base model; by default the one that the adapter names"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; what is wrong with its input is one line on stderr, and exit status 2."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(options.run(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m melora_jax", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, add, summary in (
        ("export", _add_export, "write an adapter as plain LoRA for PEFT, vLLM, SGLang and llama.cpp's converter"),
        ("merge", _add_merge, "add an adapter to its base and write a Hugging Face checkpoint"),
        ("import", _add_import, "read a PEFT adapter, or one of the MELoRA authors', into our format"),
        ("inspect", _add_inspect, "show an adapter's sites, ranks, norms, size, and what serves it"),
        ("compress", _add_compress, "find the MELoRA nearest to an adapter or to a full fine-tuning"),
    ):
        command = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
    return parser


def _add_export(command: argparse.ArgumentParser) -> None:
    _add_folders(command, "adapter", "an adapter folder, ours or PEFT's")
    command.add_argument("--format", choices=["lora", "bdlora"], default="lora", help="bdlora is for PEFT alone")
    command.add_argument("--base", help=f"{_BASE}; only its config.json is read")
    command.set_defaults(
        run=lambda given: (
            f"wrote {commands.export_folder(given.adapter, given.folder, format=given.format, base=given.base)}"
        )
    )


def _add_merge(command: argparse.ArgumentParser) -> None:
    _add_folders(command, "adapter", "an adapter folder, ours or PEFT's")
    command.add_argument("--base", help=_BASE)
    command.set_defaults(
        run=lambda given: f"wrote {commands.merge_folder(given.adapter, given.folder, base=given.base)}"
    )


def _add_import(command: argparse.ArgumentParser) -> None:
    _add_folders(command, "source", "adapter_config.json with adapter_model.safetensors or adapter_model.bin")
    command.set_defaults(run=lambda given: f"wrote {commands.import_folder(given.source, given.folder)}")


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapter", help="an adapter folder, ours, PEFT's or the authors'")
    command.set_defaults(run=lambda given: inspect_adapter(given.adapter))


def _add_compress(command: argparse.ArgumentParser) -> None:
    _add_folders(command, "source", "an adapter folder, or a fully fine-tuned checkpoint")
    command.add_argument("--n", type=int, required=True, help="mini-adapters a layer")
    command.add_argument("--r", type=int, required=True, help="rank of one mini")
    command.add_argument("--base", help="folder or hub id of the checkpoint before the fine-tuning")
    command.add_argument("--targets", nargs="+", default=[], help="layers to compress, by suffix; by default all dense")
    command.set_defaults(
        run=lambda given: commands.compress_folder(
            given.source, given.folder, n=given.n, r=given.r, base=given.base, targets=given.targets
        )
    )


def _add_folders(command: argparse.ArgumentParser, source: str, help: str) -> None:
    command.add_argument(source, help=help)
    command.add_argument("folder", help="the folder to write, whole or not at all")


if __name__ == "__main__":
    sys.exit(main())
