// The session file. Little-endian:
//   magic[8] version:u32 n_sections:u32
//   per section: tag:u32 crc:u32 size:u64 bytes[size]     (crc over tag, size and bytes)
// HEAD describes, USER are the caller's bytes, TOKS the window's state, SMPL the sampler, LGTS the last logits,
// BANK the pinned keys, KEYS llama.cpp's state of the sequence. HEAD and USER come first, so that a peek reads little.
#include "error.h"
#include "sampler.h"
#include "sink_mover.h"
#include "stream.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <map>
#include <string>
#include <sys/stat.h>
#include <unistd.h>

namespace {

constexpr char     magic[8] = { 'E', 'D', 'G', 'E', 'S', 'E', 'S', 'S' };
constexpr uint32_t version  = 1;

constexpr uint32_t tag(const char (&s)[5]) {
    return (uint32_t) s[0] | (uint32_t) s[1] << 8 | (uint32_t) s[2] << 16 | (uint32_t) s[3] << 24;
}
constexpr uint32_t HEAD = tag("HEAD"), USER = tag("USER"), TOKS = tag("TOKS"), SMPL = tag("SMPL"), LGTS = tag("LGTS"),
                   BANK = tag("BANK"), KEYS = tag("KEYS");

using bytes = std::vector<uint8_t>;

struct head {
    uint32_t n_ctx, n_keep;
    int32_t  type_k, type_v;
    int64_t  n_past;
    uint64_t fingerprint, model_tag, n_user;
    int32_t  rebase_at, sink_move;
    uint32_t n_slide, n_chunk, n_boundary, reserved;
};

// CRC-32 (ISO-HDLC polynomial), as in zip and PNG; eight bytes per step, with a table for each ("slicing by 8",
// Kounavis and Berry 2005), since a cache of many MiB goes through it after every turn of a served conversation.
uint32_t crc32(uint32_t crc, const void * data, size_t n) {
    using tables          = std::array<std::array<uint32_t, 256>, 8>;
    static const tables t = [] {
        tables out;
        for (uint32_t i = 0; i < 256; ++i) {
            uint32_t c = i;
            for (int k = 0; k < 8; ++k) {
                c = (c & 1) ? 0xedb88320u ^ (c >> 1) : c >> 1;
            }
            out[0][i] = c;
        }
        for (uint32_t i = 0; i < 256; ++i) {
            for (size_t k = 1; k < 8; ++k) {
                out[k][i] = out[0][out[k - 1][i] & 0xff] ^ (out[k - 1][i] >> 8);
            }
        }
        return out;
    }();
    const auto * p = (const uint8_t *) data;
    crc            = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        const uint32_t low =
            crc ^ ((uint32_t) p[0] | (uint32_t) p[1] << 8 | (uint32_t) p[2] << 16 | (uint32_t) p[3] << 24);
        crc = t[7][low & 0xff] ^ t[6][low >> 8 & 0xff] ^ t[5][low >> 16 & 0xff] ^ t[4][low >> 24] ^ t[3][p[4]] ^
              t[2][p[5]] ^ t[1][p[6]] ^ t[0][p[7]];
    }
    for (; n > 0; --n, ++p) {
        crc = t[0][(crc ^ *p) & 0xff] ^ (crc >> 8);
    }
    return ~crc;
}

uint32_t section_crc(uint32_t t, uint64_t size, const void * data) {
    uint32_t crc = crc32(0, &t, sizeof(t));
    crc          = crc32(crc, &size, sizeof(size));
    return crc32(crc, data, size);
}

//
// writing
//

struct file_closer {
    void operator()(FILE * f) const { fclose(f); }
};
using file = std::unique_ptr<FILE, file_closer>;

int32_t io_error(const char * what, const std::string & path) {
    const int e = errno;
    if (e == ENOSPC || e == EDQUOT || e == EFBIG) {
        return es_fail(ES_ERR_NO_SPACE, "%s %s: the disk is full", what, path.c_str());
    }
    return es_fail(ES_ERR_IO, "%s %s: %s", what, path.c_str(), strerror(e));
}

bool put(FILE * f, const void * data, size_t n) {
    return n == 0 || fwrite(data, 1, n, f) == n;
}

