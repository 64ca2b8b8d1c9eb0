"""Converters: a Hugging Face checkpoint or a GGUF file becomes a GGUF file or an MLC model.

`source.open_source` opens what is to be converted; `to_gguf.convert` and `mlc.convert` write. Nothing here is imported
before `edge-stream convert` runs, and neither torch nor transformers ever is.
"""
