"""From a validated body to a generation request; every limit is checked here."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.sampling import NUMBERS, Sampling, check_sampling, samplers_of, schema_grammar
from edge_stream.server import errors
from edge_stream.server.history.prefix_matching import History, root_key
from edge_stream.server.history.rendering import Renderer, newest_messages
from edge_stream.server.http import infill
from edge_stream.server.http.grammar_check import check_ambiguity
from edge_stream.server.http.schemas import (
    AdapterScale,
    ChatRequest,
    CompletionRequest,
    Generation,
    NamedTool,
    PromptObject,
)
from edge_stream.server.scheduling.tasks import GenerationRequest
from edge_stream.server.settings import Limits, Settings

if TYPE_CHECKING:
    from edge_stream.engine import Engine

# for the core as they are
_PASSED_ON = (
    "parallel_tool_calls",
    "enable_thinking",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
)


def adapter_scales(engine: Engine, given: Sequence[AdapterScale]) -> list[float]:
    """A scale for every adapter; 0 for those that are not given, as in llama-server. Raises ApiError 400."""
    scales = [0.0] * len(engine.backend.options.lora)
    for one in given:
        if one.id >= len(scales):
            raise errors.invalid(f"there is no adapter {one.id}: serve --lora FILE,... loads them")
        scales[one.id] = one.scale
    return scales


class RequestBuilder:
    """Makes generation requests, on any thread, since no stream is touched. Raises ApiError 400."""

    def __init__(self, engine: Engine, settings: Settings, renderer: Renderer) -> None:
        self.engine, self.settings = engine, settings
        self.core, self._histories = renderer.core, renderer.histories

    def template_capabilities(self) -> dict[str, bool]:
        """What the chat template can do, by llama-server's names."""
        return {**self.core.info["caps"], "supports_tools": self.core.info["supports_tools"]}

    def from_chat(self, request: ChatRequest, name: str | None) -> GenerationRequest:
        """A turn of a chat."""
        history = self.chat_history(request)
        assert history.request is not None
        sampling = self._sampling(request)
        if history.request.sampling:
            sampling = replace(sampling, chat=history.request.sampling, grammar=None, json_schema=None)
        limits_given = (request.n_predict, request.max_tokens, request.max_completion_tokens)
        max_tokens = next((n for n in limits_given if n is not None), None)
        common = self._common(request, sampling, max_tokens)
        return GenerationRequest(
            history=history,
            logprobs=bool(request.logprobs),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else 0,
            name=self._name(name),
            **common | {"stop": (*common["stop"], *history.request.stop)},
        )

    def chat_history(self, request: ChatRequest) -> History:
        """A chat as the core sees it."""
        limits, chat = self.settings.limits, self.settings.chat
        tools = [t.model_dump(exclude_none=True) for t in request.tools or ()]
        if len(tools) > limits.tools:
            raise errors.invalid(f"{len(tools)} tools are more than the {limits.tools} that are allowed")
        for tool in tools:
            self._check_schema(tool["function"].get("parameters") or {})
        choice = request.tool_choice
        if not tools and choice not in (None, "none", "auto"):
            raise errors.invalid("tool_choice requires a call, but there are no tools")
        schema = self._schema(request)
        if schema is not None:
            self._check_schema(schema)
        variables: dict[str, Any] = {
            "chat_template_kwargs": {**chat.variables, **(request.chat_template_kwargs or {})} or None,
            "reasoning_format": request.reasoning_format or chat.reasoning_format,
            "reasoning_budget_tokens": chat.reasoning_budget,
            "reasoning_budget_message": chat.reasoning_budget_message or None,
            "tools": tools or None,
            "tool_choice": choice.model_dump() if isinstance(choice, NamedTool) else choice,
            "json_schema": schema,
            "grammar": request.grammar,
        }
        variables |= {name: getattr(request, name) for name in _PASSED_ON}
        if request.thinking_budget_tokens is not None:
            variables["reasoning_budget_tokens"] = request.thinking_budget_tokens
        history = self._histories.history(
            request.messages, {name: value for name, value in variables.items() if value is not None}
        )
        try:
            body, n_skipped = newest_messages(history, self.engine.n_ctx)
            return replace(history, request=self.core.request(body), n_skipped=n_skipped)
        except EdgeStreamError as error:
            raise errors.invalid(str(error)) from error

    def from_text(self, request: CompletionRequest, name: str | None) -> list[GenerationRequest]:
        """One request for each prompt."""
        prompts = self._prompts(request.prompt)
        if request.suffix:
            try:
                prompts = [infill.prompt(self.engine, prompt, request.suffix) for prompt in prompts]
            except errors.ApiError as error:
                raise errors.invalid(f"suffix is not supported: {error.message}") from None
        if len(prompts) > self.settings.limits.n:
            raise errors.invalid(f"{len(prompts)} prompts are more than the {self.settings.limits.n} that are allowed")
        max_tokens = request.max_tokens if request.n_predict is None else request.n_predict
        common = self._common(request, self._sampling(request), max_tokens)
        score = request.logprobs if request.echo else None
        if score is not None:  # all of the prompt must be read, and nobody goes on from it
            common |= {"score": score, "reuse": False, "keep": False}
            name = None
        return [
            GenerationRequest(
                history=self._text_history(prompt),
                logprobs=request.logprobs is not None,
                top_logprobs=request.logprobs or 0,
                name=self._name(name),
                **common,
            )
            for prompt in prompts
        ]

    def _prompts(self, prompt: Any) -> list[str | list[int]]:
        is_one = not isinstance(prompt, list) or any(isinstance(part, int) for part in prompt)
        prompts = [self._one_prompt(one) for one in ([prompt] if is_one else prompt)]
        if not prompts or not all(prompts):
            raise errors.invalid("the prompt is empty")
        return prompts

    def _one_prompt(self, prompt: Any) -> str | list[int]:
        """A text, or tokens out of tokens and texts."""
        if isinstance(prompt, PromptObject):
            if prompt.multimodal_data:
                raise errors.invalid("multimodal_data is not supported: only text can be read")
            prompt = prompt.prompt_string
        return prompt if isinstance(prompt, str) else self.mixed_tokens(prompt, is_prompt=True)

    def mixed_tokens(self, parts: str | list[Any], *, is_prompt: bool = False) -> list[int]:
        """Tokens of a text, or of a list of tokens and texts. is_prompt: a text at its start gets BOS."""
        tokens: list[int] = []
        for i, part in enumerate([parts] if isinstance(parts, str) else parts):
            if isinstance(part, str):
                add_bos = is_prompt and i == 0 and self.engine.add_bos
                tokens += self.engine.tokenize(part, add_bos=add_bos, special=is_prompt)
            elif isinstance(part, int):
                tokens.append(part)
            else:
                raise errors.invalid("prompt: a list with tokens in it may hold tokens and texts only")
        if any(token >= self.engine.n_vocab for token in tokens):
            raise errors.invalid(f"a prompt holds a token outside the vocabulary of {self.engine.n_vocab}")
        return tokens

    @staticmethod
    def _text_history(prompt: str | list[int]) -> History:
        if isinstance(prompt, str):
            return History(root_key("text"), text=prompt.encode("utf-8", errors="surrogatepass"))
        return History(root_key("tokens"), is_tokens=True, text=array("i", prompt).tobytes())

    def _name(self, name: str | None) -> str | None:
        if name is not None and not 1 <= len(name) <= 128:
            raise errors.invalid("the conversation's name must have 1 to 128 characters")
        return name

    def _common(self, request: Generation, sampling: Sampling, max_tokens: int | None) -> dict[str, Any]:
        limits = self.settings.limits
        if request.n > limits.n:
            raise errors.invalid(f"n = {request.n} is more than the {limits.n} that are allowed")
        if request.id_slot >= self.engine.n_parallel:
            raise errors.invalid(f"id_slot = {request.id_slot} is not one of the {self.engine.n_parallel} slots")
        adapters = [scale for _, scale in self.engine.backend.options.lora]
        if request.lora and adapter_scales(self.engine, request.lora) != adapters:
            raise errors.invalid(
                "lora: adapters have one scale for all conversations, which POST /lora-adapters changes"
            )
        stop = (*self._stop(request.stop, limits), *self.settings.stop)
        # refuses a grammar that cannot be parsed, a token that does not exist
        check_sampling(self.engine.backend.vocabulary, sampling, self.engine.n_ctx)
        return {
            "sampling": sampling,
            "max_tokens": self.settings.n_predict if max_tokens is None else max_tokens,
            "stop": stop,
            "stop_pieces": self._stop_pieces(stop),
            "n": request.n,
            "ignore_eos": request.ignore_eos or self.settings.ignore_eos,
            "loop_guard": self.settings.loop_guard if request.loop_guard is None else request.loop_guard,
            "gauges": request.timings_per_token,
            "progress": request.return_progress and request.stream,
            "slot": request.id_slot if request.id_slot >= 0 else None,
            "reuse": request.cache_prompt,
            "n_indent": request.n_indent,
            "max_ms": max(0, request.t_max_predict_ms),
        }

    def _stop_pieces(self, stops: tuple[str, ...]) -> dict[int, bytes]:
        """The text of control tokens, which is else not looked at, where stop strings name them."""
        engine = self.engine
        tokens = {token for stop in stops for token in engine.tokenize(stop, special=True)}
        return {t: engine.token_to_piece(t, special=True) for t in tokens if not engine.token_to_piece(t)}

    @staticmethod
    def _stop(stop: str | list[str] | None, limits: Limits) -> tuple[str, ...]:
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        if len(stops) > limits.stop_count:
            raise errors.invalid(f"{len(stops)} stop strings are more than the {limits.stop_count} that are allowed")
        if any(len(s) > limits.stop_characters for s in stops):
            raise errors.invalid(f"a stop string is longer than {limits.stop_characters} characters")
        return tuple(s for s in stops if s)

    def _sampling(self, request: Generation) -> Sampling:
        given = self.settings.sampling
        fields = {name: "temperature" if name == "temp" else name for name in (*NUMBERS, "dry_sequence_breakers")}
        changes = {name: value for name, field in fields.items() if (value := getattr(request, field)) is not None}
        if changes.get("dry_base", 1.0) < 1.0:  # as llama-server has it
            changes["dry_base"] = given.dry_base
        if "mirostat" in changes:
            changes["mirostat"] = min(max(changes["mirostat"], 0), 2)
        order = request.samplers
        if order is not None:
            changes["samplers"] = samplers_of(order) if isinstance(order, str) else tuple(order)
        if request.seed is not None:
            # 2^32 - 1 would draw a random one
            changes["seed"] = request.seed if request.seed < 0 else request.seed % (2**32 - 1)
        if request.logit_bias:
            changes["logit_bias"] = self._logit_bias(request.logit_bias)
        grammar = request.grammar
        schema = self._schema(request)
        if grammar is not None and schema is not None:
            raise errors.invalid("give a grammar or a JSON schema, not both")
        if grammar is not None:
            if not grammar.strip():
                raise errors.invalid("the grammar is empty")
            self._check_grammar(grammar)
        elif schema is not None and not isinstance(request, ChatRequest):
            self._check_schema(schema)
            grammar = schema_grammar(schema)
        if grammar:
            changes["grammar"], changes["json_schema"] = grammar, None
        return replace(given, **changes)

    def _logit_bias(self, bias: Mapping[str, float] | list[tuple[int | str, float]]) -> dict[int, float]:
        """By token. A text, or a key that is no number, stands for each of its tokens; false and -100 for never."""
        if len(bias) > self.settings.limits.logit_bias:
            raise errors.invalid(f"logit_bias has more than {self.settings.limits.logit_bias} items")
        out: dict[int, float] = {}
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        for key, value in pairs:
            is_token = isinstance(key, int) or (isinstance(bias, Mapping) and key.isascii() and key.isdigit())
            tokens = [int(key)] if is_token else self.engine.tokenize(str(key))
            for token in tokens:
                if token >= self.engine.n_vocab:
                    raise errors.invalid(f"logit_bias: {token} is not a token of the vocabulary")
                out[token] = float("-inf") if value is False or value <= -100 else value
        return out

    def _schema(self, request: Generation) -> Mapping[str, Any] | None:
        wanted = request.response_format
        if request.json_schema is not None:
            if wanted is not None and wanted.type != "text":
                raise errors.invalid("give a json_schema or a response_format, not both")
            return request.json_schema or {"type": "object"}
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return wanted.schema_ or {"type": "object"}
        schema = wanted.json_schema.schema_ if wanted.json_schema else wanted.schema_
        if schema is None:
            raise errors.invalid("response_format json_schema needs json_schema.schema")
        return schema

    def _check_schema(self, schema: Mapping[str, Any]) -> None:
        """Size of a schema; the core refuses what it cannot express."""
        limits = self.settings.limits
        if len(json.dumps(schema)) > limits.schema_bytes:
            raise errors.invalid(f"the JSON schema is larger than {limits.schema_bytes} bytes")

    def _check_grammar(self, grammar: str) -> None:
        limits = self.settings.limits
        if len(grammar.encode()) > limits.grammar_bytes:  # UnicodeEncodeError is refused too
            raise errors.invalid(f"the grammar is larger than {limits.grammar_bytes} bytes")
        if "\0" in grammar:
            raise errors.invalid("the grammar holds a null character")
        depth = deepest = 0
        for character in grammar:
            depth += (character == "(") - (character == ")")
            deepest = max(deepest, depth)
        # the schema converter writes a bracket for every repeat
        if deepest > limits.json_depth + limits.schema_repeats:
            raise errors.invalid(f"the grammar's brackets are deeper than {limits.json_depth + limits.schema_repeats}")
        check_ambiguity(grammar)