bool put_section(FILE * f, uint32_t t, const void * data, uint64_t size) {
    const uint32_t crc = section_crc(t, size, data);
    return put(f, &t, sizeof(t)) && put(f, &crc, sizeof(crc)) && put(f, &size, sizeof(size)) && put(f, data, size);
}

// The rename is on disk only when the folder is.
void sync_folder(const std::string & path) {
    const size_t      slash  = path.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
    const int         fd     = open(folder.c_str(), O_RDONLY);
    if (fd >= 0) {
        (void) fsync(fd);
        close(fd);
    }
}

template <typename T>
void append(bytes & out, const T * data, size_t n) {
    const auto * p = (const uint8_t *) data;
    out.insert(out.end(), p, p + n * sizeof(T));
}

bytes pack_window(const es_window::state & s) {
    bytes          out;
    const uint64_t n_tokens = s.tokens.size(), n_marks = s.marks.size();
    append(out, &s.n_past, 1);
    append(out, &s.base, 1);
    append(out, &n_tokens, 1);
    append(out, s.tokens.data(), s.tokens.size());
    append(out, &n_marks, 1);
    append(out, s.marks.data(), s.marks.size());
    return out;
}

bytes pack_sampler(const es_sampler::state & s) {
    bytes          out;
    const uint64_t n = s.last.size();
    append(out, &s.seed, 1);
    append(out, &s.n_draw, 1);
    append(out, &n, 1);
    append(out, s.last.data(), s.last.size());
    return out;
}

//
// reading
//

// Takes values off the front of a byte array; ok turns false at the first that is not there.
struct reader {
    const bytes & data;
    size_t        off = 0;
    bool          ok  = true;

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

bool unpack_window(const bytes & data, es_window::state & s) {
    reader r{ data };
    r.get(&s.n_past, 1);
    r.get(&s.base, 1);
    r.get_vector(s.tokens);
    r.get_vector(s.marks);
    return r.done();
}

bool unpack_sampler(const bytes & data, es_sampler::state & s) {
    reader r{ data };
    r.get(&s.seed, 1);
    r.get(&s.n_draw, 1);
    r.get_vector(s.last);
    return r.done();
}

// Reads the sections of a session file; with only_head, HEAD and USER. Verifies every checksum it passes.
int32_t read_sections(const char * path, bool only_head, std::map<uint32_t, bytes> & out) {
    file        f{ fopen(path, "rb") };
    struct stat st;
    if (!f || fstat(fileno(f.get()), &st) != 0) {
        return io_error("cannot open session", path);
    }
    if (!S_ISREG(st.st_mode)) {
        return es_fail(ES_ERR_IO, "cannot open session %s: not a regular file", path);
    }
    uint64_t   left = (uint64_t) st.st_size;
    const auto get  = [&](void * dst, uint64_t n) {
        if (n > left || (n > 0 && fread(dst, 1, n, f.get()) != n)) {
            return false;
        }
        left -= n;
        return true;
    };
    // a file that cannot be read now is not a damaged one
    const auto cut_short = [&](const char * what) {
        return ferror(f.get()) ? io_error("cannot read session", path)
                               : es_fail(ES_ERR_FORMAT, "session %s is damaged: %s cut short", path, what);
    };
    char     m[sizeof(magic)];
    uint32_t v = 0, n_sections = 0;
    if (!get(m, sizeof(m)) && ferror(f.get())) {
        return io_error("cannot read session", path);
    }
    if (left + sizeof(m) != (uint64_t) st.st_size || memcmp(m, magic, sizeof(m)) != 0) {
        return es_fail(ES_ERR_FORMAT, "%s is not an edge-stream session", path);
    }
    if (!get(&v, sizeof(v)) || !get(&n_sections, sizeof(n_sections)) || v == 0) {
        return cut_short("its header is");
    }
    if (v > version) {
        return es_fail(ES_ERR_VERSION, "session %s is of version %u; this edge-stream reads up to version %u", path, v,
                       version);
    }
    for (uint32_t i = 0; i < n_sections && !(only_head && i == 2); ++i) {
        uint32_t t, crc;
        uint64_t size;
        if (!get(&t, sizeof(t)) || !get(&crc, sizeof(crc)) || !get(&size, sizeof(size)) || size > left) {
            return cut_short("it is");
        }
        bytes data(size);
        if (!get(data.data(), size)) {
            return cut_short("it is");
        }
        if (section_crc(t, size, data.data()) != crc) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: a checksum does not match", path);
        }
        out[t] = std::move(data);
    }
    if (!only_head && left != 0) {
        return es_fail(ES_ERR_FORMAT, "session %s is damaged: bytes follow its end", path);
    }
    return ES_OK;
}

