"""The engine on Apache TVM, for MLC model folders: see docs/mlc.md. Nothing here is imported for a GGUF model."""
