"""The decoder on Apache TVM for MLC model folders, see docs/mlc.md. Not imported for GGUF models."""
