// The words of a text, for search: folded, stemmed, as 32-bit hashes.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

// Hashes of the different words of a UTF-8 text, in the order in which they first appear. Letters are folded to small
// ones without accents (Latin, Greek, Cyrillic), English endings dropped. Scripts without spaces (Chinese, Japanese,
// Korean) give each pair of neighbouring characters. Invalid bytes separate words.
std::vector<uint32_t> es_words(std::string_view text);

// The same without words that questions have in common (what, did, my, ...), unless it has no other.
std::vector<uint32_t> es_query_words(std::string_view text);

// How the sentences of a text begin, as hashes: each by its first word, or by its first three if that is one which
// statements begin with (I, my, the, ...). In scripts without spaces also how they end, where verbs and particles are.
std::vector<uint32_t> es_sentence_forms(std::string_view text);

// Whether a text speaks of the one who wrote it: it has a word like I, my, mein, mon, мой.
bool es_is_personal(std::string_view text);
