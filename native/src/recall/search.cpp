// BM25 (Robertson and Zaragoza 2009) over the hashes of a log: two passes, no index.
#include "gate.h"
#include "log.h"
#include "words.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr double k1       = 1.2;
constexpr double b        = 0.75;
constexpr double neighbor = 0.3; // weight of the words of the entry before
constexpr size_t n_most   = 64;  // words of a query: the rarest

// Which word of the query a hash is: a small hash table, as most hashes are none.
class word_table {
public:
    explicit word_table(const std::vector<uint32_t> & words) : slots(size, -1), words(words) {
        for (size_t i = 0; i < words.size(); ++i) {
            uint32_t at = words[i] & (size - 1);
            while (slots[at] >= 0) {
                at = (at + 1) & (size - 1);
            }
            slots[at] = (int32_t) i;
        }
    }

    int32_t find(uint32_t word) const {
        for (uint32_t at = word & (size - 1); slots[at] >= 0; at = (at + 1) & (size - 1)) {
            if (words[(size_t) slots[at]] == word) {
                return slots[at];
            }
        }
        return -1;
    }

private:
    static constexpr uint32_t     size = 1 << 14;
    std::vector<int32_t>          slots;
    const std::vector<uint32_t> & words;
};

// Of the entries before n_turns: how rare each word of the query is.
struct es_rarities {
    std::vector<double> values;
    double              mean = 1; // words of an entry

    es_rarities(const es_log_entries & entries, int64_t n_turns, const std::vector<uint32_t> & query) {
        const word_table     table(query);
        std::vector<int64_t> count(query.size(), 0);
        size_t               n = 0, n_words = 0;
        entries.each([&](const es_log_entry & e) {
            if (e.turn >= n_turns) {
                return false;
            }
            ++n;
            n_words += e.n_words;
            for (size_t i = 0; i < e.n_words; ++i) {
                const int32_t q = table.find(e.words[i]);
                if (q >= 0) {
                    ++count[(size_t) q];
                }
            }
            return true;
        });
        for (const int64_t c : count) {
            values.push_back(std::log(1.0 + ((double) n - (double) c + 0.5) / ((double) c + 0.5)));
        }
        mean = n ? (double) n_words / (double) n : 1;
    }
};

} // namespace

size_t es_log_search(es_log * log, const char * text, size_t n_text, int64_t n_turns, es_log_hit * out, size_t n_out) {
    if (!log || !text || !out) {
        return 0;
    }
    const es_log_entries entries(*log);
    if (!entries.is_there()) {
        return 0;
    }
    std::vector<uint32_t> query = es_query_words(std::string_view(text, n_text));
    if (query.size() > 8192) {
        query.resize(8192);
    }
    const es_rarities   rarities(entries, n_turns, query);
    std::vector<double> rarity = rarities.values;
    if (query.size() > n_most) {
        std::vector<size_t> order(query.size());
        for (size_t i = 0; i < order.size(); ++i) {
            order[i] = i;
        }
        std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return rarity[x] > rarity[y]; });
        std::vector<uint32_t> words;
        std::vector<double>   values;
        for (size_t i = 0; i < n_most; ++i) {
            words.push_back(query[order[i]]);
            values.push_back(rarity[order[i]]);
        }
        query  = words;
        rarity = values;
    }
    double whole = 0;
    for (const double r : rarity) {
        whole += r;
    }
    const word_table        table(query);
    std::vector<es_log_hit> best; // ascending
    const auto              worse        = [](const es_log_hit & x, const es_log_hit & y) { return x.score < y.score; };
    uint64_t                before       = 0; // the query's words that the entry before has
    double                  before_score = 0;
    entries.each([&](const es_log_entry & e) {
        if (e.turn >= n_turns) {
            return false;
        }
        uint64_t has   = 0;
        double   score = 0;
        for (size_t j = 0; j < e.n_words; ++j) {
            const int32_t q = table.find(e.words[j]);
            if (q >= 0) {
                has |= (uint64_t) 1 << q;
                score += rarity[(size_t) q];
            }
        }
        score *= (k1 + 1) / (1 + k1 * (1 - b + b * (double) e.n_words / rarities.mean));
        if (has != 0) {
            double covered = 0;
            for (size_t q = 0; q < query.size(); ++q) {
                covered += (has | before) >> q & 1 ? rarity[q] : 0;
            }
            const double total = score + neighbor * before_score;
            if (best.size() < n_out || (n_out > 0 && total >= best.front().score)) {
                const es_log_hit hit = { e.turn, e.kind, e.when, total, covered / whole, 0, e.text.data() };
                if (best.size() == n_out) {
                    best.erase(best.begin());
                }
                best.insert(std::upper_bound(best.begin(), best.end(), hit, worse), hit); // the newer one is better
            }
        }
        before       = has;
        before_score = score;
        return true;
    });
    std::reverse(best.begin(), best.end());
    const es_gate gate(std::string_view(text, n_text));
    log->found.clear();
    log->found.reserve(best.size());
    for (es_log_hit & hit : best) {
        hit.text    = log->found.emplace_back(hit.text).c_str();
        hit.belongs = gate.admits(hit);
    }
    std::copy(best.begin(), best.end(), out);
    return best.size();
}
