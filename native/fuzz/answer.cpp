// What a model writes, through the parsers of formats with thinking and tools; and conversations kept in sessions.
// The first byte chooses: the template, and which of the two it is.
#include "chat.h"

namespace {

constexpr const char * request =
    R"({"messages": [{"role": "user", "content": "Weather?"}], "reasoning_format": "auto", "tools": [{"type": "function",
        "function": {"name": "get", "parameters": {"type": "object", "properties": {"where": {"type": "string"}}}}}]})";

void kept(const std::string & json) {
    static es_stream * stream = [] {
        es_stream * made = nullptr;
        assert(es_stream_init(fuzz_context(), es_stream_default_params(), &made) == ES_OK);
        return made;
    }();
    es_conversation * c   = nullptr;
    const char *      out = nullptr;
    (void) es_stream_reset(stream);
    assert(es_conversation_init(fuzz_chat(2), stream, nullptr, &c) == ES_OK);
    if (es_conversation_from_json(c, json.c_str(), "it") == ES_OK) {
        (void) es_conversation_messages(c, &out);
        if (es_conversation_say(c, "[{\"role\": \"user\", \"content\": \"Hi\"}]", nullptr, nullptr, nullptr) == ES_OK) {
            (void) es_conversation_push(c, "Yes", 3, ES_ANSWER_WHOLE, &out);
            (void) es_conversation_end(c, ES_ANSWER_WHOLE);
        }
        (void) es_conversation_to_json(c, &out);
    }
    es_conversation_free(c);
}

} // namespace

void fuzz_seeds() {
    fuzz_seed(
        "call",
        "2<think>\nhm\n</think>\n<tool_call>\n{\"name\": \"get\", \"arguments\": {\"where\": \"x\"}}\n</tool_call>");
    fuzz_seed("text", "1Just \xc3\xa4 text with `code` and { braces }.");
    fuzz_seed("generic", "0{\"tool_calls\": [{\"name\": \"get\", \"arguments\": {\"where\": \"y\"}}]}");
    es_stream * stream = nullptr;
    assert(es_stream_init(fuzz_context(), es_stream_default_params(), &stream) == ES_OK);
    es_conversation * c = nullptr;
    assert(es_conversation_init(fuzz_chat(2), stream, "{\"system\": \"Be brief.\"}", &c) == ES_OK);
    const char * out = nullptr;
    assert(es_conversation_say(c, "[{\"role\": \"user\", \"content\": \"Hi\"}]", nullptr, nullptr, nullptr) == ES_OK);
    assert(es_conversation_push(c, "Hello", 5, ES_ANSWER_WHOLE, &out) == ES_OK);
    assert(es_conversation_end(c, ES_ANSWER_WHOLE) == ES_OK);
    assert(es_conversation_to_json(c, &out) == ES_OK);
    fuzz_seed("kept", std::string("z") + out);
    es_conversation_free(c);
    es_stream_free(stream);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    if (size == 0) {
        return 0;
    }
    const std::string rest((const char *) data + 1, size - 1);
    if (data[0] == 'z') {
        kept(rest);
    } else {
        static es_chat_request * requests[std::size(fuzz_templates)] = {};
        es_chat_request *&       made                                = requests[data[0] % std::size(fuzz_templates)];
        if (!made) {
            assert(es_chat_request_init(fuzz_chat(data[0]), request, &made) == ES_OK);
        }
        fuzz_answer(made, rest);
    }
    return 0;
}
