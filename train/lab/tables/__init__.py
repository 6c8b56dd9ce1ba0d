"""Tasks by methods by seeds, their scores and figures; imports `loop`, `report` and below."""
