"""From a validated body to a generation request; every limit is checked here."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edge_stream.chat.sandbox import DeadlineError, within
from edge_stream.errors import EdgeStreamError
from edge_stream.sampling import NUMBERS, Sampling, check_sampling, samplers_of, schema_grammar
from edge_stream.server import errors
from edge_stream.server.history.prefix_matching import History, chat_history, root_key
from edge_stream.server.history.tools import ToolParser, call_schema, forcing_grammar, format_of
from edge_stream.server.http.grammar_check import check_ambiguity
from edge_stream.server.http.schemas import ChatRequest, CompletionRequest, NamedTool, _Generation
from edge_stream.server.scheduling.tasks import GenerationRequest
from edge_stream.server.settings import Limits, Settings

if TYPE_CHECKING:
    from edge_stream.engine import Engine

_SECONDS = 2.0  # for turning a schema into a grammar
_REPEATS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


class RequestBuilder:
    """Makes generation requests, on any thread, since no stream is touched. Raises ApiError 400."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.tool_format = format_of(engine.chat_template or "")

    def from_chat(self, request: ChatRequest, name: str | None) -> GenerationRequest:
        """A turn of a chat."""
        limits = self.settings.limits
        messages = [m.model_dump(exclude_none=True) for m in request.messages]
        tools = [t.model_dump(exclude_none=True) for t in request.tools or ()]
        if len(tools) > limits.tools:
            raise errors.invalid(f"{len(tools)} tools are more than the {limits.tools} that are allowed")
        sampling = self._sampling(request)
        parser = None
        if tools and request.tool_choice != "none":
            if self.tool_format is None:
                raise errors.invalid("this model's chat template defines no tool calls: send no tools")
            parser = ToolParser(self.tool_format, [t["function"]["name"] for t in tools])
            sampling = self._force_tools(sampling, tools, request)
        elif request.tool_choice is not None and request.tool_choice not in ("none", "auto"):
            raise errors.invalid("tool_choice requires a call, but there are no tools")
        variables = {"tools": tools} if parser else {}
        history = chat_history(messages, variables)
        if not history.units:
            raise errors.invalid("there is nothing to answer: messages has system messages only")
        max_tokens = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
        return GenerationRequest(
            history=history,
            logprobs=bool(request.logprobs),
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else 0,
            name=self._name(name),
            tools=parser,
            **self._common(request, sampling, max_tokens),
        )

    def from_text(self, request: CompletionRequest, name: str | None) -> list[GenerationRequest]:
        """One request for each prompt."""
        if request.suffix:
            raise errors.invalid("suffix is not supported: text is only continued at its end")
        prompts = self._prompts(request.prompt)
        if len(prompts) > self.settings.limits.n:
            raise errors.invalid(f"{len(prompts)} prompts are more than the {self.settings.limits.n} that are allowed")
        common = self._common(request, self._sampling(request), request.max_tokens)
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
        if isinstance(prompt, str):
            prompts: list[str | list[int]] = [prompt]
        elif prompt and isinstance(prompt[0], int):
            prompts = [prompt]
        else:
            prompts = list(prompt)
        for one in prompts:
            if isinstance(one, list) and any(token >= self.engine.n_vocab for token in one):
                raise errors.invalid(f"a prompt holds a token outside the vocabulary of {self.engine.n_vocab}")
        if not prompts or not all(prompts):
            raise errors.invalid("the prompt is empty")
        return prompts

    @staticmethod
    def _text_history(prompt: str | list[int]) -> History:
        if isinstance(prompt, str):
            return History(root_key("text"), text=prompt.encode("utf-8", errors="surrogatepass"))
        return History(root_key("tokens"), variables={"tokens": True}, text=array("i", prompt).tobytes())

    def _name(self, name: str | None) -> str | None:
        if name is not None and not 1 <= len(name) <= 128:
            raise errors.invalid("the conversation's name must have 1 to 128 characters")
        return name

    def _common(self, request: _Generation, sampling: Sampling, max_tokens: int | None) -> dict[str, Any]:
        limits = self.settings.limits
        if request.n > limits.n:
            raise errors.invalid(f"n = {request.n} is more than the {limits.n} that are allowed")
        # refuses a grammar that cannot be parsed, a token that does not exist
        check_sampling(self.engine.backend.vocabulary, sampling, self.engine.n_ctx)
        return {
            "sampling": sampling,
            "max_tokens": self.settings.n_predict if max_tokens is None else max_tokens,
            "stop": self._stop(request.stop, limits),
            "n": request.n,
            "ignore_eos": bool(request.ignore_eos),
            "loop_guard": self.settings.loop_guard if request.loop_guard is None else request.loop_guard,
            "gauges": request.timings_per_token,
        }

    @staticmethod
    def _stop(stop: str | list[str] | None, limits: Limits) -> tuple[str, ...]:
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        if len(stops) > limits.stop_count:
            raise errors.invalid(f"{len(stops)} stop strings are more than the {limits.stop_count} that are allowed")
        if any(len(s) > limits.stop_characters for s in stops):
            raise errors.invalid(f"a stop string is longer than {limits.stop_characters} characters")
        return tuple(s for s in stops if s)

    def _sampling(self, request: _Generation) -> Sampling:
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
        if grammar and schema is not None:
            raise errors.invalid("give a grammar or a response_format, not both")
        if schema is not None:
            grammar = self._grammar_of(schema)
        if grammar:
            self._check_grammar(grammar)
            changes["grammar"], changes["json_schema"] = grammar, None
        return replace(given, **changes)

    def _logit_bias(self, bias: Mapping[str, float]) -> dict[int, float]:
        if len(bias) > self.settings.limits.logit_bias:
            raise errors.invalid(f"logit_bias has more than {self.settings.limits.logit_bias} items")
        out: dict[int, float] = {}
        for key, value in bias.items():
            if not (key.isascii() and key.isdigit() and int(key) < self.engine.n_vocab):
                raise errors.invalid(f"logit_bias: {key[:32]!r} is not a token of the vocabulary")
            out[int(key)] = value if value > -100 else float("-inf")
        return out

    def _schema(self, request: _Generation) -> Mapping[str, Any] | None:
        wanted = request.response_format
        if wanted is None or wanted.type == "text":
            return None
        if wanted.type == "json_object":
            return {"type": "object"}
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise errors.invalid("response_format json_schema needs json_schema.schema")
        return wanted.json_schema.schema_

    def _grammar_of(self, schema: Mapping[str, Any]) -> str:
        """GBNF of a schema, within limits of size, repeats and time."""
        limits = self.settings.limits
        text = json.dumps(schema)
        if len(text) > limits.schema_bytes:
            raise errors.invalid(f"the JSON schema is larger than {limits.schema_bytes} bytes")
        stack: list[Any] = [schema]
        while stack:
            item = stack.pop()
            if isinstance(item, dict):
                for name in _REPEATS:
                    value = item.get(name)
                    if isinstance(value, (int, float)) and not -1 < value <= limits.schema_repeats:
                        raise errors.invalid(f"the JSON schema's {name} is not between 0 and {limits.schema_repeats}")
                stack += item.values()
            elif isinstance(item, list):
                stack += item
        try:
            return within(_SECONDS, lambda: schema_grammar(schema))
        except DeadlineError:
            raise errors.invalid("the JSON schema is too complicated") from None
        except EdgeStreamError as error:
            raise errors.invalid(str(error)) from error

    def _check_grammar(self, grammar: str) -> None:
        limits = self.settings.limits
        if len(grammar.encode("utf-8", errors="surrogatepass")) > limits.grammar_bytes:
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

    def _force_tools(self, sampling: Sampling, tools: list[dict[str, Any]], request: ChatRequest) -> Sampling:
        choice = request.tool_choice
        if choice is None or choice == "auto":
            return sampling
        if sampling.grammar:
            raise errors.invalid("a tool call cannot be required together with a grammar or a response_format")
        if isinstance(choice, NamedTool):
            tools = [t for t in tools if t["function"]["name"] == choice.function.name]
            if not tools:
                raise errors.invalid(f"tool_choice names no tool that was sent: {choice.function.name[:64]!r}")
        assert self.tool_format is not None
        grammar = self._grammar_of(call_schema(tools, self.tool_format))
        try:
            grammar = forcing_grammar(grammar, self.tool_format)
        except EdgeStreamError as error:
            raise errors.invalid(str(error)) from error
        self._check_grammar(grammar)
        return replace(sampling, grammar=grammar, json_schema=None)