int32_t get_head(const char * path, const std::map<uint32_t, bytes> & sections, head & h) {
    const auto it = sections.find(HEAD);
    if (it == sections.end() || it->second.size() != sizeof(head) || sections.count(USER) == 0) {
        return es_fail(ES_ERR_FORMAT, "session %s is damaged: a section is missing", path);
    }
    memcpy(&h, it->second.data(), sizeof(h));
    if (h.n_user != sections.at(USER).size()) {
        return es_fail(ES_ERR_FORMAT, "session %s is damaged: its header contradicts its content", path);
    }
    return ES_OK;
}

const char * type_name(int32_t type) {
    return type >= 0 && type < GGML_TYPE_COUNT ? ggml_type_name((ggml_type) type) : "unknown";
}

int32_t check_model(const es_stream & stream, const head & h, int32_t type_k, int32_t type_v, const char * path) {
    const uint64_t fingerprint = es_model_fingerprint(stream.model);
    if (h.fingerprint != fingerprint || h.model_tag != stream.params.model_tag) {
        return es_fail(ES_ERR_MODEL, "session %s belongs to another model", path);
    }
    if (h.type_k != type_k || h.type_v != type_v) {
        return es_fail(ES_ERR_MODEL, "session %s was made with cache types K %s, V %s; this one has K %s, V %s", path,
                       type_name(h.type_k), type_name(h.type_v), type_name(type_k), type_name(type_v));
    }
    if (h.n_keep > 0 && h.sink_move != stream.params.sink_move) {
        return es_fail(ES_ERR_MODEL, "session %s was made with the other way of moving sinks (--sink-move)", path);
    }
    return ES_OK;
}

using section_list = std::vector<std::pair<uint32_t, const bytes *>>;

int32_t write_file(const char * path, const head & h, const bytes & user, const section_list & rest) {
    const std::string tmp = std::string(path) + ".tmp-" + std::to_string(getpid());
    file              f{ fopen(tmp.c_str(), "wb") };
    if (!f) {
        return io_error("cannot write session", path);
    }
    const uint32_t n_sections = 2 + (uint32_t) rest.size();
    bool           ok         = put(f.get(), magic, sizeof(magic)) && put(f.get(), &version, sizeof(version)) &&
              put(f.get(), &n_sections, sizeof(n_sections)) && put_section(f.get(), HEAD, &h, sizeof(h)) &&
              put_section(f.get(), USER, user.data(), user.size());
    for (const auto & [t, data] : rest) {
        ok = ok && put_section(f.get(), t, data->data(), data->size());
    }
    ok = ok && fflush(f.get()) == 0 && fsync(fileno(f.get())) == 0;
    if (!ok || fclose(f.release()) != 0 || rename(tmp.c_str(), path) != 0) {
        const int32_t rc = io_error("cannot write session", path);
        unlink(tmp.c_str());
        return rc;
    }
    sync_folder(path);
    return ES_OK;
}

