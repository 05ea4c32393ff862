#!/usr/bin/env python3
"""Holds include/image.h against Pillow: the same bytes from resize, crop, pad, normalisation, patches and PNG decoding.

    python3 tests/image_parity.py [N]         N random sizes for the resize (default 3000), N / 10 for each whole pipeline

With Pillow 13 or later its new order of the passes is asked for, and the old order is checked too, where both orders agree by
rule. JPEG: the worst difference is printed, and must stay small. Needs build/image_cli (`make build/image_cli`; or a path in
BUILD), Pillow and numpy.
"""
import io, os, random, struct, subprocess, sys, warnings
import numpy as np
import PIL
from PIL import Image

from counting import check, finish

HERE = os.path.dirname(os.path.abspath(__file__))
CLI = os.path.join(os.environ.get("BUILD", os.path.join(HERE, "..", "build")), "image_cli")
CROP, PAD, STRETCH, PILLOW13 = 0, 1, 2, 4
NEW = int(PIL.__version__.split(".")[0]) >= 13
FLAG = PILLOW13 if NEW else 0
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)



def ask(op, picture, a, b, mode, n_bytes):
    h, w = picture.shape[:2]
    cli.stdin.write(op + struct.pack("=5i", w, h, a, b, mode) + picture.tobytes())
    cli.stdin.flush()
    answer = cli.stdout.read(n_bytes)
    if len(answer) != n_bytes:
        sys.exit("image_cli ended early: %s" % cli.poll())
    return np.frombuffer(answer, np.uint8)


def decode(data):
    cli.stdin.write(b"f" + struct.pack("=5i", len(data), 0, 0, 0, 0) + data)
    cli.stdin.flush()
    w, h = struct.unpack("=2i", cli.stdout.read(8))
    if w == 0:
        return cli.stdout.read(h).decode()
    return np.frombuffer(cli.stdout.read(3 * w * h), np.uint8).reshape(h, w, 3)


