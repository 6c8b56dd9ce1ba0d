"""A run killed at random moments against one left alone; imports `loop` and below."""
