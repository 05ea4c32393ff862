#!/usr/bin/env python3
"""Holds tokenizer.c against the sentencepiece library: ids and decoded texts must be the same, string for string.

    python3 tests/tokenizer_parity.py MODEL.bin [TOKENIZER.model ...]     20,000 random strings for each vocabulary
    python3 tests/tokenizer_parity.py --store MODEL.bin                   writes tests/tokenizer_strings.txt anew

Vocabularies: the one in MODEL.bin (its section turned back into the library's own file), some made ones, full of equal scores, and
each TOKENIZER.model given, as the exporter reads it. For LLaMA's also prompts of LLaVA-1.5 with known ids. Needs
build/tokenizer_cli (`make build/tokenizer_cli`) and the packages of export/requirements.txt.
"""
import hashlib
import os
import random
import struct
import subprocess
import sys
import tempfile

import sentencepiece

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "..", "export"))
import flat
import llava

import counting
from counting import check, finish

CLI = os.path.join(os.environ.get("BUILD", os.path.join(HERE, "..", "build")), "tokenizer_cli")
STORED = os.path.join(HERE, "tokenizer_strings.txt")
N_STRINGS, N_STORED, N_DECODE = 20000, 300, 4000
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6     # tokenizer.h



# -----------------------------------------------------------------------------
# a vocabulary: a list of (text as bytes, score, type)

def model_bin(path, pieces):
    """A model file that holds a tokenizer and nothing else."""
    flat.write(path, "none", {}, flat.tokenizer_section(1, pieces), [])


# SentencePiece's own file is a protocol buffer: fields of (number << 3 | wire type), types 0 varint, 2 length and bytes, 5 four bytes.

def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def library(pieces, prefix):
    """The library over these pieces; prefix: with its dummy prefix."""
    proto = b"".join(field(1, field(1, t) + field(2, float(s)) + field(3, k)) for t, s, k in pieces)
    proto += field(2, field(3, 2) + field(4, len(pieces)) + field(35, 1))
    proto += field(3, field(1, b"identity") + field(3, int(prefix)) + field(4, 0) + field(5, 1))
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


BASE = [(b"<unk>", 0.0, UNKNOWN), (b"<s>", 0.0, CONTROL), (b"</s>", 0.0, CONTROL)] + [(b"<0x%02X>" % b, 0.0, BYTE) for b in range(256)]


def equal_scores(pieces):
    """The same pieces with a handful of different scores, so that the order among equals decides."""
    return [(t, -float(i % 3) if k == NORMAL else s, k) for i, (t, s, k) in enumerate(pieces)]


def made(rng, alphabet, n, longest):
    """Random pieces: what they merge from need not be there, and scores say nothing of lengths."""
    texts = {"".join(rng.choice(alphabet) for _ in range(rng.randint(1, longest))).encode() for _ in range(n)} - {p[0] for p in BASE}
    return BASE + [(t, -float(rng.randint(0, 5)), NORMAL) for t in sorted(texts)]


# -----------------------------------------------------------------------------
# strings

SCRIPTS = [(0x20, 0x7E), (0xA0, 0x17F), (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x58F), (0x590, 0x5FF),
           (0x600, 0x6FF), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F),
           (0x13A0, 0x13FF), (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x20A0, 0x20BF), (0x2190, 0x22FF), (0x2500, 0x259F), (0x3000, 0x30FF),
           (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xFB50, 0xFDFF), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x10000, 0x100FF),
           (0x12000, 0x120FF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0100, 0xE01EF), (0x10FF00, 0x10FFFF)]
SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "<image>", "<0x0A>", "<0x00>", "<0xFF>", "<0xe2>", "<|im_start|>", "[INST]", "</s><s>", "\ufffd", " ⁇ "]
WORDS = "the a of and to in is what where how many red green blue circle square left right above below image picture USER: ASSISTANT: don't I'm " \
        "naïve café straße Москва 東京 서울 नमस्ते สวัสดี שלום مرحبا Ελλάδα x=1; {} () == \\n http://a.b/c?d=e 3.14 1,000 one-two".split()
