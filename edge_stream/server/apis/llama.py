"""llama-server's own API: /completion, /infill, embeddings, tokens, templates, slots, and what the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from edge_stream.sampling import NUMBERS
from edge_stream.server import errors
from edge_stream.server.apis import llama_schemas as schemas
from edge_stream.server.apis.facts import BUILD, likely, loop_info, progress
from edge_stream.server.apis.routes import Name, add_route, failing, streamed
from edge_stream.server.http import infill
from edge_stream.server.http.answering import AnswerForm, Answering, Collected, sse
from edge_stream.server.http.requests import adapter_scales
from edge_stream.server.http.schemas import AdapterScale, ChatRequest, CompletionRequest
from edge_stream.server.scheduling.events import Delta, Done, Finished, Progress, Reading, Started, TokenLogprobs
from edge_stream.server.scheduling.slot_actions import SlotActions
from edge_stream.server.scheduling.tasks import GenerationRequest

if TYPE_CHECKING:
    from edge_stream.engine import Engine
    from edge_stream.sampling import Sampling

# names of Sampling's fields in llama-server's settings; "": written otherwise
_SETTINGS = {"temp": "temperature", **dict.fromkeys(("seed", "logit_bias", "grammar", "json_schema", "chat"), "")}
_STOP_TYPES = {"eos": "eos", "grammar": "eos", "stop": "word"}  # of Finished.how; every other is a limit


class Llama:
    """The routes."""

    def __init__(self, router: APIRouter, answering: Answering) -> None:
        self.answering, self.engine = answering, answering.engine
        self.scheduler, self.settings = answering.scheduler, answering.settings
        self.slot_actions = SlotActions(self.scheduler)
        no: tuple[str, ...] = ()
        written: dict[str, Any] = {"methods": ["POST"], "response_model": schemas.Completion | list[schemas.Completion]}
        written |= {"responses": streamed()}
        add_route(router, "/completion", self.complete, "llama-server", aliases=("/completions",), **written)
        written["responses"] |= failing(501, "The model cannot fill in.")
        add_route(router, "/infill", self.infill, "llama-server", aliases=no, **written)
        add_route(router, "/health", self.health, "server", response_model=schemas.Health)
        plain: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
        metrics: dict[int | str, dict[str, Any]] = {200: {"content": plain, "description": "Prometheus text."}}
        add_route(router, "/metrics", self.metrics, "server", aliases=no, response_class=Response, responses=metrics)
        add_route(router, "/tokenizer_info", self.tokenizer, "text", aliases=no, response_model=schemas.TokenizerInfo)
        add_route(router, "/props", self.props, "server", aliases=no, response_model=schemas.Props)
        none: dict[str, Any] = {"response_model_exclude_none": True, "aliases": no}
        add_route(router, "/slots", self.slots, "slots", response_model=list[schemas.Slot], **none)
        missing = failing(404, "No such slot or file.")
        slot_answer: dict[str, Any] = {"responses": missing, "response_model": schemas.SlotAnswer, **none}
        add_route(router, "/slots/{slot}", self.slot, "slots", methods=["POST"], **slot_answer)
        adapters: dict[str, Any] = {"aliases": no, "response_model": list[schemas.Adapter]}
        add_route(router, "/lora-adapters", self.adapters, "llama-server", **adapters)
        adapters |= {"methods": ["POST"], "response_model": schemas.Success}
        add_route(router, "/lora-adapters", self.set_adapters, "llama-server", **adapters)
        for path, handler, model in (
            ("/tokenize", self.tokenize, schemas.Tokens),
            ("/detokenize", self.detokenize, schemas.Content),
            ("/apply-template", self.template, schemas.Prompt),
        ):
            add_route(router, path, handler, "text", methods=["POST"], aliases=no, response_model=model)

    #
    # answers
    #

    async def complete(self, body: schemas.NativeRequest, request: Request, x_conversation: Name = None) -> Any:
        """Continue a text of any length; a list of prompts gives a list of answers."""
        return await self._answer(body, body.prompt, request, x_conversation)

    async def infill(self, body: schemas.InfillRequest, request: Request, x_conversation: Name = None) -> Any:
        """Write what stands between a prefix and a suffix. Only for models that were trained to."""
        extra = [(chunk.filename, chunk.text) for chunk in body.input_extra]
        prefix, suffix = map(self.answering.requests.mixed_tokens, (body.input_prefix, body.input_suffix))
        prompt = await asyncio.to_thread(infill.prompt, self.engine, prefix, suffix, extra, body.prompt)
        return await self._answer(body, prompt, request, x_conversation)

    async def _answer(self, body: schemas.Native, prompt: Any, request: Request, name: str | None) -> Response:
        n_probs = body.n_probs if body.n_probs is not None else body.logprobs
        fields = dict(body) | {"prompt": prompt, "logprobs": n_probs or None, "echo": False, "suffix": None}
        inner = CompletionRequest.model_construct(**fields)
        generations = await asyncio.to_thread(self.answering.requests.from_text, inner, name)
        if body.post_sampling_probs and n_probs:
            generations = [replace(generation, after_sampling=True) for generation in generations]
        prompts = [await self.answering.prompt_text(generation) for generation in generations]
        form = NativeForm(self.answering, generations, prompts, body)
        return await self.answering.answer(request, form, generations, body.stream)

    #
    # facts
    #

    async def health(self) -> dict[str, str]:
        """That the server is running. Needs no key."""
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """Prometheus metrics, prefixes edge_stream_ and llamacpp:, the latter by llama-server's names."""
        counts, metrics = await self.answering.call(self.scheduler.counts), self.scheduler.metrics
        response = Response(metrics.text(counts), media_type="text/plain; version=0.0.4")
        # spelt as llama-server does: Starlette's own way would write it in lower case
        response.raw_headers.append((b"Process-Start-Time-Unix", str(metrics.t_start).encode()))
        return response

    async def props(self) -> dict[str, Any]:
        """The model, its template, the cache, defaults and limits."""
        engine, settings = self.engine, self.settings
        names = ("seed", *NUMBERS)
        defaults = {
            **{name: getattr(settings.sampling, name) for name in names},
            "n_ctx": engine.n_ctx,
            "params": generation_settings(engine, None, None, settings.sampling),
        }
        tokens = {"bos_token": engine.bos, "eos_token": engine.eos}
        return {
            "default_generation_settings": defaults,
            "total_slots": engine.n_parallel,
            "model_alias": settings.alias,
            "model_path": str(engine.model_path),
            "modalities": {"vision": False, "audio": False, "video": False},
            "endpoint_slots": self.settings.has_slots,
            "endpoint_props": False,
            "endpoint_metrics": True,
            "chat_template": self.scheduler.renderer.core.info["template"],
            "chat_template_caps": self.answering.requests.template_capabilities(),
            **{name: self._token_text(token) for name, token in tokens.items()},
            "build_info": BUILD,
            "is_sleeping": False,
            # beyond llama-server's
            "model_desc": engine.desc,
            "n_ctx": engine.n_ctx,
            "n_keep": engine.n_keep,
            "n_ctx_train": engine.n_ctx_train,
            "sink_move": engine.sink_move,
            "flash_attn": engine.backend.options.flash_attn,
            "takes_tools": self.answering.requests.core.info["supports_tools"],
            "limits": vars(settings.limits),
        }

    def _token_text(self, token: int) -> str:
        return self.engine.token_to_piece(token, special=True).decode(errors="replace") if token >= 0 else ""

    #
    # slots
    #

    async def slots(self) -> list[dict[str, Any]]:
        """The conversation in each slot of the cache."""
        if not self.settings.has_slots:
            raise errors.ApiError(501, "this server does not show its slots (--no-slots)")
        return await self.answering.call(self.scheduler.slots)

    async def slot(
        self,
        slot: int,
        action: Annotated[str, Query(pattern="^(save|restore|erase)$")],
        body: schemas.SlotFile | None = None,
    ) -> dict[str, Any]:
        """Save a slot's conversation under a name, restore one, or erase it."""
        filename = body.filename if body else None
        return await asyncio.wrap_future(
            await self.answering.call(lambda: self.slot_actions.act(slot, action, filename))
        )

    #
    # adapters
    #

    async def adapters(self) -> list[dict[str, Any]]:
        """The LoRA adapters, and their scales."""
        chosen = self.engine.backend.options.lora
        return [{"id": i, "path": str(file), "scale": scale} for i, (file, scale) in enumerate(chosen)]

    async def set_adapters(self, body: list[AdapterScale]) -> dict[str, bool]:
        """Other scales, for all conversations; 0 for adapters that are not named. They are read anew, or from disk."""
        scales = adapter_scales(self.engine, body)
        await self.answering.call(lambda: self.scheduler.set_adapters(scales))
        return {"success": True}

    #
    # text
    #

    async def tokenize(self, body: schemas.TokenizeRequest) -> dict[str, Any]:
        """Tokens of a text."""
        engine = self.engine
        add_bos = body.add_special and engine.add_bos
        tokens = await asyncio.to_thread(
            lambda: engine.tokenize(body.content, add_bos=add_bos, special=body.parse_special)
        )
        return {"tokens": [self._piece(token) for token in tokens] if body.with_pieces else tokens}

    def _piece(self, token: int) -> dict[str, Any]:
        piece = self.engine.token_to_piece(token, special=True)
        try:
            return {"id": token, "piece": piece.decode()}
        except UnicodeDecodeError:
            return {"id": token, "piece": list(piece)}

    async def detokenize(self, body: schemas.DetokenizeRequest) -> dict[str, str]:
        """Text of tokens."""
        if any(token >= self.engine.n_vocab for token in body.tokens):
            raise errors.invalid(f"there is a token outside the vocabulary of {self.engine.n_vocab}")
        pieces = await asyncio.to_thread(lambda: [self.engine.token_to_piece(t, special=True) for t in body.tokens])
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return {"content": text, "prompt": text}

    async def tokenizer(self) -> dict[str, str | None]:
        """What lm-evaluation-harness asks, before it uses /tokenize and /detokenize (from vLLM's API)."""
        names = {"bos_token": self.engine.bos, "eos_token": self.engine.eos}
        texts = {name: self._token_text(token) or None for name, token in names.items()}
        return {**texts, "chat_template": self.scheduler.renderer.core.info["template"]}

    async def template(self, body: ChatRequest) -> dict[str, str]:
        """A chat as the model's template renders it."""
        history = await asyncio.to_thread(self.answering.requests.chat_history, body)
        return {"prompt": await asyncio.to_thread(lambda: self.scheduler.renderer.request(history).prompt)}


