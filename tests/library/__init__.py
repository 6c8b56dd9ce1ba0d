"""Tests of melora_jax without its models."""