EMOJI = ["🙂", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "❤️", "☎️", "🧑🏿‍🚀", "1️⃣", "🫠"]
BROKEN = [b"\x80", b"\xbf", b"\xc0\x80", b"\xc1\xbf", b"\xc2", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xe2\x96", b"\xe2\x82", b"\xed\xa0\x80", b"\xed\xbf\xbf",
          b"\xf0\x80\x80\x80", b"\xf0\x8f\xbf\xbf", b"\xf0\x9f\x99", b"\xf0\x9f", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80", b"\xfe", b"\xff"]


def part(rng, pieces):
    """A few bytes of one kind."""
    k, n = rng.randrange(13), rng.choice((1, 1, 2, 3, 5, 8))
    if k == 0:
        lo, hi = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(lo, hi)) for _ in range(n)).encode()
    if k == 1:
        return " ".join(rng.choice(WORDS) for _ in range(n)).encode()
    if k == 2:
        return bytes(rng.choice((*range(32), 127)) for _ in range(n))
    if k == 3:
        return "".join(chr(rng.choice((*range(0x80, 0xA0), 0xA0, 0xAD, 0x200B, 0x200D, 0x2028, 0x202E, 0x3000, 0xFEFF))) for _ in range(n)).encode()
    if k == 4:
        return "".join(rng.choice(EMOJI) for _ in range(n)).encode()
    if k == 5:
        return b"".join(rng.choice(BROKEN) for _ in range(n))
    if k == 6:
        return bytes(rng.randrange(256) for _ in range(n))
    if k == 7:
        return b" " * rng.choice((1, 2, 3, 4, 7, 15, 16, 17, 33, 100))
    if k == 8:
        return "".join(rng.choice("0123456789.,") for _ in range(2 * n)).encode()
    if k == 9:
        return ("▁" * n).encode()
    if k == 10:
        return rng.choice(SPECIAL).encode()
    if k == 11:
        whole = "".join(rng.choice(EMOJI + WORDS) for _ in range(n)).encode()
        return whole[rng.randrange(3):len(whole) - rng.randrange(3)]
    return b"".join(rng.choice(pieces)[0] for _ in range(2 * n)).replace("▁".encode(), rng.choice((b" ", "▁".encode(), b"")))


def random_string(rng, pieces, alphabet=None):
    if alphabet and rng.random() < 0.7:
        return "".join(rng.choice(alphabet + " ") for _ in range(rng.randint(0, 80))).encode()
    return b"".join(part(rng, pieces) for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 6, 10, 30))))


def random_ids(rng, pieces):
    n, kind = len(pieces), rng.randrange(4)
    bytes_ = [i for i, p in enumerate(pieces) if p[2] == BYTE]
    if kind == 0:
        return [rng.randrange(n) for _ in range(rng.randint(1, 12))]
    ids = []
    for _ in range(rng.randint(1, 6)):
        c = rng.choice((chr(rng.randint(*rng.choice(SCRIPTS))).encode(), rng.choice(BROKEN), rng.choice(EMOJI).encode()))
        ids += [bytes_[b] for b in c]
        if rng.random() < 0.3:
            ids.insert(rng.randrange(len(ids) + 1), rng.choice((0, 1, 2, rng.randrange(n))))
    return ids


# -----------------------------------------------------------------------------
# the comparison

def run(model, requests):
    """requests: (op, bytes or ids). The answers of tokenizer_cli.c."""
    feed = b"".join(op + (struct.pack("<I", len(x)) + x if op != b"d" else struct.pack(f"<I{len(x)}i", len(x), *x)) for op, x in requests)
    p = subprocess.run([CLI, model], input=feed, stdout=subprocess.PIPE)
    check(p.returncode == 0, f"{CLI} {model}: exit status {p.returncode}")
    answers, i, out = [], 0, p.stdout
    for op, _ in requests:
        if i + 4 > len(out):
            answers.append(None)    # it ended too early; each missing answer fails its comparison
            continue
        n, = struct.unpack_from("<I", out, i)
        size = n if op == b"d" else 4 * n
        answers.append(out[i + 4:i + 4 + size] if op == b"d" else list(struct.unpack_from(f"<{n}i", out, i + 4)))
        i += 4 + size
    check(i == len(out), "tokenizer_cli wrote more than was asked for")
    return answers


