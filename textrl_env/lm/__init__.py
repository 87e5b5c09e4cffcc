"""What runs a language model: loading, decoding with a cache, and reading finished responses in one pass."""
