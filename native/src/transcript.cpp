#include "transcript.h"

#include "error.h"
#include "utf8.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace {

using json = nlohmann::json;

constexpr int format = 1;
// The transcript is for the reader; the model's memory is the cache. It is bounded, as everything about a stream is.
constexpr size_t n_transcript_bytes = 1000000;

int32_t not_a_conversation(const char * path) {
    return es_fail(ES_ERR_FORMAT, "%s is a session, but not of a conversation", path);
}

bool is_conversation(const json & j) {
    const auto number = [&](const char * key) { return j.contains(key) && j[key].is_number_unsigned(); };
    if (!j.is_object() || !number("format") || !number("n_dropped") || !number("n_answer") || !j.contains("system") ||
        !(j["system"].is_null() || j["system"].is_string()) || !j.contains("messages") || !j["messages"].is_array() ||
        !j.contains("answer_start") || !j["answer_start"].is_array() || !j.contains("ended") ||
        !j["ended"].is_boolean()) {
        return false;
    }
    const auto text = [](const json & m, const char * key) { return m.contains(key) && m[key].is_string(); };
    return std::all_of(j["messages"].begin(), j["messages"].end(),
                       [&](const json & m) { return m.is_object() && text(m, "role") && text(m, "content"); }) &&
           std::all_of(j["answer_start"].begin(), j["answer_start"].end(),
                       [](const json & t) { return t.is_number_integer(); });
}

int32_t parse(const std::string & text, const char * path, json & out) {
    out = json::parse(text, nullptr, false);
    if (!is_conversation(out)) {
        return not_a_conversation(path);
    }
    if (out["format"].get<uint64_t>() > format) {
        return es_fail(ES_ERR_VERSION, "%s was written by a newer edge-stream", path);
    }
    return ES_OK;
}

} // namespace

void es_transcript::add(const char * role, const std::string & text) {
    messages_.push_back({ role, es_utf8_valid(text) });
    n_bytes_ += messages_.back().text.size();
}

void es_transcript::trim() {
    while (n_bytes_ > n_transcript_bytes && messages_.size() > 2) {
        n_bytes_ -= messages_.front().text.size();
        messages_.pop_front();
        n_dropped_++;
    }
}

es_transcript::message es_transcript::take_last() {
    message last = std::move(messages_.back());
    messages_.pop_back();
    n_bytes_ -= last.text.size();
    return last;
}

void es_transcript::clear() {
    messages_.clear();
    answer_start.clear();
    n_dropped_ = n_bytes_ = 0;
    n_answer              = 0;
    ended                 = false;
}

std::string es_transcript::to_json() const {
    json list = json::array();
    for (const message & m : messages_) {
        list.push_back({ { "role", m.role }, { "content", m.text } });
    }
    const json j = {
        { "format", format },
        { "system", system.empty() ? json() : json(system) },
        { "messages", std::move(list) },
        { "n_dropped", n_dropped_ },
        { "n_answer", n_answer },
        { "answer_start", answer_start },
        { "ended", ended },
    };
    return j.dump();
}

int32_t es_transcript::from_json(const std::string & text, const char * path) {
    json          j;
    const int32_t rc = parse(text, path, j);
    if (rc != ES_OK) {
        return rc;
    }
    clear();
    system = j["system"].is_null() ? "" : j["system"].get<std::string>();
    for (const json & m : j["messages"]) {
        add(m["role"].get<std::string>().c_str(), m["content"]);
    }
    n_dropped_   = j["n_dropped"];
    n_answer     = j["n_answer"];
    answer_start = j["answer_start"].get<es_tokens>();
    ended        = j["ended"];
    return ES_OK;
}

size_t es_transcript::count_messages(const std::string & text) {
    const json j = json::parse(text, nullptr, false);
    return is_conversation(j) ? j["messages"].size() : 0;
}
