// Which models can stream, and the fingerprint of a model.
#include "support.h"

#include "aborts.h"
#include "edge_stream.h"
#include "ggml-cpp.h"
#include "llama-ext.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <sys/stat.h>
#include <vector>

std::string es_piece(const llama_vocab * vocab, llama_token token, bool special) {
    std::string   out(64, '\0');
    const int32_t n = llama_token_to_piece(vocab, token, out.data(), (int32_t) out.size(), 0, special);
    out.resize((size_t) std::abs(n));
    if (n < 0) {
        llama_token_to_piece(vocab, token, out.data(), -n, 0, special);
    }
    return out;
}

std::string es_model_meta(const llama_model * model, const std::string & key) {
    char buf[256];
    return llama_model_meta_val_str(model, key.c_str(), buf, sizeof(buf)) >= 0 ? buf : "";
}

namespace {

// null if the model can stream
const char * missing_property(const llama_model * model) {
    const std::string arch = es_model_meta(model, "general.architecture");
    const auto        has  = [&](const char * key) { return !es_model_meta(model, arch + key).empty(); };

    if (llama_model_has_encoder(model) || !llama_model_has_decoder(model)) {
        return "it has an encoder; only decoder-only models stream";
    }
    if (llama_model_is_diffusion(model)) {
        return "it is a diffusion model, not a causal decoder";
    }
    if (es_model_meta(model, arch + ".attention.causal") == "false" || has(".pooling_type")) {
        return "it is an embedding model: its attention is not causal or its output is pooled";
    }
    return es_bank_available() ? nullptr : es_model_needs_bank(model);
}

// What is asked of a GGUF file before llama.cpp loads it: its size, and metadata on which llama.cpp would abort
// (division by zero, failed assertion) without a message.
class gguf_facts {
public:
    explicit gguf_facts(const char * path) {
        gguf_init_params p    = {};
        ggml_context *   made = nullptr;
        p.no_alloc            = true;
        p.ctx                 = &made;
        file.reset(gguf_init_from_file(path, p));
        tensors.reset(made);
        const int64_t id = file ? gguf_find_key(file.get(), "general.architecture") : -1;
        if (id >= 0 && gguf_get_kv_type(file.get(), id) == GGUF_TYPE_STRING) {
            arch = gguf_get_val_str(file.get(), id);
        }
    }

    // -1: there is none
    int64_t number(const char * key) const { return number_at(find(key)); }
    int64_t number_of_any(const char * key) const { return number_at(file ? gguf_find_key(file.get(), key) : -1); }

    int64_t number_at(int64_t id) const {
        switch (id < 0 ? GGUF_TYPE_COUNT : gguf_get_kv_type(file.get(), id)) {
        case GGUF_TYPE_UINT32: return gguf_get_val_u32(file.get(), id);
        case GGUF_TYPE_INT32: return gguf_get_val_i32(file.get(), id);
        default: return -1;
        }
    }

    // a number that is below 0, or none at all (NaN)
    bool negative(const char * key) const {
        const int64_t id = find(key);
        return id >= 0 && gguf_get_kv_type(file.get(), id) == GGUF_TYPE_FLOAT32 &&
               !(gguf_get_val_f32(file.get(), id) >= 0);
    }

    // dimensions of a head's key; -1: it is not said, or differs by layer
    int64_t head_size() const {
        const int64_t n = number("attention.key_length"), n_head = number("attention.head_count");
        return n >= 0 || n_head <= 0 ? n : number("embedding_length") / n_head;
    }

    // the file's size if its last tensor is whole
    uint64_t whole() const {
        uint64_t end = 0;
        for (int64_t i = 0; file && i < gguf_get_n_tensors(file.get()); ++i) {
            end = std::max<uint64_t>(end, gguf_get_tensor_offset(file.get(), i) + gguf_get_tensor_size(file.get(), i));
        }
        return end > 0 ? gguf_get_data_offset(file.get()) + end : 0;
    }

