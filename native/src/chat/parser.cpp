// An answer, split into content, thinking and tool calls while it is written.
#include "parser.h"

#include "error.h"
#include "utf8.h"

#include <random>

namespace {

// The whole answer is parsed each time; from here on less often, so that a token's cost stays bounded.
constexpr size_t n_every_token = 8192; // bytes

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
        const common_chat_tool_call & c    = diff.tool_call_delta;
        common_json                   call = { { "index", diff.tool_call_index } };
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
    : n_call_id_(request.chat.n_call_id), is_parsed_(request.is_parsed()) {
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
        if (*before || request.is_continued()) { // what the client wrote of it is not said again
            text_    = before;
            message_ = parse(true);
        }
    }
}

common_chat_msg es_chat_parser::parse(bool is_partial) {
    common_chat_msg m = common_chat_parse(text_, is_partial, params_);
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
        common_chat_msg m     = parse(!is_last);
        auto            diffs = common_chat_msg_diff::compute_diffs(message_, m);
        message_              = std::move(m);
        return diffs;
    } catch (const std::exception &) {
        // it does not follow its format; while it is written, what comes next may mend it
        if (!is_last) {
            return {};
        }
        common_chat_msg_diff diff;
        const std::string    said = message_.reasoning_content + message_.content;
        const size_t         from = message_.tool_calls.empty() ? said.size() : text_.size();
        diff.content_delta        = text_.substr(std::min(from, text_.size()));
        message_.content += diff.content_delta;
        return { diff };
    }
}
