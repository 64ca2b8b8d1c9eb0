// edge_stream_recall.h: what was said, kept as text on disk, and found again when it has left the window.
//
// A log is a list of entries, each a line or sentence of a turn. It needs no model. It is searched by words (BM25, see
// es_log_search), in two passes over hashes: a few milliseconds for a million tokens. Its file is mapped meanwhile; in
// between, a log with a file takes no memory.
//
// Conventions: those of edge_stream.h. Text is UTF-8.
#pragma once

#include "edge_stream_types.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct es_log es_log;

typedef enum es_log_kind {
    ES_LOG_TEXT      = 0, // of no one in particular
    ES_LOG_USER      = 1,
    ES_LOG_ASSISTANT = 2
} es_log_kind;

typedef struct es_log_stats {
    int64_t  n_turns;   // one more than the newest turn's number, whether or not that had any text or was forgotten
    int64_t  n_entries; // kept
    int64_t  n_dropped; // entries that the space limit has dropped since it was opened, the oldest first
    uint64_t n_bytes;   // of the file
} es_log_stats;

// Opens the log at path, or makes it there, readable by its owner only; NULL: in memory. max_bytes: of the file; beyond
// that the oldest quarter is dropped (0: 64 MiB). A file that a crash has cut is read up to its last whole entry.
// ES_ERR_FORMAT: it is damaged elsewhere, or no log; ES_ERR_VERSION: of a newer edge-stream. Nothing is written then.
ES_API int32_t es_log_open(const char * path, uint64_t max_bytes, es_log ** out);
ES_API void    es_log_close(es_log * log); // NULL is fine

// Adds a turn as entries of at most about 160 bytes: its lines, long ones cut at ends of sentences or between words.
// turn: its number, which is not below that of any entry. kind: es_log_kind. when: seconds since 1970. What is added is
// in the file when this returns (a crash of the process loses nothing; es_log_sync makes it survive a loss of power).
// On failure nothing was added.
ES_API int32_t es_log_append(es_log * log, int64_t turn, int32_t kind, int64_t when, const char * text, size_t n_text);
ES_API int32_t es_log_sync(es_log * log);

// Keeps the turns before n_turns: for answers that are taken back.
ES_API int32_t es_log_truncate(es_log * log, int64_t n_turns);

// A copy at path (NULL: in memory) with the turns before n_turns, for a conversation that branches off.
ES_API int32_t es_log_fork(const es_log * log, const char * path, int64_t n_turns, es_log ** out);

// Deletes the entries of a turn from the log and its file, which then has an empty one in their place, so that the turn
// is not taken for one that is yet to be written. ES_ERR_INVALID if there are none.
ES_API int32_t es_log_forget(es_log * log, int64_t turn);

ES_API es_log_stats es_log_get_stats(const es_log * log);

// An entry that was found.
typedef struct es_log_hit {
    int64_t      turn;
    int32_t      kind; // es_log_kind
    int64_t      when;
    double       score;
    double       coverage; // share of the query's words that it and the entry before it have, weighted by their rarity
    int32_t      belongs;  // 1: it may come back for this text, see es_log_search
    const char * text;     // valid until the next search; 0-terminated
} es_log_hit;

// The best n entries of turns before n_turns, best first; the newer one where they are equal. An entry is judged by its
// own words, and with less weight by those of the entry before it; of a long text the 64 rarest words count. Returns
// their number. An entry belongs to the text if its coverage is at least 0.6 (0.4 if the text speaks of its writer: I,
// my, ...), and if it is neither a question nor a user's sentence that begins like one of the text: an earlier request
// like this one is no answer to it.
ES_API size_t es_log_search(es_log * log, const char * text, size_t n_text, int64_t n_turns, es_log_hit * out,
                            size_t n);

// What is to come back for a text, of turns before first_held: the later ones are still in the window. The best entry
// of all that belongs to it; none if that one is in the window, unless the assistant said it, who may have been asked
// in vain. Where the assistant only said again what the user had said, the user's words. Returns whether there is one.
ES_API bool es_log_recall(es_log * log, const char * text, size_t n_text, int64_t first_held, es_log_hit * out);

#ifdef __cplusplus
}
#endif
