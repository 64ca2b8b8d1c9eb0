"""StreamingLLM, the sink move and the rebase, in reading order. NumPy only, no weights to download, a few seconds.

    python docs/method.py

A tiny random transformer reads 400 tokens through a series of caches, and the logits are compared. docs/method.md
explains the ideas; tests/reference.py is the method for real models.
"""

import numpy as np

N_LAYER, N_HEAD, HEAD_DIM, N_VOCAB = 2, 4, 16, 64
N_CTX, N_KEEP, N_TOKENS, REBASE_AT = 32, 4, 400, 128  # a cache of 4 sinks and 28 more; positions stay below 128
N_EMBD, N_PAIR = N_HEAD * HEAD_DIM, HEAD_DIM // 2
THETA = 10000.0 ** (-np.arange(N_PAIR) / N_PAIR)  # [pair] radians per position

rng = np.random.default_rng(0)
WQ, WK, WV, WO = rng.normal(size=(4, N_LAYER, N_EMBD, N_EMBD)) / np.sqrt(N_EMBD)
EMBED = rng.normal(size=(N_VOCAB, N_EMBD))
TEXT = np.append(0, rng.integers(1, N_VOCAB, N_TOKENS - 1))  # token 0 is BOS

# Trained models park attention that a head has no use for on the first token. Here that is built in: channel 0 marks
# the first token, its value is zero, and every query looks for the mark (SINK, in decode).
EMBED[:, 0], EMBED[0] = 0.0, np.eye(N_EMBD)[0]
WV[:, :, 0], WO[:, 0], SINK = 0.0, 0.0, 1.9


def turn(x, position, dtype):
    """RoPE. x [n, head, pair]: pairs of dimensions as complex numbers; position [n]; angles are rounded to dtype."""
    angle = np.asarray(position, dtype)[:, None, None] * THETA.astype(dtype)
    return x * np.exp(1j * angle.astype(np.float64))


def decode(token, cache):
    """Read one token. Returns logits [N_VOCAB] and the attention that the oldest cached token gets, averaged."""
    x, oldest = EMBED[token], 0.0
    if len(cache.keys[0]) == cache.n_ctx:
        cache.evict()
    for layer in range(N_LAYER):
        h = x / x.std()  # the norm, without weights
        q, k = ((w[layer] @ h).view(complex).reshape(1, N_HEAD, N_PAIR) for w in (WQ, WK))
        q[..., -1] += SINK  # in the slowest pair, where distance hardly matters
        k[..., -1] += SINK * h[0]
        q, keys, values = cache.attend(layer, q, k, (WV[layer] @ h).reshape(1, N_HEAD, HEAD_DIM))
        # Re(q conj(k)) is the dot product of two pairs: of their rotations only the difference remains
        scores = np.einsum("mhp,nhp->hn", q, keys.conj()).real / np.sqrt(HEAD_DIM)
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        x = x + WO[layer] @ np.einsum("hn,nhd->hd", p, values).ravel()
        oldest += p[:, 0].mean() / N_LAYER
    cache.position += 1
    return EMBED @ x / x.std() / np.sqrt(N_EMBD), oldest


class Cache:
    """The ordinary KV cache: a key is turned once, by its position in the text, and kept as it is.

    1. With room for the whole text (n_ctx = N_TOKENS) nothing is lost, but it grows as long as the text does.
    2. With less room, the oldest token after the n_keep sinks leaves. Without sinks, that is soon the first token.
    """

    def __init__(self, n_ctx, n_keep, start=0, dtype=np.float64):
        self.n_ctx, self.n_keep, self.position, self.dtype = n_ctx, n_keep, start, dtype
        self.keys = [np.empty((0, N_HEAD, N_PAIR), complex)] * N_LAYER
        self.values = [np.empty((0, N_HEAD, HEAD_DIM))] * N_LAYER
        self.n_turned = 0

    def turn_keys(self, keys, position):
        self.n_turned += len(keys)
        return turn(keys, position, self.dtype)

    def attend(self, layer, q, k, v):
        """Store k and v. Returns q and all keys, turned, and all values."""
        self.keys[layer] = np.append(self.keys[layer], self.turn_keys(k, [self.position]), axis=0)
        self.values[layer] = np.append(self.values[layer], v, axis=0)
        return turn(q, [self.position], self.dtype), self.keys[layer], self.values[layer]

    def evict(self):
        """Drop the oldest token that is not a sink."""
        self.keys = [np.delete(k, self.n_keep, axis=0) for k in self.keys]
        self.values = [np.delete(v, self.n_keep, axis=0) for v in self.values]


