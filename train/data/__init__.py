"""Files to rows, rows to tokens, tokens to batches; imports `config` and `hosts`."""
