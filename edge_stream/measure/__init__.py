"""Measurements of streams and of other methods: speed, memory, perplexity, recall."""