    // llama.cpp takes a number that is not there for 0, and divides by it
    bool attends_without_heads() const {
        const int64_t id = find("attention.head_count");
        return (id < 0 ? find("embedding_length") >= 0 : number_at(id) == 0) && tensors &&
               ggml_get_tensor(tensors.get(), "blk.0.attn_q.weight");
    }

    // a vector that is added or multiplied in a type that ggml's CPU kernels abort over; "" if there is none
    std::string odd_vector() const {
        for (int64_t i = 0; file && i < gguf_get_n_tensors(file.get()); ++i) {
            const ggml_type     type = gguf_get_tensor_type(file.get(), i);
            const bool          fine = type == GGML_TYPE_F32 || type == GGML_TYPE_I32 || type == GGML_TYPE_I64;
            const ggml_tensor * tensor =
                fine ? nullptr : ggml_get_tensor(tensors.get(), gguf_get_tensor_name(file.get(), i));
            if (tensor && ggml_n_dims(tensor) == 1) {
                return std::string(tensor->name) + " is a vector of type " + ggml_type_name(type) + ", not f32";
            }
        }
        return "";
    }

    std::vector<int32_t> numbers(const char * key) const {
        const int64_t id = find(key);
        if (id < 0 || gguf_get_kv_type(file.get(), id) != GGUF_TYPE_ARRAY ||
            (gguf_get_arr_type(file.get(), id) != GGUF_TYPE_INT32 &&
             gguf_get_arr_type(file.get(), id) != GGUF_TYPE_UINT32)) {
            return {};
        }
        const auto * data = (const int32_t *) gguf_get_arr_data(file.get(), id);
        return { data, data + gguf_get_arr_n(file.get(), id) };
    }

    // an array of truth values, none of which is true
    bool none_of(const char * key) const {
        const int64_t id = find(key);
        if (id < 0 || gguf_get_kv_type(file.get(), id) != GGUF_TYPE_ARRAY ||
            gguf_get_arr_type(file.get(), id) != GGUF_TYPE_BOOL) {
            return false;
        }
        const auto * data = (const int8_t *) gguf_get_arr_data(file.get(), id);
        return std::all_of(data, data + gguf_get_arr_n(file.get(), id), [](int8_t x) { return x == 0; });
    }

private:
    gguf_context_ptr file;
    ggml_context_ptr tensors; // without data
    std::string      arch;

