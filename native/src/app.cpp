// Sessions of edge_stream_app.h: a conversation, or a plain stream.
#include "app_stream.h"
#include "chat/conversation.h"
#include "error.h"
#include "llama-cpp.h"
#include "llama-ext.h"
#include "recall/log.h"
#include "support.h"

#include <algorithm>
#include <cstdlib>
#include <optional>

struct es_app_session {
    explicit es_app_session(std::shared_ptr<const es_loaded_model> model) : stream(std::move(model)) {}

    es_app_stream                    stream;
    std::unique_ptr<es_log>          log; // or null
    std::string                      recalled;
    std::unique_ptr<es_chat>         chat_template;
    std::unique_ptr<es_conversation> chat; // null: a plain stream
    bool                             is_parsed = false;

    // A token may end thinking and begin the text: two records.
    std::string                bytes;
    std::optional<std::string> text_after;
    es_app_token               last = {};

    int32_t begin(es_app_answer_params params);
    int32_t next(es_app_token & out);
    int32_t end();
};

namespace {

// What parameters and model determine, before a cache is allocated.
struct plan {
    std::unique_ptr<es_chat> chat_template;
    std::string              options; // of the conversation
    es_context_params        sizes;
    uint32_t                 n_boundary = 0;

    int32_t init(const es_loaded_model & model, const es_app_session_params & params) {
        uint32_t n_keep = params.n_keep;
        uint32_t n_ctx  = params.n_ctx ? params.n_ctx : model.recommended("edge_stream.n_ctx", 4096);
        if (params.chat) {
            int32_t rc = init_chat(model, params);
            if (rc == ES_OK) {
                rc = es_conversation::find_n_keep(*chat_template, options.c_str(), n_ctx, (int32_t) n_keep, n_keep);
            }
            if (rc != ES_OK) {
                return rc;
            }
            n_boundary = (n_ctx - n_keep) / 8; // slides prefer to end between messages
        }
        return sizes.init(params, n_ctx, n_keep);
    }

    int32_t init_chat(const es_loaded_model & model, const es_app_session_params & params) {
        common_json body = { { "system", params.system ? params.system : "" } };
        if (params.tools) {
            body["tools"] = common_json::parse_no_throw(params.tools);
            if (body.at("tools").is_discarded()) {
                return es_fail(ES_ERR_INVALID, "tools must be a JSON list");
            }
        }
        if (params.thinking >= 0) {
            body["enable_thinking"] = params.thinking > 0;
        }
        options       = body.dump_safe();
        chat_template = std::make_unique<es_chat>();
        return chat_template->init(model.model, params.chat_template);
    }
};

int32_t open(es_app_model * model, const es_app_session_params & params, plan & p,
             std::unique_ptr<es_app_session> & out) {
    auto    session = std::make_unique<es_app_session>(model->loaded);
    int32_t rc      = session->stream.init(params, p.sizes, p.n_boundary);
    if (rc == ES_OK && params.chat) {
        session->chat_template = std::move(p.chat_template);
        session->chat          = std::make_unique<es_conversation>(*session->chat_template, session->stream.handle());
        rc                     = session->chat->init(p.options.c_str());
    }
    out = rc == ES_OK ? std::move(session) : nullptr;
    return rc;
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
    session->text_after.reset();
    return es_guard(std::forward<F>(f));
}

// Opens an answer by f(its options, how reading is watched), and begins to generate.
template <typename F>
int32_t answer(es_app_session * session, es_app_answer_params params, es_app_progress on_progress, void * user,
               F && f) {
    return act(session, true, [&]() -> int32_t {
        struct watched {
            es_app_session * session;
            es_app_progress  on_progress;
            void *           user;
        } w              = { session, on_progress, user };
        const auto watch = [](void * data, uint64_t done, uint64_t total) {
            const auto * self = (const watched *) data;
            return !self->session->stream.is_stopped() &&
                   (!self->on_progress || self->on_progress(self->user, done, total));
        };
        common_json options = common_json::object();
        if (params.sampling.grammar && !params.sampling.grammar_root) {
            options["grammar"]      = params.sampling.grammar; // in its place among the rules of the template
            params.sampling.grammar = nullptr;
        }
        int32_t rc = session->end();
        if (rc == ES_OK) {
            rc = f(options.dump_safe().c_str(), es_reading{ watch, &w, &session->stream.may_abort() });
        }
        if (rc == ES_OK && (rc = session->begin(params)) != ES_OK) {
            const std::string why = es_last_error();
            (void) session->chat->end(ES_ANSWER_TAKEN_BACK);
            return es_fail(rc, "%s", why.c_str());
        }
        return rc;
    });
}

} // namespace

