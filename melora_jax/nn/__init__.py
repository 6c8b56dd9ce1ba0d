"""NNX layers and trees that know no adapter: sharding, parallel and quantised dense layers, scanned stacks, attention.

Imports `core` and below.
"""
