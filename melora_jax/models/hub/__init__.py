"""Hugging Face checkpoints: names, opening, loading onto a mesh and saving; imports the models and `gguf`."""