    int64_t find(const char * key) const {
        return file && !arch.empty() ? gguf_find_key(file.get(), (arch + "." + key).c_str()) : -1;
    }
};

// A file's facts, kept until somebody takes them who needs them last: reading the vocabulary in a header takes a tenth
// of a small model's start.
class Headers {
public:
    std::shared_ptr<const gguf_facts> look(const char * path) {
        const std::lock_guard<std::mutex> lock(mutex);
        struct stat                       now = {};
        if (stat(path, &now) != 0 || !facts || path != name || now.st_size != at.st_size || now.st_ino != at.st_ino ||
            now.st_mtime != at.st_mtime) {
            facts = std::make_shared<const gguf_facts>(path);
            name  = path;
            at    = now;
        }
        return facts;
    }
    std::shared_ptr<const gguf_facts> take(const char * path) {
        const auto                        found = look(path);
        const std::lock_guard<std::mutex> lock(mutex);
        facts.reset();
        return found;
    }

private:
    std::mutex                        mutex;
    std::string                       name;
    struct stat                       at = {};
    std::shared_ptr<const gguf_facts> facts;
};

Headers headers;

std::string cut_short(const gguf_facts & facts, const char * path) {
    struct stat st;
    if (stat(path, &st) != 0 || (uint64_t) st.st_size >= facts.whole()) {
        return "";
    }
    return "it ends before its tensors do: expected " + std::to_string(facts.whole()) + " bytes, has " +
           std::to_string(st.st_size);
}

std::string contradiction(const gguf_facts & facts) {
    char              text[200];
    const std::string vector = facts.odd_vector();
    if (!vector.empty()) {
        return vector;
    }
    for (const char * key : { "full_attention_interval", "interleave_moe_layer_step", "attention.chunk_size" }) {
        if (facts.number(key) == 0) {
            snprintf(text, sizeof(text), "its %s is 0", key);
            return text;
        }
    }
    // Numbers without a bound in llama.cpp: it takes kinds for values of its enumerations, and reserves four bytes for
    // each token of a window with every batch.
    static constexpr struct {
        const char * key;
        int64_t      most;
    } bounds[] = {
        { "expert_gating_func", 4 },
        { "pooling_type", LLAMA_POOLING_TYPE_RANK },
        { "classifier.pooling_type", LLAMA_POOLING_TYPE_RANK },
        { "attention.sliding_window", 1 << 24 },
        { "attention.chunk_size", 1 << 24 },
    };
    for (const auto & bound : bounds) {
        if (const int64_t n = facts.number(bound.key); n > bound.most) {
            snprintf(text, sizeof(text), "its %s is %lld, and %lld is the most that is known", bound.key, (long long) n,
                     (long long) bound.most);
            return text;
        }
    }
    for (const char * key : { "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
                              "attention.group_norm_epsilon", "hyper_connection.epsilon" }) {
        if (facts.negative(key)) {
            snprintf(text, sizeof(text), "its %s is negative or not a number", key);
            return text;
        }
    }
    if (facts.number("attention.sliding_window") > 0 && facts.none_of("attention.sliding_window_pattern")) {
        return "it has a sliding window and no layer that uses it";
    }
    if (facts.attends_without_heads()) {
        return "it has attention and no heads";
    }
    if ((facts.number("attention.key_length_mla") > 0) != (facts.number("attention.value_length_mla") > 0)) {
        return "it has the length of either keys or values of latent attention (MLA), not of both";
    }
    for (const std::string layers : { "", "_swa" }) {
        const int64_t n_rotated = facts.number(("rope.dimension_count" + layers).c_str());
        int64_t       n_key     = facts.number(("attention.key_length" + layers).c_str());
        n_key                   = n_key >= 0 ? n_key : facts.head_size();
        // over 0 of a head's, ggml's rotation on the CPU comes to no end; latent attention keeps those apart that it
        // rotates
        const bool none = n_rotated == 0 && facts.number("attention.key_length_mla") <= 0;
        if (none || n_rotated % 2 == 1 || (n_key > 0 && n_rotated > n_key)) {
            snprintf(text, sizeof(text), "it rotates %lld dimensions of a head's %lld", (long long) n_rotated,
                     (long long) n_key);
            return text;
        }
    }
    const std::vector<int32_t> sections = facts.numbers("rope.dimension_sections");
    if (!sections.empty()) {
        int64_t n_rot    = facts.number("rope.dimension_count");
        n_rot            = n_rot >= 0 ? n_rot : facts.head_size();
        int64_t sum      = 0;
        bool    negative = false;
        for (const int32_t n : sections) {
            sum += n;
            negative = negative || n < 0;
        }
        if (negative || (n_rot >= 0 && 2 * sum != n_rot)) {
            snprintf(text, sizeof(text),
                     "the sections of its rotary positions do not add up to half of the %lld "
                     "dimensions that are rotated",
                     (long long) n_rot);
            return text;
        }
    }
    return "";
}

struct fnv1a {
    uint64_t h = 0xcbf29ce484222325u;
    void     add(const void * data, size_t n) {
        const auto * p = (const unsigned char *) data;
        for (size_t i = 0; i < n; ++i) {
            h = (h ^ p[i]) * 0x100000001b3u;
        }
    }
};

} // namespace

const char * es_model_needs_bank(const llama_model * model) {
    const std::string arch = es_model_meta(model, "general.architecture");
    const auto        has  = [&](const char * key) { return !es_model_meta(model, arch + key).empty(); };

    if (llama_model_is_recurrent(model)) {
        return nullptr; // no keys, no sinks
    }
    if (llama_model_is_hybrid(model)) {
        return "it is a hybrid of attention and recurrent layers, whose state redecoding the sinks would change";
    }
    switch (llama_model_rope_type(model)) {
    case LLAMA_ROPE_TYPE_NORM:
    case LLAMA_ROPE_TYPE_NEOX: break;
    case LLAMA_ROPE_TYPE_NONE:
        return "it has no rotary positions (learned absolute positions, ALiBi or none), which llama.cpp cannot shift";
    default: return "it has multi-dimensional rotary positions (M-RoPE), which llama.cpp cannot shift";
    }
    if (has(".attention.kv_lora_rank")) {
        return "it caches a compressed latent instead of keys and values (MLA)";
    }
    if (has(".attention.temperature_scale")) {
        return "its attention temperature depends on absolute positions";
    }
    if (arch == "llama4") {
        return "its chunked attention depends on absolute positions";
    }
    return nullptr;
}

