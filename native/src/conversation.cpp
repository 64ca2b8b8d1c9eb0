#include "conversation.h"

#include "error.h"
#include "utf8.h"

#include <algorithm>

//
// tokens of turns
//

int32_t es_conversation::make_turns(const es_loaded_model & model, const char * chat_template,
                                    const std::string & system, es_turns & out) {
    std::string   found;
    const int32_t rc = es_find_template(model, chat_template, found);
    return rc == ES_OK ? out.init(found, system) : rc;
}

es_tokens es_conversation::head_tokens(const es_loaded_model & model, const es_turns & turns) {
    es_tokens         tokens = model.tokenize(turns.head(), false, true);
    const llama_token bos    = llama_vocab_bos(model.vocab);
    if (llama_vocab_get_add_bos(model.vocab) && (tokens.empty() || tokens[0] != bos)) {
        tokens.insert(tokens.begin(), bos);
    }
    return tokens;
}

es_conversation::es_conversation(es_app_stream & stream, es_turns turns, es_transcript transcript)
    : stream_(stream), turns_(std::move(turns)), transcript_(std::move(transcript)),
      head_(head_tokens(stream.model(), turns_)), close_(stream.model().tokenize(turns_.closing(), false, true)) {}

// Tokens of a user message and of the start of its answer.
int32_t es_conversation::turn(const std::string & text, bool first, tokens_of_turn & out) const {
    es_turns::turn t;
    const int32_t  rc = first ? turns_.first(text, t) : turns_.next(text, t);
    if (rc != ES_OK) {
        return rc;
    }
    out.message = first ? head_ : es_tokens();
    for (const llama_token token : stream_.model().tokenize(t.message, false, true)) {
        out.message.push_back(token);
    }
    out.answer = stream_.model().tokenize(t.answer, false, true);
    if (out.answer.empty() && !out.message.empty()) {
        // regenerating must feed something: without an opening of the answer, the last token of the message
        out.answer.push_back(out.message.back());
        out.message.pop_back();
    }
    return ES_OK;
}

// Drops tokens up to an end-of-turn token, if one is among the first four.
es_tokens es_conversation::after_end(const es_tokens & tokens) const {
    for (size_t i = 0; i < std::min<size_t>(4, tokens.size()); ++i) {
        if (llama_vocab_is_eog(stream_.model().vocab, tokens[i])) {
            return { tokens.begin() + (ptrdiff_t) i + 1, tokens.end() };
        }
    }
    return tokens;
}

//
// turns
//

int32_t es_conversation::feed_message(es_tokens tokens, bool stoppable, es_app_progress on_progress, void * user) {
    const bool starts = tokens.size() >= head_.size() && std::equal(head_.begin(), head_.end(), tokens.begin());
    int32_t    rc     = ES_OK;
    if (stream_.n_past() > 0) {
        rc = es_stream_mark(stream_.handle());
    } else if (starts && !head_.empty()) {
        rc = stream_.feed(head_, stoppable);
        if (rc == ES_OK) {
            rc = es_stream_mark(stream_.handle());
        }
        tokens.erase(tokens.begin(), tokens.begin() + (ptrdiff_t) head_.size());
    }
    return rc == ES_OK ? stream_.feed_in_steps(tokens, stoppable, on_progress, user) : rc;
}

int32_t es_conversation::say(const std::string & text, const es_app_answer_params & params, es_app_progress on_progress,
                             void * user) {
    int32_t rc = end();
    if (rc != ES_OK) {
        return rc;
    }
    const int64_t  before = stream_.n_past();
    tokens_of_turn t;
    rc = turn(text, before == 0, t);
    if (rc != ES_OK) {
        return rc;
    }
    rc = feed_message(transcript_.ended ? after_end(t.message) : t.message, true, on_progress, user);
    if (rc != ES_OK) {
        const std::string why  = es_last_error();
        const int32_t     back = take_back(stream_.n_past() - before);
        return back == ES_OK ? es_fail(rc, "%s", why.c_str()) : back;
    }
    transcript_.answer_start = t.answer;
    transcript_.add("user", text);
    return open_answer(params);
}

int32_t es_conversation::open_answer(const es_app_answer_params & params) {
    answer_at_ = stream_.n_past();
    answer_.clear();
    closed_ = complete_ = false;
    int32_t rc          = ES_OK;
    if (transcript_.answer_start.size() > 1) { // a single token may end the user's message
        rc = es_stream_mark(stream_.handle());
    }
    if (rc == ES_OK) {
        rc = stream_.feed(transcript_.answer_start, false); // not stoppable: the turn is open now
    }
    if (rc == ES_OK) {
        es_app_answer_params p = params;
        p.loop_guard           = params.loop_guard != 0;
        rc                     = stream_.begin(p);
    }
    if (rc != ES_OK) {
        const std::string why   = es_last_error();
        const int32_t     again = stream_.begin(es_app_answer_default_params()); // so that end() closes the turn
        if (again == ES_OK) {
            (void) end();
        }
        return es_fail(rc, "%s", why.c_str());
    }
    return ES_OK;
}

