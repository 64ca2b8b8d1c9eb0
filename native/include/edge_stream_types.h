// edge_stream_types.h: shared by edge_stream.h (a stream over your llama_context) and edge_stream_app.h (everything an
// app needs). Include one of those instead.
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ES_API __declspec(dllexport)
#else
#define ES_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum es_status {
    ES_OK              = 0,
    ES_ERR_INVALID     = -1,  // an argument is out of range; nothing changed
    ES_ERR_UNSUPPORTED = -2,  // the model or context cannot stream; nothing changed
    ES_ERR_MEMORY      = -3,  // out of memory; nothing changed unless stated otherwise
    ES_ERR_DECODE      = -4,  // llama_decode failed; the stream holds every complete chunk before the failure
    ES_ERR_STOPPED     = -5,  // a callback asked to stop; the stream holds every token reported to it
    ES_ERR_IO          = -6,  // a file could not be read or written; an existing file is untouched
    ES_ERR_NO_SPACE    = -7,  // the disk is full; an existing file is untouched
    ES_ERR_FORMAT      = -8,  // not a session file, truncated or damaged; the stream is unchanged
    ES_ERR_VERSION     = -9,  // the session file is of a newer version; the stream is unchanged
    ES_ERR_MODEL       = -10, // the session file belongs to another model or cache type; the stream is unchanged
    ES_ERR_INTERNAL    = -11  // a bug in edge-stream
} es_status;

// How the sinks' keys follow the window.
typedef enum es_sink_move {
    ES_SINK_MOVE_AUTO     = 0, // the bank if libllama has it, else redecode
    ES_SINK_MOVE_BANK     = 1, // re-derived from pristine float32 copies (patched libllama)
    ES_SINK_MOVE_REDECODE = 2, // decoded again at the new positions (public llama.cpp API only)
    ES_SINK_MOVE_NONE     = 3  // not moved: an es_decoder handles positions itself, or the model has no keys
} es_sink_move;

ES_API const char * es_version(void);
ES_API const char * es_status_name(int32_t status);
ES_API const char * es_last_error(void); // of this thread; "" if none; valid until its next failing call

typedef struct es_stream_stats {
    int64_t  n_past;      // tokens seen since the stream's start
    int64_t  n_evicted;   // tokens evicted; n_past = n_cached + n_evicted
    int64_t  n_slides;    // evictions (each may evict several tokens)
    int64_t  n_rebases;   // times absolute positions were brought back to small numbers
    int64_t  t_slide_us;  // time in slides (bookkeeping and, for redecode, decoding the sinks)
    int64_t  t_rebase_us; // time in rebases
    int64_t  t_decode_us; // time in decodes of the stream's own tokens (bank: the sinks move inside this)
    uint32_t n_ctx;       // cache capacity
    uint32_t n_keep;      // sinks wanted
    uint32_t n_sinks;     // sinks present: min(n_keep, n_past)
    uint32_t n_window;    // window tokens present
    uint32_t n_chunk;     // most tokens per decode once eviction began
    uint32_t n_slide;     // least tokens per slide
    int32_t  pos_next;    // absolute position of the next token (what llama_decode will see)
    int32_t  pos_sinks;   // absolute position of the first sink
    int32_t  sink_move;   // es_sink_move in use, never AUTO
} es_stream_stats;

typedef struct es_logit_bias {
    int32_t token;
    float   bias;
} es_logit_bias;

typedef struct es_sampler_params {
    uint32_t              seed;           // 0xffffffff: random (default)
    float                 temp;           // <= 0: greedy (default 0.8)
    int32_t               top_k;          // <= 0: off (default 40)
    float                 top_p;          // 1: off (default 0.95)
    float                 min_p;          // 0: off (default 0.05)
    float                 repeat_penalty; // 1: off (default 1)
    int32_t               repeat_last_n;  // tokens that penalties consider; 0: off, at most 4096 (default 64)
    float                 frequency_penalty;
    float                 presence_penalty;
    const es_logit_bias * logit_bias;
    size_t                n_logit_bias;
    const char *          grammar;      // GBNF; NULL: none
    const char *          grammar_root; // NULL: "root"
    const char *          chat;         // es_chat_request_info's "sampling" instead of a grammar; NULL: none
} es_sampler_params;

ES_API es_sampler_params es_sampler_default_params(void);

#ifdef __cplusplus
}
#endif