class NativeForm(AnswerForm):
    """An object per choice, or per token of it. prompts: the text of each task's."""

    def __init__(
        self,
        answering: Answering,
        generations: Sequence[GenerationRequest],
        prompts: Sequence[str],
        body: schemas.Native | None = None,
    ) -> None:
        super().__init__(generations[0].n)
        self.engine, self.model = answering.engine, answering.settings.alias
        self.generations, self.prompts, self.body = generations, prompts, body
        n = len(prompts) * self.n
        # of each choice so far, for a stream, whose text is not kept
        self._n_written, self._has_line, self._finished = [0] * n, [False] * n, dict[int, Finished]()
        self._info: dict[int, dict[str, Any]] = {}

    def whole(self, choices: Sequence[Collected], done: Sequence[Done]) -> Any:
        """One object, or a list of them."""
        finals = [self.final(i, choice, done[i // self.n]) for i, choice in enumerate(choices)]
        return finals[0] if len(finals) == 1 else finals

    def chunks(self, k: int, event: Progress) -> Iterable[bytes]:
        """An object for every token. The last of each choice waits for Done."""
        if isinstance(event, Started):
            self._info[k] = event.info
        elif isinstance(event, Reading):
            yield sse(self._part(k * self.n, None) | progress(event))
        elif isinstance(event, Delta):
            i = k * self.n + event.index
            self._n_written[i] += event.token is not None
            self._has_line[i] = self._has_line[i] or "\n" in event.text
            yield sse(self._part(i, event))
        elif isinstance(event, Finished):
            self._finished[k * self.n + event.index] = event
        elif isinstance(event, Done):
            for i in range(k * self.n, (k + 1) * self.n):
                yield sse(self.final(i, None, event))

    def _part(self, i: int, event: Delta | None) -> dict[str, Any]:
        info = self._info[i // self.n]
        part: dict[str, Any] = {
            "index": i,
            "content": event.text if event else "",
            "tokens": [event.token] if event and event.token is not None else [],
            "stop": False,
            "id_slot": info["slot"],
            "tokens_predicted": self._n_written[i],
            "tokens_evaluated": info["n_past"] + info["n_to_read"],
        }
        if event and event.timings:
            part["timings"] = event.timings
        if event and event.logprobs:
            part["completion_probabilities"] = [self._probabilities(event.logprobs)]
        return part

    def final(self, i: int, choice: Collected | None, done: Done) -> dict[str, Any]:
        """Choice i at its end. choice: all of it, unless it was streamed."""
        generation = self.generations[i // self.n]
        finished = choice.finished if choice else self._finished[i]
        assert finished is not None
        stop_type = _STOP_TYPES.get(finished.how, "limit")
        answer: dict[str, Any] = {
            "index": i,
            "content": choice.text if choice else "",
            "tokens": choice.tokens if choice and self.body and self.body.return_tokens else [],
            "id_slot": done.info["slot"],
            "stop": True,
            "model": self.model,
            "tokens_predicted": len(choice.tokens) if choice else self._n_written[i],
            "tokens_evaluated": done.usage["prompt_tokens"],
            "generation_settings": generation_settings(self.engine, generation, self.body),
            "prompt": self._bos(generation) + self.prompts[i // self.n],
            "has_new_line": "\n" in choice.text if choice else self._has_line[i],
            "truncated": done.info["n_past"] > done.info["n_cached"],  # some of it has left the cache
            "stop_type": stop_type,
            "stopping_word": finished.stop_string or "",
            "tokens_cached": done.info["n_cached"],
            "timings": done.timings,
            "edge_stream": done.info | loop_info(finished),
        }
        if choice and choice.logprobs:
            answer["completion_probabilities"] = [self._probabilities(one) for one in choice.logprobs]
        wanted = self.body.response_fields if self.body else None
        return _only(answer, wanted) if wanted else answer

    def _bos(self, generation: GenerationRequest) -> str:
        history = generation.history
        if history.text is None or history.is_tokens or not self.engine.add_bos:
            return ""
        return self.engine.token_to_piece(self.engine.bos, special=True).decode(errors="replace")

    def _probabilities(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        value, top = (
            ("prob", "top_probs") if self.body and self.body.post_sampling_probs else ("logprob", "top_logprobs")
        )
        assert logprobs.logprob is not None
        return likely(self.engine, logprobs.token, logprobs.logprob, value) | {
            top: [likely(self.engine, token, one, value) for token, one in logprobs.top]
        }


def _only(answer: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """The fields that are wanted. `a/b`: field b of field a; those that do not exist are left out."""
    out: dict[str, Any] = {}
    for path in wanted:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name, _only) if isinstance(value, dict) else _only
        if value is not _only:
            out[path] = value
    return out


def generation_settings(
    engine: Engine, generation: GenerationRequest | None, body: schemas.Native | None, defaults: Sampling | None = None
) -> dict[str, Any]:
    """llama-server's generation_settings: the sampling, and what else a request asks for."""
    sampling = generation.sampling if generation else defaults
    assert sampling is not None
    ignored = engine.backend.vocabulary.eog_tokens if generation and generation.ignore_eos else ()
    bias = {**sampling.logit_bias, **dict.fromkeys(ignored, float("-inf"))}
    n_predict = generation.max_tokens if generation else -1
    names = {f.name: _SETTINGS.get(f.name, f.name) for f in fields(sampling)}
    return {
        **{given: getattr(sampling, name) for name, given in names.items() if given},
        "seed": sampling.seed & 0xFFFFFFFF,
        "logit_bias": [{"token": t, "bias": b if b > float("-inf") else None} for t, b in bias.items()],
        "grammar": sampling.grammar or "",
        "max_tokens": n_predict,
        "n_predict": n_predict,
        "n_keep": engine.n_keep,
        "n_discard": 0,
        "ignore_eos": bool(ignored),
        "stop": list(generation.stop) if generation else [],
        "stream": bool(body and body.stream),
        "n_probs": generation.top_logprobs if generation else 0,
        "timings_per_token": bool(generation and generation.gauges),
        "post_sampling_probs": bool(body and body.post_sampling_probs),
        "lora": [],
    }