// True if why is empty; otherwise writes it to reason.
static bool answer(const std::string & why, char * reason, size_t n_reason) {
    if (reason && n_reason > 0) {
        snprintf(reason, n_reason, "%s", why.c_str());
    }
    return why.empty();
}

// find returns the obstacle, or null.
static bool ask(const llama_model * model, const char * (*find)(const llama_model *), char * reason, size_t n_reason) {
    const char * why = nullptr;
    try {
        why = model ? find(model) : "there is no model";
    } catch (...) {
        why = "its metadata cannot be read";
    }
    return answer(why ? why : "", reason, n_reason);
}

bool es_model_can_stream(const llama_model * model, char * reason, size_t n_reason) {
    return ask(model, missing_property, reason, n_reason);
}

bool es_model_can_shift(const llama_model * model, char * reason, size_t n_reason) {
    return ask(model, es_model_needs_bank, reason, n_reason);
}

bool es_model_file_check(const char * path, char * reason, size_t n_reason) {
    std::string why;
    try {
        const es_abort_scope scope;
        if (path) {
            const auto facts = headers.take(path);
            why              = cut_short(*facts, path);
            why              = why.empty() ? contradiction(*facts) : why;
        }
    } catch (...) {
        why = ""; // llama.cpp will report it
    }
    return answer(why, reason, n_reason);
}

bool es_model_file_number(const char * path, const char * key, uint32_t * value) {
    try {
        const es_abort_scope scope;
        const int64_t        found = path && key ? headers.look(path)->number_of_any(key) : -1;
        if (found >= 0 && value) {
            *value = (uint32_t) found;
        }
        return found >= 0;
    } catch (...) {
        return false; // out of memory: whoever loads the file says so
    }
}

int32_t es_vocab_eog(const llama_vocab * vocab, llama_token * tokens, int32_t n_max) {
    int32_t       n        = 0;
    const int32_t n_tokens = vocab ? llama_vocab_n_tokens(vocab) : 0;
    for (llama_token token = 0; token < n_tokens; ++token) {
        if (llama_vocab_is_eog(vocab, token)) {
            if (tokens && n < n_max) {
                tokens[n] = token;
            }
            ++n;
        }
    }
    return n;
}

uint64_t es_model_fingerprint(const llama_model * model) {
    fnv1a hash;
    if (!model) {
        return 0;
    }
    char          buf[4096];
    const int32_t n_meta = llama_model_meta_count(model);
    for (int32_t i = 0; i < n_meta; ++i) {
        if (llama_model_meta_key_by_index(model, i, buf, sizeof(buf)) >= 0) {
            hash.add(buf, strlen(buf) + 1);
        }
        if (llama_model_meta_val_str_by_index(model, i, buf, sizeof(buf)) >= 0) {
            hash.add(buf, strlen(buf) + 1);
        }
    }
    const llama_vocab * vocab    = llama_model_get_vocab(model);
    const int32_t       n_tokens = llama_vocab_n_tokens(vocab);
    for (int32_t i = 0; i < n_tokens; ++i) {
        const char * text = llama_vocab_get_text(vocab, i);
        hash.add(text, strlen(text) + 1);
    }
    const uint64_t sizes[] = { llama_model_size(model), llama_model_n_params(model), (uint64_t) n_tokens };
    hash.add(sizes, sizeof(sizes));
    return hash.h;
}

void * es_model_device(const llama_model * model, int32_t i) {
    return model && i >= 0 && i < llama_model_n_devices(model) ? llama_model_get_device(model, i) : nullptr;
}
