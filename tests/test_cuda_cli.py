#!/usr/bin/env python3
"""test_cuda_cli.py: the same command with -b cpu and -b cuda must say the same: answers, logits, traces, pictures, figures, errors.

    python3 tests/test_cuda_cli.py build/llava_emulated models/scenes-llava.bin          a selection
    python3 tests/test_cuda_cli.py build/llava_emulated models/scenes-llava.bin all      every policy, every option
    python3 tests/test_cuda_cli.py build/llava models/scenes-llava.bin all               on a GPU

llava_emulated is ./llava with kernels.cu run by tests/cuda_on_cpu.h, which ends the program where host and device mix up their memory.
Both back-ends hold the cache as f32 unless a case says otherwise. Sums are taken in another order, so that numbers agree to about 1e-5
and a trace may name other slots where scores are as good as equal. Needs Python's standard library alone.
"""

import array
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

from counting import check, finish

if len(sys.argv) < 3:
    sys.exit("usage: python3 tests/test_cuda_cli.py build/llava_emulated models/scenes-llava.bin [all | CASE…]")
PROGRAM, MODEL = map(os.path.abspath, sys.argv[1:3])
ONLY = sys.argv[3:]
SCENES = os.path.join(os.path.dirname(MODEL), "scenes")
FOLDER = tempfile.TemporaryDirectory(prefix="test_cuda_cli.")
ENV = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1", "CUDA_ON_CPU_REPORT": "1"}
FIGURES = "prompt_tokens", "image_tokens", "new_tokens", "slots_kept", "slots_seen", "cache_bytes"
NUMBERS, SCORES = 2e-4, 1e-5                        # of logits and printed numbers; of votes by which slots were chosen
A, B, C = (os.path.join(SCENES, f"{n}.png") for n in (1000, 1003, 1007))
QUIZ = ("What is this?\nContext: N/A\nOptions: (A) a red square (B) a blue circle (C) a cross\n"
        "Answer with the option's letter from the given choices directly.")


# ----------------------------------------------------------------------------
# two answers beside each other