class Paper(Cache):
    """3. StreamingLLM: keys are stored unturned, and all of them are turned by their place in the cache, every time."""

    def attend(self, layer, q, k, v):
        self.keys[layer] = np.append(self.keys[layer], k, axis=0)
        self.values[layer] = np.append(self.values[layer], v, axis=0)
        place = np.arange(len(self.keys[layer]))
        return turn(q, place[-1:], self.dtype), self.turn_keys(self.keys[layer], place), self.values[layer]


class SinkMove(Cache):
    """4. Only differences of positions matter: the window stays where it is, and the sinks move up behind it."""

    moved = 0  # how far the sinks are from where they were read

    def evict(self):
        if self.moved == 0:
            self.pristine = [k[: self.n_keep].copy() for k in self.keys]  # each move starts here: no drift
        super().evict()
        self.place_sinks(self.moved + 1)

    def place_sinks(self, moved):
        self.moved = moved
        for keys, pristine in zip(self.keys, self.pristine, strict=True):
            keys[: self.n_keep] = self.turn_keys(pristine, [moved])


class Rebase(SinkMove):
    """5. Before positions outgrow float32 angles, everything goes back by as far as the sinks have moved."""

    def evict(self):
        if self.position == REBASE_AT:
            for keys in self.keys:
                keys[self.n_keep :] = self.turn_keys(keys[self.n_keep :], [-self.moved])
            self.position -= self.moved
            self.place_sinks(0)
        super().evict()


def read(cache):
    """TEXT through a cache: logits [N_TOKENS, N_VOCAB], the sink's attention at the end, keys turned per token."""
    logits = np.empty((N_TOKENS, N_VOCAB))
    for i, token in enumerate(TEXT):
        if i == N_CTX:
            cache.n_turned = 0  # counted while the cache is full
        logits[i], oldest = decode(token, cache)
    return logits, oldest, cache.n_turned / N_LAYER / (N_TOKENS - N_CTX)


CACHES = {
    "1 everything kept": Cache(N_TOKENS, 0),
    "2 window, no sinks": Cache(N_CTX, 0),
    "3 StreamingLLM": Paper(N_CTX, N_KEEP),
    "4 sinks moved": SinkMove(N_CTX, N_KEEP),
    "  from position 10,000,000": SinkMove(N_CTX, N_KEEP, 10**7),  # RoPE does not mind where the count begins,
    "  the same, float32 angles": SinkMove(N_CTX, N_KEEP, 10**7, np.float32),  # float32 does
    "5 rebased, float32 angles": Rebase(N_CTX, N_KEEP, 0, np.float32),
}

if __name__ == "__main__":
    print("cache                     keys turned  attention to  logits against 1  against 3")
    print("                            per token  oldest token            (mean)     (max)")
    results = {name: read(cache) for name, cache in CACHES.items()}
    dense, paper = results["1 everything kept"][0], results["3 StreamingLLM"][0]
    for name, (logits, oldest, n_turned) in results.items():
        away, error = np.abs(logits - dense).mean(), np.abs(logits - paper).max()
        print(f"{name:26}{n_turned:11.1f}{oldest:14.2f}{away:18.3f}{error:11.1e}")
        assert error < 1e-5 or name[0] not in "45"  # steps 4 and 5 change no logit
