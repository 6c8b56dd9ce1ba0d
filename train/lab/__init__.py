"""What measures us, not what users need: tables, benchmarks, crash test, memory.

Imports `loop`, `report` and below.
"""
