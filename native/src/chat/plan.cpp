// What a stream must do to hold a conversation. The template renders whole conversations; a stream has read an earlier
// one. The two texts are compared, token by token where the stream's own tokens are at hand, and only what follows
// their common beginning is read.
#include "request.h"

#include <algorithm>
#include <stdexcept>

namespace {

constexpr size_t n_back       = 256;  // tokens looked back for a place where tokenizing can begin afresh
constexpr size_t n_places_max = 16;   // places within what is read, the newest
constexpr size_t n_byte_token = 16;   // more bytes than tokens of a vocabulary have on average
constexpr size_t n_least      = 1024; // tokens that are read again in any case
constexpr size_t n_near       = 64;   // bytes between an answer's text and its end of turn, at most
constexpr size_t n_end_tokens = 4;    // tokens of an end of turn, at most

size_t common_prefix(const std::string & a, const std::string & b) {
    const size_t n = std::min(a.size(), b.size());
    return (size_t) (std::mismatch(a.begin(), a.begin() + (ptrdiff_t) n, b.begin()).first - a.begin());
}

bool starts_with(const std::string & s, const std::string & prefix) {
    return s.compare(0, prefix.size(), prefix) == 0;
}

// Tokens that the stream has or gets, from `first` on, and where in the text each of them ends.
struct tokens_of_text {
    es_tokens           tokens;
    std::vector<size_t> ends; // empty if the tokenizer changes the text

    // The number of tokens that end at a byte of the text or before it.
    size_t up_to(size_t byte) const {
        return (size_t) (std::upper_bound(ends.begin(), ends.end(), byte) - ends.begin());
    }
};

tokens_of_text tokens_of(const es_chat & chat, es_tokens before, const std::string & whole, size_t at) {
    tokens_of_text out;
    out.tokens            = chat.tokenize(whole.substr(at));
    const size_t n_before = before.size();
    before.insert(before.end(), out.tokens.begin(), out.tokens.end());
    for (size_t i = n_before; i < before.size(); ++i) {
        const std::string piece = chat.piece(before.data(), i);
        if (whole.compare(at, piece.size(), piece) != 0) {
            out.ends.clear();
            return out;
        }
        at += piece.size();
        out.ends.push_back(at);
    }
    return out;
}

// Cuts tokens into pieces at the ends of the request's messages, and takes the start of the answer off.
void cut(es_chat_request & request, size_t first, size_t n_known, const std::string & whole,
         const tokens_of_text & read, size_t n_head, common_json & out) {
    std::vector<std::pair<size_t, size_t>> cuts; // tokens, messages
    const size_t                           n = request.n_messages();
    for (size_t m = n; m > n_known && cuts.size() < n_places_max; --m) {
        const bool is_end = m == n ? !request.is_answer(n - 1) || !request.is_continued()
                                   : request.is_answer(m - 1) || request.is_answer(m);
        if (is_end) {
            const std::string & text = request.text(first, m, false);
            if (starts_with(whole, text) && !read.ends.empty()) {
                cuts.emplace_back(read.up_to(text.size()), m);
            }
        }
    }
    if (n_head > 0) {
        cuts.emplace_back(n_head, request.n_system);
    }
    std::reverse(cuts.begin(), cuts.end());
    common_json pieces = common_json::array();
    size_t      at     = 0;
    for (auto [end, m] : cuts) {
        end = std::min(end, read.tokens.size() - 1); // the answer starts with a token at least
        if (end > at || m > n_known) {
            pieces.push_back(
                { { "tokens", es_tokens(read.tokens.begin() + (ptrdiff_t) at, read.tokens.begin() + (ptrdiff_t) end) },
                  { "n_messages", m } });
            at = end;
        }
    }
    out["pieces"] = pieces;
    out["start"]  = es_tokens(read.tokens.begin() + (ptrdiff_t) at, read.tokens.end());
}

// Where a text that the stream was fed up to a token ends in `base`, which ends there or a token later.
size_t end_in(const es_chat & chat, const std::string & base, const llama_token * tokens, size_t n) {
    const std::string held = chat.text(tokens, n > 32 ? n - 32 : 0, n);
    if (held.empty()) {
        return base.size();
    }
    const size_t at = base.rfind(held);
    return at == std::string::npos ? std::string::npos : at + held.size();
}

// Where in `whole` to go on after the first n_known messages, if the stream keeps its own form of them. last: the text
// of its newest token.
size_t after_known(es_chat_request & request, size_t first, size_t n_known, const std::string & whole,
                   const std::string & last, bool is_ended) {
    const std::string & base    = request.text(first, n_known, false);
    const std::string   content = request.inputs.messages[n_known - 1].content;
    size_t              at      = starts_with(whole, base) ? base.size() : std::string::npos;
    if (!request.is_answer(n_known - 1) && at != std::string::npos) {
        return at;
    }
    // after the answer's text, and the end of turn where the model wrote it
    const size_t found = content.empty() ? std::string::npos : whole.rfind(content, at);
    if (found != std::string::npos) {
        at = found + content.size();
    }
    if (at == std::string::npos) {
        throw std::invalid_argument("the chat template cannot be used on a stream: what it writes between two turns "
                                    "depends on the text of the turns");
    }
    const size_t end = is_ended && !last.empty()
                           ? whole.find(last, found == std::string::npos ? at - std::min(at, n_near) : at)
                           : std::string::npos;
    return end != std::string::npos && end < at + n_near ? end + last.size() : at;
}

} // namespace

