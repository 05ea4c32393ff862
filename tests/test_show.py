#!/usr/bin/env python3
"""test_show.py: -m, --attention, --trace and --compare, from outside: the picture shows what the trace says, the trace adds up to the
figures of the last line, the comparison is what two runs with --logits give, and looking on changes no answer.

    python3 tests/test_show.py build/llava models/scenes-llava.bin

Any LLaVA model of up to 5 layers will do. Needs Python's standard library alone.
"""

import array
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import zlib

from counting import check, finish

if len(sys.argv) != 3:
    sys.exit("usage: python3 tests/test_show.py build/llava MODEL.bin")
PROGRAM, MODEL = map(os.path.abspath, sys.argv[1:])
FOLDER = tempfile.TemporaryDirectory(prefix="test_show.")
DIR = FOLDER.name
ENV = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}


def path(name, data=None):
    p = os.path.join(DIR, name)
    if data is not None:
        with open(p, "wb") as f:
            f.write(data)
    return p


def run(*args, leaks=False, **more):
    env = {**ENV, "ASAN_OPTIONS": "detect_leaks=0:" + os.environ.get("ASAN_OPTIONS", "")} if leaks else ENV
    return subprocess.run([PROGRAM, MODEL] + [str(a) for a in args], capture_output=True, timeout=120, env=env, cwd=DIR, **more)


def works(name, *args, **more):
    r = run(*args, **more)
    check(r.returncode == 0, name, f"status {r.returncode}, stderr {r.stderr[-300:]!r}")
    return r


def fails(name, *args, says):
    r = run(*args, leaks=True)
    err = r.stderr.decode()
    check(r.returncode == 1 and r.stdout == b"" and re.search("^error: ", err, re.M) and "Sanitizer" not in err and all(s in err for s in says), name, err[:300])


def figures(r, start="prompt_tokens"):
    """The line of `name value` pairs that begins with `start`."""
    line = [s for s in r.stderr.decode().splitlines() if s.startswith(start)][-1]
    return {k: float(v) for k, v in (pair.split(" ") for pair in line.split("; "))}


