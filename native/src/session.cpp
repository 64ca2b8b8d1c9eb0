// Saves and restores a stream's content.
#include "aborts.h"
#include "bank.h"
#include "error.h"
#include "sampler.h"
#include "session_format.h"
#include "stream.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>

namespace {

const char * type_name(int32_t type) {
    return type >= 0 && type < GGML_TYPE_COUNT ? ggml_type_name((ggml_type) type) : "unknown";
}

int32_t check_model(const es_stream & stream, const es_session_head & h, int32_t type_k, int32_t type_v,
                    const char * path) {
    const uint64_t fingerprint = es_model_fingerprint(stream.model);
    if (h.fingerprint != fingerprint || h.model_tag != stream.params.model_tag) {
        return es_fail(ES_ERR_MODEL, "session %s belongs to another model", path);
    }
    if (h.type_k != type_k || h.type_v != type_v) {
        return es_fail(ES_ERR_MODEL, "session %s was made with cache types K %s, V %s; this one has K %s, V %s", path,
                       type_name(h.type_k), type_name(h.type_v), type_name(type_k), type_name(type_v));
    }
    if (h.n_keep > 0 && h.sink_move != stream.params.sink_move) {
        return es_fail(ES_ERR_MODEL, "session %s was made with another --sink-move", path);
    }
    return ES_OK;
}

// Keys and values of what is cached.
bool get_keys(const es_stream & stream, es_bytes & out) {
    if (stream.window.n_cached() == 0) {
        return true;
    }
    if (!stream.ctx) {
        const es_decoder_step now = stream.now();
        out.resize(stream.decoder.state_size(stream.decoder.user, &now));
        return !out.empty() && stream.decoder.state_get(stream.decoder.user, &now, out.data(), out.size());
    }
    out.resize(llama_state_seq_get_size(stream.ctx, stream.params.seq_id));
    return llama_state_seq_get_data(stream.ctx, out.data(), out.size(), stream.params.seq_id) == out.size();
}

// Puts the cache in place, for the window that the stream has already.
int32_t fill(es_stream & stream, const es_bytes & bank, const es_bytes & keys) {
    if (!stream.ctx) {
        const es_decoder_step now = stream.now();
        return stream.decoder.state_set(stream.decoder.user, &now, keys.data(), keys.size())
                   ? (int32_t) ES_OK
                   : es_fail(ES_ERR_INTERNAL, "its cache does not fit");
    }
    {
        const es_abort_scope scope;
        if (llama_state_seq_set_data(stream.ctx, keys.data(), keys.size(), stream.params.seq_id) != keys.size()) {
            return es_fail(ES_ERR_INTERNAL, "llama.cpp refused the cache");
        }
    }
    if (!es_has_positions(stream.ctx, stream.params.seq_id, stream.window.pos_sinks(), stream.window.pos_next(),
                          stream.stateful)) {
        return es_fail(ES_ERR_FORMAT, "its cache holds other positions");
    }
    return stream.mover->set_state(bank, stream.window.sinks(), stream.window.n_recalled());
}

// Replaces the stream's content, once everything is verified. On failure the stream is as it was, or empty.
int32_t restore(es_stream & stream, const es_session_head & h, const es_window::state & toks, const es_bytes & bank,
                const es_bytes & keys) {
    es_stream_params wanted = stream.params;
    wanted.n_ctx            = h.n_ctx;
    wanted.n_keep           = h.n_keep;
    wanted.n_slide          = h.n_slide;
    wanted.n_chunk          = h.n_chunk;
    wanted.n_boundary       = h.n_boundary;
    wanted.rebase_at        = h.rebase_at;
    // while sinks are missing, all there is are a few sinks: they are decoded again
    const bool few = toks.tokens.size() < h.n_keep;
    if (few && toks.n_past != (int64_t) toks.tokens.size()) {
        return es_fail(ES_ERR_FORMAT, "the session is damaged: its positions contradict each other");
    }
    const int32_t rc = stream.resize(wanted, few ? es_window::state() : toks);
    if (rc != ES_OK || toks.tokens.empty()) {
        return rc;
    }
    const auto fail = [&](const char * why, int32_t status) {
        (void) stream.reset();
        return es_fail(status, "the session could not be restored: %s; the stream is empty now", why);
    };
    try {
        const int32_t done =
            few ? stream.feed(toks.tokens.data(), toks.tokens.size(), nullptr, nullptr) : fill(stream, bank, keys);
        if (done != ES_OK) {
            return fail(std::string(es_last_error()).c_str(), done);
        }
        return few ? (int32_t) ES_OK : stream.keep_state();
    } catch (const std::bad_alloc &) {
        return fail("out of memory", ES_ERR_MEMORY);
    }
}

} // namespace

