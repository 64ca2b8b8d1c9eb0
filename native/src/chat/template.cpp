#include "template.h"

#include "chat-auto-parser.h"
#include "error.h"
#include "es-template-budget.h"
#include "support.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

// The template's own words, without where in its source they were raised.
std::string reason(const std::string & what) {
    std::string text;
    for (const char * mark : { "Jinja Exception: ", "Error: " }) {
        const size_t at = what.rfind(mark);
        if (at != std::string::npos) {
            text = what.substr(at + std::string(mark).size());
            break;
        }
    }
    text = text.empty() ? what : text;
    while (!text.empty() && (text.back() == '\n' || text.back() == '.')) {
        text.pop_back();
    }
    return text;
}

bool is_builtin_name(const std::string & name) {
    std::vector<const char *> names((size_t) llama_chat_builtin_templates(nullptr, 0));
    llama_chat_builtin_templates(names.data(), names.size());
    return std::any_of(names.begin(), names.end(), [&](const char * known) { return name == known; });
}

// Whether common has a handler for this template, which may rewrite messages first.
bool is_special(const std::string & source) {
    autoparser::generation_params params;
    params.messages = common_json::array({ common_json{ { "role", "user" }, { "content", "Hello" } } });
    try {
        const common_chat_template parsed(source, "", "");
        return common_chat_try_specialized_template(parsed, source, params).has_value();
    } catch (const std::exception &) {
        return true;
    }
}

// Whether common can make and read calls of this template's.
bool knows_calls(const common_chat_templates * templates) {
    common_chat_templates_inputs inputs;
    inputs.messages.resize(1);
    inputs.messages[0].role    = "user";
    inputs.messages[0].content = "Hello";
    inputs.tools               = { { "look", "Looks.", R"({"type": "object", "properties": {}})" } };
    inputs.tool_choice         = COMMON_CHAT_TOOL_CHOICE_REQUIRED;
    try {
        return !common_chat_templates_apply(templates, inputs).grammar.empty();
    } catch (const std::exception &) {
        return false;
    }
}

} // namespace

int32_t es_with_template(size_t n_input, const std::function<void()> & f) {
    const char * subject = "the model's chat template";
    try {
        const es_template_budget_scope budget(n_input);
        f();
        return ES_OK;
    } catch (const es_template_stop & stop) {
        switch (stop.reason) {
        case es_template_stop::TIME:
            return es_fail(ES_ERR_INVALID, "%s was stopped: not done after %g seconds", subject, ES_TEMPLATE_SECONDS);
        case es_template_stop::DEPTH:
            return es_fail(ES_ERR_INVALID, "%s was stopped: it is nested too deeply", subject);
        default: return es_fail(ES_ERR_INVALID, "%s was stopped: it builds far more text than it was given", subject);
        }
    } catch (const std::bad_alloc &) {
        return es_fail(ES_ERR_MEMORY, "out of memory");
    } catch (const std::invalid_argument & e) { // of ours: a sentence about the request
        return es_fail(ES_ERR_INVALID, "%s", e.what());
    } catch (const std::exception & e) {
        return es_fail(ES_ERR_INVALID, "%s refuses the conversation: %s", subject, reason(e.what()).c_str());
    }
}

int32_t es_chat::init(const llama_model * model, const char * chat_template) {
    vocab                    = llama_model_get_vocab(model);
    add_bos                  = llama_vocab_get_add_bos(vocab);
    const std::string wanted = chat_template ? chat_template : "";
    is_builtin               = wanted != "chatml" && is_builtin_name(wanted);
    const bool is_jinja      = wanted.find("{{") != std::string::npos || wanted.find("{%") != std::string::npos;
    if (!wanted.empty() && wanted != "chatml" && !is_builtin && !is_jinja) {
        return es_fail(ES_ERR_INVALID, "%s is neither a Jinja template nor the name of one of llama.cpp's",
                       wanted.substr(0, 64).c_str());
    }
    const char *  own = llama_model_chat_template(model, nullptr);
    const int32_t rc  = es_with_template(wanted.size() + (own ? strlen(own) : 0), [&] {
        templates = common_chat_templates_init(model, wanted);
        source    = common_chat_templates_source(templates.get());
        is_plain  = !is_builtin && !is_special(source);
        if (!is_builtin) {
            supports_tools = knows_calls(templates.get());
        }
    });
    if (rc != ES_OK) {
        return rc;
    }
    is_fallback = wanted.empty() && !common_chat_templates_was_explicit(templates.get());
    n_call_id   = source.find("[TOOL_CALLS]") != std::string::npos ? 9 : 0;

    const es_tokens word = tokenize("a");
    space_prefix         = !word.empty() && es_piece(vocab, word[0], true).substr(0, 1) == " ";

    const llama_token eos = llama_vocab_eos(vocab);
    eos_text              = eos >= 0 ? es_piece(vocab, eos, true) : "";

    common_json caps = common_json::object();
    for (const auto & [name, value] : common_chat_templates_get_caps(templates.get())) {
        caps[name] = value;
    }
    info = common_json{
        { "template", source }, { "is_fallback", is_fallback }, { "supports_tools", supports_tools }, { "caps", caps }
    }.dump_safe();
    return ES_OK;
}

es_tokens es_chat::tokenize(const std::string & text) const {
    es_tokens out(text.size() + 8);
    int32_t   n =
        llama_tokenize(vocab, text.data(), (int32_t) text.size(), out.data(), (int32_t) out.size(), false, true);
    if (n < 0) {
        out.resize((size_t) -n);
        n = llama_tokenize(vocab, text.data(), (int32_t) text.size(), out.data(), (int32_t) out.size(), false, true);
    }
    out.resize((size_t) std::max(n, 0));
    return out;
}

es_tokens es_chat::tokenize_within(const std::string & text) const {
    if (!space_prefix) {
        return tokenize(text);
    }
    es_tokens  tokens = tokenize("\n" + text); // no token of such tokenizers goes across a line end
    const auto is_end = [&](llama_token token) { return es_piece(vocab, token, true) == "\n"; };
    const auto end    = std::find_if(tokens.begin(), tokens.end(), is_end);
    tokens.erase(tokens.begin(), end == tokens.end() ? end : end + 1);
    return tokens;
}

bool es_chat::is_control(llama_token token) const {
    return llama_vocab_is_control(vocab, token) || llama_vocab_is_eog(vocab, token);
}

std::string es_chat::piece(const llama_token * tokens, size_t i) const {
    if (add_bos && tokens[i] == llama_vocab_bos(vocab)) {
        return ""; // templates leave it to the tokenizer
    }
    std::string text = es_piece(vocab, tokens[i], true);
    if (space_prefix && !text.empty() && text[0] == ' ' && (i == 0 || is_control(tokens[i - 1]))) {
        text.erase(0, 1);
    }
    return text;
}

std::string es_chat::text(const llama_token * tokens, size_t first, size_t last) const {
    std::string out;
    for (size_t i = first; i < last; ++i) {
        out += piece(tokens, i);
    }
    return out;
}
