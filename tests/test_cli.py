#!/usr/bin/env python3
"""test_cli.py: the command line of ./llava, from outside: every option, what is printed where, bad input, damaged model files, Ctrl-C.

    python3 tests/test_cli.py build/llava models/scenes-llava.bin

Any LLaVA model file will do: what is expected is computed here, from the model file's own fields and pieces, by a second tokenizer and a
second sampler. Needs Python's standard library alone. Not here: whether logits are right (test_llava.c, parity.py).
"""

import array
import fcntl
import math
import os
import random
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import zlib
from concurrent.futures import ThreadPoolExecutor

from counting import check, finish

if len(sys.argv) != 3:
    sys.exit("usage: python3 tests/test_cli.py build/llava MODEL.bin")
PROGRAM, MODEL = map(os.path.abspath, sys.argv[1:])
DIR = tempfile.mkdtemp(prefix="test_cli.")
HERE = threading.local()                            # .dir: where a test's files lie; two tests run side by side
HERE.dir = DIR
# Threads that wait must not spin: whatever else runs here would pay for it.
ENV = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
LEAKS_ALLOWED = {**ENV, "ASAN_OPTIONS": "detect_leaks=0:" + os.environ.get("ASAN_OPTIONS", "")}   # who ends early frees nothing


def path(name, data=None):
    p = os.path.join(HERE.dir, name)
    if data is not None:
        with open(p, "wb") as f:
            f.write(data if isinstance(data, bytes) else data.encode())
    return p


def run(*args, stdin=b"", model=None, env=None, **more):
    """The program on the model: .returncode, .stdout, .stderr (bytes)."""
    if env is None:
        env = LEAKS_ALLOWED if {"--tokens", "--info"} & set(args) else ENV
    args = [PROGRAM] + ([] if model is False else [model or MODEL]) + [str(a) for a in args]
    try:
        return subprocess.run(args, input=stdin, capture_output=True, timeout=60, env=env, cwd=HERE.dir, **more)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(args, "timeout", b"", b"")


def fails(name, *args, says=(), **more):
    """An error: status 1, `error: …` that names what is in `says`, nothing on standard output."""
    r = run(*args, env=LEAKS_ALLOWED, **more)
    err = r.stderr.decode(errors="replace")
    ok = r.returncode == 1 and r.stdout == b"" and re.search("^error: ", err, re.M) and "Sanitizer" not in err
    ok = ok and all(s in err for s in ([says] if isinstance(says, str) else says))
    return check(ok, name, f"status {r.returncode}, stdout {r.stdout[:60]!r}, stderr {err[:300]!r}")


def works(name, *args, **more):
    r = run(*args, **more)
    check(r.returncode == 0 and "Sanitizer" not in r.stderr.decode(errors="replace"), name, f"status {r.returncode}, stderr {r.stderr[:300]!r}")
    return r


# ----------------------------------------------------------------------------
# the model file (include/model.h), as far as it is needed here

def read_model(data):
    """Fields {name: (offset of the entry, value)}, tensors {name: (offset of the entry, type, rows, cols, offset, bytes)}, pieces."""
    n_fields, n_tensors = struct.unpack_from("<2I", data, 12)
    tok_offset, tok_bytes = struct.unpack_from("<2Q", data, 24)
    fields, tensors, at = {}, {}, 64
    for _ in range(n_fields):
        name, kind, _, value = struct.unpack_from("<40s2I8s", data, at)
        fields[name.rstrip(b"\0").decode()] = at, struct.unpack("<d" if kind else "<q", value)[0]
        at += 64
    for _ in range(n_tensors):
        name, kind, rows, cols, _, offset, n = struct.unpack_from("<64s4I2Q", data, at)
        tensors[name.rstrip(b"\0").decode()] = at, kind, rows, cols, offset, n
        at += 128
    n, n_text = struct.unpack_from("<2I", data, tok_offset + 4)
    texts, pieces, begin = data[tok_offset + 16 + 12 * n:tok_offset + tok_bytes], [], 0
    for i in range(n):
        score, kind, end = struct.unpack_from("<fII", data, tok_offset + 16 + 12 * i)
        pieces.append((texts[begin:end].decode(), score, kind))
        begin = end
    return fields, tensors, pieces


with open(MODEL, "rb") as f:
    BYTES = f.read()
FIELDS, TENSORS, PIECES = read_model(BYTES)
F = {name: value for name, (_, value) in FIELDS.items()}
BOS, EOS, VOCAB, N_PIECES = F["bos_id"], F["eos_id"], F["vocab_size"], F["n_pieces"]
IMAGE_ROWS = (F["image_size"] // F["patch_size"]) ** 2
IMAGE_ID = F["image_id"] if F["image_id"] >= 0 else -200
TEMPLATES = ["vicuna_v1", "llava_v1", "hf", "chatml", "plain", "milebench", "raw"]
NORMAL = {text: (score, i) for i, (text, score, kind) in enumerate(PIECES) if kind == 1}
BYTE = {text: i for i, (text, _, kind) in enumerate(PIECES) if kind == 6}


def encode(text, prefix=True):
    """SentencePiece BPE, by the book: the best-scored pair of neighbours merges, the leftmost of equals."""
    if not text:
        return []
    s = list(("▁" if prefix else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(-NORMAL[a + b][0], i) for i, (a, b) in enumerate(zip(s, s[1:])) if a + b in NORMAL]
        if not pairs:
            break
        i = min(pairs)[1]
        s[i:i + 2] = [s[i] + s[i + 1]]
    return [i for c in s for i in ([NORMAL[c][1]] if c in NORMAL else [BYTE[f"<0x{b:02X}>"] for b in c.encode()])]


def decode(ids):
    """What is shown of an answer."""
    out = b""
    for i in ids:
        text, _, kind = PIECES[i] if i < len(PIECES) else ("", 0, 3)
        out += b"" if kind == 3 else " ⁇ ".encode() if kind == 2 else bytes([int(text[3:5], 16)]) if kind == 6 else text.replace("▁", " ").encode()
    shown = ""
    while out:                                              # U+FFFD for every byte that belongs to no character
        n = next((n for n in (1, 2, 3, 4) if out[:n].decode(errors="replace") == out[:n].decode(errors="ignore") != ""), 0)
        shown += out[:n].decode() if n else "\ufffd"
        out = out[n or 1:]
    return shown.strip(" \t\r\n")


def png(w, h, pixel=lambda x, y: (x * 7 % 256, y * 5 % 256, (x + y) * 3 % 256), declare=None):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = b"".join(b"\0" + b"".join(bytes(pixel(x, y)) for x in range(w)) for y in range(h))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", *(declare or (w, h)), 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


PICTURE = path("picture.png", png(120, 90))
OTHER = path("other.png", png(64, 64, lambda x, y: (220, 40, 40) if (x - 30) ** 2 + (y - 30) ** 2 < 200 else (245, 245, 245)))
ROOM = F["max_positions"]                           # longest sequence
N_MANY = min(40, ROOM - 2 * IMAGE_ROWS - 100)       # so that questions about two pictures fit


def logits_of(*args, stdin=b"", **more):
    """The run, and its --logits as rows."""
    p = path("logits")
    if os.path.exists(p):
        os.remove(p)
    r = run(*args, "--logits", p, stdin=stdin, **more)
    a = array.array("f")
    if os.path.exists(p):
        with open(p, "rb") as f:
            a.frombytes(f.read())
    return r, [a[i:i + VOCAB] for i in range(0, len(a), VOCAB)]


def argmax(row):
    return max(range(N_PIECES), key=lambda i: (row[i], -i))


def distance(a, b):
    """Relative L2."""
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) / (sum(y * y for y in b) or 1))


LINE = re.compile(rb"prompt_tokens (\d+); image_tokens (\d+); new_tokens (\d+); slots_kept ([\d.]+); slots_seen ([\d.]+); cache_bytes (\d+); "
                  rb"image_ms (\d+\.\d); vision_ms (\d+\.\d); prompt_ms (\d+\.\d); token_ms (\d+\.\d); tokens_per_s (\d+\.\d)\n$")


