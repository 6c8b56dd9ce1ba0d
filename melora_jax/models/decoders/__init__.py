"""Llama, Mistral, Qwen, Gemma and SmolLM as one configurable decoder; imports `nn`, `core` and what models share."""
