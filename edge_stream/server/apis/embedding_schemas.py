"""Requests and answers of embeddings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from edge_stream.server.http.schemas import Count, Open, PromptObject, TextPart, Token


class ContentObject(Open):
    """A text in parts."""

    content: list[TextPart]


Object = ContentObject | PromptObject
Inputs = str | Object | list[Token | str | Object | list[Token | str]]


class EmbeddingRequest(Open):
    """POST /v1/embeddings. A text, tokens, or both mixed, or a list of such."""

    input: Inputs
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None


class NativeEmbeddingRequest(Open):
    """POST /embedding."""

    content: Inputs | None = None
    input: Inputs | None = None


class OllamaEmbedRequest(Open):
    """POST /api/embed."""

    input: Inputs
    dimensions: Count | None = None


class OllamaEmbeddingsRequest(Open):
    """POST /api/embeddings."""

    prompt: str


class Embedding(BaseModel):
    """A text's. base64: of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    total_tokens: int


class Embedded(BaseModel):
    """The answer to POST /v1/embeddings."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


class NativeEmbedding(BaseModel):
    """A text's, as the answer to POST /embedding has them."""

    index: int
    embedding: list[list[float]]