def picture(w, h):
    """Noise, smooth, or noise of 0 and 255 (ringing beyond both ends)."""
    kind = random.randrange(3)
    if kind == 0:
        return rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    if kind == 1:
        return rng.integers(0, 2, (h, w, 3), dtype=np.uint8) * 255
    y, x = np.mgrid[0:h, 0:w]
    return np.stack([x * 3 + y, 128 + 127 * np.sin(x / 9 + y / 5), y * 255 // h], 2).astype(np.uint8)


def side(most):
    return random.choice((random.randint(1, 8), random.randint(1, most), random.randint(1, most)))


def new_order(w, h, to_w, to_h):
    return to_h < h and h - to_h > 2 * (w - to_w)


def test_resize(n):
    for _ in range(n):
        w, h, to_w, to_h = side(300), side(300), side(300), side(300)
        if random.random() < 0.1:
            to_w = w
        p = picture(w, h)
        want = np.asarray(Image.fromarray(p).resize((to_w, to_h), Image.BICUBIC)).ravel()
        got = ask(b"r", p, to_w, to_h, FLAG, 3 * to_w * to_h)
        check((got == want).all(), "resize %dx%d to %dx%d: %d bytes differ" % (w, h, to_w, to_h, (got != want).sum()))
        if not new_order(w, h, to_w, to_h):
            got = ask(b"r", p, to_w, to_h, 0, 3 * to_w * to_h)
        else:                                                # the old order: x, then y, as two resizes of Pillow
            im = Image.fromarray(p).resize((to_w, h), Image.BICUBIC).resize((to_w, to_h), Image.BICUBIC)
            want, got = np.asarray(im).ravel(), ask(b"r", p, to_w, to_h, 0, 3 * to_w * to_h)
        check((got == want).all(), "old order, %dx%d to %dx%d: %d bytes differ" % (w, h, to_w, to_h, (got != want).sum()))


def crop(im, size):
    """Hugging Face CLIPImageProcessor, the Pillow one: shortest edge, bicubic, center crop."""
    w, h = im.size
    short, long = min(w, h), max(w, h)
    long = int(size * long / short)
    im = im.resize((size, long) if w <= h else (long, size), Image.BICUBIC)
    left, top = (im.width - size) // 2, (im.height - size) // 2
    return im.crop((left, top, left + size, top + size))


def pad(im, size):
    """LLaVA's expand2square, then the above."""
    w, h = im.size
    if w != h:
        square = Image.new("RGB", (max(w, h), max(w, h)), tuple(int(255 * m) for m in (0.48145466, 0.4578275, 0.40821073)))
        square.paste(im, (0, (w - h) // 2) if w > h else ((h - w) // 2, 0))
        im = square
    return crop(im, size)


def normalized(p):
    v = (p.astype(np.float64) * (1 / 255)).astype(np.float32)
    return ((v - MEAN) / STD).transpose(2, 0, 1)


def test_pipelines(n):
    sizes = [(1, 1), (1, 500), (500, 1), (336, 336), (335, 337), (337, 335), (448, 448), (2000, 3), (3, 2000), (640, 480), (480, 640)]
    sizes += [(side(900), side(900)) for _ in range(n)]
    for w, h in sizes:
        p = picture(w, h)
        im = Image.fromarray(p)
        size, patch = random.choice(((336, 14), (112, 16), (448, 14), (28, 14), (64, 8)))
        if max(w, h) / min(w, h) > 60:                       # Pillow makes the whole long picture
            size, patch = 56, 14
        for mode, name, want in ((CROP, "crop", crop), (PAD, "pad", pad), (STRETCH, "stretch", lambda i, s: i.resize((s, s), Image.BICUBIC))):
            want = np.asarray(want(im, size))
            what = "%s of %dx%d to %d" % (name, w, h, size)
            got = ask(b"s", p, size, 0, mode | FLAG, 3 * size * size)
            check((got == want.ravel()).all(), what + ": %d bytes differ" % (got != want.ravel()).sum())
            chw = normalized(want)
            got = ask(b"n", p, size, 0, mode | FLAG, 12 * size * size).view(np.float32)
            check((got.view(np.uint32) == chw.ravel().view(np.uint32)).all(), what + ", normalised")
            g = size // patch
            rows = chw.reshape(3, g, patch, g, patch).transpose(1, 3, 0, 2, 4)
            got = ask(b"p", p, size, patch, mode | FLAG, 12 * size * size).view(np.float32)
            check((got == rows.ravel()).all(), what + ", in patches")


def difference(got, want, subsampling):
    """Worst level. stb_image mixes up two samples in the last but one column (odd widths: the last) of 4:2:2: left out."""
    if isinstance(got, str) or got.shape != want.shape:
        return 999
    n = want.shape[1] - (2 if subsampling == 1 and want.shape[1] > 2 else 0)
    return np.abs(got[:, :n].astype(int) - want[:, :n]).max()


def test_files():
    folder = os.path.join(HERE, "images")
    worst = 0
    for name in sorted(os.listdir(folder)):
        if not name.endswith((".png", ".jpg")) or name.startswith(("bad", "grey1-large", "palette8short")):
            continue
        path = os.path.join(folder, name)
        got = decode(open(path, "rb").read())
        im = Image.open(path)
        if im.mode == "I;16":                                # 16-bit grey: Pillow clips at 255, we take the upper byte
            want = np.repeat((np.asarray(im) >> 8).astype(np.uint8)[:, :, None], 3, 2)
        else:
            want = np.asarray(im.convert("RGB"))
        diff = difference(got, want, 1 if name == "422.jpg" else 0)
        if name.endswith(".jpg"):
            worst = max(worst, diff)
        check(diff <= (6 if name.endswith(".jpg") else 0), f"{name} differs by {diff}")
    for q in (30, 75, 95):                                   # and some of a usual size
        for sub in (0, 1, 2):
            p = picture(random.randint(50, 400), random.randint(50, 400))
            f = io.BytesIO()
            Image.fromarray(p).save(f, "jpeg", quality=q, subsampling=sub, progressive=random.random() < 0.5)
            got, want = decode(f.getvalue()), np.asarray(Image.open(f).convert("RGB"))
            diff = difference(got, want, sub)
            worst = max(worst, diff)
            check(diff <= 6, "jpeg quality %d subsampling %d differs by %d" % (q, sub, diff))
            for cut in (1, 2, 10, len(f.getvalue()) // 2):   # what Pillow calls truncated, we do
                data = f.getvalue()[:-cut]
                try:
                    Image.open(io.BytesIO(data)).convert("RGB")
                    pillow = True
                except OSError:
                    pillow = False
                check(pillow or isinstance(decode(data), str), "jpeg without its last %d bytes" % cut)
    print("jpeg: at most", worst, "levels from Pillow")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    random.seed(1)
    rng = np.random.default_rng(1)
    cli = subprocess.Popen([CLI], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    test_resize(n)
    test_pipelines(n // 10)
    test_files()
    cli.stdin.close()
    check(cli.wait() == 0, "image_cli's status")
    print("Pillow %s" % PIL.__version__)
    finish()
