// The bounds were chosen with the texts *-tune.tsv of benchmarks/recall_data, which are not those that are measured.
#include "gate.h"

#include "words.h"

#include <algorithm>

namespace {

constexpr size_t n_hits         = 16;  // entries looked at
constexpr double least_of_own   = 0.4; // coverage, where the text speaks of its writer
constexpr double least_of_other = 0.6; // knowledge of the world has words in common with anything

bool is_question(std::string_view text) {
    for (const std::string_view mark : { "?", "\xEF\xBC\x9F", "\xD8\x9F" }) { // Latin, East Asian, Arabic
        if (text.size() >= mark.size() && text.substr(text.size() - mark.size()) == mark) {
            return true;
        }
    }
    return false;
}

} // namespace

es_gate::es_gate(std::string_view text)
    : forms_(es_sentence_forms(text)), least_coverage_(es_is_personal(text) ? least_of_own : least_of_other) {}

bool es_gate::admits(const es_log_hit & hit) const {
    if (hit.coverage < least_coverage_ || is_question(hit.text)) {
        return false;
    }
    if (hit.kind != ES_LOG_USER) {
        return true;
    }
    // "Write a poem about the sea" is no answer to "Write a poem about the hills"
    const std::vector<uint32_t> forms = es_sentence_forms(hit.text);
    return std::find_first_of(forms.begin(), forms.end(), forms_.begin(), forms_.end()) == forms.end();
}

bool es_log_recall(es_log * log, const char * text, size_t n_text, int64_t first_held, es_log_hit * out) {
    es_log_hit   hits[n_hits];
    const size_t n    = out ? es_log_search(log, text, n_text, INT64_MAX, hits, n_hits) : 0;
    const auto   ends = [&](const es_log_hit & hit) {
        return hit.belongs && (hit.turn < first_held || hit.kind != ES_LOG_ASSISTANT);
    };
    const es_log_hit * const end = hits + n;
    const es_log_hit *       hit = std::find_if((const es_log_hit *) hits, end, ends);
    if (hit == end || hit->turn >= first_held) {
        return false;
    }
    // the user's own words rather than what the model made of them
    const auto is_original = [&, said = *hit](const es_log_hit & other) {
        return other.belongs && other.turn < first_held && other.kind == ES_LOG_USER && other.coverage >= said.coverage;
    };
    const es_log_hit * original = hit->kind == ES_LOG_ASSISTANT ? std::find_if(hit, end, is_original) : end;
    hit                         = original == end ? hit : original;
    *out                        = *hit;
    return true;
}
