"""Tiny GGUF models as MLC folders with the same weights, to the last bit in q0f32."""

from __future__ import annotations

from pathlib import Path

from edge_stream.converters import mlc
from edge_stream.converters.mlc import MlcOptions, params
from edge_stream.converters.mlc.quantization import find_quantization
from edge_stream.converters.mlc.tensor_cache import TensorCacheWriter
from edge_stream.models.conversion import open_source


def write_mlc(gguf: Path, out: Path, quantization: str = "q0f32", **options: object) -> Path:
    """Convert; q0f32 weights are stored as float32 then, not rounded to bfloat16 as MLC's own files are."""
    source = open_source(str(gguf))
    try:
        mlc.convert(source, out, MlcOptions(quantization=quantization, **options), lambda _line: None)
        if quantization == "q0f32":
            for old in (*out.glob("params_shard_*"), *out.glob("*-cache*.json")):
                old.unlink()
            writer = TensorCacheWriter(out)
            for param in params.list_params(source):
                for stored, array in params.convert_param(source, param, find_quantization("q0f32")):
                    writer.add(stored.name, array, encoding="raw")
            writer.finish({"ParamSize": 0, "ParamBytes": 0.0, "BitsPerParam": 32.0})
    finally:
        source.close()
    return out
