"""`python -m train eval`: the tasks of lm-eval on a JAX model, with or without its adapter.

Imports `chat`, `loop` and below.
"""
