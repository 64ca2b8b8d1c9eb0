#include "conversation.h"

#include "error.h"
#include "support.h"

#include <algorithm>

namespace {

constexpr size_t least_step   = 64; // tokens between two reports
constexpr size_t n_turns_near = 4;  // turns rendered at least
constexpr size_t n_byte_token = 16; // more bytes than tokens have on average

// Of the tokens seen, the first that is still in the window.
int64_t window_start(const es_stream_stats & s) {
    return s.n_evicted > 0 ? s.n_past - s.n_window : 0;
}

int32_t parse(const char * json, const char * what, common_json & out) {
    out = json ? common_json::parse_no_throw(json) : common_json::object();
    return out.is_discarded() || !out.is_object() ? es_fail(ES_ERR_INVALID, "%s must be a JSON object", what)
                                                  : (int32_t) ES_OK;
}

// Takes the system prompt out of the options.
std::string take_system(common_json & options) {
    const std::string system =
        options.contains("system") && options.at("system").is_string() ? options.at("system").get<std::string>() : "";
    options.erase("system");
    return system;
}

} // namespace

int32_t es_conversation::find_n_keep(const es_chat & chat, const char * options, uint32_t n_ctx, int32_t n_keep,
                                     uint32_t & out) {
    common_json body;
    int32_t     rc = parse(options, "options", body);
    if (rc != ES_OK) {
        return rc;
    }
    const std::string system    = take_system(body);
    const bool        has_tools = body.contains("tools") && !body.at("tools").is_null();
    size_t            n_head    = 0;
    if (!system.empty() || has_tools || n_keep < 0) {
        es_transcript question;
        question.add(es_transcript::message(common_json{ { "role", "user" }, { "content", "Hello" } }));
        body["messages"] = question.to_json(0, system);
        es_chat_request request(chat);
        rc = request.init(body.dump_safe().c_str());
        if (rc == ES_OK) {
            rc = es_with_template(request.n_input(),
                                  [&] { n_head = chat.tokenize(request.head()).size() + chat.add_bos; });
        }
    }
    out = std::max((uint32_t) std::max(n_keep, 0), (uint32_t) n_head);
    if (rc == ES_OK && out > n_ctx / 4 * 3) {
        return es_fail(ES_ERR_INVALID,
                       "the %u pinned tokens leave less than a quarter of the cache (%u tokens) for the "
                       "conversation: shorten the system prompt or use a larger cache",
                       out, n_ctx);
    }
    return rc;
}

int32_t es_conversation::init(const char * options) {
    const int32_t rc = parse(options, "options", options_);
    if (rc == ES_OK) {
        system_ = take_system(options_);
    }
    return rc;
}

es_stream_stats es_conversation::stats() const {
    es_stream_stats s = {};
    es_stream_get_stats(stream_, &s);
    return s;
}

//
// turns
//

int32_t es_conversation::say(const char * messages, const char * answer, const es_reading & reading) {
    const int32_t rc = end(ES_ANSWER_CUT);
    if (rc != ES_OK) {
        return rc;
    }
    std::vector<es_transcript::message> added;
    try {
        const common_json list = common_json::parse(messages);
        for (const common_json & m : list) {
            added.emplace_back(m);
        }
        if (!list.is_array() || added.empty() || added.back().role == "assistant") {
            return es_fail(ES_ERR_INVALID, "messages must be a list that ends with a message to the model");
        }
    } catch (const std::bad_alloc &) {
        throw;
    } catch (const std::exception & e) {
        return es_fail(ES_ERR_INVALID, "these are not messages: %s", e.what());
    }
    taken_.reset();
    n_added_ = added.size();
    for (es_transcript::message & m : added) {
        transcript_.add(std::move(m));
    }
    forget_places(window_start(stats()), stats().n_past, transcript_.count());
    recall_.find(chat_, transcript_, first_held_);
    return attempt(answer, reading, "");
}

int32_t es_conversation::regenerate(const char * answer, const es_reading & reading) {
    const int32_t rc = end(ES_ANSWER_CUT);
    if (rc != ES_OK) {
        return rc;
    }
    if (!transcript_.has_answer()) {
        return es_fail(ES_ERR_INVALID, "there is no answer to regenerate");
    }
    n_added_ = 0;
    taken_   = transcript_.take_last();
    recall_.retract(transcript_.count());
    return attempt(answer, reading, "");
}

int32_t es_conversation::go_on(const char * answer, const es_reading & reading) {
    const int32_t rc = end(ES_ANSWER_CUT);
    if (rc != ES_OK) {
        return rc;
    }
    if (!transcript_.has_answer()) {
        return es_fail(ES_ERR_INVALID, "there is no answer to continue");
    }
    if (!is_cut_) {
        return es_fail(ES_ERR_INVALID, "the last answer is complete: it was not cut");
    }
    n_added_ = 0;
    taken_   = transcript_.take_last();
    recall_.retract(transcript_.count());
    return attempt(answer, reading, cut_);
}