def figures(r):
    """The last line on standard error."""
    m = LINE.search(r.stderr)
    names = "prompt_tokens image_tokens new_tokens slots_kept slots_seen cache_bytes image_ms vision_ms prompt_ms token_ms tokens_per_s".split()
    return dict(zip(names, map(float, m.groups()))) if m else dict.fromkeys(names, math.nan)


# ----------------------------------------------------------------------------
# options

def test_options():
    r = works("-h", "-h", model=False)
    for word in "-i -f --template --system -c -n -t --top-k --top-p --repeat-penalty -s -B -p -r -k --pos -b -j --device --kv --ctx --image-mode -m --compare --attention --attention-layer --trace --tokens --info -q -v --force --force-ids --logits".split():
        check(re.search(rb"^ +(-\w, )?" + word.encode() + rb"(?![\w-])", r.stdout, re.M), f"-h lists {word}")
    check(r.stdout.startswith(b"usage") and r.stderr == b"", "-h goes to standard output alone")
    check(works("--help", "--help").stdout == r.stdout, "--help is -h, with files too")
    r = works("-p help", "-p", "help", model=False)
    check(b"full" in r.stdout and r.stderr == b"", "-p help prints the policies")

    r = works("--info", "--info")
    check(all(re.search(rf"\b{name}\b +{re.escape(f'{value:g}' if isinstance(value, float) else str(value))}\n".encode(), r.stdout) for name, value in F.items()), "--info lists the fields")
    check(all(re.search(rf"\b{re.escape(name)} .*\b{t[2]} x {t[3]} ".encode(), r.stdout) for name, t in TENSORS.items()), "--info lists the tensors")

    base = run("-n", "5", "-i", "hello").stdout
    for name, args in (("options before the files", ["-n", "5", "-i", "hello", MODEL]), ("between them", ["-n", "5", MODEL, "-i", "hello"]),
                       ("-- ends them", ["-n", "5", "-i", "hello", "--", MODEL]), ("the last one counts", ["-n", "7", MODEL, "-i", "hello", "-n", "5"])):
        check(run(*args, model=False).stdout == base, f"options: {name}")
    check(run("-n", "5", "-i", "hello", "--template", "plain", "--tokens").stdout == run("--template=plain", "-n", "5", "-i", "hello", "--tokens").stdout, "--long VALUE and --long=VALUE")
    check(run("--system=a=b", "-i", "hello", "--tokens").stdout == run("--system", "a=b", "-i", "hello", "--tokens").stdout, "--long=VALUE: only the first = counts")
    dashed = path("-picture.png", png(8, 8))
    check(run("-n", "3", "--", os.path.basename(dashed)).stdout == run("-n", "3", dashed).stdout, "--: a file called -picture.png")

    fails("no model", model=False, says="MODEL")
    fails("unknown flag", "--frobnicate", says="--frobnicate")
    fails("unknown flag with a value", "--frobnicate=3", says="--frobnicate")
    fails("unknown short flag", "-Z", says="-Z")
    fails("a flag takes no value", "--tokens=1", says="--tokens")
    fails("a value is missing", "-n", says="-n")
    fails("-i and -f", "-i", "x", "-f", PICTURE, says=["-i", "-f"])
    fails("-r and -k", "-r", "0.5", "-k", "0.5", says=["-r", "-k"])
    fails("--force and --force-ids", "--force", PICTURE, "--force-ids", PICTURE, says=["--force", "--force-ids"])
    whole = {"-n": ["0", "-1", "1.5", "x", "", "99999999999"], "--top-k": ["0", "-3", "1e3"], "-B": ["0", "5000", "two"], "-j": ["0", "-2", "100000"],
             "--ctx": ["0", "-5", "x"], "-s": ["-1", "x", "1.5", "99999999999999999999999"]}
    real = {"-t": ["-0.1", "x", "nan", "inf", ""], "--top-p": ["0", "1.01", "-1", "nan"], "--repeat-penalty": ["0", "-1", "1e9"], "-r": ["1.7", "-0.1", "nan", "half"], "-k": ["1.7", "-0.1", "x"]}
    for option, values in {**whole, **real}.items():
        for v in values:
            fails(f"{option} {v!r}", option, v, "-i", "x", says=["allowed", option, v])
    for option in ("--template", "--kv", "--pos", "-b", "--image-mode"):
        fails(f"{option} bogus", option, "bogus", "-i", "x", says=["allowed", option, "bogus"])
    fails("-p nosuch", "-p", "nosuch", "-r", "0.5", "-i", "x", says="nosuch")
    fails("--ctx beyond the model's positions", "--ctx", ROOM + 1, "-i", "x", says=["--ctx", str(ROOM)])
    fails("chatml is not LLaVA's", "--template", "chatml", "-i", "x", says="chatml")
    fails("--system for a template without", "--template", "raw", "--system", "x", "-i", "x", says="--system")
    fails("-c with --force", "-c", "--force", PICTURE, says="-c")
    fails("-c with -B", "-c", "-B", "2", says="-c")


# ----------------------------------------------------------------------------
# prompts: templates, <image>, kinds, files

SYSTEM = {"vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.",
          "llava_v1": "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the human's questions.",
          "milebench": "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the user with a variety of tasks using natural language."}


def first_turn(template, question, n_images, system=None):
    """[(bytes, whether the user said them)] of a prompt, <image> in place."""
    if "<image>" not in question:
        images = ("<image>" if template in ("plain", "raw") else "<image>\n") * n_images
    else:
        images = ""
    system = SYSTEM.get(template, "") if system is None else system
    if template in ("vicuna_v1", "llava_v1", "hf"):
        return [((system + " " if system else "") + "USER: " + images, False), (question, True), (" ASSISTANT:", False)]
    if template == "milebench":
        return [("[INST] <<SYS>>\n" + system + "\n<</SYS>>\n\n" + images, False), (question, True), (" [/INST]", False)]
    return [(images, False), (question, True)]


def expected_rows(parts):
    """[(id, kind)] of a prompt: a token is the user's where its last byte is."""
    text = "".join(p for p, _ in parts)
    user = [said for p, said in parts for _ in p.encode()]
    rows, at = [(BOS, "template")], 0
    for i, piece in enumerate(text.split("<image>")):
        if i:
            rows += [(IMAGE_ID, "image")] * IMAGE_ROWS
            at += len("<image>")
        source, n, part = " " + piece, 0, 0         # n characters and `part` bytes are spelt so far; the blank in front is not in the text
        for id in encode(piece):
            text, _, kind = PIECES[id]
            n, part = (n, part + 1) if kind == 6 else (n + len(text), 0)
            last = at + len(source[1:n].encode()) + part - 1
            if part and part == len(source[n].encode()):
                n, part = n + 1, 0
            rows.append((id, "text" if user[max(last, at)] else "template"))
        at += len(piece.encode())
    return rows


def tokens_of(*args, **more):
    """--tokens: [(id, kind)], checked for its format."""
    r = works(f"--tokens {args}", *args, "--tokens", **more)
    rows = []
    for i, line in enumerate(r.stdout.decode().splitlines()):
        m = re.fullmatch(r"(\d+)\t(-?\d+)\t(template|text|image)\t(.*)", line)
        if not m or int(m[1]) != i:
            check(False, "--tokens: index, id, kind, piece", line)
            break
        id = int(m[2])
        piece = m[4].encode().decode("unicode_escape").encode("latin-1").decode() if "\\" in m[4] else m[4]
        if m[3] == "image":
            good = id == IMAGE_ID and piece == "<image>"
        else:
            good = piece == (PIECES[id][0] if id < len(PIECES) else "")
        if not good:
            check(False, "--tokens: the piece of its id", line)
        rows.append((id, m[3]))
    check(r.stderr == b"" and r.stdout.endswith(b"\n"), "--tokens: nothing on standard error")
    return rows


