// Requests, as clients send them: messages, tools, schemas, grammars, options. The first byte chooses the template.
#include "chat.h"

void fuzz_seeds() {
    const char * bodies[] = {
        R"(2{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "enable_thinking": true, "thinking_budget_tokens": 5, "reasoning_format": "deepseek", "reasoning_effort": "low"})",
        R"(2{"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": null, "tool_calls":
            [{"id": "a1", "type": "function", "function": {"name": "get", "arguments": "{\"where\": \"x\"}"}}]},
            {"role": "tool", "tool_call_id": "a1", "content": "sun"}], "tool_choice": "required", "parallel_tool_calls": true,
            "tools": [{"type": "function", "function": {"name": "get", "description": "d", "parameters": {"type": "object",
            "properties": {"where": {"type": "string", "enum": ["x", "y"]}, "n": {"type": "integer", "minimum": 3}},
            "required": ["where"]}}}]})",
        R"(1{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "continue_final_message": true})",
        R"(0{"messages": [{"role": "user", "content": "JSON", "recalled": {"text": "I am Bob", "role": "user"}}],
            "json_schema": {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}}},
            "$defs": {"b": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-c]{2,3}$"}]}}}})",
        R"(1{"messages": [{"role": "user", "content": "G"}], "grammar": "root ::= \"a\" [b-d]+ | root2\nroot2 ::= \"x\"{2,3}",
            "chat_template_kwargs": {"enable_thinking": false, "x": [1]}})",
    };
    fuzz_seed_each("request", bodies);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    if (size > 0) {
        fuzz_request(fuzz_chat(data[0] - '0'), { (const char *) data + 1, size - 1 }, "<think>a</think>{\"a\": [1]}");
    }
    return 0;
}