def png(data):
    """Width, and the pixels' bytes with the filters undone."""
    w, h = struct.unpack(">2I", data[16:24])
    packed, at = b"", 8
    while at < len(data):
        n, kind = struct.unpack(">I4s", data[at:at + 8])
        packed += data[at + 8:at + 8 + n] if kind == b"IDAT" else b""
        at += n + 12
    s, up, out = zlib.decompress(packed), bytes(3 * w), bytearray()
    for y in range(h):
        kind, row = s[y * (3 * w + 1)], bytearray(s[y * (3 * w + 1) + 1:(y + 1) * (3 * w + 1)])
        for i in range(3 * w):
            a, b, c = row[i - 3] if i > 2 else 0, up[i], up[i - 3] if i > 2 else 0
            p = a + b - c
            paeth = min((a, b, c), key=lambda v: abs(p - v))
            row[i] = row[i] + (0, a, b, (a + b) // 2, paeth)[kind] & 255
        out += row
        up = bytes(row)
    return w, bytes(out)


def pixels_differ(x, y):
    (w, a), (v, b) = png(x), png(y)
    return 1.0 if w != v or len(a) != len(b) else sum(a[i:i + 3] != b[i:i + 3] for i in range(0, len(a), 3)) / (len(a) / 3)


def close(a, b, tol):
    return a is b or a == b or (a is not None and b is not None and abs(a - b) <= tol * (1 + abs(a)))


def votes(e, which):
    return dict(zip(e.get(which, []), e.get(which + "_score", [])))


def trace_differs(x, y):
    """What differs between two traces, or None. Where a plan or a drop took other slots, their scores must be as good as equal; from there
    on the two caches are not the same, and only the kinds of events are compared."""
    x, y = ([json.loads(s) for s in t.decode().splitlines()] for t in (x, y))
    tie = False
    for e, f in zip(x, y):
        same = ("event", "policy", "seq", "step", "layer", "head", "first", "layers", "kv_heads", "kind")
        if any(e.get(k) != f.get(k) for k in same):
            return f"{ {k: e.get(k) for k in same} } and { {k: f.get(k) for k in same} }" if not tie else None
        if tie:
            continue
        if any(e.get(k) != f.get(k) for k in ("rows", "hidden", "slots", "id", "piece")):
            return f"{e} and {f}"[:400]
        p, q = {**votes(e, "kept"), **votes(e, "dropped")}, {**votes(f, "kept"), **votes(f, "dropped")}
        other = set(e.get("dropped", [])) ^ set(f.get("dropped", []))
        if other:
            scores = [s[i] for s in (p, q) for i in other if i in s]
            if not scores or max(scores) - min(scores) > SCORES * (1 + max(map(abs, scores))):
                return f"{e['event']}, layer {e.get('layer')}, head {e.get('head')}, step {e['step']}: slots {sorted(other)}, scores {scores}"[:400]
            tie = True
        elif any(not close(p[i], q[i], NUMBERS) for i in p):
            return f"{e['event']}, layer {e.get('layer')}, head {e.get('head')}: scores {p} and {q}"[:400]
        merged = [[(a, b) for a, b, _ in g.get("merged", [])] for g in (e, f)]
        weights = zip(e.get("merged", []), f.get("merged", []))
        if not tie and (merged[0] != merged[1] or any(not close(a[2], b[2], NUMBERS) for a, b in weights)):
            return f"merged {e['merged']} and {f['merged']}"[:400]
    return None if len(x) == len(y) else f"{len(x)} and {len(y)} events"


def floats(data):
    a = array.array("f")
    a.frombytes(data)
    return a


def text_differs(x, y):
    """Two texts, number by number: those that are no whole numbers may differ in the last digits; bars of # by one character."""
    number = re.compile(r"\d+\.\d+(?:e[-+]\d+)?|\d+e[-+]\d+| *#+")
    if number.sub("", x) != number.sub("", y):
        return f"{x!r} and {y!r}"[:1200]
    for a, b in zip(number.findall(x), number.findall(y)):
        if abs(len(a) - len(b)) > 1 if "#" in a + b else not close(float(a), float(b), NUMBERS):
            return f"{a} and {b}"
    return None


def run(name, back_end, args, stdin):
    here = os.path.join(FOLDER.name, name.replace("/", "_"), back_end)
    os.makedirs(here)
    if name.startswith("force"):
        with open(os.path.join(here, "answer"), "w") as f:
            f.write("A small brown cross")
    try:
        r = subprocess.run([PROGRAM, MODEL] + args + ["-b", back_end], input=stdin.encode(), capture_output=True, timeout=300, env=ENV, cwd=here)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(args, "timeout", b"", b""), {}
    files = {}
    for f in sorted(os.listdir(here)):
        with open(os.path.join(here, f), "rb") as file:
            files[f] = file.read()
    return r, files


def said(r):
    """Standard error without times: the last line's other figures, and the lines before it."""
    lines = [s for s in r.stderr.decode(errors="replace").splitlines()
             if not re.match("(prompt|vision tower|rows read)[,:] |cuda_on_cpu: .*launched$|note: .* CUDA graph$", s)]
    figures = dict(p.split(" ") for p in lines[-1].split("; ")) if lines and lines[-1].startswith("prompt_tokens") else {}
    return "\n".join(s.replace("back-end cuda", "back-end cpu") for s in (lines[:-1] if figures else lines)), {k: figures.get(k) for k in FIGURES}


def both(name, *args, stdin="", status=0, tol=NUMBERS, graphs=None):
    """One command on both back-ends. graphs: how many steps are launched as one."""
    args = [str(a) for a in args]
    start = time.time()
    (r, mine), (s, theirs) = (run(name, b, args + ([] if "--kv" in args or status else ["--kv", "f32"]), stdin) for b in ("cpu", "cuda"))
    name = f"{name} ({time.time() - start:.1f} s)"
    if not check(r.returncode == s.returncode == status, name, f"status {r.returncode} and {s.returncode}: {s.stderr[-600:]!r}"):
        return
    says, launched = b"CUDA graph" in s.stderr, re.search(rb"cuda_on_cpu: \d+ kernels, (\d+) graphs", s.stderr)
    looks_on = any(re.search("fastv:(mask|recompute)", a) for a in args) and not status
    check(says == looks_on and b"CUDA graph" not in r.stderr, name, f"{'silent about' if looks_on else 'speaks of'} graphs: {s.stderr!r}")
    check(graphs is None or not launched or int(launched[1]) == graphs, name, f"{launched and launched[1]} graphs launched, not {graphs}")
    (x, f), (y, g) = said(r), said(s)
    check(r.stdout == s.stdout, name, f"{r.stdout!r} and {s.stdout!r}")
    check(f == g, name, f"{f} and {g}")
    differs = text_differs(x, y)
    check(not differs, name, differs)
    check(list(mine) == list(theirs), name, f"files {list(mine)} and {list(theirs)}")
    for file in set(mine) & set(theirs):
        a, b = mine[file], theirs[file]
        if file == "trace":
            differs = trace_differs(a, b)
            check(not differs, name, differs)
        elif file == "logits":
            a, b = floats(a), floats(b)
            worst = max((abs(p - q) / (1 + abs(p)) for p, q in zip(a, b)), default=0)
            check(len(a) == len(b) and worst < tol, name, f"logits: {len(a)} and {len(b)} numbers, {worst:g} apart")
        elif file == "attention.png":                # its colours are numbers
            check(len(a) and pixels_differ(a, b) < 0.01, name, f"{pixels_differ(a, b):g} of the pixels of {file} differ")
        else:
            check(a == b, name, f"{file} differs: {len(a)} and {len(b)} bytes")


# ----------------------------------------------------------------------------
# what is run: name, arguments, and more for both(); the first ones are the selection

FEW, MANY = [], []


def few(name, *args, **more):
    FEW.append((name, args, more))


def many(name, *args, **more):
    MANY.append((name, args, more))


LOOK = "--trace", "trace", "-m", "kept.png", "--logits", "logits"
LONG = " ".join(str(5 + 7 * i % 500) for i in range(60))
TURNS = "How many shapes?\nWhich colour?\n"

few("chat", A, "-c", "-n", 5, "-p", "h2o", "-r", 0.5, "--logits", "logits", stdin=TURNS)
few("answers", A, "-B", 3, "-n", 6, "-t", 0.7, "-s", 3, "-p", "h2o", "-r", 0.4, "--trace", "trace", graphs=4)
few("compare", B, "--compare", "-n", 4, "-p", "elastic", "-r", 0.6, "-v", "-s", 1, *LOOK, graphs=6)
few("two pictures", A, B, "-i", "What is in <image> and in <image>?", "-n", 4, "-p", "snapkv", "-k", 0.4, *LOOK, graphs=2)
few("no picture", "-i", "Hello", "-n", 8, "--logits", "logits", "--attention", "attention.png", "--attention-layer", 1, graphs=6)
few("fastv:mask", A, "-p", "fastv:mask", "-r", 0.5, "-n", 3, "--trace", "trace", "--logits", "logits", graphs=0)
few("merging, f16", A, "-p", "lookm", "-r", 0.5, "-n", 4, "--kv", "f16", "--logits", "logits", tol=5e-3)
few("--ctx too small", A, "--ctx", 40, status=1)

# A policy that looks on at every token decides on the host while a trace is written, on the device else.
for form in ("full", "random", "random:rows", "stride", "stride:rows", "streaming", "streaming:released", "h2o", "h2o:released", "h2o:lookm",
             "roco", "snapkv", "snapkv:lookm", "elastic", "elastic:released", "prefixkv:online", "lookm", "lookm:merge=none", "lookm:merge=average",
             "lookm:merge=weighted", "lookm:released", "fastv", "fastv:mask", "fastv:recompute", "fastv:lmms", "fastv:score=all", "simignore",
             "fastv:k=2,r=0.5+h2o:r=0.4", "simignore:r=0.3+snapkv:r=0.5", "random:rows:r=0.5+streaming:r=0.5"):
    ratio, graphs = () if "+" in form else ("-r", 0.5), 0 if re.search("mask|recompute", form) else 4
    many("-p " + form, B, "-p", form, *ratio, "-n", 6, "-s", 1, *LOOK, graphs=graphs)
    if re.search("h2o|streaming", form):
        many("untraced -p " + form, B, "-p", form, *ratio, "-n", 6, "-s", 1, "--logits", "logits", graphs=graphs)
for form in ("simignore:released-7b:k=2", "simignore:released-13b:k=3"):
    many("-p " + form, A, "-p", form, "-i", QUIZ, "-n", 3, "--template", "vicuna_v1", *LOOK)
for form in ("full", "streaming", "snapkv", "elastic", "h2o:released", "fastv", "fastv:mask", "lookm", "random:rows:r=0.5+h2o:r=0.4"):
    many("chat, " + form, A, "-c", "-n", 4, "-p", form, *(() if "+" in form else ("-r", 0.5)), "-s", 1, "--trace", "trace", stdin=TURNS,
         graphs=0 if "mask" in form else None)
for form in ("full", "streaming", "h2o:released", "fastv:mask", "fastv:recompute", "snapkv", "lookm"):
    many("answers, " + form, A, "-B", 3, "-n", 5, "-t", 0.7, "-s", 4, "-p", form, "-r", 0.5, "--trace", "trace",
         graphs=0 if re.search("mask|recompute", form) else 3)
for form in ("h2o", "streaming", "fastv", "fastv:mask", "h2o:released", "simignore"):
    many("compare, " + form, A, "--compare", "-n", 5, "-p", form, "-r", 0.5, graphs=3 if "mask" in form else 9)
many("compare, fastv:recompute", A, "--compare", "-n", 3, "-p", "fastv:recompute", "-r", 0.5, graphs=1)
many("20 answers", A, "-B", 20, "-n", 4, "-t", 1, "-s", 1, "-p", "h2o", "-r", 0.5)
many("40 answers to text", "-i", "A", "--template", "raw", "-B", 40, "-n", 6, "-t", 1, "-s", 1)
many("answers of different lengths", C, "-i", "What is this?", "-B", 4, "-n", 20, "-t", 4, "-s", 1, "-p", "h2o", "-r", 0.5)
many("one token", A, "-n", 1, "-p", "h2o", "-r", 0.5, *LOOK)
many("one token each", A, "-n", 1, "-B", 4)
many("three pictures", A, B, C, "-n", 4, "-p", "elastic", "-r", 0.7, "--attention", "attention.png", *LOOK)
many("attention", A, "-n", 2, "--attention", "attention.png")
many("attention of a layer", A, "-n", 2, "--attention", "attention.png", "--attention-layer", 2, "-p", "fastv", "-r", 0.5)
many("attention, masked", A, "-n", 2, "--attention", "attention.png", "-p", "fastv:mask", "-r", 0.5, graphs=0)
many("long", A, "-p", "h2o", "-r", 0.5, "--force-ids", "/dev/stdin", "--logits", "logits", stdin=LONG, graphs=58)
many("long, traced", A, "-p", "h2o", "-r", 0.5, "--force-ids", "/dev/stdin", "--logits", "logits", "--trace", "trace", stdin=LONG, graphs=58)
many("long, streaming", A, "-p", "streaming", "-r", 0.8, "--force-ids", "/dev/stdin", "--logits", "logits", stdin=LONG, graphs=58)
many("to the last position", A, "--force-ids", "/dev/stdin", "-p", "h2o", "-r", 0.5, "--logits", "logits", stdin=" ".join([LONG] * 7 + ["9"] * 13))
many("--ctx as needed", A, "-n", 4, "--ctx", 83, "--logits", "logits")
many("--ctx one short", A, "-n", 4, "--ctx", 82, "--logits", "logits")
many("--ctx of the prompt", A, "-n", 4, "--ctx", 80, "--logits", "logits")
many("--ctx one short of the prompt", A, "-n", 4, "--ctx", 79, status=1)
many("--ctx of a chat", A, "-c", "-n", 4, "--ctx", 100, stdin="How many shapes are there in the picture?\nWhich colour?\n", status=1)
many("--ctx too large", A, "-n", 4, "--ctx", 513, status=1)
many("--pos slot", A, "-n", 5, "-p", "snapkv", "-r", 0.5, "--pos", "slot", *LOOK)
many("--pos true", A, "-n", 5, "-p", "streaming", "-r", 0.5, "--pos", "true", *LOOK)
many("-k 0.01", A, "-n", 5, "-p", "h2o", "-k", 0.01, "--logits", "logits", status=1)
many("-k 0.03", A, "-n", 5, "-p", "h2o", "-k", 0.03, *LOOK)
many("-r 1", A, "-n", 3, "-p", "stride", "-r", 1, *LOOK)
many("-r 0", A, "-n", 3, "-p", "h2o", "-r", 0, *LOOK)
many("a layer too many", A, "-p", "fastv:k=9", "-r", 0.5, status=1)
many("f16", A, "-n", 6, "--kv", "f16", "-p", "h2o", "-r", 0.5, "--logits", "logits", tol=5e-3)
many("f16, streaming", A, "-n", 6, "--kv", "f16", "-p", "streaming", "-r", 0.5, "--logits", "logits", tol=5e-3)
many("f16, chat", A, "-c", "-n", 4, "--kv", "f16", "-p", "elastic", "-r", 0.5, stdin="How many?\n")
many("force", A, "--force", "answer", "-p", "h2o", "-r", 0.5, *LOOK)
many("penalty", A, "-n", 6, "--repeat-penalty", 1.3, "--logits", "logits")
many("raw", "-i", "A", "--template", "raw", "-n", 4, "--logits", "logits")
many("pad", A, "--image-mode", "pad", "-n", 3, "--logits", "logits")
many("nothing stays", A, "-p", "random:what=all", "-r", 1, "-s", 1, "-n", 3, status=1)

wanted = FEW + MANY if ONLY == ["all"] else [c for c in FEW + MANY if c[0] in ONLY] if ONLY else FEW
with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
    list(pool.map(lambda c: both(c[0], *c[1], **c[2]), wanted))
if not ONLY or ONLY == ["all"]:                     # without -b and --kv it is CUDA with f16; a device that is not there has a name
    r = subprocess.run([PROGRAM, MODEL, "-i", "Hello", "-n", "1", "-v"], capture_output=True, env=ENV)
    check(r.returncode == 0 and b"back-end cuda" in r.stderr and b"cache f16" in r.stderr, "back-end by default", r.stderr)
    r = subprocess.run([PROGRAM, MODEL, "-i", "Hello", "-n", "1", "--device", "1000"], capture_output=True, env=ENV)
    check(r.returncode == 1 and r.stdout == b"" and b"error: --device 1000: there " in r.stderr, "--device 1000", r.stderr)
finish()
