// An answer, split into content, thinking and tool calls while it is written.
#include "parser.h"

#include "error.h"
#include "es-template-budget.h"
#include "utf8.h"

#include <random>

namespace {

// The whole answer is parsed each time; from here on less often, so that a token's cost stays bounded.
constexpr size_t n_every_token = 8192; // bytes
constexpr size_t n_tries       = 32;   // of a beginning that can be parsed

std::string random_text(size_t n) {
    static const char  letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789";
    std::random_device device;
    std::string        out;
    for (size_t i = 0; i < n; ++i) {
        out += letters[device() % (sizeof(letters) - 1)];
    }
    return out;
}

} // namespace

common_json es_delta_json(const std::vector<common_chat_msg_diff> & diffs) {
    std::string content, thinking;
    common_json calls = common_json::array();
    for (const common_chat_msg_diff & diff : diffs) {
        content += diff.content_delta;
        thinking += diff.reasoning_content_delta;
        if (diff.tool_call_index == std::string::npos) {
            continue;
        }
        const common_chat_tool_call & c        = diff.tool_call_delta;
        common_json                   call     = { { "index", diff.tool_call_index } };
        common_json                   function = common_json::object();
        if (!c.name.empty()) {
            call["id"]       = c.id;
            call["type"]     = "function";
            function["name"] = c.name;
        }
        function["arguments"] = c.arguments;
        call["function"]      = function;
        calls.push_back(call);
    }
    common_json out = common_json::object();
    if (!content.empty()) {
        out["content"] = content;
    }
    if (!thinking.empty()) {
        out["reasoning_content"] = thinking;
    }
    if (!calls.empty()) {
        out["tool_calls"] = calls;
    }
    return out;
}

common_json es_message_json(const common_chat_msg & m) {
    common_json out = { { "role", "assistant" }, { "content", m.content } };
    if (!m.reasoning_content.empty()) {
        out["reasoning_content"] = m.reasoning_content;
    }
    if (!m.tool_calls.empty()) {
        common_json calls = common_json::array();
        for (const common_chat_tool_call & c : m.tool_calls) {
            const common_json function = { { "name", c.name }, { "arguments", c.arguments } };
            calls.push_back({ { "id", c.id }, { "type", "function" }, { "function", function } });
        }
        out["tool_calls"] = calls;
    }
    return out;
}

es_chat_parser::es_chat_parser(const es_chat_request & request, const char * before)
    : n_call_id_(request.chat.n_call_id), is_parsed_(request.is_parsed()),
      is_plain_(request.chat.is_plain && !request.params.supports_thinking) {
    params_                  = common_chat_parser_params(request.params);
    params_.reasoning_format = request.inputs.reasoning_format;
    params_.parse_tool_calls = !request.inputs.tools.empty();
    params_.is_continuation  = request.is_continued();
    if (!is_parsed_) {
        message_.content = before;
    } else {
        if (!request.params.parser.empty()) {
            params_.parser.load(request.params.parser);
        }
        if (*before ||
            request.is_continued()) { // what is there of it is not said again; a continued one has it already
            text_    = request.is_continued() ? "" : before;
            message_ = parse(text_, true);
        }
    }
}

common_chat_msg es_chat_parser::parse(const std::string & text, bool is_partial) {
    common_chat_msg m;
    try { // what a model writes may be nested as deeply as it likes
        const es_template_budget_scope budget(text.size());
        m = common_chat_parse(text, is_partial, params_);
    } catch (const es_template_stop &) {
        throw std::runtime_error("the answer is nested too deeply");
    }
    m.set_tool_call_ids(ids_, [&] { return n_call_id_ ? random_text(n_call_id_) : "call_" + random_text(24); });
    return m;
}

std::vector<common_chat_msg_diff> es_chat_parser::push(const std::string & bytes, bool is_last, bool now) {
    held_ += bytes;
    const size_t n_whole = is_last ? held_.size() : es_utf8_complete(held_);
    std::string  added   = es_utf8_valid(held_.substr(0, n_whole));
    held_.erase(0, n_whole);
    text_ += added;
    n_new_ += added.size();
    if (!is_parsed_) {
        message_.content += added;
        common_chat_msg_diff diff;
        diff.content_delta = std::move(added);
        return { diff };
    }
    if (!is_last && !now && n_new_ < text_.size() / n_every_token) {
        return {};
    }
    n_new_ = 0;
    try {
        return changed(parse(text_, !is_last), is_last ? lost(text_) : "");
    } catch (const std::exception &) {
        // it does not follow its format; while it is written, what comes next may mend it
        return is_last ? broken() : std::vector<common_chat_msg_diff>();
    }
}

std::vector<common_chat_msg_diff> es_chat_parser::changed(common_chat_msg m, const std::string & more) {
    m.content += more;
    auto diffs = common_chat_msg_diff::compute_diffs(message_, m);
    message_   = std::move(m);
    return diffs;
}

// What was taken for the beginning of a call, and is text after all.
std::string es_chat_parser::lost(const std::string & text) {
    const common_chat_msg m = parse(text, false);
    const bool            is_text =
        m.tool_calls.empty() && m.reasoning_content.empty() && text.compare(0, m.content.size(), m.content) == 0;
    const std::string rest = is_text ? text.substr(m.content.size()) : "";
    return is_plain_ || rest.substr(0, 1) == "{" ? rest : "";
}

// The whole text, as content after the longest beginning with calls that follows the format.
std::vector<common_chat_msg_diff> es_chat_parser::broken() {
    size_t n = text_.size();
    for (size_t i = 0; i < n_tries && n > 0; ++i) {
        n = text_.find_last_of(">]}", n - 1);
        if (n == std::string::npos) {
            break;
        }
        try {
            common_chat_msg m = parse(text_.substr(0, n + 1), false);
            if (!m.tool_calls.empty()) {
                return changed(std::move(m), text_.substr(n + 1));
            }
        } catch (const std::exception &) {
            continue;
        }
    }
    common_chat_msg_diff diff;
    const size_t         n_said = message_.reasoning_content.size() + message_.content.size();
    diff.content_delta          = message_.tool_calls.empty() && n_said < text_.size() ? text_.substr(n_said) : "";
    message_.content += diff.content_delta;
    return { diff };
}
