"""Two hundred strings that tokenizers like to disagree about. Deterministic."""

from __future__ import annotations

import random
import unicodedata

_PLAIN = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    " \n \n",
    "   leading spaces",
    "trailing spaces   ",
    " one leading",
    "a  b   c    d",
    "tab\tseparated\tvalues",
    "mixed \t \n \r\n ends \n",
    "don't can't I'm you're WE'LL they'd He'S it's",
    "'s 't 're 've 'm 'll 'd",
    "'S 'T 'RE 'VE 'M 'LL 'D",
    "1 12 123 1234 12345 1234567890",
    "3.14159 1,000,000 -5 +7 1e-9 0x1F 1/2 50%",
    "٣٤٥ ४५६ ⅷ ½ ²",
    "CamelCase snake_case kebab-case SCREAMING_SNAKE",
    "Größe naïve façade coöperate Ångström",
    "你好，世界！这是一个测试。",
    "こんにちは世界。テストです。",
    "안녕하세요 세계",
    "Привет, мир! Съешь ещё этих мягких французских булок",
    "مرحبا بالعالم",
    "שלום עולם",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "ကမ္ဘာလောက",
    "😀😃😄",
    "👩‍👩‍👧‍👦 family",
    "🇩🇪🇫🇷 flags",
    "👍🏽 skin tone",
    "text😀text",
    "❤️ ✈️ ☺",
    "zero\u200bwidth\u200djoiner\ufeff",
    "non\u00a0breaking\u2003em\u3000ideographic spaces",
    "\x00\x01\x02 control \x1b[31m \x7f",
    "\x85\u2028\u2029 line separators",
    "if (x == 1) { return y[0]; } // comment",
    "def f(a, b=None):\n    return a if b is None else b\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", 42); }',
    '<html><body class="x">&amp;</body></html>',
    "SELECT * FROM t WHERE a <> 'b''c';",
    "https://example.com/a?b=c&d=e#f",
    "user@example.com C:\\path\\to\\file /usr/bin",
    '{"key": [1, 2, {"n": null}]}',
    "!!! ??? ... --- === *** ### $$$",
    "(((nested)))[[[brackets]]]{{{braces}}}",
    "\\n is not a newline, \\t no tab",
    "a" * 100,
    " " * 33,
    "ab" * 40,
    "\n" * 9,
    "∑∫√∞≠≤≥ αβγδ",
    "“quotes” ‘single’ «guillemets» — dash – en",
    "ﬁ ligature ﬀ ①②③ ㎏",
    "\U0001f9d1\U0001f3fd\u200d\U0001f680",
    "ß ẞ ı İ ǅ",
    "x\u0301y\u0308",
    "▁already▁visible▁spaces",
    "Ġ Ċ byte-level look-alikes Ã©",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒸𝓊𝓇𝓈𝒾𝓋ℯ",
    "\ue000 private \U000f0000 use",
    "end.",
]
_SPECIAL = [
    "<|im_start|>user\nhello<|im_end|>\n",
    "<|im_start|><|im_end|>",
    "text<|endoftext|>text",
    " <|endoftext|> spaced <|endoftext|> ",
    "<|im_start|>  two spaces after",
    "<|im_start |> not special <|im_end",
    "<|im_start|>\n\n<|im_end|>\n\n",
    "a<|im_end|>b<|im_end|>c",
    "你<|im_start|>好",
    "\n<|endoftext|>\n",
]
_POOLS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    "    \n\t",
    ".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+`~",
    "äöüßéèñçøåÄÖÜ",
    "你好世界中文字符",
    "あいうえおカキクケコ",
    "абвгдежзАБВГ",
    "😀🎉🚀❤👍",
]


def awkward_strings(count: int = 200) -> list[str]:
    """`count` strings: those above, then random mixtures of scripts. Not in NFC only where that is the point."""
    rng = random.Random(0)
    strings = [*_PLAIN, *_SPECIAL]
    while len(strings) < count:
        pools = rng.sample(_POOLS, rng.randint(1, 4))
        strings.append("".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(1, 40))))
    return strings[:count]


def mixed_case(text: str) -> bool:
    """Letters beyond ASCII of both cases: llama.cpp's tekken finds the change of case among ASCII letters only."""
    return any(c.islower() and ord(c) > 127 for c in text) and any(c.isupper() for c in text)


def marked(text: str) -> bool:
    """With combining marks: to llama.cpp's tekken they are no part of a word."""
    return any(unicodedata.category(c).startswith("M") for c in text)


def decomposed(text: str) -> bool:
    """Not in NFC: Qwen's tokenizer composes such text, llama.cpp does not."""
    return unicodedata.normalize("NFC", text) != text
