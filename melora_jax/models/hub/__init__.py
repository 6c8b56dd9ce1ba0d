"""Hugging Face checkpoints: names, loading into shards and saving; imports the model families and `gguf`."""
