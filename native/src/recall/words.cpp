#include "words.h"

#include "utf8.h"

#include <algorithm>
#include <set>
#include <string>
#include <unordered_set>

namespace {

// What English questions are made of; after folding and stemming, as es_words has them.
constexpr std::string_view common[] = {
    "a",     "about", "again", "all",   "also", "am",    "an",     "and",      "any",  "are",   "as",    "at",
    "be",    "been",  "but",   "by",    "can",  "could", "did",    "do",       "does", "ever",  "for",   "from",
    "had",   "has",   "have",  "he",    "her",  "him",   "his",    "how",      "i",    "if",    "in",    "is",
    "it",    "its",   "just",  "many",  "me",   "mine",  "more",   "most",     "much", "my",    "no",    "not",
    "of",    "often", "on",    "or",    "our",  "pleas", "please", "remember", "said", "say",   "she",   "should",
    "so",    "some",  "tell",  "than",  "that", "the",   "their",  "them",     "then", "there", "these", "they",
    "this",  "those", "to",    "told",  "us",   "very",  "was",    "we",       "were", "what",  "when",  "where",
    "which", "who",   "whom",  "whose", "why",  "will",  "with",   "would",    "you",  "your",  "yours",
};

// Of the one who writes, in the languages that are written most; and what else statements begin with in English.
constexpr std::string_view personal[] = {
    "i",      "me",  "my",  "mine", "our", "ours", "ich",  "mir",  "mich", "mein", "meine", "meinen", "meinem",
    "meiner", "mon", "mes", "moi",  "je",  "mi",   "mis",  "yo",   "io",   "mio",  "mia",   "meu",    "minha",
    "eu",     "я",   "мой", "моя",  "мое", "мою",  "моей", "меня", "мне",  "我",   "我的",  "私の",   "私は",
};
constexpr std::string_view openers[] = {
    "a",     "an",    "he",   "her",  "his",   "it", "its", "she", "that", "the",  "their",
    "there", "these", "they", "this", "those", "us", "we",  "you", "your", "我们",
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

namespace {

template <size_t n>
std::set<uint32_t> hashes_of(const std::string_view (&words)[n]) {
    std::set<uint32_t> out;
    for (const std::string_view word : words) {
        for (const uint32_t h : es_words(word)) {
            out.insert(h);
        }
    }
    return out;
}

} // namespace

std::vector<uint32_t> es_query_words(std::string_view text) {
    static const std::set<uint32_t> usual = hashes_of(common);
    std::vector<uint32_t>           all   = es_words(text), out;
    std::copy_if(all.begin(), all.end(), std::back_inserter(out), [&](uint32_t h) { return usual.count(h) == 0; });
    return out.empty() ? all : out;
}

namespace {

bool is_personal(uint32_t word) {
    static const std::set<uint32_t> known = hashes_of(personal);
    return known.count(word) > 0;
}

bool is_opener(uint32_t word) {
    static const std::set<uint32_t> known = hashes_of(openers);
    return is_personal(word) || known.count(word) > 0;
}

bool ends_sentence(uint32_t c) {
    return c == '.' || c == '!' || c == '?' || c == '\n' || c == 0x3002 || c == 0xFF01 || c == 0xFF1F;
}

} // namespace

std::vector<uint32_t> es_sentence_forms(std::string_view text) {
    std::vector<uint32_t> out;
    for (size_t at = 0; at < text.size();) {
        const size_t from = at;
        size_t       to   = at;
        uint32_t     last = 0; // letter
        while (at < text.size()) {
            const uint32_t c = es_utf8_next(text, at);
            if (ends_sentence(c)) {
                break;
            }
            to   = at;
            last = is_letter(c) ? c : last;
        }
        std::vector<uint32_t> words;
        each_word(text.substr(from, to - from), [&](std::string_view word) { words.push_back(hash(word)); });
        const auto join = [&](size_t i, size_t n) {
            uint32_t h = (uint32_t) n;
            for (; n > 0; --n, ++i) {
                h = h * 16777619u ^ words[i];
            }
            out.push_back(h);
        };
        if (!words.empty()) {
            join(0, is_opener(words[0]) ? std::min<size_t>(3, words.size()) : 1);
        }
        if (is_unspaced(last) && words.size() >= 2) {
            join(words.size() - 2, 2);
        }
    }
    return out;
}

bool es_is_personal(std::string_view text) {
    const std::vector<uint32_t> words = es_words(text);
    return std::any_of(words.begin(), words.end(), is_personal);
}
