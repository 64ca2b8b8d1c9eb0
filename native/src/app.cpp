// Sessions of edge_stream_app.h: a conversation, or a plain stream.
#include "conversation.h"
#include "error.h"
#include "llama-cpp.h"
#include "llama-ext.h"
#include "support.h"

#include <algorithm>
#include <cstdlib>

struct es_app_session {
    explicit es_app_session(std::shared_ptr<const es_loaded_model> model) : stream(std::move(model)) {}

    es_app_stream                    stream;
    std::unique_ptr<es_conversation> chat; // null: a plain stream
};

namespace {

// What parameters and model determine, before a cache is allocated.
struct plan {
    es_transcript     transcript; // system prompt, and the messages of a saved session
    es_turns          turns;
    es_context_params sizes;
    uint32_t          n_boundary = 0;

    int32_t init(const es_loaded_model & model, const es_app_session_params & params) {
        uint32_t n_ctx = params.n_ctx, n_keep = params.n_keep;
        if (n_ctx == 0) {
            n_ctx = model.recommended("edge_stream.n_ctx", 4096);
        }
        if (!params.chat) {
            return sizes.init(params, n_ctx, n_keep);
        }
        transcript.system = params.system ? params.system : "";
        int32_t rc        = init_turns(model, params);
        if (rc != ES_OK) {
            return rc;
        }
        if (!transcript.system.empty()) {
            n_keep = std::max(n_keep, (uint32_t) es_conversation::head_tokens(model, turns).size());
        }
        if (n_keep > n_ctx / 4 * 3) {
            return es_fail(ES_ERR_INVALID,
                           "the %u pinned tokens leave less than a quarter of the cache (%u tokens) for the "
                           "conversation: shorten the system prompt or use a larger cache",
                           n_keep, n_ctx);
        }
        n_boundary = (n_ctx - n_keep) / 8; // slides prefer to end between messages
        return sizes.init(params, n_ctx, n_keep);
    }

    int32_t init_turns(const es_loaded_model & model, const es_app_session_params & params) {
        return es_conversation::make_turns(model, params.chat_template, transcript.system, turns);
    }
};

int32_t open(es_app_model * model, const es_app_session_params & params, plan & p,
             std::unique_ptr<es_app_session> & out) {
    auto          session = std::make_unique<es_app_session>(model->loaded);
    const int32_t rc      = session->stream.init(params, p.sizes, p.n_boundary);
    if (rc != ES_OK) {
        return rc;
    }
    if (params.chat) {
        session->chat = std::make_unique<es_conversation>(session->stream, std::move(p.turns), std::move(p.transcript));
    }
    out = std::move(session);
    return ES_OK;
}

int32_t peek(const char * path, es_session_info & info, std::string & user) {
    int32_t rc = es_session_peek(path, &info, nullptr, 0);
    if (rc == ES_OK) {
        user.resize(info.n_user);
        rc = es_session_peek(path, &info, user.data(), user.size());
    }
    return rc;
}

// Runs f on a session of the right kind, after clearing an earlier stop.
template <typename F>
int32_t act(es_app_session * session, bool chat, F && f) {
    ES_REQUIRE(session);
    if ((session->chat != nullptr) != chat) {
        return es_fail(ES_ERR_INVALID, chat ? "the session is a plain stream, not a conversation"
                                            : "the session is a conversation, not a plain stream");
    }
    session->stream.clear_stop();
    return es_guard(std::forward<F>(f));
}

} // namespace

es_app_session_params es_app_session_default_params(void) {
    es_app_session_params p = {};
    p.n_keep                = 4;
    p.n_batch               = 512;
    p.flash_attn            = -1;
    p.chat                  = true;
    return p;
}

es_app_answer_params es_app_answer_default_params(void) {
    es_app_answer_params p = {};
    p.sampling             = es_sampler_default_params();
    p.max_tokens           = -1;
    p.loop_guard           = -1;
    return p;
}

