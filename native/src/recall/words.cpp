#include "words.h"

#include "utf8.h"

#include <algorithm>
#include <set>
#include <string>
#include <unordered_set>

namespace {

// What English questions are made of; after folding and stemming, as es_words has them.
constexpr std::string_view common[] = {
    "a",     "about", "again", "all",   "also",   "am",       "an",    "and",   "any",   "are",    "as",
    "at",    "be",    "been",  "but",   "by",     "can",      "could", "did",   "do",    "does",   "ever",
    "for",   "from",  "had",   "has",   "have",   "he",       "her",   "him",   "his",   "how",    "i",
    "if",    "in",    "is",    "it",    "its",    "me",       "mine",  "my",    "no",    "not",    "of",
    "on",    "or",    "our",   "pleas", "please", "remember", "said",  "say",   "she",   "should", "so",
    "some",  "tell",  "than",  "that",  "the",    "their",    "them",  "then",  "there", "these",  "they",
    "this",  "those", "to",    "told",  "us",     "was",      "we",    "were",  "what",  "when",   "where",
    "which", "who",   "whom",  "whose", "why",    "will",     "with",  "would", "you",   "your",   "yours",
};

// Scripts that put no spaces between words.
bool is_unspaced(uint32_t c) {
    return (c >= 0x2E80 && c < 0x3000) || (c >= 0x3040 && c < 0xA4D0) || (c >= 0xAC00 && c < 0xD7B0) ||
           (c >= 0xF900 && c < 0xFB00) || (c >= 0x20000 && c < 0x32000) || (c >= 0x0E00 && c < 0x0F00);
}

bool is_letter(uint32_t c) {
    if (c < 0x80) {
        return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    }
    // without Latin-1's signs, general punctuation, symbols, and the punctuation of East Asia
    return c >= 0xAA && c != 0xAB && c != 0xBB && c != 0xD7 && c != 0xF7 && !(c >= 0x2000 && c < 0x2C00) &&
           !(c >= 0x3000 && c < 0x3040) && !(c >= 0xFE10 && c < 0xFE70) && !(c >= 0xFF00 && c < 0xFF10) &&
           !(c >= 0x1F000 && c < 0x1FB00);
}

void append(std::string & out, uint32_t c) {
    if (c < 0x80) {
        out += (char) c;
    } else {
        for (int shift = 0; shift < 24; shift += 8) { // any form that tells them apart: only hashes are kept
            out += (char) (uint8_t) (c >> shift | 0x80);
        }
    }
}

// A small letter without its accent.
void fold(std::string & out, uint32_t c) {
    static const char * const latin[] = { "a", "a", "a", "a", "a", "a", "ae", "c", "e",  "e", "e",
                                          "e", "i", "i", "i", "i", "d", "n",  "o", "o",  "o", "o",
                                          "o", "",  "o", "u", "u", "u", "u",  "y", "th", "ss" };
    if (c >= 'A' && c <= 'Z') {
        c += 'a' - 'A';
    } else if (c >= 0xC0 && c < 0x100) {
        out += c == 0xFF ? "y" : c == 0xDF ? "ss" : latin[(c - 0xC0) % 32];
        return;
    } else if (c >= 0x100 && c < 0x180) { // pairs of a capital and a small letter, mostly
        c |= c < 0x138 || c >= 0x14A ? 1u : 0u;
    } else if ((c >= 0x391 && c <= 0x3A9) || (c >= 0x410 && c <= 0x42F)) {
        c += 0x20;
    } else if (c >= 0x400 && c <= 0x40F) {
        c += 0x50;
    } else if (c >= 0xFF10 && c <= 0xFF5A) { // full width
        fold(out, c - 0xFEE0);
        return;
    }
    append(out, c);
}

bool ends(const std::string & w, std::string_view end) {
    return w.size() >= end.size() && w.compare(w.size() - end.size(), end.size(), end) == 0;
}

// English endings, roughly: likes, liked, liking and like become the same.
void stem(std::string & w) {
    const bool is_ascii = std::all_of(w.begin(), w.end(), [](char c) { return c >= 'a' && c <= 'z'; });
    if (!is_ascii || w.size() <= 3) {
        return;
    }
    if (ends(w, "ies") && w.size() > 4) {
        w.replace(w.size() - 3, 3, "y");
    } else if (ends(w, "sses") || ends(w, "shes") || ends(w, "ches") || ends(w, "xes")) {
        w.resize(w.size() - 2);
    } else if (ends(w, "s") && !ends(w, "ss") && !ends(w, "us") && !ends(w, "is")) {
        w.pop_back();
    }
    const size_t before = w.size();
    if (ends(w, "ing") && w.size() > 5) {
        w.resize(w.size() - 3);
    } else if (ends(w, "ed") && w.size() > 4) {
        w.resize(w.size() - 2);
    }
    if (w.size() < before && w.size() > 3 && w.back() == w[w.size() - 2] && w.back() != 'l' && w.back() != 's') {
        w.pop_back(); // running
    }
    if (w.size() > 3 && w.back() == 'e') {
        w.pop_back();
    }
}

uint32_t hash(std::string_view word) { // FNV-1a, then mixed
    uint32_t h = 2166136261u;
    for (const char c : word) {
        h = (h ^ (uint8_t) c) * 16777619u;
    }
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    return h ^ h >> 13;
}

template <typename F>
void each_word(std::string_view text, F && f) {
    std::string word;
    uint32_t    before   = 0; // an unspaced character
    bool        alone    = false;
    const auto  end_word = [&] {
        if (!word.empty()) {
            stem(word);
            f(std::string_view(word));
            word.clear();
        }
    };
    const auto end_run = [&] {
        if (before && alone) {
            std::string one;
            append(one, before);
            f(std::string_view(one));
        }
        before = 0;
    };
    for (size_t at = 0; at < text.size();) {
        const uint32_t c = es_utf8_next(text, at);
        if (is_unspaced(c)) {
            end_word();
            if (before) {
                std::string two;
                append(two, before);
                append(two, c);
                f(std::string_view(two));
            }
            alone  = !before;
            before = c;
            continue;
        }
        end_run();
        if (is_letter(c)) {
            fold(word, c);
        } else {
            end_word();
        }
    }
    end_word();
    end_run();
}

} // namespace

std::vector<uint32_t> es_words(std::string_view text) {
    std::vector<uint32_t>        out;
    std::unordered_set<uint32_t> seen;
    each_word(text, [&](std::string_view word) {
        const uint32_t h = hash(word);
        if (seen.insert(h).second) {
            out.push_back(h);
        }
    });
    return out;
}

std::vector<uint32_t> es_query_words(std::string_view text) {
    static const std::set<uint32_t> usual = [] {
        std::set<uint32_t> out;
        for (const std::string_view word : common) {
            std::string stemmed(word);
            stem(stemmed);
            out.insert(hash(stemmed));
        }
        return out;
    }();
    std::vector<uint32_t> all = es_words(text), out;
    std::copy_if(all.begin(), all.end(), std::back_inserter(out), [&](uint32_t h) { return usual.count(h) == 0; });
    return out.empty() ? all : out;
}
