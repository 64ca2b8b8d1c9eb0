// A conversation, and how it shall be answered: rendered as a whole, in parts, and what the answer needs.
#pragma once

#include "template.h"

#include <map>
#include <string>
#include <utility>
#include <vector>

struct es_chat_request {
    const es_chat &              chat;
    common_chat_templates_inputs inputs;              // with all messages
    common_chat_params           params;              // of the newest ones: grammar, parser, stops, tags
    size_t                       n_system        = 0; // messages of the system prompt, which come first
    int                          thinking_budget = -1;
    std::string                  thinking_message;
    std::string                  own_grammar;      // the client's, for all of the answer
    bool                         one_call = false; // not several calls in one answer
    std::string                  result;           // what the last call returned

    explicit es_chat_request(const es_chat & c) : chat(c) {}

    // These set es_last_error.
    int32_t init(const char * json);

    // What follows may throw, and runs the template: see es_with_template.

    size_t n_messages() const { return inputs.messages.size(); }
    bool   is_answer(size_t i) const { return inputs.messages[i].role == "assistant"; }
    bool   is_continued() const { return inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE; }
    size_t n_input() const; // bytes of messages, tools and template

    // The system prompt and messages first..last as the template renders them, with the start of an answer or without.
    // What it renders for a message does not depend on messages more than a few turns before it: see first_near.
    const std::string & text(size_t first, size_t last, bool open);
    size_t              first_near(size_t n_known) const;
    std::string         head();

    bool        is_generic() const; // tools, and a template that knows none: see generic_tools.h
    bool        has_calls() const;
    bool        is_parsed() const;
    std::string grammar() const; // of the answer; empty: none
    common_json info() const;

private:
    void               read(const common_json & body);
    common_chat_params find_params();
    common_chat_params render(size_t first, size_t last, bool open, bool with_format) const;

    std::map<std::pair<std::pair<size_t, size_t>, bool>, std::string> texts_;
};

// "keep", "pieces", "start", "head", "dropped", "note": see es_chat_plan.
common_json es_plan_anew(es_chat_request & request, size_t n_ctx);
// What follows the last place is kept as well, as far as it is what the request has there.
common_json es_plan_on(es_chat_request & request, const std::vector<std::pair<size_t, size_t>> & places,
                       const llama_token * tokens, size_t n_tokens);

// A JSON schema as GBNF; without any word: an object. Throws std::invalid_argument.
std::string es_schema_grammar(common_json schema);
