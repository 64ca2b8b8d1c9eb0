// What a session's sections hold.
#pragma once

#include "sampler_state.h"
#include "session_file.h"
#include "window.h"

constexpr uint32_t es_fourcc(const char (&s)[5]) {
    return (uint32_t) s[0] | (uint32_t) s[1] << 8 | (uint32_t) s[2] << 16 | (uint32_t) s[3] << 24;
}

// In the order of the file: the first two come first, so that a peek reads little.
enum es_session_tag : uint32_t {
    ES_TAG_HEAD = es_fourcc("HEAD"), // es_session_head
    ES_TAG_USER = es_fourcc("USER"), // the caller's bytes
    ES_TAG_TOKS = es_fourcc("TOKS"), // the window's state
    ES_TAG_SMPL = es_fourcc("SMPL"), // the sampler's state, or nothing
    ES_TAG_LGTS = es_fourcc("LGTS"), // the last logits as f32, or nothing
    ES_TAG_BANK = es_fourcc("BANK"), // the pinned keys
    ES_TAG_KEYS = es_fourcc("KEYS"), // llama.cpp's state of the sequence, or the decoder's
};

struct es_session_head {
    uint32_t n_ctx, n_keep;
    int32_t  type_k, type_v;
    int64_t  n_past;
    uint64_t fingerprint, model_tag, n_user;
    int32_t  rebase_at, sink_move;
    uint32_t n_slide, n_chunk, n_boundary, reserved;
};

// HEAD of sections that hold HEAD and USER. Sets es_last_error.
int32_t es_get_head(const char * path, const es_sections & sections, es_session_head & out);

es_bytes es_pack(const es_window::state & state);
es_bytes es_pack(const es_sampler_state & state);

// False if data is not what es_pack returns.
bool es_unpack(const es_bytes & data, es_window::state & out);
bool es_unpack(const es_bytes & data, es_sampler_state & out);
