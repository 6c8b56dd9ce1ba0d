"""Tests of the model families against torch transformers."""
