"""One adapter on plain arrays, without Flax modules: formulas, start values, dropout, which paths a config means.

Imports `config`, `validation` and `files`.
"""
