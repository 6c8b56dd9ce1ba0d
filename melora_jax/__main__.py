"""`python -m melora_jax COMMAND`: export, merge, import, inspect and compress adapter folders."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from melora_jax import commands
from melora_jax.checkpoints.inspect import inspect_adapter

_BASE = "folder or hub id of the base model (default: the one that the adapter names)"


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="an adapter folder, ours or PEFT's")
    _add_output(parser)
    parser.add_argument("--format", choices=["lora", "bdlora"], default="lora", help="only PEFT reads bdlora")
    parser.add_argument("--base", help=f"{_BASE}; only its config.json is read")


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="an adapter folder, ours or PEFT's")
    _add_output(parser)
    parser.add_argument("--base", help=_BASE)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="adapter_config.json with adapter_model.safetensors or adapter_model.bin")
    _add_output(parser)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="an adapter folder, ours, PEFT's or the authors'")


def _compress_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="an adapter folder, or a fully fine-tuned checkpoint")
    _add_output(parser)
    parser.add_argument("--n", type=int, required=True, help="mini-adapters per layer")
    parser.add_argument("--r", type=int, required=True, help="rank of each mini-adapter")
    parser.add_argument("--base", help="folder or hub id of the checkpoint before the fine-tuning")
    parser.add_argument(
        "--targets", nargs="+", default=[], help="suffixes of the layers to compress (default: all dense layers)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the folder to write; on an error nothing in it changes")


def _wrote(folder: object) -> str:
    return f"wrote {folder}"


@dataclasses.dataclass(frozen=True)
class _Command:
    """One command: what `--help` says of it, its arguments, and what it runs; the result is printed."""

    summary: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Any]


_COMMANDS = {
    "export": _Command(
        summary="write an adapter as plain LoRA for PEFT, vLLM, SGLang and llama.cpp's converter",
        example="runs/first/adapter my-peft-adapter",
        arguments=_export_arguments,
        run=lambda given: _wrote(
            commands.export_folder(given.adapter, given.folder, format=given.format, base=given.base)
        ),
    ),
    "merge": _Command(
        summary="add an adapter to its base and write a Hugging Face checkpoint",
        example="my-peft-adapter my-model --base FacebookAI/roberta-base",
        arguments=_merge_arguments,
        run=lambda given: _wrote(commands.merge_folder(given.adapter, given.folder, base=given.base)),
    ),
    "import": _Command(
        summary="read a PEFT adapter, or one of the MELoRA authors', into our format",
        example="my-peft-adapter my-adapter",
        arguments=_import_arguments,
        run=lambda given: _wrote(commands.import_folder(given.source, given.folder)),
    ),
    "inspect": _Command(
        summary="show an adapter's sites, ranks, norms and size, and which programs can serve it",
        example="my-adapter",
        arguments=_inspect_arguments,
        run=lambda given: inspect_adapter(given.adapter),
    ),
    "compress": _Command(
        summary="find the MELoRA nearest to an adapter or to a full fine-tuning",
        example="my-tuned-model my-adapter --base my-model --n 8 --r 2",
        arguments=_compress_arguments,
        run=lambda given: commands.compress_folder(
            given.source, given.folder, n=given.n, r=given.r, base=given.base, targets=given.targets
        ),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; faulty input gives one line on stderr and exit status 2."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        print(_COMMANDS[given.command].run(given))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m melora_jax", description="Export, merge, import, inspect and compress adapter folders."
    )
    parsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, command in _COMMANDS.items():
        command.arguments(
            parsers.add_parser(
                name,
                help=command.summary,
                description=command.summary,
                epilog=f"example:\n  python -m melora_jax {name} {command.example}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