//
// answers of a conversation
//

int32_t es_app_session::begin(es_app_answer_params params) {
    const common_json info  = chat->answer().info();
    std::string       rules = info.at("sampling").is_null() ? "" : info.at("sampling").get<std::string>();
    if (!rules.empty()) {
        params.sampling.chat = rules.c_str();
    }
    is_parsed         = info.at("is_parsed").get<bool>();
    params.loop_guard = params.loop_guard != 0;
    return stream.begin(params);
}

int32_t es_app_session::next(es_app_token & out) {
    if (text_after) {
        bytes       = std::move(*text_after);
        out         = last;
        out.bytes   = bytes.data();
        out.n_bytes = bytes.size();
        text_after.reset();
        return ES_OK;
    }
    int32_t rc = stream.next(is_parsed, out);
    if (rc != ES_OK) {
        return rc;
    }
    std::string   thinking, text;
    const bool    is_whole = out.finish == ES_APP_EOS || out.finish == ES_APP_REPETITION;
    const int32_t how      = is_whole ? ES_ANSWER_WHOLE : out.finish ? ES_ANSWER_CUT : ES_ANSWER_OPEN;
    for (const common_chat_msg_diff & diff : chat->push(std::string(out.bytes, out.n_bytes), how)) {
        thinking += diff.reasoning_content_delta;
        text += diff.content_delta;
    }
    if (chat->answer().is_ended() &&
        out.finish != ES_APP_REPETITION) { // by a text that the template ends answers with, perhaps
        out.finish = ES_APP_EOS;
    }
    if (out.finish != ES_APP_UNFINISHED) {
        rc = end();
    }
    last            = out;
    out.is_thinking = !thinking.empty();
    if (out.is_thinking && !text.empty()) {
        text_after = std::move(text);
        out.finish = ES_APP_UNFINISHED;
    }
    bytes       = out.is_thinking ? std::move(thinking) : std::move(text);
    out.bytes   = bytes.data();
    out.n_bytes = bytes.size();
    return rc;
}

int32_t es_app_session::end() {
    stream.end();
    return chat ? chat->end(ES_ANSWER_CUT) : (int32_t) ES_OK; // whole if the model ended it
}

