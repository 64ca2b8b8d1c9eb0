#include "answer.h"

#include "utf8.h"

#include <algorithm>

namespace {

bool is_json(const std::string & text) {
    return !common_json::parse_no_throw(text).is_discarded();
}

// The number of bytes at the end of a text, from `first` on, with which one of the stops may begin.
size_t held_back(const std::string & text, size_t first, const std::vector<std::string> & stops) {
    size_t n = 0;
    for (const std::string & stop : stops) {
        for (size_t k = std::min(text.size() - first, stop.size() - 1); k > n; --k) {
            if (text.compare(text.size() - k, k, stop, 0, k) == 0) {
                n = k;
            }
        }
    }
    return n;
}

} // namespace

es_answer::es_answer(std::unique_ptr<es_chat_request> request, std::vector<std::string> stops,
                     const std::string & before, const es_stream_stats & stream)
    : request_(std::move(request)), parser_(std::make_unique<es_chat_parser>(*request_, before.c_str())),
      stops_(std::move(stops)), before_(before), raw_(before), n_said_(before.size()), n_seen_(stream.n_past),
      n_ends_(stream.n_ctx) {
    stops_.erase(std::remove(stops_.begin(), stops_.end(), std::string()), stops_.end());
}

std::vector<common_chat_msg_diff> es_answer::push(const std::string & bytes, int32_t how, int64_t n_past) {
    if (is_ended_) {
        return {};
    }
    const bool is_last = how == ES_ANSWER_WHOLE, is_cut = how == ES_ANSWER_CUT;
    part_ += bytes;
    const size_t n_whole = is_last ? part_.size() : es_utf8_complete(part_);
    raw_ += es_utf8_valid(part_.substr(0, n_whole));
    part_.erase(0, n_whole);
    if (part_.empty()) {
        n_past_ = n_past;
    }
    size_t end = std::string::npos;
    for (const std::string & stop : stops_) {
        end = std::min(end, raw_.find(stop, n_said_));
    }
    is_ended_        = is_last || end != std::string::npos;
    end              = std::min(end, raw_.size() - (is_ended_ || is_cut ? 0 : held_back(raw_, n_said_, stops_)));
    std::string said = raw_.substr(n_said_, end - n_said_);
    n_said_          = end;
    auto diffs       = parser_->push(said, is_ended_, is_cut);
    ends_.push_back(raw_.size());
    if (ends_.size() > n_ends_ + 1) {
        ends_.pop_front();
    }
    if (n_past < n_seen_ && is_last) {
        take_back((size_t) (n_seen_ + 1 - n_past));
    }
    n_seen_ = n_past;
    return diffs;
}

void es_answer::take_back(size_t n_tokens) {
    raw_.resize(n_tokens < ends_.size() ? ends_[ends_.size() - 1 - n_tokens] : before_.size());
    parser_ = std::make_unique<es_chat_parser>(*request_, "");
    parser_->push(raw_, true);
}

common_json es_answer::message() {
    if (is_ended_) {
        return es_message_json(parser_->message());
    }
    push("", ES_ANSWER_CUT, n_past_);
    common_chat_msg m = parser_->message();
    // a template reads calls' arguments
    m.tool_calls.erase(std::remove_if(m.tool_calls.begin(), m.tool_calls.end(),
                                      [](const common_chat_tool_call & call) { return !is_json(call.arguments); }),
                       m.tool_calls.end());
    return es_message_json(m);
}

common_json es_answer::info() const {
    common_json out = request_->info();
    if (!before_.empty() && !out.at("sampling").is_null()) { // rules go on after what was written
        common_json rules = common_json::parse(out.at("sampling"));
        rules["before"]   = rules.at("before").get<std::string>() + before_;
        out["sampling"]   = rules.dump();
    }
    return out;
}
