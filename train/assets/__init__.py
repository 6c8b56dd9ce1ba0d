"""The files that demos and tests need, fetched and checked by sha256; imports nothing of ours."""
