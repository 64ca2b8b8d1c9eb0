"""Conversations as text, hashes and files: what was said, what the cache holds of it, what is on disk."""