// Opens an answer; if that fails, the conversation is as it was.
int32_t es_conversation::attempt(const char * answer, const es_reading & reading, const std::string & written) {
    taken_tokens_.clear();
    taken_places_.clear();
    const int32_t rc = es_guard([&] { return open(answer, reading, written); });
    if (rc != ES_OK) {
        const std::string why = es_last_error();
        undo();
        go_back();
        return es_fail(rc, "%s", why.c_str());
    }
    return rc;
}

int32_t es_conversation::open(const char * answer, const es_reading & reading, const std::string & written) {
    common_json given;
    int32_t     rc = parse(answer, "the options of an answer", given);
    if (rc != ES_OK) {
        return rc;
    }
    std::vector<std::string> stops;
    if (given.contains("stop")) {
        stops = given.at("stop").get<std::vector<std::string>>();
        given.erase("stop");
    }
    const size_t from = first_near();
    common_json  body = options_;
    for (const auto & [name, value] : given.items()) {
        body[name] = value;
    }
    body["messages"] = transcript_.to_json(from, system_);
    auto request     = std::make_unique<es_chat_request>(chat_);
    rc               = request->init(body.dump_safe().c_str());
    if (rc == ES_OK) {
        rc = read(*request, from, written, reading);
    }
    if (rc != ES_OK) {
        return rc;
    }
    const common_json own = request->info().at("stop");
    for (const common_json & stop : own) {
        stops.push_back(stop.get<std::string>());
    }
    answer_ = std::make_unique<es_answer>(std::move(request), std::move(stops), written, stats());
    return ES_OK;
}

// The first message that can matter for what the stream holds or may hold.
size_t es_conversation::first_near() const {
    const auto & messages = transcript_.messages();
    const size_t n_ctx    = stats().n_ctx;
    size_t       n_bytes = 0, n_turns = 0, first = 0;
    for (size_t i = messages.size(); i-- > 0;) {
        n_bytes += messages[i].n_bytes();
        if (transcript_.is_start(i)) {
            first = i;
            if (++n_turns >= n_turns_near && n_bytes > n_ctx * n_byte_token) {
                return first;
            }
        }
    }
    return transcript_.n_dropped() > 0 ? first : 0;
}

//
// reading
//

// Keeps the places from n_past `first` to `last` with at most n_messages.
void es_conversation::forget_places(int64_t first, int64_t last, int64_t n_messages) {
    for (const es_place & p : places_) {
        first_held_ = p.n_past < first ? std::max(first_held_, p.n_messages) : first_held_;
    }
    const auto gone = [&](const es_place & p) {
        return p.n_past < first || p.n_past > last || p.n_messages > n_messages;
    };
    places_.erase(std::remove_if(places_.begin(), places_.end(), gone), places_.end());
    known_ = std::min(known_, last);
}

int32_t es_conversation::find_plan(es_chat_request & request, size_t from, common_json & out) {
    const es_stream_stats s      = stats();
    const uint32_t        n_gone = s.n_evicted > 0 ? s.n_sinks : 0; // of the tokens cached, those without places
    const int64_t         first  = window_start(s);
    forget_places(first, s.n_past, transcript_.count());
    if (taken_) { // what follows the last place is the answer that is taken back
        known_ = 0;
    }
    std::vector<std::pair<size_t, size_t>> places;
    for (const es_place & p : places_) {
        const int64_t n = p.n_messages - (int64_t) (transcript_.n_dropped() + from) + (system_.empty() ? 0 : 1);
        if (n >= 1) {
            places.emplace_back((size_t) n, (size_t) (p.n_past - first));
        }
    }
    if (!places.empty()) {
        es_tokens tokens(es_stream_tokens(stream_, nullptr, 0));
        es_stream_tokens(stream_, tokens.data(), tokens.size());
        const size_t  n_known = std::max(places.back().second, (size_t) std::max<int64_t>(0, known_ - first));
        const int32_t rc      = es_with_template(
            request.n_input(), [&] { out = es_plan_on(request, places, tokens.data() + n_gone, n_known); });
        const int64_t keep = rc == ES_OK ? first + out.at("keep").get<int64_t>() : s.n_past;
        if (rc == ES_OK && es_stream_rewind(stream_, (size_t) (s.n_past - keep)) == ES_OK) {
            taken_tokens_.assign(tokens.end() - (ptrdiff_t) (s.n_past - keep), tokens.end());
            taken_places_ = places_;
            forget_places(first, keep, transcript_.count());
            known_ = keep;
            return ES_OK;
        }
    }
    const int32_t rc = es_with_template(request.n_input(), [&] { out = es_plan_anew(request, s.n_ctx - 1); });
    if (rc == ES_OK) {
        places_.clear();
        known_      = 0;
        first_held_ = transcript_.n_dropped() + (int64_t) from + out.at("dropped").get<int64_t>();
        return es_stream_reset(stream_);
    }
    return rc;
}