def compare(name, pieces, n, alphabet=None, original=None):
    """original: the library over the file itself, where there is one."""
    rng = random.Random("parity")
    with_prefix, without = original or library(pieces, True), library(pieces, False)
    texts = [b"", b" ", "▁".encode(), b"x" * 20000, b" " * 5000, bytes(range(256))] + [random_string(rng, pieces, alphabet) for _ in range(n)]
    requests, want = [], []
    for i, text in enumerate(texts):
        op = b"en"[i % 4 == 3:][:1]    # every fourth string without the prefix
        ids = (with_prefix if op == b"e" else without).encode(text)
        requests += [(op, text), (b"d", ids)]
        want += [ids, with_prefix.decode(ids).encode()]
    for _ in range(N_DECODE):
        ids = random_ids(rng, pieces)
        requests.append((b"d", ids))
        want.append(with_prefix.decode(ids).encode())
    before = counting.failed
    with tempfile.TemporaryDirectory() as folder:
        model_bin(os.path.join(folder, "vocabulary.bin"), pieces)
        for (op, x), w, got in zip(requests, want, run(os.path.join(folder, "vocabulary.bin"), requests)):
            check(got == w, f"{name}: {op.decode()} {x!r:.300}: got {got!r:.300}, the library has {w!r:.300}")
    print(f"{name}: {len(pieces)} pieces, {len(texts)} strings, {len(requests)} comparisons, {counting.failed - before} differ")


# -----------------------------------------------------------------------------
# prompts of LLaVA-1.5: what stands around a picture (None) is encoded on its own, each part with the prefix, after <s>
# Ids by the fast tokenizer of transformers for llava-hf/llava-1.5-7b-hf, where 32000 is <image>.

SYSTEM = "A chat between a curious user and an artificial intelligence assistant. " \
         "The assistant gives helpful, detailed, and polite answers to the user's questions."
GOLDENS = [
    (["USER: ", None, "\nWhat's the content of the image?\nASSISTANT:"],
     "3148 1001 29901 29871 32000 29871 13 5618 29915 29879 278 2793 310 278 1967 29973 13 22933 9047 13566 29901"),
    (["USER: ", None, "\nWhat is shown in this image? ASSISTANT:"],
     "3148 1001 29901 29871 32000 29871 13 5618 338 4318 297 445 1967 29973 319 1799 9047 13566 29901"),
    ([SYSTEM + " USER: ", None, "\nDescribe this image. ASSISTANT:"],
     "319 13563 1546 263 12758 1404 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892 322 1248 568 6089 304 278 1404 29915 29879 "
     "5155 29889 3148 1001 29901 29871 32000 29871 13 4002 29581 445 1967 29889 319 1799 9047 13566 29901"),
]
LLAMA = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
DECODED = [([450, 1967], "The image"), ([29871, 13, 5618], "\nWhat"), ([15043, 29871, 3186], "Hello  world"), ([243, 162, 156, 133], "\U0001F642")]


def goldens(pieces):
    requests, want = [], []
    for parts, ids in GOLDENS:
        ids = [int(i) for i in ids.split()]
        cut = ids.index(32000)
        requests += [(b"e", parts[0].encode()), (b"e", parts[2].encode())]
        want += [ids[:cut], ids[cut + 1:]]
    requests += [(b"n", b"USER: How"), (b"e", b"USER: How")]    # after </s>: the original code, transformers
    want += [[11889, 29901, 1128], [3148, 1001, 29901, 1128]]
    for ids, text in DECODED:
        requests.append((b"d", ids))
        want.append(text.encode())
    with tempfile.TemporaryDirectory() as folder:
        model_bin(os.path.join(folder, "llama.bin"), pieces)
        for (op, x), w, got in zip(requests, want, run(os.path.join(folder, "llama.bin"), requests)):
            check(got == w, f"LLaVA-1.5: {op.decode()} {x!r}: got {got!r}, expected {w!r}")
    print(f"LLaVA-1.5: {len(requests)} known answers")


# -----------------------------------------------------------------------------
# the stored strings, for tests/test_tokenizer.c, which needs no Python