// Keys and values of what is cached.
bool get_keys(const es_stream & stream, bytes & out) {
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

// Everything is verified: replace the stream's content.
int32_t restore(es_stream & stream, const head & h, const es_window::state & toks, const bytes & bank,
                const bytes & keys) {
    es_window_params wanted;
    wanted.n_ctx      = h.n_ctx;
    wanted.n_keep     = h.n_keep;
    wanted.n_slide    = h.n_slide;
    wanted.n_chunk    = h.n_chunk;
    wanted.n_boundary = h.n_boundary;
    wanted.rebase_at  = h.rebase_at;
    const int32_t rc  = stream.resize(wanted, toks);
    if (rc != ES_OK || toks.tokens.empty()) {
        return rc;
    }
    const auto fail = [&](const char * why) {
        (void) stream.reset();
        return es_fail(ES_ERR_INTERNAL, "the session could not be restored: %s; the stream is empty now", why);
    };
    if (!stream.ctx) {
        const es_decoder_step now = stream.now();
        return stream.decoder.state_set(stream.decoder.user, &now, keys.data(), keys.size())
                   ? (int32_t) ES_OK
                   : fail("its cache does not fit");
    }
    if (llama_state_seq_set_data(stream.ctx, keys.data(), keys.size(), stream.params.seq_id) != keys.size()) {
        return fail("llama.cpp refused the cache");
    }
    const llama_pos p0 = llama_memory_seq_pos_min(stream.mem, stream.params.seq_id);
    const llama_pos p1 = llama_memory_seq_pos_max(stream.mem, stream.params.seq_id);
    // a state has one position, its last
    if ((p0 != stream.window.pos_sinks() && !stream.stateful) || p1 + 1 != stream.window.pos_next()) {
        return fail("its cache holds other positions");
    }
    if (stream.mover->set_state(bank, stream.window.sinks()) != ES_OK) {
        return fail("the pinned sinks do not fit");
    }
    return stream.keep_state();
}

} // namespace

// Everything that a session file holds.
struct es_snapshot {
    head  h;
    bytes user, toks, smpl, lgts, bank, keys;

    section_list rest() const {
        return { { TOKS, &toks }, { SMPL, &smpl }, { LGTS, &lgts }, { BANK, &bank }, { KEYS, &keys } };
    }
};

namespace {

int32_t take_snapshot(const es_stream & stream, const es_sampler * sampler, int32_t type_k, int32_t type_v,
                      const void * user, size_t n_user, es_snapshot & out) {
    const es_window & w = stream.window;
    if (w.n_past() > 0 && w.n_sinks() < w.params().n_keep) {
        return es_fail(ES_ERR_INVALID, "the stream holds only %u of its %u sinks: feed them before saving", w.n_sinks(),
                       w.params().n_keep);
    }
    out.h = {
        w.params().n_ctx,
        w.params().n_keep,
        type_k,
        type_v,
        w.n_past(),
        es_model_fingerprint(stream.model),
        stream.params.model_tag,
        n_user,
        w.params().rebase_at,
        stream.params.sink_move,
        w.params().n_slide,
        w.params().n_chunk,
        w.params().n_boundary,
        0,
    };
    if (!stream.mover->can_save() || stream.state_lost) {
        return es_fail(ES_ERR_INVALID, "the last decode failed: feed a token before saving");
    }
    const int32_t rc = stream.mover->get_state(out.bank);
    if (rc != ES_OK) {
        return rc;
    }
    if (!get_keys(stream, out.keys)) {
        return es_fail(ES_ERR_INTERNAL, "the cache could not be copied");
    }
    if (es_check_devices(stream.ctx) != ES_OK) {
        return ES_ERR_DECODE; // what was read is not the cache
    }
    append(out.user, (const uint8_t *) user, n_user);
    out.toks = pack_window(w.get_state());
    // a state that waits for its sampler since an earlier load is kept
    out.smpl = sampler                ? pack_sampler(sampler->get_state())
               : stream.saved_sampler ? pack_sampler(*stream.saved_sampler)
                                      : bytes();
    if (const float * logits = stream.logits()) {
        append(out.lgts, logits, (size_t) stream.n_vocab());
    }
    return ES_OK;
}

} // namespace

int32_t es_snapshot_init(const es_stream * stream, const es_sampler * sampler, int32_t type_k, int32_t type_v,
                         const void * user, size_t n_user, es_snapshot ** out) {
    if (!stream || !out || (n_user > 0 && !user)) {
        return es_fail(ES_ERR_INVALID, "stream, user and out must not be null");
    }
    if (stream->broken) {
        return es_fail(ES_ERR_INTERNAL, "the stream's cache is undefined after an earlier failure: reset it");
    }
    return es_guard([&]() -> int32_t {
        auto          snapshot = std::make_unique<es_snapshot>();
        const int32_t rc       = take_snapshot(*stream, sampler, type_k, type_v, user, n_user, *snapshot);
        if (rc == ES_OK) {
            *out = snapshot.release();
        }
        return rc;
    });
}