// The sections of a session, copied.
struct es_snapshot {
    std::vector<std::pair<uint32_t, es_bytes>> sections;

    std::vector<es_section> view() const {
        std::vector<es_section> out;
        for (const auto & [tag, data] : sections) {
            out.push_back({ tag, data.data(), data.size() });
        }
        return out;
    }
};

int32_t es_snapshot_init(const es_stream * stream, const es_sampler * sampler, int32_t type_k, int32_t type_v,
                         const void * user, size_t n_user, es_snapshot ** out) {
    ES_REQUIRE(stream);
    ES_REQUIRE(out);
    ES_REQUIRE(user || n_user == 0);
    if (stream->broken) {
        return es_fail(ES_ERR_INTERNAL, "the stream's cache is undefined after an earlier failure: reset it");
    }
    return es_guard([&]() -> int32_t {
        stream->settle();
        const es_window &     w   = stream->window;
        const bool            few = w.n_sinks() < w.params().n_keep; // see restore
        const es_session_head h   = { w.params().n_ctx,
                                      w.params().n_keep,
                                      type_k,
                                      type_v,
                                      w.n_past(),
                                      es_model_fingerprint(stream->model),
                                      stream->params.model_tag,
                                      n_user,
                                      w.params().rebase_at,
                                      stream->params.sink_move,
                                      w.params().n_slide,
                                      w.params().n_chunk,
                                      w.params().n_boundary,
                                      0 };
        if (!stream->mover->can_save() || stream->state_lost) {
            return es_fail(ES_ERR_INVALID, "the last decode failed: feed a token before saving");
        }
        es_bytes      bank, keys;
        const int32_t rc = few ? (int32_t) ES_OK : stream->mover->get_state(bank);
        if (rc != ES_OK) {
            return rc;
        }
        if (!few && !get_keys(*stream, keys)) {
            return es_fail(ES_ERR_INTERNAL, "the cache could not be copied");
        }
        if (es_check_devices(stream->ctx) != ES_OK) {
            return ES_ERR_DECODE; // what was read is invalid
        }
        // the state of an earlier load is kept until a sampler restores it
        const es_bytes smpl = sampler                 ? es_pack(sampler->get_state())
                              : stream->saved_sampler ? es_pack(*stream->saved_sampler)
                                                      : es_bytes();
        const auto     copy = [](const void * data, size_t n) {
            return n ? es_bytes((const uint8_t *) data, (const uint8_t *) data + n) : es_bytes();
        };
        const std::vector<float> & lgts = stream->last_logits;

        auto snapshot      = std::make_unique<es_snapshot>();
        snapshot->sections = {
            { ES_TAG_HEAD, copy(&h, sizeof(h)) },
            { ES_TAG_USER, copy(user, n_user) },
            { ES_TAG_TOKS, es_pack(w.get_state()) },
            { ES_TAG_SMPL, smpl },
            { ES_TAG_LGTS, copy(lgts.data(), lgts.size() * sizeof(float)) },
        };
        snapshot->sections.emplace_back(ES_TAG_BANK, std::move(bank)); // a list would copy it
        snapshot->sections.emplace_back(ES_TAG_KEYS, std::move(keys));
        *out = snapshot.release();
        return ES_OK;
    });
}

uint64_t es_snapshot_size(const es_snapshot * snapshot) {
    uint64_t n = 0;
    (void) es_guard([&]() -> int32_t {
        n = snapshot ? es_session_size(snapshot->view()) : 0;
        return ES_OK;
    });
    return n;
}

