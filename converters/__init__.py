"""Converters: a Hugging Face checkpoint or a GGUF file becomes a GGUF file or an MLC model.

`source` opens what is to be converted; `to_gguf.convert` and `mlc.convert` write. Nothing here is imported before
`edge-stream convert` runs, and neither torch nor transformers ever is.

The package is `edge_stream.converters`, never `converters`: in the repository edge_stream/converters is a link to this
folder, in wheels it is the folder itself. Of edge_stream it imports only leaves (tests/test_imports.py has the list).
"""