common_json es_plan_anew(es_chat_request & request, size_t n_ctx) {
    const es_chat & chat = request.chat;
    const es_tokens bos  = chat.add_bos ? es_tokens{ llama_vocab_bos(chat.vocab) } : es_tokens{};

    // where a history may begin: at a message to the model after an answer, or at the first
    std::vector<size_t> starts;
    for (size_t i = request.n_system; i < request.n_messages(); ++i) {
        if (i == request.n_system || (request.inputs.messages[i].role == "user" && request.is_answer(i - 1))) {
            starts.push_back(i);
        }
    }
    size_t from = 0, n_bytes = 0; // not even looked at: what cannot fit
    for (size_t i = request.n_messages(), s = starts.size(); i-- > starts[0];) {
        n_bytes += request.inputs.messages[i].content.size();
        while (s > 0 && starts[s - 1] >= i) {
            --s;
        }
        if (n_bytes / n_byte_token > n_ctx && s + 1 < starts.size()) {
            from = s + 1;
            break;
        }
    }
    const auto read = [&](size_t s) {
        return tokens_of(chat, bos, request.text(starts[s], request.n_messages(), true), 0);
    };
    const auto     fits = [&](const tokens_of_text & t) { return bos.size() + t.tokens.size() <= n_ctx; };
    size_t         lo = from, hi = starts.size() - 1; // the first start that fits; the last is taken anyway
    tokens_of_text best = read(lo);
    if (!fits(best)) {
        while (lo < hi) {
            const size_t mid = lo + (hi - lo) / 2;
            if (fits(read(mid))) {
                hi = mid;
            } else {
                lo = mid + 1;
            }
        }
        best = read(lo);
    }
    const size_t        first = starts[lo];
    const std::string & whole = request.text(first, request.n_messages(), true);
    if (best.tokens.empty()) {
        throw std::invalid_argument("there is nothing to read: the prompt is empty");
    }
    size_t      n_head = best.up_to(common_prefix(request.head(), whole));
    common_json out    = { { "keep", 0 }, { "dropped", first - request.n_system } };
    best.tokens.insert(best.tokens.begin(), bos.begin(), bos.end());
    best.ends.insert(best.ends.begin(), best.ends.empty() ? 0 : bos.size(), 0);
    n_head      = std::min(n_head + bos.size(), best.tokens.size() - 1);
    out["head"] = n_head;
    cut(request, first, first, whole, best, n_head, out);
    return out;
}