int32_t es_snapshot_write(const es_snapshot * snapshot, const char * path) {
    ES_REQUIRE(snapshot);
    ES_REQUIRE(path);
    return es_guard([&] { return es_session_write(path, snapshot->view()); });
}

void es_snapshot_free(es_snapshot * snapshot) {
    delete snapshot;
}

int32_t es_session_save(const es_stream * stream, const es_sampler * sampler, int32_t type_k, int32_t type_v,
                        const char * path, const void * user, size_t n_user) {
    ES_REQUIRE(path);
    es_snapshot * snapshot = nullptr;
    int32_t       rc       = es_snapshot_init(stream, sampler, type_k, type_v, user, n_user, &snapshot);
    if (rc == ES_OK) {
        rc = es_snapshot_write(snapshot, path);
        es_snapshot_free(snapshot);
    }
    return rc;
}

int32_t es_session_peek(const char * path, es_session_info * info, void * user, size_t n_user) {
    ES_REQUIRE(path);
    ES_REQUIRE(info);
    return es_guard([&]() -> int32_t {
        es_sections     sections;
        es_session_head h;
        int32_t         rc = es_session_read(path, 2, sections, h);
        if (rc != ES_OK) {
            return rc;
        }
        *info              = { es_session_version, h.n_ctx,       h.n_keep,    h.type_k, h.type_v,
                               h.n_past,           h.fingerprint, h.model_tag, h.n_user };
        const es_bytes & u = sections[ES_TAG_USER];
        if (user && !u.empty()) {
            memcpy(user, u.data(), std::min(n_user, u.size()));
        }
        return ES_OK;
    });
}

int32_t es_session_load(es_stream * stream, int32_t type_k, int32_t type_v, const char * path) {
    ES_REQUIRE(stream);
    ES_REQUIRE(path);
    return es_guard([&]() -> int32_t {
        es_sections      sections;
        es_session_head  h;
        es_window::state toks;
        es_sampler_state smpl;

        int32_t rc = es_session_read(path, 0, sections, h);
        if (rc == ES_OK) {
            rc = check_model(*stream, h, type_k, type_v, path);
        }
        if (rc != ES_OK) {
            return rc;
        }
        if (!es_unpack(sections[ES_TAG_TOKS], toks) || toks.n_past != h.n_past ||
            (!sections[ES_TAG_SMPL].empty() && !es_unpack(sections[ES_TAG_SMPL], smpl))) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: a section cannot be read", path);
        }
        const int32_t n_vocab = stream->n_vocab();
        const auto    foreign = [&](llama_token t) { return t < 0 || t >= n_vocab; };
        if (std::any_of(toks.tokens.begin(), toks.tokens.end(), foreign) ||
            std::any_of(toks.recalled.begin(), toks.recalled.end(), foreign) ||
            std::any_of(smpl.last.begin(), smpl.last.end(), foreign)) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: it holds a token outside the vocabulary", path);
        }
        if (h.sink_move == ES_SINK_MOVE_BANK && h.n_keep > 0 && toks.tokens.size() >= h.n_keep &&
            sections[ES_TAG_BANK].empty()) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: its pinned sinks are missing", path);
        }
        const es_bytes & lgts = sections[ES_TAG_LGTS];
        if (!lgts.empty() && lgts.size() != (size_t) n_vocab * sizeof(float)) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: its logits are not those of this vocabulary", path);
        }
        std::vector<float> logits(lgts.size() / sizeof(float));
        std::copy(lgts.begin(), lgts.end(), (uint8_t *) logits.data());
        std::unique_ptr<es_sampler_state> sampler;
        if (!sections[ES_TAG_SMPL].empty()) {
            sampler = std::make_unique<es_sampler_state>(std::move(smpl));
        }
        rc = restore(*stream, h, toks, sections[ES_TAG_BANK], sections[ES_TAG_KEYS]);
        if (rc == ES_OK) { // no memory is taken any more
            stream->last_logits   = std::move(logits);
            stream->saved_sampler = std::move(sampler);
        }
        return rc;
    });
}
