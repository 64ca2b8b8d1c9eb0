#include "session_format.h"

#include "error.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

template <typename T>
void append(es_bytes & out, const T * data, size_t n) {
    const auto * p = (const uint8_t *) data;
    out.insert(out.end(), p, p + n * sizeof(T));
}

// Reads values from the front of a byte array; ok becomes false at the first one missing.
struct reader {
    const es_bytes & data;
    size_t           off = 0;
    bool             ok  = true;

    template <typename T>
    void get(T * out, uint64_t n) {
        if (!ok || n > (data.size() - off) / sizeof(T)) {
            ok = false;
            return;
        }
        if (n > 0) {
            memcpy(out, data.data() + off, n * sizeof(T));
        }
        off += n * sizeof(T);
    }
    template <typename T>
    void get_vector(std::vector<T> & out) {
        uint64_t n = 0;
        get(&n, 1);
        if (!ok || n > (data.size() - off) / sizeof(T)) {
            ok = false;
            return;
        }
        out.resize(n);
        get(out.data(), n);
    }
    bool done() const { return ok && off == data.size(); }
};

} // namespace

int32_t es_session_read(const char * path, uint32_t n, es_sections & sections, es_session_head & h) {
    const int32_t rc = es_session_read(path, n, sections);
    if (rc != ES_OK) {
        return rc;
    }
    const auto it = sections.find(ES_TAG_HEAD);
    if (it == sections.end() || it->second.size() != sizeof(h) || sections.count(ES_TAG_USER) == 0) {
        return es_fail(ES_ERR_FORMAT, "session %s is damaged: a section is missing", path);
    }
    memcpy(&h, it->second.data(), sizeof(h));
    if (h.n_user != sections.at(ES_TAG_USER).size()) {
        return es_fail(ES_ERR_FORMAT, "session %s is damaged: its header contradicts its content", path);
    }
    return ES_OK;
}

es_bytes es_pack(const es_window::state & s) {
    es_bytes       out;
    const uint64_t n_tokens = s.tokens.size(), n_marks = s.marks.size();
    append(out, &s.n_past, 1);
    append(out, &s.base, 1);
    append(out, &n_tokens, 1);
    append(out, s.tokens.data(), s.tokens.size());
    append(out, &n_marks, 1);
    append(out, s.marks.data(), s.marks.size());
    if (!s.recalled.empty()) {
        const uint64_t n_recalled = s.recalled.size();
        append(out, &n_recalled, 1);
        append(out, s.recalled.data(), s.recalled.size());
    }
    return out;
}

es_bytes es_pack(const es_sampler_state & s) {
    es_bytes       out;
    const uint64_t n = s.last.size();
    append(out, &s.seed, 1);
    append(out, &s.n_draw, 1);
    append(out, &n, 1);
    append(out, s.last.data(), s.last.size());
    const uint64_t n_aim = s.aim.size();
    append(out, &n_aim, 1);
    append(out, s.aim.data(), s.aim.size());
    return out;
}

bool es_unpack(const es_bytes & data, es_window::state & s) {
    reader r{ data };
    r.get(&s.n_past, 1);
    r.get(&s.base, 1);
    r.get_vector(s.tokens);
    r.get_vector(s.marks);
    if (!r.done()) {
        r.get_vector(s.recalled);
    }
    return r.done();
}

bool es_unpack(const es_bytes & data, es_sampler_state & s) {
    reader r{ data };
    r.get(&s.seed, 1);
    r.get(&s.n_draw, 1);
    r.get_vector(s.last);
    if (!r.done()) { // files of version 1 end here
        r.get_vector(s.aim);
    }
    return r.done() && std::all_of(s.aim.begin(), s.aim.end(), [](float x) { return std::isfinite(x); });
}