es_app_session_params es_app_session_default_params(void) {
    es_app_session_params p = {};
    p.n_keep                = 4;
    p.n_batch               = 512;
    p.flash_attn            = -1;
    p.chat                  = true;
    p.thinking              = -1;
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
            rc = es_saved_conversation().from_json(user, path);
            if (rc == ES_OK) {
                rc = p.init_chat(*model->loaded, params);
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
        if (rc == ES_OK && params.chat) {
            rc = session->chat->load(user.c_str(), path);
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
        std::string   transcript;
        const int32_t rc = session->chat ? session->chat->save(transcript) : (int32_t) ES_OK;
        return rc == ES_OK ? session->stream.save(path, transcript) : rc;
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
            es_saved_conversation saved;
            if (saved.from_json(user, path) == ES_OK) {
                out->n_messages = saved.transcript.messages().size();
            }
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
    *out                             = { m.role.c_str(),     m.text.c_str(),    m.text.size(),
                                         m.thinking.c_str(), m.thinking.size(), m.calls.empty() ? nullptr : m.calls.c_str() };
    return ES_OK;
}

int32_t es_app_session_clear(es_app_session * session) {
    ES_REQUIRE(session);
    return es_guard([&]() -> int32_t {
        session->text_after.reset();
        const int32_t rc = session->stream.reset();
        return rc == ES_OK && session->chat ? session->chat->clear() : rc;
    });
}

int32_t es_app_use_log(es_app_session * session, const char * path, uint64_t max_bytes, uint32_t n_tokens) {
    return act(session, true, [&]() -> int32_t {
        int32_t rc = session->chat->set_log(nullptr, 0);
        if (rc != ES_OK) {
            return rc;
        }
        session->log = std::make_unique<es_log>();
        rc           = session->log->open(path, max_bytes);
        if (rc != ES_OK) {
            session->log.reset();
            return rc;
        }
        rc = session->chat->set_log(session->log.get(), n_tokens);
        if (rc != ES_OK) {
            session->log.reset();
        }
        return rc;
    });
}

int32_t es_app_get_recalled(es_app_session * session, es_app_recalled * out) {
    ES_REQUIRE(session);
    ES_REQUIRE(out);
    *out = {};
    return es_guard([&]() -> int32_t {
        const common_json found = session->chat ? session->chat->info().at("recalled") : common_json();
        if (!found.is_null()) {
            session->recalled = found.at("text").get<std::string>();
            *out = { session->recalled.c_str(), found.at("role") == "user", found.at("turn").get<int64_t>(),
                     found.at("when").get<int64_t>(), found.at("coverage").get<double>() };
        }
        return ES_OK;
    });
}

int32_t es_app_forget(es_app_session * session, int64_t message) {
    ES_REQUIRE(session);
    if (!session->log) {
        return es_fail(ES_ERR_INVALID, "the conversation has no log");
    }
    return es_guard([&] { return session->log->forget(message); });
}

int32_t es_app_say(es_app_session * session, const char * text, es_app_answer_params params,
                   es_app_progress on_progress, void * user) {
    ES_REQUIRE(text);
    common_json list = common_json::array();
    list.push_back({ { "role", "user" }, { "content", text } });
    return es_app_say_messages(session, list.dump_safe().c_str(), params, on_progress, user);
}

int32_t es_app_say_messages(es_app_session * session, const char * messages, es_app_answer_params params,
                            es_app_progress on_progress, void * user) {
    ES_REQUIRE(messages);
    return answer(session, params, on_progress, user, [&](const char * options, const es_reading & reading) {
        return session->chat->say(messages, options, reading);
    });
}

int32_t es_app_regenerate(es_app_session * session, es_app_answer_params params) {
    return answer(session, params, nullptr, nullptr, [&](const char * options, const es_reading & reading) {
        return session->chat->regenerate(options, reading);
    });
}

int32_t es_app_continue(es_app_session * session, es_app_answer_params params) {
    return answer(session, params, nullptr, nullptr, [&](const char * options, const es_reading & reading) {
        return session->chat->go_on(options, reading);
    });
}

int32_t es_app_feed(es_app_session * session, const char * text, bool special, es_app_progress on_progress,
                    void * user) {
    ES_REQUIRE(text);
    return act(session, false, [&]() -> int32_t {
        es_app_stream & s = session->stream;
        s.end();
        const bool      bos    = s.n_past() == 0 && llama_vocab_get_add_bos(s.model().vocab);
        const es_tokens tokens = s.model().tokenize(text, bos, special);
        return tokens.empty() ? es_fail(ES_ERR_INVALID, "there is no text to read") : s.feed(tokens, on_progress, user);
    });
}

int32_t es_app_begin(es_app_session * session, es_app_answer_params params) {
    return act(session, false, [&] { return session->stream.begin(params); });
}

int32_t es_app_next(es_app_session * session, es_app_token * out) {
    ES_REQUIRE(session);
    ES_REQUIRE(out);
    if (!session->stream.writing() && !session->text_after) {
        return es_fail(ES_ERR_INVALID, "no answer is open");
    }
    return es_guard([&]() -> int32_t {
        if (session->chat) {
            return session->next(*out);
        }
        const int32_t rc = session->stream.next(false, *out);
        if (rc == ES_OK && out->finish != ES_APP_UNFINISHED) {
            session->stream.end();
        }
        return rc;
    });
}

int32_t es_app_end(es_app_session * session) {
    ES_REQUIRE(session);
    return es_guard([&] {
        session->text_after.reset();
        return session->end();
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
