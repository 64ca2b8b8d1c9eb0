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

es_chat_parser::es_chat_parser(const es_chat_request & request, const char * before)
    : n_call_id_(request.chat.n_call_id), is_parsed_(request.is_parsed()) {
    params_                  = common_chat_parser_params(request.params);
    params_.reasoning_format = request.inputs.reasoning_format;
    params_.parse_tool_calls = !request.inputs.tools.empty();
    params_.is_continuation  = request.is_continued();
    if (is_parsed_) {
        if (!request.params.parser.empty()) {
            params_.parser.load(request.params.parser);
        }
        if (*before || request.is_continued()) { // what the client wrote of it is not said again
            text_   = before;
            message_ = parse(true);
        }
    }
}

common_chat_msg es_chat_parser::parse(bool is_partial) {
    common_chat_msg m = common_chat_parse(text_, is_partial, params_);
    m.set_tool_call_ids(ids_, [&] { return n_call_id_ ? random_text(n_call_id_) : "call_" + random_text(24); });
    return m;
}

std::vector<common_chat_msg_diff> es_chat_parser::push(const std::string & bytes, bool is_last) {
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
    if (!is_last && n_new_ < text_.size() / n_every_token) {
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