// Makes the stream hold the request's conversation, the start of its answer, and what was written of that.
int32_t es_conversation::read(es_chat_request & request, size_t from, const std::string & written,
                              const es_reading & reading) {
    const es_stream_stats s = stats();
    n_done_                 = 0;
    note_.clear();
    const bool is_held = !written.empty() && !places_.empty() && places_.back().n_past == s.n_past &&
                         places_.back().n_messages == transcript_.count() + 1;
    if (is_held) { // only the logits may be missing
        n_read_ = es_stream_logits(stream_) ? 0 : 1;
        es_tokens last(es_stream_tokens(stream_, nullptr, 0));
        es_stream_tokens(stream_, last.data(), last.size());
        if (n_read_ == 0 || es_stream_rewind(stream_, 1) == ES_OK) {
            last.erase(last.begin(), last.end() - (ptrdiff_t) n_read_);
            const int32_t rc = feed(last, reading);
            if (rc == ES_OK) {
                places_.pop_back();
            }
            return rc;
        }
    }
    common_json   plan;
    const int32_t rc    = find_plan(request, from, plan);
    const int64_t first = (int64_t) (from + transcript_.n_dropped()) - (system_.empty() ? 0 : 1);
    return rc == ES_OK ? read_plan(plan, first, written, reading) : rc;
}

// first: what is to be added to the plan's numbers of messages.
int32_t es_conversation::read_plan(const common_json & plan, int64_t first, const std::string & written,
                                   const es_reading & reading) {
    note_           = plan.value("note", "");
    es_tokens start = plan.at("start").get<es_tokens>();
    if (!written.empty()) {
        const es_tokens more = chat_.tokenize(written);
        start.insert(start.end(), more.begin(), more.end());
    }
    n_read_ = start.size();
    for (const common_json & piece : plan.at("pieces")) {
        n_read_ += piece.at("tokens").size();
    }
    int32_t rc = ES_OK;
    for (const common_json & piece : plan.at("pieces")) {
        const es_tokens tokens = piece.at("tokens").get<es_tokens>();
        if (stats().n_past > 0 && !tokens.empty()) {
            rc = es_stream_mark(stream_);
        }
        if (rc == ES_OK) {
            rc = feed(tokens, reading);
        }
        if (rc != ES_OK) {
            return rc;
        }
        const int64_t n = first + piece.at("n_messages").get<int64_t>();
        if (n > (places_.empty() ? 0 : places_.back().n_messages)) {
            places_.push_back({ n, stats().n_past });
        }
    }
    if (start.size() > 1 && stats().n_past > 0) { // a single token may end the message
        rc = es_stream_mark(stream_);
    }
    return rc == ES_OK ? feed(start, reading) : rc;
}

int32_t es_conversation::feed(const es_tokens & tokens, const es_reading & reading) {
    const size_t step = std::max<size_t>(least_step, stats().n_chunk);
    for (size_t i = 0; i < tokens.size(); i += step) {
        const size_t n = std::min(step, tokens.size() - i);
        if (reading.may_abort) {
            *reading.may_abort = true;
        }
        const int32_t rc = es_stream_feed(stream_, tokens.data() + i, n, nullptr, nullptr);
        if (reading.may_abort) {
            *reading.may_abort = false;
        }
        if (rc != ES_OK) {
            return rc;
        }
        n_done_ += n;
        if (reading.on_progress && !reading.on_progress(reading.user, n_done_, n_read_)) {
            return es_fail(ES_ERR_STOPPED, "reading was stopped");
        }
    }
    return ES_OK;
}

// Returns to what is known of the stream.
void es_conversation::go_back() {
    const es_stream_stats s = stats();
    forget_places(0, s.n_past, transcript_.count());
    const int64_t last = std::max(known_, places_.empty() ? 0 : places_.back().n_past);
    if (last == 0 || es_stream_rewind(stream_, (size_t) (s.n_past - last)) != ES_OK) {
        places_.clear();
        known_ = 0;
        es_stream_reset(stream_); // the next turn reads again
        return;
    }
    known_ = last;
    // the end of an answer was taken back for what joins it
    const int64_t n_before = last + (int64_t) taken_tokens_.size();
    const bool    is_end   = !taken_places_.empty() && taken_places_.back().n_past == n_before;
    if (is_end && taken_tokens_.size() <= least_step && feed(taken_tokens_, {}) == ES_OK) {
        places_ = std::move(taken_places_);
        known_  = n_before;
    }
}