WRITTEN = ["", " ", "  ", "a", "Hello world", "Hello  world", " leading", "trailing ", "   three", "What is left of the red circle?", "How many squares are there?",
           "USER: ", "\nASSISTANT:", "\n", "\n\n", "\t", "\r\n", "a\tb", "\x00", "a\x00b", "\x7f", "\x1b[0m", "\u00a0", "\u3000", "\u200b", "\ufeffbom", "\u202eabc",
           "▁", "▁▁", " ▁", "▁ ", "a▁b", "▁a ▁b", "_", "<s>", "</s>", "<unk>", "<s>hello</s>", "<0x0A>", "<0x00>", "<0xFF>", "a<0x0A>b", "<image>", "<image>\nWhat is this?",
           "0", "42", "3.14159", "1234567890", "1,000,000", "ABC abc", "don't", "straße", "naïve café", "Ελλάδα", "Москва", "Հայաստան", "שלום", "مرحبا", "नमस्ते", "বাংলা", "தமிழ்",
           "สวัสดี", "საქართველო", "ኢትዮጵያ", "ᏣᎳᎩ", "한국어", "日本語", "中文", "ｆｕｌｌ", "ﬁ ligature", "e\u0301", "é", "\U00020000", "𝒳", "𒀀", "🙂", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "❤️", "a🙂b",
           "\ufffd", "\ue000", "\uffff", "\U0010ffff", "⁇", "{}[]()", "a\\b", "#", "# no comment", "\"quoted\"", "'", "x" * 100, " " * 64, "ab " * 20, "🙂" * 20]


def escape(data):
    """Readable and on one line: what is not a printable character, and a space at either end, as \\xNN."""
    text, out = data.decode("utf-8", "surrogateescape"), ""
    for i, c in enumerate(text):
        plain = c.isprintable() and c != "\\" and not (c == " " and i in (0, len(text) - 1))
        out += c if plain else "".join("\\x%02X" % b for b in c.encode("utf-8", "surrogateescape"))
    return out


def fnv(data):
    h = 0xcbf29ce484222325
    for b in data:
        h = (h ^ b) * 0x100000001b3 & (1 << 64) - 1
    return h


def store(model):
    pieces, rng = flat.read(model).tokenizer, random.Random("stored")
    with_prefix, without = library(pieces, True), library(pieces, False)
    texts = [t.encode("utf-8", "surrogatepass") for t in WRITTEN] + BROKEN + [b"a" + b + b"b" for b in BROKEN]
    while len(texts) < N_STORED - 40:
        t = random_string(rng, pieces)
        if 0 < len(t) < 120:
            texts.append(t)
    lines = []
    for i, t in enumerate(texts):
        op = "en"[i % 4 == 3]
        ids = (with_prefix if op == "e" else without).encode(t)
        lines.append((op, escape(t), ids))
    while len(lines) < N_STORED:
        lines.append(("d", "", random_ids(rng, pieces)))
    with open(STORED, "w", encoding="utf-8", newline="\n") as f:
        f.write(f"# Written by tests/tokenizer_parity.py --store with sentencepiece {sentencepiece.__version__}. Fields, between tabs: how (e: with\n"
                "# the prefix, n: without, d: ids alone), text, ids, the ids decoded. \\xNN is a byte. The next line says of which vocabulary.\n")
        f.write(f"vocabulary\t{len(pieces)}\t{fnv(flat.tokenizer_section(1, pieces)):016x}\n")
        for op, text, ids in lines:
            f.write(f"{op}\t{text}\t{' '.join(map(str, ids))}\t{escape(with_prefix.decode(ids).encode())}\n")
    print(f"{STORED}: {len(lines)} strings, {len(pieces)} pieces")


def main():
    args = sys.argv[1:]
    if args[:1] == ["--store"] and len(args) == 2:
        return store(args[1])
    if not args or args[0].startswith("-"):
        sys.exit(__doc__)
    if not os.path.exists(CLI):
        sys.exit(f"error: {CLI} is missing\nhint:  make build/tokenizer_cli")
    pieces = flat.read(args[0]).tokenizer
    compare(args[0], pieces, N_STRINGS)
    compare("the same, equal scores", equal_scores(pieces), 5000)
    for i, (alphabet, n, longest) in enumerate((("ab▁", 60, 5), ("abc▁", 400, 6), ("aé▁日🙂", 300, 4), ("<>/s0x41", 3000, 5))):
        compare(f"made vocabulary {i}", made(random.Random(i), alphabet, n, longest), 5000, alphabet)
    for path in args[1:]:
        with open(path, "rb") as f:
            data = f.read()
        pieces = llava.sentencepiece_model(path)
        compare(path, pieces, N_STRINGS, original=sentencepiece.SentencePieceProcessor(model_proto=data))
        compare(path + ", equal scores", equal_scores(pieces), 5000)
        if hashlib.sha256(data).hexdigest() == LLAMA:
            goldens(pieces)
    finish()


if __name__ == "__main__":
    main()