int32_t es_app_memory_need(const char * path, es_app_model_params model, es_app_session_params params,
                           es_app_memory * out) {
    ES_REQUIRE(path);
    ES_REQUIRE(out);
    return es_guard([&]() -> int32_t {
        std::shared_ptr<const es_loaded_model> loaded;
        plan                                   p;
        int32_t                                rc = es_load_model(path, model, true, loaded);
        if (rc == ES_OK) {
            rc = p.init(*loaded, params);
        }
        if (rc != ES_OK) {
            return rc;
        }
        const llama_context_ptr ctx(es_make_context(loaded->model, params, p.sizes, nullptr, nullptr));
        if (!ctx) {
            return ES_ERR_MEMORY;
        }
        *out = {};
        for (const auto & [type, size] : llama_get_memory_breakdown(ctx.get())) {
            out->weights += size.model;
            out->cache += size.context;
            out->compute += size.compute;
        }
        const std::string arch   = es_model_meta(loaded->model, "general.architecture");
        const std::string length = es_model_meta(loaded->model, arch + ".attention.key_length");
        const int32_t     n_head = std::max(1, llama_model_n_head(loaded->model));
        const uint64_t    n_key  = length.empty() ? (uint64_t) (llama_model_n_embd(loaded->model) / n_head)
                                                  : (uint64_t) std::max(0, atoi(length.c_str()));
        out->sinks               = es_bank_available()
                                       ? n_key * (uint64_t) llama_model_n_head_kv(loaded->model) *
                               (uint64_t) llama_model_n_layer(loaded->model) * p.sizes.n_keep * sizeof(float)
                                       : 0;
        out->total               = out->weights + out->cache + out->sinks + out->compute;
        out->n_ctx               = p.sizes.n_ctx;
        out->n_keep              = p.sizes.n_keep;
        return ES_OK;
    });
}

int32_t es_app_session_open(es_app_model * model, es_app_session_params params, es_app_session ** out) {
    ES_REQUIRE(out);
    *out = nullptr;
    ES_REQUIRE(model);
    return es_guard([&]() -> int32_t {
        plan                            p;
        std::unique_ptr<es_app_session> session;
        int32_t                         rc = p.init(*model->loaded, params);
        if (rc == ES_OK) {
            rc = open(model, params, p, session);
        }
        *out = session.release();
        return rc;
    });
}

int32_t es_app_session_restore(es_app_model * model, es_app_session_params params, const char * path,
                               es_app_session ** out) {
    ES_REQUIRE(out);
    *out = nullptr;
    ES_REQUIRE(model);
    ES_REQUIRE(path);
    return es_guard([&]() -> int32_t {
        es_session_info info;
        std::string     user;
        plan            p;
        int32_t         rc = peek(path, info, user);
        if (rc == ES_OK &&
            (info.fingerprint != es_model_fingerprint(model->loaded->model) || info.model_tag != model->loaded->tag)) {
            return es_fail(ES_ERR_MODEL, "session %s belongs to another model", path); // before allocating a cache
        }
        if (rc == ES_OK && params.chat) {
            rc = p.transcript.from_json(user, path);
            if (rc == ES_OK) {
                rc = p.init_turns(*model->loaded, params);
            }
        }
        if (rc == ES_OK) {
            rc = p.sizes.init(params, info.n_ctx, info.n_keep);
        }
        std::unique_ptr<es_app_session> session;
        if (rc == ES_OK) {
            rc = open(model, params, p, session);
        }
        if (rc == ES_OK) {
            rc = session->stream.load(path);
        }
        *out = rc == ES_OK ? session.release() : nullptr;
        return rc;
    });
}

void es_app_session_free(es_app_session * session) {
    (void) es_guard([&]() -> int32_t {
        delete session;
        return ES_OK;
    });
}

int32_t es_app_session_save(es_app_session * session, const char * path) {
    ES_REQUIRE(session);
    ES_REQUIRE(path);
    return es_guard([&]() -> int32_t {
        if (session->stream.writing()) {
            return es_fail(ES_ERR_INVALID, "an answer is open: end it before saving");
        }
        return session->stream.save(path, session->chat ? session->chat->transcript().to_json() : "");
    });
}

