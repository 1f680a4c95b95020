"""A few hundred deterministic strings that are difficult for tokenizers."""

from __future__ import annotations

import random
from collections.abc import Sequence

WRITTEN = (
    "",
    " ",
    "a",
    "Hello, world!",
    " leading and trailing ",
    "Don't we're I'll I'D THEY'VE it'S 'tis rock'n'roll ''s '",
    "\N{RIGHT SINGLE QUOTATION MARK}s don\N{RIGHT SINGLE QUOTATION MARK}t",
    "CamelCaseAndSNAKE_CASE_and-kebab-case.and.dots/and/slashes\\and\\backslashes",
    "def f(x):\n    return x[::-1]\n\n\n\tif x != y and not z: pass  # comment\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; } // \u00e9t\u00e9",
    '{"key": [1, 2.5e-10, null, "\\u00e9"], "nested": {"a": {}}}',
    "<html><body class='x'>&nbsp;&#1234;</body></html>",
    "SELECT * FROM t WHERE a='it''s' AND b<>3;--",
    "https://example.com/a?b=c&d=%20e#f user@example.org +49 (0)30 1234-5678",
    "1 12 123 1234 12345 1234567890 3.14159 1,000,000.00 1e10 0b1010 1_000 \u00bd \u00b2\u00b3 \u2167",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \uff11\uff12\uff13 \u4e00\u4e8c\u4e09 \u2460\u2461",
    "ab1c22def333 v1.2.3-rc.4+build5 A4 3D 2nd",
    "\u00c4\u00d6\u00dc\u00e4\u00f6\u00fc\u00df \u0153uvre \u00c6gir",
    "\u00f1 \u00bfqu\u00e9? stra\u00dfe na\u00efve caf\u00e9",
    "cafe\u0301 a\u0308 n\u0303 e\u0323\u0302 \u1e69 s\u0323\u0307 q\u0307\u0323 A\u030a \u00c5 \u212b",  # NFC or not
    "Z\u0351\u036b\u0343\u036aA\u033cL\u0321\u034aG\u0330\u0302O\u031a",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u0436 \u0438\u0306 \u0457",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5 \u1f00\u1f02\u1f79",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u05d1\u05b0\u05bc\u05e8\u05b5\u05d0\u05e9\u05c1\u05b4\u05d9\u05ea",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0627\u0644\u0633\u064e\u0651",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0915\u094d\u0937\u0924\u094d\u0930",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 \u0e19\u0e49\u0e33 \u0e19\u0e33",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u300c\u5f15\u7528\u300d",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c \u30ab\u30bf\u30ab\u30ca \uff76\uff9e\uff77\uff9e \u304b\u3099",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4 \u1112\u1161\u11ab\u1100\u1173\u11af \u314b\u314b\u314b",
    "\U00020000\U0002a6d6\U0001d11e \U00010348 \U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd",
    "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 1\ufe0f\u20e3 \u2764\ufe0f \u2603 \u263a\ufe0e \U0001faf1\U0001f3fb",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "a\u00a0b\u2003c\u2009d\u200be\u3000f\u2028g\u2029h\u0085i\u1680j\u202fk\u205fl\ufeffm",
    "\u200e\u200f\u202a\u202e\u2066\u2069\u00ad\u2060\u180e",
    "a\x00b\x01\x02\x07\x08\x0b\x0c\x1b[31m\x7f\x80\x9f",
    "\r \r\n \n\r \n\n \r\n\r\n \t\n\t \x0b\n",
    "a\n b\n  c\n   d\n    e\n\tf\n\t\tg\n \t h",
    "tail   ",
    "tail\n\n\n",
    "   head",
    "\n\n\nhead",
    "\t\t\thead\t\t\ttail\t\t\t",
    "\u2581 \u2581\u2581a\u2581b",  # SentencePiece's space symbol
    "\u0120a \u010a \u0100\u0101",  # letters that stand for bytes in byte-level BPE
    "<0x0A> <0xE2> <0x00>",  # byte tokens of SentencePiece
    "<unk> <s> </s> <pad> [PAD] [UNK]",
    "!!! ??? ... --- === *** ### $$$ %%% ^^^ &&& ((( ))) [[[ ]]] {{{ }}} ~~~ ``` '''",
    "!?!?\n!?!?\r\n;;\n\n//\n/*\n*/",
    "\u2026\u2014\u2013\u201c\u201d\u2018\u2019\u00ab\u00bb\u2022\u2192\u21d2\u2211\u221e\u2260\u2264\u00b1\u20ac\u00a3\u00a5\u20bf",
    "\u0130\u0131 \u01c5 \u1fb3 \ufb01 \ufb03 \u017f \u212a \u1e9e \u0345",  # letters with unusual case mappings
    "\ue000\uf8ff\U000f0000\U0010fffd \ufffd \ufdd0 \uffff",  # private use, replacement, noncharacters
    "x" * 300,
    "ab" * 200,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "Donaudampfschifffahrtselektrizit\u00e4tenhauptbetriebswerkbauunterbeamtengesellschaft",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbbb",
    "1" * 100,
    "0.1 " * 30,
    " " * 100,
    "\n" * 100,
    "\u4e2d" * 60,
    "\U0001f600" * 30,
)

_ALPHABETS = (
    "abcdefghij ",
    "aAbB12 \n",
    " \t\n\r",
    " \n\u00a0\u3000\u2003\u2028\x0b\x0c",
    "0123456789.,eE+-",
    "'sStTdDlLvVrRmMeE ",
    "(){}[]<>=!&|;:/*#\n ",
    "a\u0301\u0308\u0323\u0327e ",
    "\u00e4\u00f6\u00fc\u00e9\u00e8\u00ea\u00f1\u00e7\u00df ",
    "\u4f60\u597d\u4e16\u754c\u3042\u30a2\ud55c\uae00 \uff0c\u3002",
    "\u0627\u0644\u0639\u0631\u0628\u064e\u0651 ",
    "\u0915\u094d\u0937\u093f\u0902 ",
    "\U0001f600\U0001f468\u200d\U0001f3fd\ufe0f\U0001f1e9 ",
    "\x00\x01\x1b\x7f\x85 a",
    "\u2581\u0120\u010a a",
    "\U00020000\ue000\ufffd\u200b\u200d a",
    "\u0130\u0131\u01c5\ufb01\u017f\u212aaI'",
    "_-.@/\\:~ab1 ",
)


def awkward_strings(special_tokens: Sequence[str] = ()) -> list[str]:
    """Return about four hundred strings without surrogates; some contain the given special tokens."""
    generator = random.Random(0)
    strings = list(WRITTEN)
    for alphabet in _ALPHABETS:
        strings += ["".join(generator.choices(alphabet, k=length)) for length in (2, 3, 5, 8, 13, 21, 34, 55)]
    characters = "".join(dict.fromkeys("".join((*WRITTEN, *_ALPHABETS))))
    strings += ["".join(generator.choices(characters, k=generator.randint(1, 40))) for _ in range(100)]
    strings += ["".join(map(_any_character, [generator] * generator.randint(1, 30))) for _ in range(50)]
    for token in special_tokens:
        strings += [token, f"a{token}b", f" {token} ", f"\n{token}\n\n{token}{token}", token[:-1], token[1:]]
        strings += [f"{token[:2]} {token[2:]}", f"{token.upper()} x", f"the end of a turn is {token}\nuser: 1"]
    return strings


def _any_character(generator: random.Random) -> str:
    """Return a random character that is not a surrogate."""
    code = generator.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)