def png(w, h, pixel):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    rows = b"".join(b"\0" + b"".join(bytes(pixel(x, y)) for x in range(w)) for y in range(h))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I5B", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def read_png(name):
    """Width, height, and rows of bytes; every checksum is checked."""
    with open(path(name), "rb") as f:
        s = f.read()
    assert s[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    while at < len(s):
        n, kind = struct.unpack_from(">I4s", s, at)
        body = s[at + 8:at + 8 + n]
        assert struct.unpack_from(">I", s, at + 8 + n)[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            w, h, *rest = struct.unpack(">2I5B", body)
            assert rest == [8, 2, 0, 0, 0]
        if kind == b"IDAT":
            packed += body
        at += 12 + n
    assert kind == b"IEND"
    raw, rows, up = zlib.decompress(packed), [], bytes(3 * w)
    assert len(raw) == h * (3 * w + 1)
    for y in range(h):
        line = bytearray(raw[y * (3 * w + 1):(y + 1) * (3 * w + 1)])
        kind, row = line[0], line[1:]
        for i in range(3 * w):
            a, b, c = (row[i - 3] if i >= 3 else 0), up[i], (up[i - 3] if i >= 3 else 0)
            if kind == 4:
                p = a + b - c
                pa, pb, pc = abs(p - a), abs(p - b), abs(p - c)
                guess = a if pa <= pb and pa <= pc else b if pb <= pc else c
            else:
                guess = (0, a, b, (a + b) // 2)[kind]
            row[i] = (row[i] + guess) & 255
        rows.append(up := bytes(row))
    return w, h, rows


INFO = dict(re.findall(r"^  (\w+) +([\d.]+)$", run("--info").stdout.decode(), re.M))
N_LAYERS, N_HEADS, VOCAB, N_PIECES = (int(INFO[k]) for k in ("n_layers", "n_kv_heads", "vocab_size", "n_pieces"))
GRID = int(INFO["image_size"]) // int(INFO["patch_size"])
GREY = path("grey.png", png(60, 60, lambda x, y: (150, 150, 150)))
SHAPES = path("shapes.png", png(120, 90, lambda x, y: (220, 40, 40) if (x - 40) ** 2 + (y - 40) ** 2 < 300 else (245, 245, 245)))
POLICIES = ["full", "random", "random:rows", "stride", "streaming", "h2o", "h2o:released", "snapkv", "elastic", "elastic:released", "prefixkv", "lookm", "lookm:merge=average",
            "fastv", "fastv:mask", "fastv:recompute", "fastv:lmms", "simignore", "fastv:r=0.4+h2o:r=0.5", "random:rows:r=0.3+lookm:r=0.5"]
EVENTS = {"prompt": {"first", "layers", "kv_heads", "id", "kind"}, "rows": {"layer", "rows", "dropped"}, "hidden": {"layer", "hidden"},
          "plan": {"layer", "head", "kept", "dropped", "kept_score", "dropped_score", "merged", "merge_self"},
          "drop": {"layer", "head", "slots", "dropped", "dropped_score"}, "token": {"id", "piece"}}


def no_constant(x):
    raise ValueError(x)


def read_trace(name):
    """Its events, each checked by itself."""
    with open(path(name), encoding="utf-8") as f:
        events = [json.loads(line, parse_constant=no_constant) for line in f]
    for e in events:
        check(set(e) == {"event", "policy", "seq", "step"} | EVENTS[e["event"]], f"{name}: fields of {e['event']}", sorted(e))
        if e["event"] in ("plan", "drop"):
            check(e["dropped"] == sorted(e["dropped"]) and len(e["dropped"]) == len(e["dropped_score"]), f"{name}: {e['event']}")
    return events


def test_policy(p, picture):
    common = [picture, "-p", p, "-r", "0.5", "-s", "1", "-n", "12", "-i", "What is it?"]
    plain = works(f"{p}", *common)
    r = works(f"{p}: looked at", *common, "-m", "kept.png", "--trace", "trace", "--attention", "map.png")
    check(r.stdout == plain.stdout, f"{p}: looking on changes no answer")
    f, events = figures(r), read_trace("trace")
    check(all(e["policy"] == p and e["seq"] == 0 for e in events), f"{p}: policy and seq")
    prompt = [e for e in events if e["event"] == "prompt"]
    rows = [s.split("\t") for s in run(*common, "--tokens").stdout.decode().splitlines()]
    check(len(prompt) == 1 and prompt[0]["kind"] == [s[2] for s in rows] and all(i == -1 or i == int(s[1]) for i, s in zip(prompt[0]["id"], rows)), f"{p}: the prompt is --tokens'")
    kinds, n = prompt[0]["kind"], len(rows)
    tokens = [e for e in events if e["event"] == "token"]
    check(len(tokens) == f["new_tokens"] and [e["step"] for e in tokens] == list(range(len(tokens))), f"{p}: tokens")

    # plans: what is there at each layer is what rows left; then kept and dropped are all of it
    gone, slots = {}, {}
    for e in events:
        if e["event"] == "rows" and e["step"] == 0:
            for l in range(e["layer"], N_LAYERS):
                gone.setdefault(l, set()).update(e["dropped"])
            check(e["rows"] == n - len(gone[e["layer"]]), f"{p}: rows of layer {e['layer']}")
    plans = {(e["layer"], e["head"]): e for e in events if e["event"] == "plan" and e["step"] == 0}
    check(len(plans) == N_LAYERS * N_HEADS, f"{p}: a plan a head")
    for (l, h), e in plans.items():
        all_slots = sorted(e["kept"] + e["dropped"])
        check(all_slots == [i for i in range(n) if i not in gone.get(l, ())], f"{p}: layer {l}, head {h}: slots")
        check(len(e["kept"]) == len(e["kept_score"]) and all(t in e["kept"] and s in all_slots and isinstance(w, (int, float)) for s, t, w in e["merged"]), f"{p}: merged into kept ones")
        slots[l, h] = set(e["kept"])
    hidden = {}
    for e in events:
        if e["event"] == "hidden" and e["step"] == 0:
            for l in range(e["layer"], N_LAYERS):
                hidden[l] = set(e["hidden"])
    if p == "fastv:mask":
        check(hidden and all(len(x) == GRID * GRID // 2 for x in hidden.values()), f"{p}: hidden keys")

    # what left while decoding: every fed token joins, drops leave; the count is the last line's
    if p != "fastv:recompute":
        fed = n
        for step in range(1, len(tokens)):
            for s in slots.values():
                s.add(fed)
            fed += 1
            for e in events:
                if e["event"] == "drop" and e["step"] == step:
                    s = slots[e["layer"], e["head"]]
                    check(len(s) == e["slots"] and s >= set(e["dropped"]), f"{p}: step {step} drops what is there")
                    s -= set(e["dropped"])
        mean = sum(map(len, slots.values())) / len(slots)
        check(abs(mean - f["slots_kept"]) <= 0.051, f"{p}: the trace adds up", f"{mean} {f['slots_kept']}")

    # the picture: the middle third of a patch, off the dot, is as bright as the share of heads that keep it
    w, h, image = read_png("kept.png")
    cell = 272 // GRID
    side = cell * GRID
    check(w >= N_LAYERS * (side + 34) + 16 and h >= side + 100, f"{p}: size of the picture", f"{w} x {h}")
    if picture == GREY:
        first, wrong = kinds.index("image"), 0
        for l in range(N_LAYERS):
            for t in range(GRID * GRID):
                kept = sum(first + t in plans[l, k]["kept"] and first + t not in hidden.get(l, ()) for k in range(N_HEADS)) / N_HEADS
                merged = sum(any(s == first + t and s in plans[l, k]["dropped"] for s, _, _ in plans[l, k]["merged"]) for k in range(N_HEADS)) / N_HEADS
                x, y = 16 + l * (side + 34) + t % GRID * cell + cell // 4, 80 + t // GRID * cell + cell // 4
                got, rest = image[y][3 * x:3 * x + 3], kept + merged
                for k in range(3):
                    dim = (45, 45, 55)[k] * 0.82 + 150 * 0.18
                    color = (150 * kept + (150 * 0.4 + (0, 185, 185)[k] * 0.6) * merged) / rest if rest else 0
                    wrong += abs(got[k] - (color * rest + dim * (1 - rest))) > 3
        check(not wrong, f"{p}: the picture shows what the trace says", f"{wrong} wrong colours")
    if p not in ("full", "fastv", "lookm"):
        return
    w, h, image = read_png("map.png")
    check(len(set(image[0:h])) > 50 and w > N_LAYERS * 200, f"{p}: the attention map", f"{w} x {h}")


def logits_of(*args):
    works("--logits", *args, "--logits", "logits")
    a = array.array("f")
    with open(path("logits"), "rb") as f:
        a.frombytes(f.read())
    return [a[i:i + N_PIECES].tolist() for i in range(0, len(a), VOCAB)]


def log_softmax(x):
    m = max(x)
    s = math.log(sum(math.exp(v - m) for v in x)) + m
    return [v - s for v in x]


def test_compare():
    common = [SHAPES, "-n", "10", "-i", "What is it?"]
    for extra in ([], ["-t", "0.8", "-s", "3"], ["--repeat-penalty", "1.3"]):
        full = run(*common, *extra, "--trace", "full")
        ids = [e["id"] for e in read_trace("full") if e["event"] == "token"]
        path("ids", " ".join(map(str, ids)).encode())
        p = logits_of(*common, "--force-ids", "ids")
        for policy in ("h2o", "fastv", "fastv:recompute", "elastic", "streaming"):
            name, how = f"--compare -p {policy} {' '.join(extra)}", [*extra, "-p", policy, "-r", "0.6"]
            alone = run(*common, *how, "--trace", "alone")
            other = [e["id"] for e in read_trace("alone") if e["event"] == "token"]
            r = works(name, *common, *how, "--compare", "-q")
            check(r.stdout == alone.stdout, f"{name}: the policy's answer as always")
            q = logits_of(*common, "-p", policy, "-r", "0.6", "--force-ids", "ids")
            kl = [sum(math.exp(a) * (a - b) for a, b in zip(x, y)) for x, y in ((log_softmax(x), log_softmax(y)) for x, y in zip(p, q))]
            f = figures(r, "full_tokens")
            differ = next((i for i, (a, b) in enumerate(zip(ids, other)) if a != b), min(len(ids), len(other)) if len(ids) != len(other) else -1)
            agree = sum(x.index(max(x)) == y.index(max(y)) for x, y in zip(p, q)) / len(ids)
            check(f["full_tokens"] == len(ids) and f["policy_tokens"] == len(other) and f["first_difference"] == differ, f"{name}: where they part", f"{f} {differ}")
            near = all(math.isclose(f[key], kls, rel_tol=1e-5, abs_tol=1e-5) for key, kls in (("kl_mean", sum(kl) / len(kl)), ("kl_max", max(kl))))
            check(near and abs(f["agreement"] - agree) < 1e-3, f"{name}: KL and agreement", f"{f} {sum(kl) / len(kl)} {max(kl)} {agree}")
            check(r.stderr.count(b">>") == (2 if differ >= 0 else 0), f"{name}: marked on both sides")
            steps = re.findall(r"^ *(\d+)  .* (\d+\.\d{5})  #*$", r.stderr.decode(), re.M)
            check([int(s) for s, _ in steps] == list(range(len(ids))) and all(abs(float(x) - y) < 2e-5 for (_, x), y in zip(steps, kl)), f"{name}: a line a step", steps)
        check(run(*common, *extra, "-p", "full").stdout == full.stdout, "full")
    f = figures(works("--compare full", *common, "--compare"), "full_tokens")
    check(f["kl_max"] == 0 and f["agreement"] == 1 and f["first_difference"] == -1, "--compare -p full: no difference", f)
    r = works("--compare, all of it", *common, "-p", "h2o", "-r", "0.5", "--compare", "-m", "c.png", "--trace", "c", "--attention", "a.png", "--logits", "l")
    last = r.stderr.decode().splitlines()[-1]
    check(last.startswith("prompt_tokens ") and figures(r)["new_tokens"] == os.path.getsize(path("l")) / 4 / VOCAB, "--compare: the last line and --logits are the policy's")
    check(sum(e["event"] == "prompt" for e in read_trace("c")) == 1, "--compare: the trace is the policy's")
    path("text", "A red circle".encode())
    f = figures(works("--compare --force", *common, "-p", "h2o", "-r", "0.5", "--compare", "--force", "text"), "full_tokens")
    check(f["first_difference"] == -1 and f["kl_max"] > 0, "--compare --force: along a given text", f)


def test_others():
    two = [GREY, SHAPES, "-i", "<image> and <image> differ?", "-n", "6", "-p", "h2o", "-r", "0.5"]
    works("two pictures", *two, "-m", "two.png")
    check(read_png("two.png")[0] > 0, "two pictures: a PNG")
    works("pad", SHAPES, "-n", "2", "-p", "h2o", "-r", "0.5", "-m", "pad.png", "--image-mode", "pad")
    works("another extension", SHAPES, "-n", "2", "-m", "kept.jpg")
    check(read_png("kept.jpg")[0] > 0, "another extension: still a PNG")
    works("-B", *two, "-t", "1", "-s", "1", "-B", "3", "-m", "b.png", "--attention", "ba.png", "--trace", "b")
    events = read_trace("b")
    check({e["seq"] for e in events if e["event"] == "token"} == {0, 1, 2} and {e["seq"] for e in events if e["event"] == "drop"} == {0, 1, 2}, "-B: a trace of all answers")
    works("-B under fastv:mask", *two[:-4], "-p", "fastv:mask", "-r", "0.5", "-t", "1", "-s", "1", "-B", "2", "--trace", "b")
    read_trace("b")
    r = works("a chat", SHAPES, "-n", "4", "-c", "-p", "elastic", "-r", "0.5", "-m", "chat.png", "--trace", "chat", "--attention", "ca.png", input=b"And now?\nWhy?\n")
    events = read_trace("chat")
    first = [e["first"] for e in events if e["event"] == "prompt"]
    check(len(first) == 3 and first[0] == 0 < first[1] < first[2], "a chat: a prompt a turn", first)
    works("text alone", "-i", "Hello", "-n", "3", "--trace", "t", "--attention", "t.png", "--compare", "-p", "h2o", "-r", "0.3")
    for l in range(N_LAYERS):
        works("a layer", SHAPES, "-n", "1", "--attention", "one.png", "--attention-layer", l)
    check(read_png("one.png")[1] > 600, "one layer is drawn large")

    fails("-m without a picture", "-i", "x", "-m", "kept.png", says=["-m kept.png", "picture"])
    for option in "-m", "--trace", "--attention":
        fails(f"{option}: a path that cannot be written", SHAPES, "-n", "1", option, "nowhere/file", says=[option, "nowhere/file"])
        fails(f"{option}: a folder", SHAPES, "-n", "1", option, DIR, says=[option, DIR])
        if os.path.exists("/dev/full"):
            fails_full = run(SHAPES, "-n", "1", option, "/dev/full", leaks=True)
            check(fails_full.returncode == 1 and b"/dev/full" in fails_full.stderr, f"{option}: the disk is full", fails_full.stderr[:200])
    fails("--attention-layer alone", SHAPES, "-n", "1", "--attention-layer", "1", says=["--attention-layer 1"])
    fails("--attention-layer out of range", SHAPES, "-n", "1", "--attention", "x.png", "--attention-layer", N_LAYERS, says=[f"--attention-layer {N_LAYERS}", str(N_LAYERS - 1)])
    fails("--compare with -B", SHAPES, "--compare", "-B", "2", says=["--compare", "-B"])
    fails("--compare with -c", SHAPES, "--compare", "-c", says=["--compare", "-c"])


for policy in POLICIES:
    test_policy(policy, GREY)
for policy in "fastv", "lookm":
    test_policy(policy, SHAPES)
test_compare()
test_others()
FOLDER.cleanup()
finish()
