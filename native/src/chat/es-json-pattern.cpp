// Everything becomes classes, groups, alternatives and repeats: what the converter writes as it stands.
#include "es-json-pattern.h"

#include "../common/unicode.h" // not libllama's, which is src/unicode.h
#include "es-template-budget.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace {

constexpr uint32_t last      = 0x10FFFF;
constexpr int      n_depth   = 64;
constexpr int      n_repeats = 2000; // a grammar's, see llama-grammar.cpp

// Code points: ascending ranges, both ends included.
using ranges = std::vector<std::pair<uint32_t, uint32_t>>;

const ranges digits = { { '0', '9' } };
const ranges words  = { { '0', '9' }, { 'A', 'Z' }, { '_', '_' }, { 'a', 'z' } };
const ranges spaces = { { '\t', '\r' },     { ' ', ' ' },       { 0xA0, 0xA0 },     { 0x1680, 0x1680 },
                        { 0x2000, 0x200A }, { 0x2028, 0x2029 }, { 0x202F, 0x202F }, { 0x205F, 0x205F },
                        { 0x3000, 0x3000 }, { 0xFEFF, 0xFEFF } };
const ranges lines  = { { '\n', '\n' }, { '\r', '\r' }, { 0x2028, 0x2029 } };
const ranges coded  = { { 0, 0x1F }, { '"', '"' }, { '\\', '\\' } }; // what a JSON string writes as an escape

ranges merged(ranges in) {
    std::sort(in.begin(), in.end());
    ranges out;
    for (const auto & r : in) {
        if (!out.empty() && r.first <= out.back().second + 1) {
            out.back().second = std::max(out.back().second, r.second);
        } else {
            out.push_back(r);
        }
    }
    return out;
}

ranges others(const ranges & in) {
    ranges   out;
    uint32_t from = 0;
    for (const auto & [first, end] : merged(in)) {
        if (first > from) {
            out.emplace_back(from, first - 1);
        }
        from = end + 1;
    }
    if (from <= last) {
        out.emplace_back(from, last);
    }
    return out;
}

bool has(const ranges & in, uint32_t c) {
    return std::any_of(in.begin(), in.end(), [&](const auto & r) { return r.first <= c && c <= r.second; });
}

std::string hex(const char * format, uint32_t c) {
    char out[16];
    snprintf(out, sizeof(out), format, c);
    return out;
}

// One of a set of characters, as JSON writes it.
std::string one_of(const ranges & set) {
    static const std::pair<uint32_t, const char *> escapes[] = { { '"', "\"" }, { '\\', "\\\\" }, { '\b', "b" },
                                                                 { '\f', "f" }, { '\n', "n" },    { '\r', "r" },
                                                                 { '\t', "t" } };
    ranges                                         all       = coded;
    for (const auto & r : others(set)) {
        all.push_back(r);
    }
    const ranges             plain = others(all);
    std::vector<std::string> ways;
    if (!plain.empty()) {
        std::string text = "[";
        for (const auto & [first, end] : plain) {
            text += hex("\\U%08X", first);
            text += first == end ? "" : "-" + hex("\\U%08X", end);
        }
        ways.push_back(text + "]");
    }
    std::string letters;
    for (const auto & [c, letter] : escapes) {
        letters += has(set, c) ? letter : "";
    }
    if (!letters.empty()) {
        ways.push_back("[\\\\][" + letters + "]");
    }
    for (uint32_t c = 0; c < ' ' && plain.empty(); ++c) { // by number where nothing else is asked for
        const bool is_named =
            std::any_of(std::begin(escapes), std::end(escapes), [&](const auto & e) { return e.first == c; });
        if (!is_named && has(set, c)) {
            ways.push_back("[\\\\][u][0][0][" + std::string(1, (char) ('0' + c / 16)) + "][" + hex("%X", c % 16) + "]");
        }
    }
    if (ways.empty()) {
        throw std::invalid_argument("a class in it holds no character");
    }
    std::string out = ways[0];
    for (size_t i = 1; i < ways.size(); ++i) {
        out += "|" + ways[i];
    }
    return ways.size() == 1 && !plain.empty() ? out : "(" + out + ")";
}

struct reader {
    const std::vector<uint32_t> text;
    size_t                      at = 0;

    bool     more() const { return at < text.size(); }
    bool     is(uint32_t c, size_t ahead = 0) const { return at + ahead < text.size() && text[at + ahead] == c; }
    uint32_t next() {
        if (!more()) {
            throw std::invalid_argument("it ends too early");
        }
        es_template_step();
        return text[at++];
    }