uint64_t es_snapshot_size(const es_snapshot * snapshot) {
    constexpr uint64_t section = sizeof(uint32_t) + sizeof(uint32_t) + sizeof(uint64_t); // tag, crc, size
    uint64_t           n       = sizeof(magic) + 2 * sizeof(uint32_t) + 2 * section + sizeof(head);
    n += snapshot->user.size();
    for (const auto & [t, data] : snapshot->rest()) {
        n += section + data->size();
    }
    return n;
}

int32_t es_snapshot_write(const es_snapshot * snapshot, const char * path) {
    if (!snapshot || !path) {
        return es_fail(ES_ERR_INVALID, "snapshot and path must not be null");
    }
    return es_guard([&] { return write_file(path, snapshot->h, snapshot->user, snapshot->rest()); });
}

void es_snapshot_free(es_snapshot * snapshot) {
    delete snapshot;
}

int32_t es_session_save(const es_stream * stream, const es_sampler * sampler, int32_t type_k, int32_t type_v,
                        const char * path, const void * user, size_t n_user) {
    es_snapshot * snapshot = nullptr;
    int32_t       rc       = es_snapshot_init(stream, sampler, type_k, type_v, user, n_user, &snapshot);
    if (rc == ES_OK) {
        rc = es_snapshot_write(snapshot, path);
        es_snapshot_free(snapshot);
    }
    return rc;
}

int32_t es_session_peek(const char * path, es_session_info * info, void * user, size_t n_user) {
    if (!path || !info) {
        return es_fail(ES_ERR_INVALID, "path and info must not be null");
    }
    return es_guard([&]() -> int32_t {
        std::map<uint32_t, bytes> sections;
        head                      h;
        int32_t                   rc = read_sections(path, true, sections);
        if (rc == ES_OK) {
            rc = get_head(path, sections, h);
        }
        if (rc != ES_OK) {
            return rc;
        }
        *info = { version, h.n_ctx, h.n_keep, h.type_k, h.type_v, h.n_past, h.fingerprint, h.model_tag, h.n_user };
        const bytes & u = sections[USER];
        if (user && !u.empty()) {
            memcpy(user, u.data(), std::min(n_user, u.size()));
        }
        return ES_OK;
    });
}

int32_t es_session_load(es_stream * stream, int32_t type_k, int32_t type_v, const char * path) {
    if (!stream || !path) {
        return es_fail(ES_ERR_INVALID, "stream and path must not be null");
    }
    return es_guard([&]() -> int32_t {
        std::map<uint32_t, bytes> sections;
        head                      h;
        es_window::state          toks;
        es_sampler::state         smpl;

        int32_t rc = read_sections(path, false, sections);
        if (rc == ES_OK) {
            rc = get_head(path, sections, h);
        }
        if (rc == ES_OK) {
            rc = check_model(*stream, h, type_k, type_v, path);
        }
        if (rc != ES_OK) {
            return rc;
        }
        if (!unpack_window(sections[TOKS], toks) || toks.n_past != h.n_past ||
            (!sections[SMPL].empty() && !unpack_sampler(sections[SMPL], smpl))) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: a section cannot be read", path);
        }
        const int32_t n_vocab = stream->n_vocab();
        const auto    foreign = [&](llama_token t) { return t < 0 || t >= n_vocab; };
        if (std::any_of(toks.tokens.begin(), toks.tokens.end(), foreign) ||
            std::any_of(smpl.last.begin(), smpl.last.end(), foreign)) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: it holds a token outside the vocabulary", path);
        }
        if (h.sink_move == ES_SINK_MOVE_BANK && h.n_keep > 0 && !toks.tokens.empty() && sections[BANK].empty()) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: its pinned sinks are missing", path);
        }
        const bytes & lgts = sections[LGTS];
        if (!lgts.empty() && lgts.size() != (size_t) n_vocab * sizeof(float)) {
            return es_fail(ES_ERR_FORMAT, "session %s is damaged: its logits are not those of this vocabulary", path);
        }
        rc = restore(*stream, h, toks, sections[BANK], sections[KEYS]);
        if (rc == ES_OK) {
            stream->last_logits.resize(lgts.size() / sizeof(float));
            std::copy(lgts.begin(), lgts.end(), (uint8_t *) stream->last_logits.data());
        }
        if (rc == ES_OK && !sections[SMPL].empty()) {
            stream->saved_sampler = std::make_unique<es_sampler_state>(std::move(smpl));
        }
        return rc;
    });
}
