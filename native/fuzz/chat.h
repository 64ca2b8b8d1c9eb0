// Everything that is asked of a request, and an answer's parser with given bytes.
#pragma once

#include "fuzz.h"

#include <cassert>
#include <string>

inline void fuzz_sampler(const es_sampler_params & p) {
    es_sampler * s = nullptr;
    if (es_sampler_init(fuzz_model(), p, &s) == ES_OK) {
        es_sampler_free(s);
    }
}

inline void fuzz_rules(const char * json) {
    // the "sampling" of the request's info, if it has one
    const std::string info  = json;
    const size_t      start = info.find("\"sampling\":\"");
    if (start == std::string::npos) {
        return;
    }
    std::string text;
    for (size_t i = start + 12; i < info.size() && info[i] != '"'; ++i) {
        if (info[i] == '\\' && i + 1 < info.size()) {
            ++i;
            if (info[i] == 'n') {
                text += '\n';
            } else if (info[i] == 'u') {
                return; // not worth a parser
            } else {
                text += info[i];
            }
        } else {
            text += info[i];
        }
    }
    es_sampler_params p = es_sampler_default_params();
    p.chat              = text.c_str();
    fuzz_sampler(p);
}

inline void fuzz_answer(es_chat_request * request, const std::string & answer) {
    const char *     out    = nullptr;
    es_chat_parser * parser = nullptr;
    if (es_chat_parser_init(request, "", &parser) == ES_OK) {
        for (size_t i = 0; i < answer.size(); i += 7) {
            const std::string part = answer.substr(i, 7);
            if (es_chat_parser_push(parser, part.data(), part.size(), i + 7 >= answer.size(), &out) != ES_OK) {
                break;
            }
        }
        (void) es_chat_parser_message(parser, &out);
        es_chat_parser_free(parser);
    }
}

inline void fuzz_request(const es_chat * chat, const std::string & json, const std::string & answer) {
    es_chat_request * request = nullptr;
    if (es_chat_request_init(chat, json.c_str(), &request) != ES_OK) {
        return;
    }
    const char * out = nullptr;
    (void) es_chat_request_prompt(request, &out);
    (void) es_chat_request_head(request, &out);
    (void) es_chat_plan(request, nullptr, 0, nullptr, 0, 64, &out);
    const int32_t       tokens[] = { 1, 70, 71, 72, 73, 74, 75, 76 };
    const es_chat_place places[] = { { 1, 4 } };
    (void) es_chat_plan(request, places, 1, tokens, 8, 64, &out);
    if (es_chat_request_info(request, &out) == ES_OK) {
        fuzz_rules(out);
    }
    fuzz_answer(request, answer);
    es_chat_request_free(request);
}

constexpr const char * fuzz_templates[] = {
    "chatml", // one of llama.cpp's own
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    // thinking and tools, as Qwen 3 and Hermes have them
    "{%- if tools %}<|im_start|>system\n<tools>{% for t in tools %}{{ t | tojson }}\n{% endfor %}</tools>\n"
    "For each call, return <tool_call>\n{\"name\": <name>, \"arguments\": <json>}\n</tool_call><|im_end|>\n{%- endif %}"
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{%- if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n{%- endif %}{{ m.content }}{%- if m.tool_calls %}{%- for c in m.tool_calls "
    "%}\n"
    "<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson "
    "}}}\n</tool_call>"
    "{%- endfor %}{%- endif %}<|im_end|>\n{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{%- if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{%- endif %}{%- endif %}",
};

inline const es_chat * fuzz_chat(size_t i) {
    static es_chat * chats[std::size(fuzz_templates)] = {};
    i %= std::size(fuzz_templates);
    if (!chats[i]) {
        assert(es_chat_init(fuzz_model(), fuzz_templates[i], &chats[i]) == ES_OK);
    }
    return chats[i];
}