    uint32_t hexadecimal(int n) {
        uint32_t out = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t c     = next();
            const char *   place = c < 128 && c > 0 ? strchr(digits16, (int) (c | 0x20)) : nullptr;
            if (!place) {
                throw std::invalid_argument("an escape in it is not hexadecimal");
            }
            out = out * 16 + (uint32_t) (place - digits16);
        }
        return out;
    }

    // After a backslash.
    ranges escaped(bool in_class) {
        const uint32_t c = next();
        switch (c) {
        case 'd': return digits;
        case 'w': return words;
        case 's': return spaces;
        case 'D': return others(digits);
        case 'W': return others(words);
        case 'S': return others(spaces);
        case 't': return { { '\t', '\t' } };
        case 'n': return { { '\n', '\n' } };
        case 'r': return { { '\r', '\r' } };
        case 'f': return { { '\f', '\f' } };
        case 'v': return { { '\v', '\v' } };
        case 'x':
        case 'u': {
            const uint32_t code = hexadecimal(c == 'x' ? 2 : 4);
            if (code >= 0xD800 && code < 0xE000) {
                throw std::invalid_argument("an escape in it is half a character");
            }
            return { { code, code } };
        }
        case 'b':
            if (in_class) {
                return { { '\b', '\b' } };
            }
            break;
        default: break;
        }
        if (c == '0' && !(more() && text[at] >= '0' && text[at] <= '9')) {
            return { { 0, 0 } };
        }
        const bool is_letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (is_letter) {
            throw std::invalid_argument(std::string("a grammar has no \\") + (char) c);
        }
        return { { c, c } };
    }

    // After an opening bracket.
    ranges set() {
        const bool is_negated = is('^');
        at += is_negated;
        ranges out;
        while (!is(']')) {
            uint32_t c    = next();
            ranges   here = c == '\\' ? escaped(true) : ranges{ { c, c } };
            if (is('-') && !is(']', 1) && here.size() == 1 && here[0].first == here[0].second) {
                ++at;
                c                = next();
                const ranges end = c == '\\' ? escaped(true) : ranges{ { c, c } };
                if (end.size() != 1 || end[0].first != end[0].second || end[0].first < here[0].first) {
                    throw std::invalid_argument("a range of characters in it has no order");
                }
                here[0].second = end[0].first;
            }
            out.insert(out.end(), here.begin(), here.end());
        }
        ++at;
        return is_negated ? others(out) : merged(out);
    }

    // After an opening brace.
    std::string repeats() {
        std::string out;
        int         n[2] = { 0, 0 }, i = 0, n_digits = 0;
        for (uint32_t c = next(); c != '}'; c = next()) {
            out += (char) c;
            if (c == ',' && i == 0 && n_digits > 0) {
                ++i;
            } else if (c >= '0' && c <= '9' && n[i] <= n_repeats) {
                n[i] = n[i] * 10 + (int) (c - '0');
                ++n_digits;
            } else {
                n_digits = 0;
                break;
            }
        }
        if (n_digits == 0 || n[0] > n_repeats || n[1] > n_repeats) {
            throw std::invalid_argument("braces in it do not repeat 0 to " + std::to_string(n_repeats) + " times");
        }
        return "{" + out + "}";
    }

    static constexpr const char * digits16 = "0123456789abcdef";
};

std::vector<uint32_t> code_points(const std::string & text) {
    std::vector<uint32_t> out;
    for (size_t at = 0; at < text.size();) {
        const utf8_parse_result one = common_parse_utf8_codepoint(text, at);
        if (one.status != utf8_parse_result::SUCCESS) {
            throw std::invalid_argument("it is not UTF-8");
        }
        out.push_back(one.codepoint);
        at += one.bytes_consumed;
    }
    return out;
}

// Up to the end, or a dollar sign there.
std::string middle_of(reader & in, bool & is_end) {
    std::string out;
    int         depth      = 0;
    bool        can_repeat = false;
    is_end                 = false;
    while (in.more()) {
        const uint32_t c = in.next();
        if (c == '$' && !in.more()) {
            is_end = true;
            break;
        }
        switch (c) {
        case '^':
        case '$': throw std::invalid_argument("it has an anchor inside");
        case '(':
            if (in.is('?')) {
                ++in.at;
                if (in.next() != ':') {
                    throw std::invalid_argument("a grammar cannot look ahead or behind, and names no groups");
                }
            }
            if (++depth > n_depth) {
                throw std::invalid_argument("its groups are nested deeper than " + std::to_string(n_depth));
            }
            out += "(";
            can_repeat = false;
            break;
        case ')':
            if (--depth < 0) {
                throw std::invalid_argument("its parentheses are not balanced");
            }
            out += ")";
            can_repeat = true;
            break;
        case '|':
            out += "|";
            can_repeat = false;
            break;
        case '*':
        case '+':
        case '?':
        case '{':
            if (!can_repeat) {
                throw std::invalid_argument("it has nothing to repeat");
            }
            out += c == '{' ? in.repeats() : std::string(1, (char) c);
            in.at += in.is('?'); // a lazy repeat matches the same texts
            can_repeat = false;
            break;
        default:
            out += one_of(c == '.'    ? others(lines)
                          : c == '['  ? in.set()
                          : c == '\\' ? in.escaped(false)
                                      : ranges{ { c, c } });
            can_repeat = true;
        }
    }
    if (depth != 0) {
        throw std::invalid_argument("its parentheses are not balanced");
    }
    return out;
}

} // namespace

std::string es_json_pattern(const std::string & pattern) {
    try {
        reader     in{ code_points(pattern) };
        const bool is_start = in.is('^');
        in.at += is_start;
        bool              is_end = false;
        const std::string middle = middle_of(in, is_end);
        const std::string any    = one_of(others(coded)) + "*";
        return "^" + (is_start ? "" : any) + "(" + middle + ")" + (is_end ? "" : any) + "$";
    } catch (const std::invalid_argument & e) {
        throw std::invalid_argument("the JSON schema's pattern " + pattern + " cannot be used: " + e.what());
    }
}
