"""Bytes on disk: safetensors, JSON, atomic writes, and pickled tensors read without running anything.

Imports nothing of ours.
"""
