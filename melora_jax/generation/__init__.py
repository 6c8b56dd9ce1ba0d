"""Text from decoders: prompts, the decoding loop and sampling; imports `models` and below."""
