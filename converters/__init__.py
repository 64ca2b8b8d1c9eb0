"""Converters: a Hugging Face checkpoint or a GGUF file becomes a GGUF file or an MLC model.

`source` opens the input; `to_gguf.convert` and `mlc.convert` write the output. Nothing here is imported before
`edge-stream convert` runs, and torch and transformers never are.

The package is `edge_stream.converters`, never `converters`: edge_stream/converters is a link to this folder in the
repository and the folder itself in wheels. Of edge_stream it imports only leaf modules (listed in
tests/test_imports.py).
"""
