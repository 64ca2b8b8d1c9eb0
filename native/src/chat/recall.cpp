#include "recall.h"

#include "error.h"
#include "recall/log.h"

#include <algorithm>
#include <ctime>

namespace {

constexpr int64_t n_unfinished = 2; // a message and its answer, which a session does not have yet

// Whether a log may be the one of a transcript: it has nothing else of the messages that both have. The last answer may
// be another, or longer, in a session that is older than the log.
bool is_of(const es_log & log, const es_transcript & transcript) {
    const auto & messages = transcript.messages();
    const auto   dropped  = (int64_t) transcript.n_dropped();
    const auto   end      = transcript.count() - (transcript.has_answer() ? 1 : 0);
    if (transcript.count() == 0) {
        return log.stats().n_turns <= n_unfinished;
    }
    const es_log_entries entries(log);
    if (!entries.is_there()) {
        return false;
    }
    bool        is_so = true;
    int64_t     turn  = -1;
    size_t      at    = 0; // where in what was said the turn's next entry is looked for
    std::string said;
    entries.each([&](const es_log_entry & e) {
        if (e.turn >= end) {
            return false;
        }
        if (e.turn < dropped || e.text.empty()) { // empty: forgotten, or there was nothing
            return true;
        }
        if (e.turn != turn) {
            turn = e.turn;
            at   = 0;
            said = es_log_text(messages[(size_t) (turn - dropped)].text);
        }
        at    = said.find(e.text, at);
        is_so = at != std::string::npos;
        at += e.text.size();
        return is_so;
    });
    return is_so;
}

} // namespace

int32_t es_recall::use(es_log * log, uint32_t n_tokens, const es_transcript & transcript) {
    log_      = nullptr;
    n_tokens_ = n_tokens;
    error_.clear();
    if (!log) {
        return ES_OK;
    }
    if (!is_of(*log, transcript)) {
        return es_fail(ES_ERR_FORMAT, "the log is of another conversation");
    }
    log_       = log; // it may have an answer more, or less, than the session that was restored
    n_written_ = std::min(transcript.count(), es_log_get_stats(log_).n_turns);
    write(transcript);
    return ES_OK;
}

void es_recall::find(const es_chat & chat, es_transcript & transcript, int64_t first_held) {
    found_                                = common_json();
    const es_transcript::message & newest = transcript.messages().back();
    if (!log_ || n_tokens_ == 0 || newest.role != "user") {
        return;
    }
    es_log_hit hit;
    if (!es_log_recall(log_, newest.text.data(), newest.text.size(), first_held, &hit) ||
        chat.tokenize(hit.text).size() > n_tokens_) {
        return;
    }
    found_                         = common_json{ { "text", hit.text },
                                                  { "role", hit.kind == ES_LOG_ASSISTANT ? "assistant" : "user" },
                                                  { "turn", hit.turn },
                                                  { "when", hit.when },
                                                  { "coverage", hit.coverage } };
    es_transcript::message message = transcript.take_last();
    message.recall(found_);
    transcript.add(std::move(message));
}

void es_recall::write(const es_transcript & transcript) {
    if (!log_) {
        return;
    }
    const auto dropped = (int64_t) transcript.n_dropped();
    int32_t    rc      = es_log_truncate(log_, n_written_);
    for (int64_t i = std::max(n_written_, dropped); rc == ES_OK && i < transcript.count(); ++i) {
        const es_transcript::message & m = transcript.messages()[(size_t) (i - dropped)];
        if (m.role == "user" || m.role == "assistant") {
            rc = es_log_append(log_, i, m.role == "user" ? ES_LOG_USER : ES_LOG_ASSISTANT, (int64_t) time(nullptr),
                               m.text.data(), m.text.size());
        }
    }
    if (rc == ES_OK) {
        rc = es_log_sync(log_);
    }
    n_written_ = transcript.count();
    if (rc != ES_OK) {
        error_ = es_last_error();
        log_   = nullptr;
    }
}
