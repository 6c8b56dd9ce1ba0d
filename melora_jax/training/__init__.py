"""Training an adapted model: optimizer, step, rank budget, populations and the mesh check.

Imports `models`, `adapters` and below.
"""
