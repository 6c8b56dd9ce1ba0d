"""Bytes on disk: safetensors, atomic writes and pickled tensors read without running anything.

Imports nothing of ours.
"""
