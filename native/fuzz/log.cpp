// Logs of what was said. Checksums of whole entries are put right before reading.
#include "fuzz.h"

#include <cassert>
#include <cstring>

namespace {

constexpr size_t n_header = 12, n_record = 16;

std::string put_right(std::string file) {
    for (size_t at = n_header; at + n_record <= file.size();) {
        uint16_t n_text = 0, n_words = 0;
        memcpy(&n_text, &file[at], 2);
        memcpy(&n_words, &file[at + 2], 2);
        const size_t n = 4 * (size_t) n_words + (n_text / 4 + 1) * 4;
        if (n > file.size() - at - n_record) {
            break;
        }
        uint32_t crc = fuzz_crc(0, &file[at], 4);
        crc          = fuzz_crc(crc, &file[at + 8], 8);
        crc          = fuzz_crc(crc, file.data() + at + n_record, n);
        memcpy(&file[at + 4], &crc, 4);
        at += n_record + n;
    }
    return file;
}

} // namespace

void fuzz_seeds() {
    const std::string path = fuzz_path("seed");
    es_log *          log  = nullptr;
    assert(es_log_open(path.c_str(), 0, &log) == ES_OK);
    const auto say = [&](int64_t turn, int32_t kind, const char * text) {
        assert(es_log_append(log, turn, kind, 1000 + turn, text, strlen(text)) == ES_OK);
    };
    say(0, ES_LOG_USER, "My sister Anna lives in Lisbon.\nShe has two cats. Their names are Mia and Tom.");
    say(1, ES_LOG_ASSISTANT, "How nice! Lisbon is on the Tagus.");
    say(2, ES_LOG_USER, "Where does my sister live?");
    say(3, ES_LOG_ASSISTANT, "");
    fuzz_seed("log", fuzz_read(path));
    es_log_close(log);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const fuzz_watch watch;

    if (size == 0) {
        return 0;
    }
    // the first byte says what is done with the log
    const uint8_t     how   = data[0];
    const std::string bytes = put_right({ (const char *) data + 1, size - 1 });
    const std::string path  = fuzz_file("log", (const uint8_t *) bytes.data(), bytes.size());
    es_log *          log   = nullptr;
    if (es_log_open(path.c_str(), how & 1 ? 400 : 0, &log) != ES_OK) {
        return 0;
    }
    const std::string query = bytes.size() > 40 ? bytes.substr(28, 60) : "Where does my sister Anna live?";
    es_log_hit        hits[4];
    const size_t      n = es_log_search(log, query.data(), query.size(), INT64_MAX, hits, 4);
    for (size_t i = 0; i < n; ++i) {
        (void) strlen(hits[i].text);
    }
    (void) es_log_recall(log, query.data(), query.size(), 1 << 20, hits);
    const es_log_stats before = es_log_get_stats(log);
    for (int64_t i = 0; i < 3; ++i) {
        (void) es_log_append(log, before.n_turns + i, ES_LOG_USER, 5, bytes.data(), bytes.size());
    }
    if (how & 2) {
        (void) es_log_forget(log, n > 0 ? hits[0].turn : 0);
    }
    if (how & 4) {
        (void) es_log_truncate(log, before.n_turns + 1);
    }
    es_log * other = nullptr;
    if ((how & 8) && es_log_fork(log, nullptr, before.n_turns, &other) == ES_OK) {
        (void) es_log_search(other, query.data(), query.size(), INT64_MAX, hits, 4);
        es_log_close(other);
    }
    const es_log_stats kept = es_log_get_stats(log);
    es_log_close(log);
    // what was written can be read again, and is the same
    assert(es_log_open(path.c_str(), 0, &log) == ES_OK);
    const es_log_stats again = es_log_get_stats(log);
    assert(again.n_turns == kept.n_turns && again.n_entries == kept.n_entries && again.n_bytes == kept.n_bytes);
    es_log_close(log);
    return 0;
}
