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
    ES_ERR_DECODE      = -4,  // llama_decode failed, and every complete chunk before that is held; or it computed NaN
    ES_ERR_STOPPED     = -5,  // a callback or a limit of time stopped it; the stream holds every token reported
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
    int64_t  n_past;       // tokens seen since the stream's start
    int64_t  n_evicted;    // tokens evicted; n_past = n_cached + n_evicted
    int64_t  n_slides;     // evictions (each may evict several tokens)
    int64_t  n_rebases;    // times absolute positions were brought back to small numbers
    int64_t  t_slide_us;   // time in slides (bookkeeping and, for redecode, decoding the sinks)
    int64_t  t_rebase_us;  // time in rebases
    int64_t  t_decode_us;  // time in decodes of the stream's own tokens (bank: the sinks move inside this)
    uint32_t n_ctx;        // cache capacity
    uint32_t n_keep;       // sinks wanted
    uint32_t n_sinks;      // sinks present: min(n_keep, n_past)
    uint32_t n_window;     // window tokens present
    uint32_t n_chunk;      // most tokens per decode once eviction began
    uint32_t n_slide;      // least tokens per slide
    int32_t  pos_next;     // absolute position of the next token (what llama_decode will see)
    int32_t  pos_sinks;    // absolute position of the first sink
    int32_t  sink_move;    // es_sink_move in use, never AUTO
    int64_t  n_drafts;     // decodes of a token and guesses of what follows it
    int64_t  n_drafted;    // these guesses
    int64_t  n_accepted;   // those that came true
    uint32_t n_recalled;   // recalled tokens between sinks and window; in none of the other counts
    uint32_t n_recall_max; // most tokens that can be; 0: none, see es_stream_recall
} es_stream_stats;

typedef struct es_logit_bias {
    int32_t token;
    float   bias;
} es_logit_bias;

// Names, defaults and order of samplers are llama.cpp's.
typedef struct es_sampler_params {
    uint32_t seed;            // 0xffffffff: random (default)
    float    temp;            // <= 0: greedy (default 0.8)
    int32_t  top_k;           // <= 0: off (default 40)
    float    top_p;           // 1: off (default 0.95)
    float    min_p;           // 0: off (default 0.05)
    float    typical_p;       // 1: off (default)
    float    top_n_sigma;     // <= 0: off (default -1)
    int32_t  min_keep;        // tokens that top_p, min_p, typical_p and XTC leave at least (default 0)
    float    xtc_probability; // with which the likeliest tokens are dropped; 0: off (default)
    float    xtc_threshold;   // that their probability reaches; above 0.5: off (default 0.1)
    float    dynatemp_range;  // the temperature follows the entropy from temp - range to temp + range; 0: off (default)
    float    dynatemp_exponent; // how it follows (default 1)
    float    repeat_penalty;    // 1: off (default 1)
    int32_t  repeat_last_n;     // tokens that penalties consider; 0: off, -1: n_ctx, at most 2^20 (default 64)
    float    frequency_penalty;
    float    presence_penalty;
    float    dry_multiplier;     // penalty of a token that continues a repetition; 0: off (default)
    float    dry_base;           // it grows by this per repeated token (default 1.75; below 1: off)
    int32_t  dry_allowed_length; // repeated tokens without a penalty (default 2)
    int32_t  dry_penalty_last_n; // tokens that are searched; 0: off, -1: n_ctx, at most 2^20 (default 64)
    int32_t  mirostat;           // 1 or 2, instead of all samplers but temp; 0: off (default)
    float    mirostat_tau;       // entropy aimed at (default 5)
    float    mirostat_eta;       // learning rate (default 0.1)
    float    adaptive_target;    // with adaptive_p in samplers: the probability aimed at; negative: off (default -1)
    float    adaptive_decay;     // 0 to 0.99 (default 0.9)
    uint32_t n_ctx;              // what -1 stands for (es_app_*: the session's)

    const es_logit_bias * logit_bias;
    size_t                n_logit_bias;
    const char * const *  dry_sequence_breakers; // texts of at most 40 bytes that end a repetition
    size_t                n_dry_sequence_breakers;
    // NULL: "penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature". There are also infill and adaptive_p.
    const char * samplers;
    const char * grammar;      // GBNF; NULL: none
    const char * grammar_root; // NULL: "root"
    const char * chat;         // es_chat_request_info's "sampling" instead of a grammar; NULL: none
} es_sampler_params;

ES_API es_sampler_params es_sampler_default_params(void);

// The newest n_tokens tokens of an answer repeat its newest period tokens over and over. period 0: they do not.
typedef struct es_loop {
    uint32_t period;
    uint32_t n_tokens;
} es_loop;

#ifdef __cplusplus
}
#endif
