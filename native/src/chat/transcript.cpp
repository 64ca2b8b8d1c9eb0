#include "transcript.h"

#include "error.h"

#include <algorithm>
#include <stdexcept>

namespace {

constexpr int64_t format = 2;
// The transcript is for display, and for reading again what the cache could hold. Like all of a stream it is bounded.
constexpr size_t n_transcript_bytes = 1000000;

std::string text_of(const common_json & m, const char * name) {
    if (!m.contains(name) || m.at(name).is_null()) {
        return "";
    }
    const common_json & value = m.at(name);
    if (!value.is_array()) {
        return value.get<std::string>();
    }
    std::string out;
    for (const common_json & part : value) { // content in parts
        out += (out.empty() ? "" : "\n") + part.value("text", "");
    }
    return out;
}

uint64_t number(const common_json & j, const char * name) {
    const int64_t n = j.at(name).get<int64_t>();
    if (!j.at(name).is_number_integer() || n < 0) {
        throw std::invalid_argument(name);
    }
    return (uint64_t) n;
}

} // namespace

es_transcript::message::message(const common_json & m)
    : json(m), role(text_of(m, "role")), text(text_of(m, "content")), thinking(text_of(m, "reasoning_content")) {
    if (role.empty()) {
        throw std::invalid_argument("a message must have a role");
    }
    if (m.contains("tool_calls") && m.at("tool_calls").is_array() && !m.at("tool_calls").empty()) {
        calls = m.at("tool_calls").dump_safe();
    }
}

void es_transcript::message::recall(const common_json & found) {
    json["recalled"] = found;
}

bool es_transcript::is_start(size_t i) const {
    return messages_[i].role == "user" && (i == 0 || messages_[i - 1].role == "assistant");
}

void es_transcript::add(message m) {
    n_bytes_ += m.n_bytes();
    messages_.push_back(std::move(m));
}

es_transcript::message es_transcript::take_last() {
    message last = std::move(messages_.back());
    messages_.pop_back();
    n_bytes_ -= last.n_bytes();
    return last;
}

void es_transcript::trim() {
    const auto drop = [&] {
        n_bytes_ -= messages_.front().n_bytes();
        messages_.pop_front();
        n_dropped_++;
    };
    while (n_bytes_ > n_transcript_bytes && messages_.size() > 2) {
        do {
            drop();
        } while (messages_.size() > 2 && messages_.front().role != "user");
    }
}

void es_transcript::clear(size_t n_dropped) {
    messages_.clear();
    n_dropped_ = n_dropped;
    n_bytes_   = 0;
}

common_json es_transcript::to_json(size_t i, const std::string & system) const {
    common_json out = common_json::array();
    if (!system.empty()) {
        out.push_back({ { "role", "system" }, { "content", system } });
    }
    for (; i < messages_.size(); ++i) {
        out.push_back(messages_[i].json);
    }
    return out;
}

common_json es_saved_conversation::to_json() const {
    common_json list = common_json::array();
    for (const es_place & p : places) {
        const int64_t n = p.n_messages - (int64_t) transcript.n_dropped();
        if (n >= 0) {
            list.push_back(common_json::array({ n, p.n_past }));
        }
    }
    return common_json{
        { "format", format },
        { "system", system.empty() ? common_json() : common_json(system) },
        { "tools", tools },
        { "messages", transcript.to_json(0, "") },
        { "n_dropped", transcript.n_dropped() },
        { "places", list },
        { "n_left", n_left },
        { "cut", is_cut ? common_json(cut) : common_json() },
    };
}

int32_t es_saved_conversation::from_json(const std::string & text, const char * name) {
    try {
        const common_json j       = common_json::parse(text);
        const uint64_t    version = number(j, "format");
        if (version > (uint64_t) format) {
            return es_fail(ES_ERR_VERSION, "%s was written by a newer edge-stream", name);
        }
        system = j.at("system").is_null() ? "" : j.at("system").get<std::string>();
        tools  = j.contains("tools") ? j.at("tools") : common_json();
        transcript.clear(number(j, "n_dropped"));
        if (!j.at("messages").is_array()) {
            throw std::invalid_argument("messages");
        }
        for (const common_json & m : j.at("messages")) {
            m.at("content"); // throws without it
            transcript.add(es_transcript::message(m));
        }
        places.clear();
        is_cut = false;
        if (version < 2) { // the last answer, with what the template wrote around it, and where it began
            const int64_t n_answer = (int64_t) number(j, "n_answer");
            if (transcript.has_answer() && n_answer > 0) {
                places = { { transcript.count() - 1, -n_answer }, { transcript.count(), 0 } };
            }
            return ES_OK;
        }
        for (const common_json & p : j.at("places")) {
            const es_place place = { p.at((size_t) 0).get<int64_t>() + (int64_t) transcript.n_dropped(),
                                     p.at((size_t) 1).get<int64_t>() };
            if (place.n_messages < 0 || place.n_messages > transcript.count() || place.n_past > 0 ||
                (!places.empty() &&
                 (place.n_past < places.back().n_past || place.n_messages <= places.back().n_messages))) {
                throw std::invalid_argument("places");
            }
            places.push_back(place);
        }
        n_left = j.contains("n_left") ? (int64_t) number(j, "n_left") : 0;
        is_cut = !j.at("cut").is_null();
        cut    = is_cut ? j.at("cut").get<std::string>() : "";
        return ES_OK;
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception &) {
        return es_fail(ES_ERR_FORMAT, "%s is a session, but not of a conversation", name);
    }
}
