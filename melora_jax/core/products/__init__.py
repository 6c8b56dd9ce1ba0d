"""How x·W + x·ΔW is computed, chosen once from shapes, dtype, mesh and platform; imports `config` and `core`."""
