"""Step times of adapters over the frozen model; imports `loop` and below."""
