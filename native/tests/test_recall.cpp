// The log under random use, and random damage to its file; for the sanitizers.
#include "edge_stream.h"
#include "edge_stream_recall.h"

#include <cassert>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>

namespace {

std::mt19937 draw(1);

std::string noise(size_t n) {
    static const char * const pieces[] = { "word",     "Wörter ", " the ", "running", "\n", ". ",    "漢字", "\xff",
                                           "\xe2\x82", "é",       "ЯЖ",    "x",       "? ", "1234 ", "",     " " };
    std::string               out;
    for (size_t i = 0; i < n; ++i) {
        out += pieces[draw() % std::size(pieces)];
    }
    return out;
}

std::string read(const char * path) {
    std::string out;
    FILE *      f = fopen(path, "rb");
    for (int c; f && (c = fgetc(f)) != EOF;) {
        out += (char) c;
    }
    if (f) {
        fclose(f);
    }
    return out;
}

void write(const char * path, const std::string & data) {
    FILE * f = fopen(path, "wb");
    assert(f && fwrite(data.data(), 1, data.size(), f) == data.size());
    fclose(f);
}

void search(es_log * log) {
    es_log_hit        hits[5];
    const std::string query = noise(draw() % 40);
    const size_t      n     = es_log_search(log, query.data(), query.size(), (int64_t) (draw() % 200), hits, 5);
    for (size_t i = 0; i < n; ++i) {
        assert(hits[i].coverage > 0 && hits[i].coverage < 1 + 1e-9 && strlen(hits[i].text) <= 160);
        assert(i == 0 || hits[i].score <= hits[i - 1].score);
    }
}

} // namespace

int main() {
    const char * path = "recall.log";
    remove(path);
    es_log * log  = nullptr;
    int64_t  turn = 0;
    assert(es_log_open(path, 20000, &log) == ES_OK);
    for (int i = 0; i < 3000; ++i) {
        const std::string text = noise(draw() % 60);
        switch (draw() % 8) {
        case 0:
            turn = std::max<int64_t>(0, turn - (int64_t) (draw() % 4));
            assert(es_log_truncate(log, turn) == ES_OK);
            break;
        case 1: (void) es_log_forget(log, turn - (int64_t) (draw() % 6)); break;
        case 2:
            es_log_close(log);
            assert(es_log_open(path, 20000, &log) == ES_OK);
            break;
        case 3: search(log); break;
        default: assert(es_log_append(log, turn++, (int32_t) (draw() % 3), i, text.data(), text.size()) == ES_OK);
        }
        assert(read(path).size() == es_log_get_stats(log).n_bytes && es_log_get_stats(log).n_bytes <= 20000);
    }
    es_log_close(log);

    const std::string good = read(path);
    for (int i = 0; i < 2000; ++i) { // refused, or read up to the damage
        std::string bad = good.substr(0, draw() % 3 ? good.size() : draw() % (good.size() + 1));
        for (size_t n = draw() % 3; n > 0 && !bad.empty(); --n) {
            bad[draw() % std::min<size_t>(bad.size(), draw() % 2 ? 64 : bad.size())] = (char) draw();
        }
        write(path, bad);
        if (es_log_open(path, 0, &log) == ES_OK) {
            search(log);
        }
        es_log_close(log);
        log = nullptr;
    }
    remove(path);
    puts("ok");
}
