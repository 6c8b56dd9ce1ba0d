"""Tests of the application in train/."""
