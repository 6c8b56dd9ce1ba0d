"""Tests on simulated devices and in several processes."""
