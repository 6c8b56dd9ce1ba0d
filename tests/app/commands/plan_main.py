"""Planned and compiled memory of small runs, as JSON; a program of its own, because XLA's flags are read once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.app.commands.test_plan import SMALL, run_config
from train.lab.memory.planning import abstract_mesh, abstract_run, plan_run


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
