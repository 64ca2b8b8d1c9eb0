"""One thread over the engine: which session is in which slot, and whose turn it is."""