int32_t es_app_session_peek(const char * path, es_app_session_info * out) {
    ES_REQUIRE(path);
    ES_REQUIRE(out);
    return es_guard([&]() -> int32_t {
        es_session_info info;
        std::string     user;
        const int32_t   rc = peek(path, info, user);
        if (rc == ES_OK) {
            *out             = {};
            out->n_ctx       = info.n_ctx;
            out->n_keep      = info.n_keep;
            out->n_past      = info.n_past;
            out->fingerprint = info.fingerprint;
            out->model_tag   = info.model_tag;
            out->n_messages  = es_transcript::count_messages(user);
        }
        return rc;
    });
}

int32_t es_app_session_stats(const es_app_session * session, es_stream_stats * out) {
    ES_REQUIRE(session);
    return es_stream_get_stats(session->stream.handle(), out);
}

size_t es_app_message_count(const es_app_session * session) {
    return session && session->chat ? session->chat->transcript().messages().size() : 0;
}

size_t es_app_message_dropped(const es_app_session * session) {
    return session && session->chat ? session->chat->transcript().n_dropped() : 0;
}

int32_t es_app_message_get(const es_app_session * session, size_t index, es_app_message * out) {
    ES_REQUIRE(out);
    if (index >= es_app_message_count(session)) {
        return es_fail(ES_ERR_INVALID, "there is no message %zu", index);
    }
    const es_transcript::message & m = session->chat->transcript().messages()[index];
    *out                             = { m.role.c_str(), m.text.c_str(), m.text.size() };
    return ES_OK;
}

int32_t es_app_session_clear(es_app_session * session) {
    ES_REQUIRE(session);
    return es_guard([&] { return session->chat ? session->chat->clear() : session->stream.reset(); });
}

int32_t es_app_say(es_app_session * session, const char * text, es_app_answer_params params,
                   es_app_progress on_progress, void * user) {
    ES_REQUIRE(text);
    return act(session, true, [&] { return session->chat->say(text, params, on_progress, user); });
}

int32_t es_app_regenerate(es_app_session * session, es_app_answer_params params) {
    return act(session, true, [&] { return session->chat->regenerate(params); });
}

int32_t es_app_feed(es_app_session * session, const char * text, bool special, es_app_progress on_progress,
                    void * user) {
    ES_REQUIRE(text);
    return act(session, false, [&]() -> int32_t {
        es_app_stream & s = session->stream;
        s.end();
        const bool      bos    = s.n_past() == 0 && llama_vocab_get_add_bos(s.model().vocab);
        const es_tokens tokens = s.model().tokenize(text, bos, special);
        return tokens.empty() ? es_fail(ES_ERR_INVALID, "there is no text to read")
                              : s.feed_in_steps(tokens, true, on_progress, user);
    });
}

int32_t es_app_begin(es_app_session * session, es_app_answer_params params) {
    return act(session, false, [&] { return session->stream.begin(params); });
}

int32_t es_app_next(es_app_session * session, es_app_token * out) {
    ES_REQUIRE(session);
    ES_REQUIRE(out);
    if (!session->stream.writing()) {
        return es_fail(ES_ERR_INVALID, "no answer is open");
    }
    return es_guard([&]() -> int32_t {
        if (session->chat) {
            return session->chat->next(*out);
        }
        const int32_t rc = session->stream.next(*out);
        if (rc == ES_OK && out->finish != ES_APP_UNFINISHED) {
            session->stream.end();
        }
        return rc;
    });
}

int32_t es_app_end(es_app_session * session) {
    ES_REQUIRE(session);
    return es_guard([&]() -> int32_t {
        if (session->chat) {
            return session->chat->end();
        }
        session->stream.end();
        return ES_OK;
    });
}

int32_t es_app_generate(es_app_session * session, es_app_on_token on_token, void * user) {
    es_app_token token = {};
    do {
        const int32_t rc = es_app_next(session, &token);
        if (rc != ES_OK) {
            return rc;
        }
        if (on_token && !on_token(user, &token)) {
            return es_app_end(session);
        }
    } while (token.finish == ES_APP_UNFINISHED);
    return ES_OK;
}

void es_app_stop(es_app_session * session) {
    if (session) {
        session->stream.stop();
    }
}