int32_t es_conversation::regenerate(const es_app_answer_params & params) {
    int32_t rc = end();
    if (rc != ES_OK) {
        return rc;
    }
    if (!transcript_.has_answer()) {
        return es_fail(ES_ERR_INVALID, "there is no answer to generate again");
    }
    const es_transcript::message answer = transcript_.take_last();
    rc                                  = take_back(transcript_.n_answer);
    if (rc != ES_OK) {
        transcript_.add("assistant", answer.text);
        return rc;
    }
    return open_answer(params);
}

int32_t es_conversation::next(es_app_token & out) {
    const int32_t rc = stream_.next(out);
    if (rc != ES_OK) {
        return rc;
    }
    answer_.append(out.bytes, out.n_bytes);
    answer_.resize(answer_.size() - stream_.n_unlooped());
    closed_   = out.finish == ES_APP_EOS;
    complete_ = out.finish != ES_APP_UNFINISHED && out.finish != ES_APP_STOPPED;
    return out.finish == ES_APP_UNFINISHED ? (int32_t) ES_OK : end();
}

// Ends the answer with the template's end-of-turn tokens, as far as the model has not generated them.
int32_t es_conversation::end() {
    if (!stream_.writing()) {
        return ES_OK;
    }
    stream_.end();
    const es_tokens rest = closed_ ? after_end(close_) : close_;
    transcript_.ended    = closed_ && rest.size() == close_.size();
    int32_t rc           = stream_.feed(rest, false);
    if (rc == ES_OK) {
        rc = es_stream_rebase(stream_.handle()); // now, while idle, rather than during an answer
    }
    transcript_.n_answer = stream_.n_past() - answer_at_;
    if (!complete_) { // without an incomplete character
        answer_.resize(es_utf8_complete(answer_));
    }
    transcript_.add("assistant", answer_);
    transcript_.trim();
    return rc;
}

int32_t es_conversation::clear() {
    transcript_.clear();
    return stream_.reset();
}

// Removes the newest n tokens.
int32_t es_conversation::take_back(int64_t n) {
    if (n == 0) {
        return ES_OK;
    }
    // if the stream has slid past their start, rebuild it
    return es_stream_rewind(stream_.handle(), (size_t) n) == ES_OK ? (int32_t) ES_OK : refeed();
}

// Resets the stream and feeds the newest turns, as many as the cache holds without a slide. The last one may lack its
// answer.
int32_t es_conversation::refeed() {
    const auto &        messages = transcript_.messages();
    std::vector<size_t> users;
    for (size_t i = 0; i < messages.size(); ++i) {
        if (messages[i].role == "user") {
            users.push_back(i);
        }
    }
    const auto whole = [&](size_t i, bool first, es_tokens & out, es_tokens & start) -> int32_t {
        tokens_of_turn t;
        const int32_t  rc = turn(messages[i].text, first, t);
        out               = t.message;
        start             = t.answer;
        if (rc == ES_OK && i + 1 < messages.size()) {
            out.insert(out.end(), t.answer.begin(), t.answer.end());
            const es_tokens said = stream_.model().tokenize(messages[i + 1].text, false, true);
            out.insert(out.end(), said.begin(), said.end());
            out.insert(out.end(), close_.begin(), close_.end());
        }
        return rc;
    };
    const es_tokens       start_before = transcript_.answer_start;
    std::deque<es_tokens> turns;
    int64_t               room = (int64_t) stream_.stats().n_ctx - (int64_t) head_.size() - 1;
    size_t                k    = users.size();
    es_tokens             tokens, start;
    for (; k > 0; --k) {
        const int32_t rc = whole(users[k - 1], false, tokens, start);
        if (rc != ES_OK) {
            return rc;
        }
        room -= (int64_t) tokens.size();
        if (room < 0 && !turns.empty()) {
            break;
        }
        turns.push_front(tokens);
        if (users[k - 1] + 1 == messages.size()) {
            transcript_.answer_start = start;
        }
    }
    if (!turns.empty()) { // templates write the first turn differently
        const int32_t rc = whole(users[k], true, turns.front(), start);
        if (rc != ES_OK) {
            transcript_.answer_start = start_before;
            return rc;
        }
        if (users[k] + 1 == messages.size()) {
            transcript_.answer_start = start;
        }
    }
    int32_t rc        = es_stream_reset(stream_.handle());
    transcript_.ended = false;
    for (size_t i = 0; rc == ES_OK && i < turns.size(); ++i) {
        rc = feed_message(turns[i], false, nullptr, nullptr);
    }
    return rc;
}