def test_prompts():
    default = TEMPLATES[F["template"]]
    check(tokens_of(PICTURE) == expected_rows(first_turn(default, "Describe the image in detail.", 1)), "no -i, no --template: the defaults")
    check(tokens_of() == expected_rows(first_turn(default, "Describe the image in detail.", 0)), "no picture")
    questions = [("What is in the center?", 1), ("One here <image> and there <image>, which?", 2), ("no picture at all", 0), ("first", 2), ("<image>", 1), ("  two blanks\n\nend \n", 1),
                 ("Ünïcödé 🙂 ▁ \t </s> <s> <unk> <0x0A>", 1), ("<image>\n<image>x", 2), ("", 1)]
    for template in TEMPLATES:
        if template != "chatml":
            for q, n in questions:
                got, want = tokens_of(*[PICTURE, OTHER][:n], "-i", q, "--template", template), expected_rows(first_turn(template, q, n))
                check(got == want, f"--template {template} -i {q!r}", f"{[(i, *x) for i, x in enumerate(zip(got, want)) if x[0] != x[1]]} of {len(got)}, {len(want)}")
    for template in ("vicuna_v1", "llava_v1", "hf", "milebench"):
        check(tokens_of("-i", "x", "--template", template, "--system", "Be brief.") == expected_rows(first_turn(template, "x", 0, "Be brief.")), f"--system with {template}")
    check(tokens_of("-i", "x", "--template", "vicuna_v1", "--system", "") == expected_rows([("USER: ", False), ("x", True), (" ASSISTANT:", False)]), "--system '': none")

    text = "What colour\nis it?\n\n"
    want = tokens_of("-i", text, "--template", "raw")
    check(tokens_of("-f", path("question.txt", text), "--template", "raw") == want, "-f FILE, to its last byte")
    check(tokens_of("-f", "-", "--template", "raw", stdin=text.encode()) == want, "-f -: standard input")
    check(len(tokens_of("-f", path("zero", b"a\0b"), "--template", "raw")) == 1 + len(encode("a\0b")), "-f: a zero byte does not end it")
    check(run("-f", path("broken", b"ab\xff\xfe\xe2\x82 c"), "--tokens").returncode == 0, "-f: broken UTF-8")
    check(tokens_of("-f", path("empty.txt", "")) == tokens_of("-i", ""), "-f: an empty file")
    fails("-f: no such file", "-f", path("nowhere"), says=["-f", "nowhere"])
    fails("-f: a folder", "-f", DIR, says="-f")

    fails("<image> too often", PICTURE, "-i", "<image> and <image>", "--tokens", says=["2", "<image>"])
    fails("<image> too rarely", PICTURE, OTHER, "-i", "<image>", "--tokens", says="<image>")
    fails("<image> without a picture", "-i", "<image>", "--tokens", says="<image>")
    fails("<image> in --system", PICTURE, "-i", "x", "--template", "vicuna_v1", "--system", "<image>", "--tokens", says="--system")


# ----------------------------------------------------------------------------
# answers: greedy, forced, sampled, several at once

def splitmix(seed):
    mask = 2 ** 64 - 1
    while True:
        seed = (seed + 0x9e3779b97f4a7c15) & mask
        z = seed
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9 & mask
        z = (z ^ z >> 27) * 0x94d049bb133111eb & mask
        yield ((z ^ z >> 31) >> 11) / 2 ** 53