common_json es_plan_on(es_chat_request & request, const std::vector<std::pair<size_t, size_t>> & places,
                       const llama_token * held, size_t n_held) {
    const es_chat &     chat    = request.chat;
    const size_t        n_known = places.back().first, n_end = places.back().second;
    const size_t        first = request.first_near(n_known);
    const std::string & whole = request.text(first, request.n_messages(), true);
    common_json         out   = common_json::object();

    // from the newest message read: what of the template's text does the stream hold?
    size_t     keep = 0, at = std::string::npos;
    const auto is_input = [&](const auto & p) { return p.first > first && !request.is_answer(p.first - 1); };
    const auto newest   = std::find_if(places.rbegin(), places.rend(), is_input);
    if (newest != places.rend()) {
        const std::string & base = request.text(first, newest->first, false);
        keep                     = newest->second;
        at                       = end_in(chat, base, held, keep);
        if (at != std::string::npos && starts_with(whole, base.substr(0, at))) {
            for (; keep < n_held; ++keep) { // the answer
                const std::string piece = chat.piece(held, keep);
                if (whole.compare(at, piece.size(), piece) != 0) {
                    break;
                }
                at += piece.size();
            }
        } else if (at != std::string::npos) { // the template renders earlier messages differently now
            const size_t same = common_prefix(whole, base);
            while (keep > 0 && at > same) {
                const std::string piece = chat.piece(held, --keep);
                if (piece.size() > at || base.compare(at - piece.size(), piece.size(), piece) != 0) {
                    break;
                }
                at -= piece.size();
            }
            at = at > same ? std::string::npos : at;
        }
    }
    // far more than the stream has of it is not read again: a transcript may hold what was never in this stream
    const size_t n_differ = at == std::string::npos ? 0 : request.text(first, n_known, false).size();
    if (n_differ > at && n_differ - at > n_byte_token * (n_end + n_least)) {
        at = std::string::npos;
    }
    if (at == std::string::npos) {
        keep       = n_end;
        size_t end = keep; // where the model's end of turn begins, if the stream ends with one
        while (end > 0 && keep - end < n_end_tokens && !llama_vocab_is_eog(chat.vocab, held[end - 1])) {
            --end;
        }
        const bool is_ended = end > 0 && llama_vocab_is_eog(chat.vocab, held[end - 1]);
        at = after_known(request, first, n_known, whole, is_ended ? chat.text(held, end - 1, keep) : "", is_ended);
        if (newest != places.rend()) { // else that message has left the window, and nothing is wrong
            out["note"] = "the chat template rewrites earlier messages, which stay in the stream as first read";
        }
    }
    // tokens are made from where the tokenizer would begin afresh, so that they are those of the whole text
    const es_tokens rest  = chat.tokenize(whole.substr(at));
    const bool      joins = !rest.empty() && !chat.is_control(rest[0]);
    size_t          fresh = rest.empty() && keep > 0 ? keep - 1 : keep; // something must be read: its last token again
    while (joins && fresh > 0 && keep - fresh < n_back && !chat.is_control(held[fresh - 1])) {
        --fresh;
    }
    const std::string before = chat.text(held, fresh, keep);
    const es_tokens   made   = fresh == keep ? rest
                               : fresh == 0 || chat.is_control(held[fresh - 1])
                                   ? chat.tokenize(before + whole.substr(at))
                                   : chat.tokenize_within(before + whole.substr(at));
    size_t            same   = 0;
    while (same < keep - fresh && same < made.size() && made[same] == held[fresh + same]) {
        ++same;
    }
    if (same == made.size() && same > 0) { // nothing new: the last token is read again
        --same;
    }
    const size_t n_kept = fresh + same;
    if (made.size() == same) {
        throw std::invalid_argument("there is nothing to read: the prompt is empty");
    }
    tokens_of_text read;
    read.tokens.assign(made.begin() + (ptrdiff_t) same, made.end());
    size_t byte =
        at - before.size() + chat.text(made.data(), 0, same).size(); // may wrap; comes back with the additions
    es_tokens all(held + fresh, held + n_kept);
    for (const llama_token token : read.tokens) {
        all.push_back(token);
        byte += chat.piece(all.data(), all.size() - 1).size();
        read.ends.push_back(byte);
    }
    out["keep"]    = n_kept;
    out["head"]    = 0;
    out["dropped"] = 0;
    cut(request, first, n_known, whole, read, 0, out);
    return out;
}
