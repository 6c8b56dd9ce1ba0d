"""Tests of linen."""
