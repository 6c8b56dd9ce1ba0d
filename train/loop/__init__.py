"""A run: set up, the loop, evaluation, checkpoints, resuming; imports `report`, `run_folder`, `data` and below."""
