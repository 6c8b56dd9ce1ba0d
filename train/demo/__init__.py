"""The two demos; imports `loop`, `report` and `assets`."""
