"""PEFT's adapter format: its config, reading, exporting and what servers take of it.

Imports `checkpoints` and below.
"""
