#include "utf8.h"

#include <algorithm>

namespace {

// Length of a character by its first byte; 0: invalid.
size_t length(unsigned char lead) {
    return lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
}

// Number of bytes at i that are a character or the beginning of one; at least 1.
size_t well_formed(std::string_view s, size_t i) {
    const auto   at     = [&](size_t k) { return (unsigned char) s[k]; };
    const size_t wanted = length(at(i));
    size_t       n      = 1;
    for (; n < wanted && i + n < s.size(); ++n) {
        const unsigned char c = at(i + n);
        // the first continuation byte excludes overlong forms, surrogates, and what is beyond U+10FFFF
        const unsigned char low  = n > 1 ? 0x80 : at(i) == 0xe0 ? 0xa0 : at(i) == 0xf0 ? 0x90 : 0x80;
        const unsigned char high = n > 1 ? 0xbf : at(i) == 0xed ? 0x9f : at(i) == 0xf4 ? 0x8f : 0xbf;
        if (c < low || c > high) {
            break;
        }
    }
    return n;
}

} // namespace

size_t es_utf8_complete(const std::string & text) {
    const size_t from = text.size() - std::min<size_t>(3, text.size());
    for (size_t i = text.size(); i > from; --i) {
        const size_t wanted = length((unsigned char) text[i - 1]);
        if (wanted > 1) { // the last character's first byte
            const bool cut = wanted > text.size() - (i - 1) && well_formed(text, i - 1) == text.size() - (i - 1);
            return cut ? i - 1 : text.size();
        }
    }
    return text.size();
}

std::string es_utf8_valid(const std::string & text) {
    std::string out;
    out.reserve(text.size());
    for (size_t i = 0; i < text.size();) {
        const size_t n = well_formed(text, i);
        if (n == length((unsigned char) text[i])) {
            out.append(text, i, n);
        } else {
            out += "\xef\xbf\xbd";
        }
        i += n;
    }
    return out;
}

uint32_t es_utf8_next(std::string_view text, size_t & at) {
    const auto   byte = [&](size_t i) { return (unsigned char) text[i]; };
    const size_t n = well_formed(text, at), begin = at;
    at += n;
    if (n != length(byte(begin))) {
        return 0;
    }
    uint32_t c = n == 1 ? byte(begin) : byte(begin) & (0xffu >> (n + 1));
    for (size_t i = 1; i < n; ++i) {
        c = c << 6 | (byte(begin + i) & 0x3f);
    }
    return c;
}
