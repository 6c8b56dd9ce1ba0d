"""Killed and resumed runs against an uninterrupted one; imports `loop` and below."""