// Puts the messages back as they were before the last call that opened an answer.
void es_conversation::undo() {
    for (; n_added_ > 0; --n_added_) {
        transcript_.take_last();
    }
    if (taken_) {
        transcript_.add(std::move(*taken_));
        taken_.reset();
    }
}

//
// the answer
//

std::vector<common_chat_msg_diff> es_conversation::push(const std::string & bytes, int32_t how) {
    return answer_->push(bytes, how, stats().n_past);
}

common_json es_conversation::info() const {
    common_json out = answer_ ? answer_->info() : common_json::object();
    out.erase("stop");
    out["n_read"]       = n_read_;
    out["note"]         = note_.empty() ? common_json() : common_json(note_);
    out["recalled"]     = recall_.found();
    out["recall_error"] = recall_.error();
    return out;
}

int32_t es_conversation::end(int32_t how) {
    if (!answer_) {
        return ES_OK;
    }
    const std::unique_ptr<es_answer> answer = std::move(answer_);
    if (how == ES_ANSWER_TAKEN_BACK) {
        undo();
        go_back();
        return ES_OK;
    }
    if (how == ES_ANSWER_WHOLE && !answer->is_ended()) {
        answer->push("", ES_ANSWER_WHOLE, stats().n_past);
    }
    transcript_.add(es_transcript::message(answer->message()));
    taken_.reset();
    n_added_   = 0;
    is_cut_    = !answer->is_ended();
    cut_       = is_cut_ ? answer->raw() : "";
    int32_t rc = ES_OK;
    int64_t at = stats().n_past;
    if (is_cut_ && answer->n_past() > 0 && answer->n_past() < at) { // without the beginning of a character
        rc = es_stream_rewind(stream_, (size_t) (at - answer->n_past()));
        at = answer->n_past();
    }
    if (rc == ES_OK) {
        places_.push_back({ transcript_.count(), at });
        known_ = at;
    }
    recall_.write(transcript_);
    transcript_.trim();
    return es_stream_rebase(stream_); // now, while idle, rather than during an answer
}

//
// the whole conversation
//

int32_t es_conversation::set_log(es_log * log, uint32_t n_tokens) {
    if (answer_) {
        return es_fail(ES_ERR_INVALID, "an answer is open: end it before the log is changed");
    }
    return recall_.use(log, n_tokens, transcript_);
}

common_json es_conversation::messages() const {
    return common_json{
        { "system", system_.empty() ? common_json() : common_json(system_) },
        { "messages", transcript_.to_json(0, "") },
        { "n_dropped", transcript_.n_dropped() },
        { "is_cut", is_cut_ && !answer_ },
    };
}

int32_t es_conversation::clear() {
    answer_.reset();
    transcript_.clear();
    places_.clear();
    known_  = 0;
    is_cut_ = false;
    cut_.clear();
    taken_.reset();
    n_added_    = 0;
    first_held_ = 0;
    recall_.retract(0);
    recall_.write(transcript_);
    return es_stream_reset(stream_);
}

int32_t es_conversation::save(std::string & out) const {
    if (answer_) {
        return es_fail(ES_ERR_INVALID, "an answer is open: end it before saving");
    }
    const int64_t         n_past = stats().n_past;
    es_saved_conversation saved;
    saved.system     = system_;
    saved.tools      = options_.contains("tools") ? options_.at("tools") : common_json();
    saved.transcript = transcript_;
    for (const es_place & p : places_) {
        saved.places.push_back({ p.n_messages, p.n_past - n_past });
    }
    saved.n_left = first_held_;
    saved.is_cut = is_cut_;
    saved.cut    = cut_;
    out          = saved.to_json().dump_safe();
    return ES_OK;
}

int32_t es_conversation::load(const char * json, const char * name) {
    es_saved_conversation saved;
    const int32_t         rc = saved.from_json(json, name);
    if (rc != ES_OK) {
        return rc;
    }
    answer_.reset();
    taken_.reset();
    n_added_ = 0;
    system_  = saved.system;
    options_.erase("tools");
    if (!saved.tools.is_null()) {
        options_["tools"] = saved.tools;
    }
    transcript_ = std::move(saved.transcript);
    places_     = std::move(saved.places);
    first_held_ = saved.n_left;
    is_cut_     = saved.is_cut;
    cut_        = saved.cut;
    known_      = stats().n_past;
    for (es_place & p : places_) {
        p.n_past += known_;
    }
    known_ = places_.empty() ? 0 : places_.back().n_past;
    return ES_OK;
}
