"""Embeddings by a second model, in the forms of OpenAI, llama-server and Ollama; reranking is refused."""

from __future__ import annotations

import asyncio
import base64
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter

from edge_stream.server import errors
from edge_stream.server.apis import embedding_schemas as schemas
from edge_stream.server.apis.ollama import OllamaErrorBody
from edge_stream.server.apis.routes import add_route, error_responses, failing
from edge_stream.server.errors import NOT_SUPPORTED, ApiError
from edge_stream.server.http.answering import Answering
from edge_stream.server.http.schemas import PromptObject

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_stream.embedder import Embedder


class Embeddings:
    """The routes."""

    def __init__(self, router: APIRouter, answering: Answering) -> None:
        self.alias, self.limits = answering.settings.alias, answering.settings.limits
        self._embedder, self._metrics = answering.settings.embedder, answering.scheduler.metrics.llama
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embed")  # one text at a time, beside the engine
        options: dict[str, Any] = {"methods": ["POST"], "responses": failing(501, "There is no embedding model.")}
        add_route(
            router, "/v1/embeddings", self.openai, "OpenAI", aliases=(), response_model=schemas.Embedded, **options
        )
        native: dict[str, Any] = {"aliases": ("/embeddings",), "response_model": list[schemas.NativeEmbedding]}
        add_route(router, "/embedding", self.native, "llama-server", **native, **options)
        failures = error_responses(OllamaErrorBody) | failing(501, "There is no embedding model.", OllamaErrorBody)
        options |= {"aliases": (), "responses": failures, "response_model": dict[str, Any]}
        add_route(router, "/api/embed", self.ollama, "Ollama", **options)
        add_route(router, "/api/embeddings", self.ollama_one, "Ollama", **options)
        for path in ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"):
            router.add_api_route(path, self.rerank, methods=["POST"], include_in_schema=False)

    async def openai(self, body: schemas.EmbeddingRequest) -> dict[str, Any]:
        """A vector of length 1 for each text."""
        rows, n = await self._pooled(body.input, body.dimensions)
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(row, body.encoding_format)}
            for i, row in enumerate(rows)
        ]
        return {"model": self._model().path.stem, "data": data, "usage": {"prompt_tokens": n, "total_tokens": n}}

    async def native(self, body: schemas.NativeEmbeddingRequest) -> list[dict[str, Any]]:
        """Vectors for each text: one, or with --pooling none one for each token."""
        given = body.content if body.input is None else body.input
        if given is None:
            raise errors.invalid("content is needed: a text, tokens, or a list of them")
        rows, _ = await self._embed(self._model(), given)
        return [{"index": i, "embedding": one.tolist()} for i, one in enumerate(rows)]

    async def ollama(self, body: schemas.OllamaEmbedRequest) -> dict[str, Any]:
        """A vector of length 1 for each text, in the form of Ollama's API."""
        begin = time.perf_counter_ns()
        rows, n = await self._pooled(body.input, body.dimensions)
        times = {"total_duration": time.perf_counter_ns() - begin, "load_duration": 0, "prompt_eval_count": n}
        return {"model": self._model().path.stem, "embeddings": [row.tolist() for row in rows], **times}

    async def ollama_one(self, body: schemas.OllamaEmbeddingsRequest) -> dict[str, Any]:
        """A vector of length 1 for a text, in the older form of Ollama's API."""
        rows, _ = await self._pooled(body.prompt, None)
        return {"embedding": rows[0].tolist()}

    async def rerank(self) -> None:
        """Refused."""
        raise ApiError(501, "this server does not rerank", NOT_SUPPORTED)

    def _model(self) -> Embedder:
        if self._embedder is None:
            raise ApiError(501, "this server has no embedding model (serve --embedding-model)", NOT_SUPPORTED)
        return self._embedder

    async def _pooled(self, given: schemas.Inputs, dimensions: int | None) -> tuple[list[NDArray[np.float32]], int]:
        """One vector for each text, and the number of tokens in all."""
        embedder = self._model()
        if not embedder.is_pooled:
            raise errors.invalid("this server embeds single tokens, as /embedding says: start it with --pooling")
        if dimensions is not None and dimensions != embedder.n_embd:
            raise errors.invalid(f"dimensions = {dimensions}: this model's embeddings have {embedder.n_embd}")
        rows, n = await self._embed(embedder, given)
        return [row[0] for row in rows], n

    async def _embed(self, embedder: Embedder, given: schemas.Inputs) -> tuple[list[NDArray[np.float32]], int]:
        """The vectors of each text, and the number of tokens in all."""
        is_one = not isinstance(given, list) or any(isinstance(part, int) for part in given)
        texts: list[Any] = [given] if is_one or not isinstance(given, list) else given
        if not texts:
            raise errors.invalid("input is empty")
        if len(texts) > self.limits.embeddings:
            raise errors.invalid(f"{len(texts)} texts are more than the {self.limits.embeddings} that are allowed")

        def work() -> tuple[list[NDArray[np.float32]], int]:
            all_tokens = [_tokens(embedder, text) for text in texts]
            return [self._row(embedder, tokens) for tokens in all_tokens], sum(map(len, all_tokens))

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _row(self, embedder: Embedder, tokens: list[int]) -> NDArray[np.float32]:
        begin = time.perf_counter()
        row = embedder.embed(tokens)
        self._metrics.read(len(tokens), time.perf_counter() - begin)
        self._metrics.decoded(1, len(tokens))
        return row


def _tokens(embedder: Embedder, text: Any) -> list[int]:
    vocabulary = embedder.vocabulary
    if isinstance(text, PromptObject):
        text = text.prompt_string
    elif isinstance(text, schemas.ContentObject):
        text = "".join(part["text"] for part in text.content)
    parts = [text] if isinstance(text, str) else text
    out: list[int] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            out += vocabulary.tokenize(part, add_bos=i == 0, special=True)
        elif isinstance(part, int) and part < vocabulary.size:
            out.append(part)
        else:
            raise errors.invalid(f"input: {part!s:.32} is neither a text nor a token of the {vocabulary.size}")
    return out


def _encoded(row: NDArray[np.float32], form: str) -> list[float] | str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if form == "base64" else row.tolist()
