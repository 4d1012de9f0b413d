"""Text towers, tokenizers, and the words of zero-shot classification."""
