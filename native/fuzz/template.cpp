// Chat templates (Jinja), which come with downloaded files: found out about, and rendered with a conversation.
#include "chat.h"

namespace {

constexpr const char * request =
    R"({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "reasoning_content": "They greet."}, {"role": "user", "content": "Why?"}]})";
constexpr const char * with_tools =
    R"({"messages": [{"role": "user", "content": "Weather?"}], "tools": [{"type": "function", "function":
        {"name": "get", "parameters": {"type": "object", "properties": {"where": {"type": "string"}}}}}]})";

} // namespace

void fuzz_seeds() {
    fuzz_seed_each("template", fuzz_templates);
    fuzz_seed(
        "filters",
        "{{ bos_token }}{% set ns = namespace(a=0) %}{% macro f(x, y=2) %}{{ x * y }}{% endmacro %}"
        "{% for m in messages[1:] if m.role != 'x' %}{{ loop.index0 }}{{ m.content | trim | upper | "
        "replace('A', 'b') | default('') }}{{ m['content'].split(' ')[-1] }}{{ f(3) }}{% set ns.a = "
        "ns.a + 1 %}{% if loop.last %}{{ raise_exception('no') if false else '' }}{% endif %}{% endfor "
        "%}{{ strftime_now('%Y') }}{{ range(3) | list | join(',') }}{{ {'a': [1, 2.5, none]} | tojson(indent=2) }}");
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    const std::string source((const char *) data, size);
    es_chat *         chat = nullptr;
    if (es_chat_init(fuzz_model(), source.c_str(), &chat) == ES_OK) {
        fuzz_request(chat, request, "<think>yes</think>It is so.");
        fuzz_request(chat, with_tools,
                     "<tool_call>\n{\"name\": \"get\", \"arguments\": {\"where\": \"here\"}}\n</tool_call>");
    }
    es_chat_free(chat);
    return 0;
}
