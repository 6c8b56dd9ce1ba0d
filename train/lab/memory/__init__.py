"""What a run holds on a device, from shapes alone; imports `loop` and below."""