def f32(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def pick(row, seen, u, t=0.0, k=0, p=1.0, penalty=1.0):
    """A second sampler: penalty, temperature, top-k, top-p, draw (u: what draws uniform numbers)."""
    row = [f32(x * penalty if x < 0 else x / penalty) if i in seen else x for i, x in enumerate(row[:N_PIECES])]
    if t == 0:
        return row.index(max(row))
    ids = list(range(len(row)))
    if k or p < 1:
        ids.sort(key=lambda i: (-row[i], i))
    if k:
        ids = [i for i in ids if row[i] >= row[ids[k - 1]]] if k < len(ids) else ids
    top = max(row)
    w = [math.exp((row[i] - top) / t) for i in ids]
    if p < 1:
        total, above, n = sum(w), 0.0, 0
        while n < len(w) and (n == 0 or above < p * total):
            above += w[n]
            n += 1
        ids, w = ids[:n], w[:n]
    x = next(u) * sum(w)
    for i, v in zip(ids, w):
        x -= v
        if x < 0:
            return i
    return ids[-1]


def test_answers():
    prompt = [PICTURE, "-i", "What is this?"]
    seen_first = {i for i, kind in tokens_of(*prompt) if kind != "image"}
    n_prompt = len(tokens_of(*prompt))

    # greedy: logits, text and figures belong together
    r, rows = logits_of(*prompt, "-n", "12")
    ids = [argmax(row) for row in rows]
    stop = EOS in ids
    check(r.returncode == 0 and 1 <= len(rows) <= 12 and ids.index(EOS) == len(ids) - 1 if stop else len(rows) == 12, "-n 12: as many rows of logits, or to </s>", f"{len(rows)} rows")
    check(all(len(row) == VOCAB for row in rows), "--logits: rows of vocab_size floats")
    check(r.stdout.decode(errors="replace") == decode(ids) + "\n", "greedy text is that of the largest logits", f"{r.stdout!r}, {decode(ids)!r}")
    f = figures(r)
    check(f["prompt_tokens"] == n_prompt and f["image_tokens"] == IMAGE_ROWS and f["new_tokens"] == len(ids), "the last line: prompt, image, new tokens", f"{r.stderr!r}")
    check(f["slots_seen"] == f["slots_kept"] == n_prompt + len(ids) - 1, "the last line: the last token is predicted, not fed", f"{r.stderr!r}")
    check(f["vision_ms"] > 0 and f["prompt_ms"] > 0 and (len(ids) < 2 or abs(f["token_ms"] * f["tokens_per_s"] - 1000) < 60 + 50 * f["tokens_per_s"]), "the last line: times", f"{r.stderr!r}")
    check(r.stderr.count(b"\n") == 1, "nothing else on standard error", f"{r.stderr!r}")
    bits = [row.tobytes() for row in rows]
    check([row.tobytes() for row in logits_of(*prompt, "-n", "12")[1]] == bits, "twice the same: the same bits")
    more_threads = logits_of(*prompt, "-n", "12", "-j", "2")[1]
    check([row.tobytes() for row in more_threads] == bits, "-j 2: the same bits")
    r1, one = logits_of(*prompt, "-n", "1")
    check(r1.returncode == 0 and [row.tobytes() for row in one] == bits[:1], "-n 1", f"{r1.stderr!r}")
    check(figures(r1)["slots_seen"] == n_prompt and figures(r1)["token_ms"] == 0, "-n 1: nothing is fed")

    # forced
    forced = (ids[:-1] if stop else ids) + encode(" blue cross")
    r2, again = logits_of(*prompt, "--force-ids", path("ids", " ".join(map(str, forced)) + "\n"), "-n", "1")
    check(r2.returncode == 0 and len(again) == len(forced), "--force-ids: a row an id, whatever -n says", f"{len(again)} rows, {r2.stderr!r}")
    check([row.tobytes() for row in again[:len(ids)]] == bits, "--force-ids with the greedy answer: the same bits")
    check(r2.stdout.decode(errors="replace") == decode(forced) + "\n", "--force-ids: prints their text", f"{r2.stdout!r}")
    check(figures(r2)["new_tokens"] == len(forced) and figures(r2)["slots_seen"] == n_prompt + len(forced) - 1, "--force-ids: figures")
    slot = 2 * F["n_layers"] * F["n_kv_heads"] * F["head_dim"] * 4
    check(figures(r2)["cache_bytes"] == slot * (n_prompt + len(forced) - 1), "the cache has the bytes of its slots", f"{r2.stderr!r}")
    half = run(*prompt, "--force-ids", path("ids"), "--kv", "f16")
    check(2 * figures(half)["cache_bytes"] == figures(r2)["cache_bytes"], "--kv f16: half the bytes", f"{half.stderr!r}")
    text = "There are 3 shapes.\nA blue </s> ring."
    r3, rows3 = logits_of(*prompt, "--force", path("answer", text))
    check(len(rows3) == len(encode(text)) and r3.stdout.decode() == text + "\n", "--force: a row a token, its text shown", f"{len(rows3)} rows, {r3.stdout!r}")
    rows4 = logits_of(*prompt, "--force-ids", path("ids", "\n".join(map(str, encode(text)))))[1]
    check([x.tobytes() for x in rows3] == [x.tobytes() for x in rows4], "--force is --force-ids of its tokens")
    fed = logits_of(*prompt, "--force", path("answer", text + " "))[1]
    check(len(fed) == len(encode(text + " ")), "--force: to the last byte")
    if VOCAB > N_PIECES:
        check(len(logits_of("-i", "x", "--force-ids", path("ids", f"{EOS} {VOCAB - 1} {BOS}"))[1]) == 3, "--force-ids: any row of the table, </s> ends nothing")
    for name, data in (("empty", ""), ("no number", "1 2 x"), ("too large", f"1 {VOCAB}"), ("negative", "-1"), ("glued", "1,2"), ("a zero byte", b"1\0 2"), ("huge", "1 99999999999999999999999")):
        fails(f"--force-ids: {name}", "-i", "x", "--force-ids", path("ids", data), says="--force-ids")
    fails("--force: empty", "-i", "x", "--force", path("answer", ""), says="--force")
    fails("--force: no such file", "-i", "x", "--force", path("nowhere"), says=["--force", "nowhere"])
    fails("--logits: cannot be written", "-i", "x", "--logits", path("no/such/folder"), says="--logits")

    # -q, -v
    r5 = run(*prompt, "-n", "12", "-q")
    check(r5.stdout == r.stdout and r5.stderr == b"", "-q: nothing but the answer", f"{r5.stderr!r}")
    r6 = run(*prompt, "-n", "12", "-v")
    check(r6.stdout == r.stdout and len(r6.stderr) > len(r.stderr) and LINE.search(r6.stderr), "-v: more, and the last line last")

    # sampled: a second sampler on the same logits and seed
    for args, kw in ((["-t", "0.8"], dict(t=0.8)), (["-t", "1.5", "--top-k", "5"], dict(t=1.5, k=5)), (["-t", "2", "--top-p", "0.7"], dict(t=2.0, p=0.7)),
                     (["-t", "1.3", "--top-k", "40", "--top-p", "0.9", "--repeat-penalty", "1.3"], dict(t=1.3, k=40, p=0.9, penalty=1.3)), (["--repeat-penalty", "1.5"], dict(penalty=1.5)),
                     (["-t", "1e-300"], dict(t=1e-300)), (["-t", "1e6"], dict(t=1e6)), (["-t", "1", "--top-p", "1e-9"], dict(t=1.0, p=1e-9)), (["--repeat-penalty=0.5"], dict(penalty=0.5))):
        r7, rows7 = logits_of(*prompt, "-n", 15, "-s", "7", *args)
        seen, u, drawn = set(seen_first), splitmix(7), []
        for row in rows7:
            drawn.append(pick(row, seen, u, **kw))
            seen.add(drawn[-1])
        check(rows7 and r7.stdout.decode(errors="replace") == decode(drawn) + "\n", f"{' '.join(args)}: as a second sampler draws", f"{r7.stdout!r}, {decode(drawn)!r}")
    a, b = (run(*prompt, "-n", "20", "-t", "1.5", "-s", s).stdout for s in ("18446744073709551615", "3"))
    check(run(*prompt, "-n", "20", "-t", "1.5", "-s", "3").stdout == b, "the same seed, the same answer")
    check(a != b, "another seed, another answer")

    # -B
    for extra in (["-t", "1.2"], ["-t", "1", "--top-k", "20", "--repeat-penalty", "1.2"], []):
        single = [run(*prompt, "-n", "25", "-s", 11 + i, *extra) for i in range(3)]
        batch = run(*prompt, "-n", "25", "-s", "11", "-B", "3", *extra)
        check(batch.stdout == b"".join(s.stdout for s in single), f"-B 3 {' '.join(extra)}: as three single runs with seeds 11, 12, 13", f"{batch.stdout!r}")
        check(figures(batch)["new_tokens"] == sum(figures(s)["new_tokens"] for s in single), "-B 3: new tokens of all answers", f"{batch.stderr!r}")
        check(abs(figures(batch)["slots_seen"] - sum(figures(s)["slots_seen"] for s in single) / 3) <= 0.051, "-B 3: slots, mean over answers", f"{batch.stderr!r}")
    fails("-B with --force", "-B", "2", "--force", path("answer", "x"), says="-B")

    # the context
    fails("prompt longer than --ctx", *prompt, "--ctx", n_prompt - 1, says=["context", str(n_prompt), str(n_prompt - 1)])
    r8 = run(*prompt, "--ctx", n_prompt, "-n", "12")
    check(r8.returncode == 0 and figures(r8)["new_tokens"] == 1 and b"note" in r8.stderr, "--ctx as long as the prompt: one token, and a note", f"{r8.stderr!r}")
    r9, rows9 = logits_of(*prompt, "--ctx", n_prompt + 2, "-n", "12", "-q")
    check([row.tobytes() for row in rows9] == bits[:3] and r9.stderr == b"", "--ctx prompt + 2: three tokens; -q: no note", f"{r9.stderr!r}")
    fails("--force longer than --ctx", *prompt, "--ctx", n_prompt + 2, "--force", path("answer", text), says="--ctx")
    fails("prompt longer than the model's positions", "-f", path("long", "a shape " * ROOM), says=["context", str(ROOM)])
    r10 = run("-i", "hello", "-n", ROOM + 5000)
    check(r10.returncode == 0 and figures(r10)["slots_seen"] <= ROOM, "-n beyond the model's positions ends there", f"{r10.stderr!r}")

    # pictures
    same = [logits_of(p, "-i", "What?", "-n", "1", *more)[1][0].tobytes() for p, more in ((PICTURE, []), (PICTURE, ["--image-mode", "crop"]), (PICTURE, ["--image-mode=pad"]), (OTHER, []))]
    check(same[F["image_mode"] + 1] == same[0] and same[1] != same[2], "--image-mode: crop and pad differ, one is the model file's")
    check(same[3] != same[0], "another picture, other logits")
    order = [logits_of(*p, "-i", "<image> or <image>", "-n", "1")[1][0].tobytes() for p in ([PICTURE, OTHER], [OTHER, PICTURE])]
    check(order[0] != order[1], "two pictures: their order matters")
    two = run(PICTURE, OTHER, "-n", "2")
    check(two.returncode == 0 and figures(two)["image_tokens"] == 2 * IMAGE_ROWS, "two pictures: image tokens", f"{two.stderr!r}")
    fails("-b cuda with no device", "-b", "cuda", "-i", "x", says="cuda") if b"cuda" not in run("-i", "x", "-n", "1", "-v").stderr else check(True, "-b cuda")
    check(run("-b", "cpu", *prompt, "-n", "12").stdout == r.stdout, "-b cpu")


# ----------------------------------------------------------------------------
# chat: further turns join the cache, and the logits are those of the whole conversation in one go

def test_chat():
    first, second = "How many shapes are there?", "And the background?"
    for template in ("hf", "vicuna_v1", "milebench", "plain", "raw"):
        for cut, prefix in ((True, 1), (False, 1), (False, 0)):
            # an answer that -n cuts, and one that the model ends: what it says first is made its </s>
            args = [OTHER, "--template", template, "-i", first, "-n", 4]
            greedy = [argmax(row) for row in logits_of(*args)[1]]
            fields = {"prefix_after_special": prefix, "eos_id": EOS if cut else [id for i, id in enumerate(greedy) if id not in greedy[:i]][-1]}
            if not cut:
                args[-1] = 9
            data = bytearray(BYTES)
            for name, value in fields.items():
                struct.pack_into("<q", data, FIELDS[name][0] + 48, value)
            model, eos = path("chat.bin", bytes(data)), fields["eos_id"]
            r, rows = logits_of(*args, "-c", stdin=second.encode() + b"\n", model=model)
            ids = [argmax(row) for row in rows]
            k = ids.index(eos) + 1 if eos in ids[:args[-1]] else args[-1]
            a1, a2 = ids[:k], ids[k:]
            spoken = [[i for i in a if i != eos] for a in (a1, a2)]
            lines, name = r.stdout.decode(errors="replace"), f"-c {template}, {'cut' if cut else f'ended, prefix_after_special {prefix}'}"
            if not check(r.returncode == 0 and a2 and lines == "".join(decode(a) + "\n" for a in spoken), f"{name}: two answers", f"{lines!r}, {r.stderr!r}"):
                continue
            ends = {"hf": [], "plain": [], "raw": []}.get(template, [eos] + ([BOS] if template == "milebench" else []))
            said = {"milebench": f"[INST] {second} [/INST]", "plain": second, "raw": second}.get(template, f"USER: {second} ASSISTANT:")
            between = ends + encode(said, prefix == 1 if ends else True)
            _, want = logits_of(*args, "--force-ids", path("ids", " ".join(map(str, spoken[0] + between + a2))), model=model)
            n = len(spoken[0])
            got, want = rows[:n] + rows[k:], want[:n] + want[n + len(between):]
            worst = max((distance(x, y) for x, y in zip(got, want)), default=9)
            check(len(got) == len(want) and worst < 1e-4, f"{name}: logits as of one sequence", f"{len(got)} and {len(want)} rows, relative L2 {worst:.1e}")
            f = figures(r)
            n_first = len(expected_rows(first_turn(template, first, 1)))
            n_second = len(between) + (eos not in a1)       # the last token of an answer is fed with the next turn, unless it is </s>
            check(f["prompt_tokens"] == n_first + n_second and f["new_tokens"] == len(ids) and f["image_tokens"] == IMAGE_ROWS, f"{name}: figures of both turns", f"{r.stderr!r}")
            check(f["slots_seen"] == n_first + k - 1 + n_second + len(a2) - 1, f"{name}: slots of both turns", f"{r.stderr!r}")

    r = run("-i", "hi", "-n", "3", "-c", stdin=b"\r\n\nlast line without an end")
    check(r.returncode == 0 and r.stdout.count(b"\n") >= 4, "-c: empty lines, and a last one without a newline", f"{r.stdout!r} {r.stderr!r}")
    r = run("-i", "hi", "-n", "3", "-c", stdin=b"")
    check(r.returncode == 0 and r.stdout == run("-i", "hi", "-n", "3").stdout, "-c: no further turn")
    r = run("-i", "hi", "-n", "3", "-c", stdin=b"see <image>\n")
    check(r.returncode == 1 and b"<image>" in r.stderr, "-c: <image> in a later turn, which has no picture")
    r = run("-i", "hi", "-n", "3", "-c", "--ctx", "60", stdin=b"one more question\n" * 40)
    check(r.returncode == 1 and b"context" in r.stderr and b"60" in r.stderr, "-c: the conversation outgrows --ctx", f"{r.stderr!r}")
    fails("-c with -f -", "-c", "-f", "-", says="-f -")


# ----------------------------------------------------------------------------
# forgetting: -r 0 is full, to the bit; -r forgets

SUMS = ["fastv:k=2+h2o", "fastv:k=2,r=0.5+h2o:r=0.4", "stride:rows+snapkv", "lookm:merge=average,prior=off", "lookm:budget=strict", "snapkv:window=8,pool=3", "fastv:score=all"]


def test_policies():
    prompt = [PICTURE, "-i", "What is this?", "--force", path("answer", "There are 3 shapes.")]
    _, rows = logits_of(*prompt)
    bits = [row.tobytes() for row in rows]
    table = run("-p", "help", model=False).stdout.decode().split("\n\n")[1]
    names = [line.split()[0] for line in table.splitlines()[1:]]
    check(len(names) > 20 and "simignore:released-7b" in names, "-p help lists every form", table)
    for p in [n for n in names if not n.startswith("simignore:released")] + SUMS:    # those read another prompt: below
        if run("-p", p, "-i", "x", "--tokens").returncode:
            check(False, f"-p {p}", run("-p", p, "-i", "x", "--tokens").stderr.decode()[:200])
            continue
        own = ",r=" in p                                    # a fraction of its own: -r 0 does not switch it off
        for amount in () if own else (["-r", "0"], ["-k", "1"]):
            r, got = logits_of(*prompt, "-p", p, *amount)
            check([row.tobytes() for row in got] == bits, f"-p {p} {' '.join(amount)}: bit-equal to full", f"{r.stderr[:200]!r}")
        if p == "full":
            continue
        r, got = logits_of(*prompt, "-p", p, "-r", "0.5", "-s", "1")
        f = figures(r)
        check(r.returncode == 0 and (f["slots_kept"] < f["slots_seen"]) == (p != "fastv:mask"), f"-p {p} -r 0.5 forgets", f"{r.stderr[:200]!r}")
        check(got and got[0].tobytes() == bits[0] or p.split(":")[0] in ("fastv", "simignore") or ":rows" in p, f"-p {p}: the first token does not depend on it")
        check([row.tobytes() for row in logits_of(*prompt, "-p", p, "-k", "0.5", "-s", "1")[1]] == [row.tobytes() for row in got], f"-p {p}: -k 0.5 is -r 0.5")
        sampled = [PICTURE, "-i", "What?", "-n", "12", "-t", "1", "-p", p, "-r", "0.5"]
        if not p.startswith("random"):                      # one draw for the prompt, by -s
            single = b"".join(run(*sampled, "-s", 4 + i).stdout for i in range(2))
            check(run(*sampled, "-s", "4", "-B", "2").stdout == single, f"-p {p}: -B 2 as two single runs")
        if p == "fastv:recompute":
            fails(f"-p {p}: a chat", *sampled[:3], "-c", "-p", p, "-r", "0.5", says=p)
            continue
        r = run(*sampled[:3], "-n", "5", "-c", "-p", p, "-r", "0.5", stdin=b"And now?\n")
        check(r.returncode == 0 and LINE.search(r.stderr), f"-p {p}: a chat", f"{r.stderr[:200]!r}")
    science = [PICTURE, "-n", "3", "-i", "<image>\nContext: a scene\nOptions: (A) a circle (B) a square\nAnswer with the option's letter from the given choices directly."]
    for p in "simignore:released-7b", "simignore:released-13b":
        check(logits_of(*science, "-p", p, "-r", "0")[1] == logits_of(*science)[1], f"-p {p} -r 0 is full, whatever its k")
        r = run(*science, "-p", p + ":k=1", "-r", "0.5")
        check(r.returncode == 0 and figures(r)["slots_kept"] < figures(r)["slots_seen"], f"-p {p}", f"{r.stderr[:200]!r}")
    few, many = (run(PICTURE, "-n", "2", "-p", f"simignore:tokens={n}") for n in (3, IMAGE_ROWS + 1))
    check(b"note" not in few.stderr and figures(few)["slots_kept"] == figures(few)["slots_seen"] - IMAGE_ROWS + 3, "simignore:tokens=3", f"{few.stderr!r}")
    check(b"note: simignore: tokens" in many.stderr and figures(many)["slots_kept"] == figures(many)["slots_seen"], "more tokens than rows: a note", f"{many.stderr!r}")
    check(run(PICTURE, "-n", "2", "-q", "-p", f"simignore:tokens={IMAGE_ROWS + 1}").stderr == b"", "-q: no note")
    fails("fastv:keep beyond the image", PICTURE, "-p", f"fastv:keep={IMAGE_ROWS + 1}", says=["-p fastv:keep", str(IMAGE_ROWS)])
    r = run(PICTURE, "-p", "h2o", "-r", "1")                # it says so after the first token, which never depends on the plan
    check(r.returncode == 1 and b"error: -p h2o: nothing at all would stay" in r.stderr and b"hint: " in r.stderr, "nothing stays", f"{r.stderr!r}")
    for p in "h2o", "lookm:merge=none,prior=off", "snapkv", "snapkv:lookm":      # amounts stand in place of -r, and are fractions of the prompt
        f = figures(run(PICTURE, "-n", "1", "-p", f"{p}{',' if '=' in p else ':'}important=0.29,recent=0.11"))
        check(f["slots_kept"] == int(f["prompt_tokens"] * 0.29) + int(f["prompt_tokens"] * 0.11), f"-p {p}: important, recent", f"{f}")
    kept = [figures(run(*prompt, "-p", "random:what=all", "-r", r, "-s", "1"))["slots_kept"] for r in ("0.7", "0.3")]
    same = [figures(run(*prompt, "-p", "random:what=all", "-k", k, "-s", "1"))["slots_kept"] for k in ("0.3", "0.7")]
    check(kept == same and kept[0] < kept[1], "-k K is -r 1-K", f"{kept} {same}")


# ----------------------------------------------------------------------------
# tests/replay, where it lies beside the program: files that break the format end with an error, and the others are read all the same

GOLD = """case good
method streaming:released
int layers 1 int heads 1 int prompt 4 int steps 1 int start_size 1 num ratio 0.5
step 0
expect_ints kept_L0 2 0 3 expect_ints next_pos 1 2
step 1
expect_ints kept_L0 3 0 3 4
end
"""


def test_replay():
    replay = os.path.join(os.path.dirname(PROGRAM), "replay")
    if not os.path.exists(replay):
        return

    def ends(name, text, status, last, says=""):
        r = subprocess.run([replay, path("x.gold", text), path("good.gold", GOLD)], capture_output=True, env=LEAKS_ALLOWED, timeout=60)
        check(r.returncode == status and r.stdout.decode().endswith(last + "\n") and says in (r.stderr + r.stdout).decode() and b"Sanitizer" not in r.stderr and b"runtime error" not in r.stderr,
              f"replay: {name}", f"{r.returncode} {r.stdout!r} {r.stderr!r}")

    ends("a good file", GOLD, 0, "2 passed, 0 failed")
    ends("a comment and another layout", "# x\n" + GOLD.replace("\n", " \t\n\n").replace("end", "end# the end"), 0, "2 passed, 0 failed")
    for name, a, b, says in (("another slot is expected", "2 0 3", "2 0 2", "[1] is 3, expected 2"), ("an unknown method", "streaming:", "streamink:", "unknown method"), ("an unknown expectation", "kept_L0 2", "kept_M0 2", "kept_M0"),
                             ("a list that is too short", "2 0 3 expect", "3 0 3 expect", "not a number"), ("a list that is too long", "2 0 3 expect", "1 0 3 expect", "unknown record"),
                             ("a word for a number", "ratio 0.5", "ratio half", "`half` is not a number"), ("NaN", "ratio 0.5", "ratio nan", "`nan` is not a number"), ("a ratio of 1.5", "ratio 0.5", "ratio 1.5", "allowed"),
                             ("no layers", "layers 1", "layers 0", "allowed"), ("more layers than anything has", "layers 1", "layers 99999999", "allowed"), ("half a head", "heads 1", "heads 0.5", "integer"),
                             ("a size that the file cannot hold", "kept_L0 2", "kept_L0 1000000000", "file ends before"), ("steps that fall", "step 1\n", "step 0\n", "allowed"), ("steps that are not there", "steps 1", "steps 7", "the last step is 1"),
                             ("a record twice", "step 1\n", "step 1\nexpect_ints kept_L0 1 0\n", "twice"), ("an unknown record", "step 1\n", "step 1\nexpected 3\n", "unknown record `expected`")):
        ends(name, GOLD.replace(a, b), 1, "1 passed, 1 failed", says)
    for n in range(0, len(GOLD) - 1, 7):
        ends(f"cut after {n} bytes", GOLD[:n], 1, "1 passed, 1 failed", "error: ")
    ends("a zero byte", GOLD + "\0", 1, "1 passed, 1 failed", "zero byte")
    r = subprocess.run([replay, path("nowhere.gold"), path("good.gold", GOLD)], capture_output=True, env=ENV, timeout=60)
    check(r.returncode == 1 and b"nowhere.gold: No such file" in r.stderr and r.stdout.endswith(b"1 passed, 1 failed\n"), "replay: no such file", f"{r.stdout!r} {r.stderr!r}")


# ----------------------------------------------------------------------------
# bad pictures

def test_pictures():
    good = png(40, 30)
    bad = {"empty": b"", "text": b"hello, I am no picture\n" * 50, "truncated": good[:len(good) // 2], "header alone": good[:33], "a few bytes": good[:5], "GIF": b"GIF89a" + bytes(100),
           "too many megapixels": png(1, 1, declare=(20000, 20000)), "too wide": png(1, 1, declare=(2 ** 31 - 1, 1)), "no width": png(1, 1, declare=(0, 5)), "JPEG marker alone": b"\xff\xd8\xff",
           "JPEG of nothing": b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(40), "declares more than it holds": png(2, 2, declare=(900, 900))}
    for name, data in bad.items():
        fails(f"picture: {name}", path("bad.png", data), "-n", "1", says="bad.png")
    r = run(path("bad.png", bad["too many megapixels"]), "-n", "1")
    check(b"64" in r.stderr and b"megapixel" in r.stderr, "picture: the error names the cap", f"{r.stderr!r}")
    fails("picture: no such file", path("nowhere.png"), "-n", "1", says="nowhere.png")
    fails("picture: a folder", DIR, "-n", "1", says=DIR)
    fails("picture: the second of two", PICTURE, path("nowhere.png"), "-n", "1", says="nowhere.png")
    if os.getuid():
        os.chmod(path("secret.png", good), 0)
        fails("picture: not readable", path("secret.png"), "-n", "1", says="secret.png")
    for w, h in ((1, 1), (1, 500), (500, 1), (3, 2)):
        for mode in ("crop", "pad"):
            works(f"picture: {w} x {h}, {mode}", path("small.png", png(w, h)), "-n", "1", "--image-mode", mode)


# ----------------------------------------------------------------------------
# damaged model files

def test_model_files():
    copy = path("damaged.bin", BYTES)
    fd = os.open(copy, os.O_RDWR)
    n_head = 64 + 64 * len(FIELDS) + 128 * len(TENSORS)
    tok_offset, tok_bytes = struct.unpack_from("<2Q", BYTES, 24)

    def damaged(name, *patches, says="damaged.bin", cut=None):
        """patches: (offset, format, value), or (offset, bytes)."""
        for at, *what in patches:
            os.pwrite(fd, what[0] if len(what) == 1 else struct.pack("<" + what[0], what[1]), at)
        if cut is not None:
            os.ftruncate(fd, cut)
        fails(f"model file: {name}", "-i", "x", "-n", "1", model=copy, says=says)
        if cut is not None:
            os.pwrite(fd, BYTES[cut:], cut)
        for at, *what in patches:
            n = len(what[0]) if len(what) == 1 else struct.calcsize("<" + what[0])
            os.ftruncate(fd, len(BYTES))
            os.pwrite(fd, BYTES[at:at + n], at)

    def entry(name):
        return TENSORS[name][0]

    fails("model file: none there", "-i", "x", model=path("nowhere.bin"), says="nowhere.bin")
    fails("model file: a folder", "-i", "x", model=DIR, says=DIR)
    fails("model file: a picture", "-i", "x", model=PICTURE, says="picture.png")
    fails("model file: empty", "-i", "x", model=path("empty.bin", b""), says="empty.bin")
    works("the undamaged copy", "-i", "x", "-n", "1", model=copy)
    damaged("magic", (0, b"X"), says="magic")
    damaged("a text file's line ends", (5, b"\n\n"), says="magic")
    damaged("version 2", (8, "I", 2), says="version")
    damaged("architecture", (48, b"qwenvl\0\0"), says="qwenvl")
    damaged("architecture without end", (48, b"x" * 16))
    damaged("architecture without a name", (48, bytes(16)))
    for name, at, form, values in (("n_fields", 12, "I", (0, 1, 2 ** 31, 2 ** 32 - 1)), ("n_tensors", 16, "I", (0, 1, 2 ** 31, 2 ** 32 - 1)),
                                   ("tokenizer offset", 24, "Q", (0, 1, tok_offset + 1, tok_offset + 64, len(BYTES), 2 ** 63, 2 ** 64 - 64)),
                                   ("tokenizer bytes", 32, "Q", (0, 15, tok_bytes - 1, len(BYTES), 2 ** 63, 2 ** 64 - 1)), ("file bytes", 40, "Q", (0, len(BYTES) - 1, 2 ** 64 - 1))):
        for v in values:
            damaged(f"{name} {v}", (at, form, v))
    cuts = {0, 1, 7, 8, 63, 64, 65, n_head - 1, n_head, tok_offset, tok_offset + 15, tok_offset + tok_bytes, len(BYTES) - 1} | {len(BYTES) * i // 37 for i in range(37)} | {n_head * i // 23 for i in range(23)}
    for cut in sorted(cuts):
        damaged(f"cut to {cut} bytes", cut=cut)
        if cut >= 64 and cut % 3 == 0:
            damaged(f"cut to {cut} bytes, as its header says", (40, "Q", cut), cut=cut)
    os.pwrite(fd, bytes(64), len(BYTES))
    fails("model file: longer than its header says", "-i", "x", model=copy, says="damaged.bin")
    os.ftruncate(fd, len(BYTES))

    # fields
    for name, (at, value) in FIELDS.items():
        if name not in ("template", "image_mode", "prefix_after_special", "image_id", "vision_act", "vision_layers") and isinstance(value, int):
            for v in (0, -1, 2 ** 31, 2 ** 62) if not name.endswith("_id") else (-1, VOCAB, 2 ** 32 + 1):
                damaged(f"{name} {v}", (at + 48, "q", v), says=name)
    for name, v in (("template", 7), ("image_mode", 2), ("prefix_after_special", 2), ("image_id", VOCAB), ("vision_act", 2)):
        damaged(f"{name} {v}", (FIELDS[name][0] + 48, "q", v), says=name)
    for name in ("norm_eps", "rope_theta", "vision_eps", "image_mean_0", "image_std_2"):
        for v in (math.nan, math.inf, -1e30):
            damaged(f"{name} {v}", (FIELDS[name][0] + 48, "d", v), says=name)
    at, size = struct.unpack_from("<2Q", BYTES, entry("norm") + 80)
    damaged("weights that are no numbers", (at, b"\xff" * size), says="NaN")
    at, size = struct.unpack_from("<2Q", BYTES, entry("layers.0.w2") + 80)
    os.pwrite(fd, b"\xff" * size, at)                        # from layer 1 on no score is a number: budgets hold all the same
    for policy in "h2o", "snapkv", "elastic", "prefixkv", "lookm", "streaming", "fastv:k=1", "h2o:released", "h2o:lookm":
        works(f"scores that are no numbers: {policy}", PICTURE, "-p", policy, "-r", "0.6", "--force-ids", path("ids", b"5 6 7 8 9"), model=copy)
    os.pwrite(fd, BYTES[at:at + size], at)
    damaged("a field twice", (FIELDS["n_layers"][0], b"n_heads\0\0"), says="n_heads")
    damaged("a field of the wrong kind", (FIELDS["n_layers"][0] + 40, "I", 1), says="n_layers")
    damaged("a field of no kind", (FIELDS["n_layers"][0] + 40, "I", 7))
    damaged("a field without a name", (FIELDS["n_layers"][0], bytes(40)))
    damaged("a field's name without end", (FIELDS["n_layers"][0], b"n" * 40))
    damaged("a missing field", (FIELDS["n_layers"][0], b"m_layers"), says="n_layers")
    for name, v in (("n_heads", F["n_heads"] * 2), ("n_kv_heads", max(1, F["n_kv_heads"] // 2) if F["n_kv_heads"] > 1 else 2), ("dim", F["dim"] - 2), ("hidden_dim", F["hidden_dim"] + 1), ("n_layers", F["n_layers"] + 1),
                    ("vision_layers", F["vision_layers"] + 1), ("head_dim", F["head_dim"] + 1), ("vocab_size", VOCAB + 1), ("n_pieces", N_PIECES + 1), ("image_size", F["image_size"] * 2),
                    ("image_size", F["image_size"] - 1), ("patch_size", F["patch_size"] * 2), ("vision_heads", F["vision_heads"] * 5), ("vision_dim", F["vision_dim"] + F["vision_heads"]), ("vision_hidden_dim", 1)):
        damaged(f"{name} {v} instead of {F[name]}", (FIELDS[name][0] + 48, "q", v))

    # tensors
    names = list(TENSORS)
    a, b = names[3], names[4]
    damaged("a tensor twice", (entry(b), a.encode().ljust(64, b"\0")), says=a)
    damaged("a tensor without a name", (entry(a), bytes(64)))
    damaged("a tensor's name without end", (entry(a), b"a" * 64))
    for name in ("tok_emb", "head", "norm", "layers.0.wqkv", "vision.patch", "vision.pos", "vision.class", "projector.w1", f"layers.{F['n_layers'] - 1}.w2", f"vision.layers.{F['vision_layers'] - 1}.b2"):
        at, kind, rows, cols, offset, n = TENSORS[name]
        damaged(f"{name} missing", (at, b"no_such_tensor".ljust(64, b"\0")), says=name)
        damaged(f"{name}: type 9", (at + 64, "I", 9), says=name)
        damaged(f"{name}: 0 rows", (at + 68, "I", 0), says=name)
        damaged(f"{name}: rows", (at + 68, "I", rows + 1), says=name)
        damaged(f"{name}: columns", (at + 72, "I", cols + 64), says=name)
        damaged(f"{name}: 2^32 - 1 rows and columns", (at + 68, "Q", 2 ** 64 - 1), says=name)
        damaged(f"{name}: not aligned", (at + 80, "Q", offset + 4), says=[name, "aligned"])
        damaged(f"{name}: past the end", (at + 80, "Q", len(BYTES) // 64 * 64), says=name)
        damaged(f"{name}: far past the end", (at + 80, "Q", 2 ** 64 - 64), says=name)
        damaged(f"{name}: over the header", (at + 80, "Q", 64), says="overlap")
        damaged(f"{name}: bytes", (at + 88, "Q", n + 64), says=name)
        damaged(f"{name}: 2^63 bytes", (at + 88, "Q", 2 ** 63), says=name)
        per_row = {0: 4, 1: 2, 2: 2, 3: 1}[kind]
        if rows > 1 and rows % 2 == 0 and (cols * per_row) % 64 == 0:
            damaged(f"{name}: another shape of the same bytes", (at + 68, "I", rows // 2), (at + 72, "I", cols * 2), says=name)
    damaged("two tensors overlap", (entry("layers.0.wo") + 80, "Q", TENSORS["layers.0.w13"][4]), says="overlap")
    damaged("a tensor lies in the tokenizer", (entry("norm") + 80, "Q", tok_offset), says="overlap")
    at, kind, rows, cols, _, n = TENSORS["norm"]
    damaged("a norm in f16", (at + 64, "I", 1), (at + 88, "Q", (cols * 2 + 63) // 64 * 64), says="norm")
    damaged("q8_0 without scales", (entry("layers.0.wo") + 64, "I", 3), (entry("layers.0.wo") + 88, "Q", TENSORS["layers.0.wo"][2] * ((TENSORS["layers.0.wo"][3] + 63) // 64 * 64)), says="layers.0.wo")

    # the tokenizer
    n, n_text = struct.unpack_from("<2I", BYTES, tok_offset + 4)
    first = tok_offset + 16
    damaged("tokenizer: kind", (tok_offset, "I", 9), says="tokenizer")
    for v in (0, n - 1, n + 1, 2 ** 31, 2 ** 32 - 1):
        damaged(f"tokenizer: {v} pieces", (tok_offset + 4, "I", v), says="tokenizer")
    for v in (0, n_text - 1, 2 ** 31, 2 ** 32 - 1):
        damaged(f"tokenizer: {v} bytes of text", (tok_offset + 8, "I", v), says="tokenizer")
    for i in (0, 5, n // 2, n - 1):
        damaged(f"tokenizer: piece {i} ends nowhere", (first + 12 * i + 8, "I", 2 ** 32 - 1), says="tokenizer")
        damaged(f"tokenizer: piece {i} ends before it begins", (first + 12 * i + 8, "I", 0), says="tokenizer")
        damaged(f"tokenizer: piece {i} has type 9", (first + 12 * i + 4, "I", 9), says="tokenizer")
        damaged(f"tokenizer: piece {i} has no score", (first + 12 * i, "f", math.nan), says="tokenizer")
    begin = struct.unpack_from("<I", BYTES, first + 12 * (BYTE["<0x00>"] - 1) + 8)[0] if BYTE["<0x00>"] else 0
    damaged("tokenizer: a byte piece that is none", (first + 12 * n + begin, b"<0xZZ>"), says="tokenizer")
    damaged("tokenizer: text that is no UTF-8", (first + 12 * n + n_text - 1, b"\xff"), says="tokenizer")

    # anything at all may stand there: an answer or an error, never a crash
    rng = random.Random(1)
    for i in range(120):
        at, data = rng.randrange(8, tok_offset + tok_bytes), bytes(rng.randrange(256) for _ in range(rng.choice((1, 1, 2, 4, 8))))
        os.pwrite(fd, data, at)
        r = run("-i", "x", "-n", "1", model=copy, env=LEAKS_ALLOWED)
        ok = r.returncode == 0 or r.returncode == 1 and r.stdout == b"" and b"error: " in r.stderr
        check(ok and b"Sanitizer" not in r.stderr, f"model file: {data.hex()} at byte {at}", f"status {r.returncode}, {r.stderr[:200]!r}")
        os.pwrite(fd, BYTES[at:at + len(data)], at)
    os.close(fd)
    os.remove(copy)


# ----------------------------------------------------------------------------
# Ctrl-C, and a standard output that takes nothing

def blocked(*args):
    """The program, held up in the middle of its answer: its standard output is a pipe with room for a few bytes."""
    r, w = os.pipe()
    size = fcntl.fcntl(w, getattr(fcntl, "F_SETPIPE_SZ", 1031), 4096)
    filler = b"." * (size - 12)
    os.write(w, filler)
    p = subprocess.Popen([PROGRAM, MODEL, *args], stdin=subprocess.DEVNULL, stdout=w, stderr=subprocess.PIPE, env=ENV, cwd=HERE.dir)
    os.close(w)
    for _ in range(1000):                                   # until the first text has come
        waiting = struct.unpack("i", fcntl.ioctl(r, termios.FIONREAD, bytes(4)))[0]
        if waiting > len(filler) or p.poll() is not None:
            break
        time.sleep(0.005)
    time.sleep(0.1)
    return p, r, len(filler)


def drain(r):
    out = b""
    while data := os.read(r, 65536):
        out += data
    os.close(r)
    return out


def test_interrupts():
    answer = path("answer", "one two three four five six seven eight nine ten " * 2)
    p, r, n = blocked("-i", "x", "--force", answer)
    p.send_signal(signal.SIGINT)
    time.sleep(0.1)
    out = drain(r)[n:]
    err = p.stderr.read()
    status = p.wait(10)
    check(status == 130, "Ctrl-C: status 130", f"{status} {err!r}")
    m = LINE.search(err)
    check(m and int(m[3]) < len(encode(open(answer).read())), "Ctrl-C: the answer ends, the last line comes", f"{err!r}")
    check(out.endswith(b"\n") and b"one two three four five six seven eight nine ten " .startswith(out.strip()[:20]), "Ctrl-C: what was said so far stands there", f"{out!r}")

    p, r, n = blocked("-i", "x", "--force", answer)
    p.send_signal(signal.SIGINT)
    time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    try:
        status = p.wait(10)                                 # although nobody reads what it has to say
    except subprocess.TimeoutExpired:
        status = "still running"
        p.kill()
    check(status == 130, "Ctrl-C twice: the program ends at once", f"{status}")
    drain(r)
    p.stderr.close()

    p = subprocess.Popen([PROGRAM, MODEL, "-i", "x", "-n", "3", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV)
    p.stdout.readline()
    select.select([p.stderr], [], [], 0.1)
    p.send_signal(signal.SIGINT)
    try:
        p.wait(10)                                          # standard input stays open: it is the signal that ends the waiting
        out, err = p.communicate()
        check(p.returncode == 130 and LINE.search(err), "Ctrl-C while a chat waits: status 130, the last line", f"{p.returncode} {err!r}")
    except subprocess.TimeoutExpired:
        p.kill()
        check(False, "Ctrl-C while a chat waits: it goes on waiting")

    p, r, n = blocked("-i", "x", "-n", "30", "-c", "-t", "2", "-s", "1")    # the answer ends, the chat goes on, and finds no more turns
    p.send_signal(signal.SIGINT)
    time.sleep(0.1)
    drain(r)
    err = p.stderr.read()
    check(p.wait(10) == 130 and LINE.search(err), "Ctrl-C in a chat's answer: the last line, status 130", f"{p.returncode} {err!r}")

    r = run("-i", "x", "-n", "5", "-q")
    if os.path.exists("/dev/full"):
        for name, args in (("an answer", ["-i", "x", "-n", "5"]), ("-B", ["-i", "x", "-n", "5", "-B", "2"]), ("--tokens", ["-i", "x", "--tokens"]), ("--info", ["--info"]), ("-h", ["-h"]), ("-p help", ["-p", "help"])):
            with open("/dev/full", "wb") as full:
                q = subprocess.run([PROGRAM, MODEL, *args], stdout=full, stderr=subprocess.PIPE, env=LEAKS_ALLOWED, timeout=60)
            check(q.returncode == 1 and b"error: standard output" in q.stderr, f"a full disk: {name}", f"{q.returncode} {q.stderr!r}")
        q = run("-i", "x", "-n", "2", "--logits", "/dev/full", env=LEAKS_ALLOWED)
        check(q.returncode == 1 and b"--logits" in q.stderr, "a full disk: --logits", f"{q.returncode} {q.stderr!r}")
    logits = path("closed")
    q = subprocess.run(["sh", "-c", '"$@" >&-', "sh", PROGRAM, MODEL, "-i", "x", "-n", "2", "--logits", logits], stderr=subprocess.PIPE, env=LEAKS_ALLOWED, timeout=60)
    check(q.returncode == 1 and b"error: standard output" in q.stderr and not os.path.exists(logits), "standard output closed", f"{q.returncode} {q.stderr!r}")
    q = subprocess.run(["sh", "-c", '"$@" 2>&- <&-', "sh", PROGRAM, MODEL, "-i", "x", "-n", "5", "--logits", logits], stdout=subprocess.PIPE, env=ENV, timeout=60)
    check(q.returncode == 0 and q.stdout == r.stdout and os.path.getsize(logits) % (4 * VOCAB) == 0, "standard error and input closed: nothing goes astray", f"{q.returncode} {q.stdout!r}")
    q = subprocess.run(["sh", "-c", '"$@" | head -c 1 >/dev/null', "sh", PROGRAM, MODEL, "-i", "x", "-n", "50"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=LEAKS_ALLOWED, timeout=60)
    check(b"Sanitizer" not in q.stderr, "a reader that goes away", f"{q.stderr!r}")


def one(test):
    HERE.dir = tempfile.mkdtemp(dir=DIR)
    start = time.time()
    try:
        test()
    except Exception:
        check(False, test.__name__, traceback.format_exc())
    if "TIMES" in os.environ:
        print(f"{test.__name__}: {time.time() - start:.1f} s", flush=True)


try:
    with ThreadPoolExecutor(2) as pool:                     # the slow ones first
        list(pool.map(one, (test_policies, test_chat, test_model_files, test_answers, test_options, test_prompts, test_pictures, test_replay, test_interrupts)))
finally:
    shutil.rmtree(DIR)
finish()
