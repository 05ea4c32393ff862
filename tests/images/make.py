"""make.py: writes the pictures that tests/test_image.c reads.

    python3 tests/images/make.py          needs Pillow and numpy; the files are in the repository, so nobody has to

PNG files come from a writer of our own, so that every colour type, depth, filter and interlacing occurs; their samples
follow a formula that test_image.c knows too. JPEG files come from Pillow, and beside each stands what Pillow reads from
it (`x.jpg` and `x.jpg.png`; the flavours that hold the same coefficients as 420.jpg or grey.jpg have none of their own).
"""
import os
import struct
import zlib

import numpy as np
from PIL import Image

HERE = os.path.dirname(os.path.abspath(__file__))
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]  # x, y, step x, step y
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
NAME = {0: "grey", 2: "rgb", 3: "palette", 4: "greya", 6: "rgba"}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sample(x, y, c, depth):
    """The formula: picture A of the resize vectors in its upper bits; 16 bits add a lower byte that decoding drops."""
    v = (37 * x + 91 * y + 53 * c + 11 * x * y) % 256
    return v * 256 + (7 * x + 3 * y) % 256 if depth == 16 else v >> (8 - depth)


def palette(n):
    return bytes(v % 256 for i in range(n) for v in (5 * i + 1, 3 * i + 2, 255 - i))


def pack(row, depth):
    if depth == 16:
        return b"".join(struct.pack(">H", v) for v in row)
    bits = "".join(format(v, "0%db" % depth) for v in row)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i:i + 8], 2) for i in range(0, len(bits), 8))


def paeth(a, b, c):
    p = a + b - c
    pa, pb, pc = abs(p - a), abs(p - b), abs(p - c)
    return a if pa <= pb and pa <= pc else b if pb <= pc else c


def filtered(rows, bpp):
    """The rows with filters 0, 1, 2, 3, 4, 0, … in turn, starting with 4: the first row has synthetic neighbours."""
    out, above = b"", bytes(len(rows[0]))
    for i, row in enumerate(rows):
        kind = (4, 3, 1, 2, 0)[i % 5]
        line = bytearray()
        for k, v in enumerate(row):
            a = row[k - bpp] if k >= bpp else 0
            c = above[k - bpp] if k >= bpp else 0
            b = above[k]
            line.append((v - (0, a, b, (a + b) // 2, paeth(a, b, c))[kind]) % 256)
        out += bytes([kind]) + bytes(line)
        above = row
    return out


def png(name, w, h, color, depth, interlaced=False, extra=b"", n_palette=None, data=None):
    passes = ADAM7 if interlaced else [(0, 0, 1, 1)]
    if data is None:
        data = b""
        for x0, y0, dx, dy in passes:
            rows = [pack([sample(x, y, c, depth) for x in range(x0, w, dx) for c in range(CHANNELS[color])], depth)
                    for y in range(y0, h, dy)]
            if rows and rows[0]:
                data += filtered(rows, max(1, CHANNELS[color] * depth // 8))
    packed = zlib.compress(data, 9)
    cut = len(packed) // 2                      # two IDAT chunks: they must be joined
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, color, 0, 0, interlaced))
    if color == 3:
        body += chunk(b"PLTE", palette(n_palette or 1 << depth))
    body += extra + chunk(b"tEXt", b"Comment\0a test") + chunk(b"IDAT", packed[:cut]) + chunk(b"IDAT", packed[cut:]) + chunk(b"IEND", b"")
    with open(os.path.join(HERE, name + ".png"), "wb") as f:
        f.write(b"\x89PNG\r\n\x1a\n" + body)


def make_png():
    for color, depths in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items():
        for depth in depths:
            for interlaced in (False, True):
                png("%s%d%s" % (NAME[color], depth, "i" if interlaced else ""), 13, 11, color, depth, interlaced)
    png("palette8t", 13, 11, 3, 8, extra=chunk(b"tRNS", bytes(range(100))))         # transparency: dropped
    png("rgb8t", 13, 11, 2, 8, extra=chunk(b"tRNS", struct.pack(">HHH", 0, 53, 106)))
    png("grey8t", 13, 11, 0, 8, extra=chunk(b"tRNS", struct.pack(">H", 0)))
    png("palette8short", 13, 11, 3, 8, n_palette=100)                               # samples of 100 and more: black
    png("rgb8-1x1", 1, 1, 2, 8)
    png("grey1i-5x5", 5, 5, 0, 1, True)                                             # Adam7 more than doubles its bytes
    png("grey1-large", 8000, 8000, 0, 1, data=b"\0" + b"\xaa" * 1000 + bytes(1001 * 7999))    # 64 megapixels: just allowed
    png("bad-bomb", 1, 1, 2, 8, data=bytes(1 << 20))                                # 1 MB of data for 1 pixel


def make_jpeg():
    y, x = np.mgrid[0:35, 0:45]
    smooth = np.stack([128 + 100 * np.sin(x / 7), 128 + 90 * np.cos(y / 5 + x / 20), 4 * x + y], 2).clip(0, 255).astype(np.uint8)
    rgb = Image.fromarray(smooth)
    flavours = {
        "444": dict(subsampling=0), "422": dict(subsampling=1), "420": dict(subsampling=2),
        "progressive": dict(progressive=True, subsampling=2), "restart": dict(restart_marker_blocks=2, subsampling=2),
        "optimized": dict(optimize=True, quality=30), "icc": dict(icc_profile=b"x" * 300, comment=b"a test", quality=80),
        "exif": dict(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),  # orientation 6: ignored
        "rgb": dict(keep_rgb=True, quality=90),
    }
    for name, options in flavours.items():
        rgb.save(os.path.join(HERE, name + ".jpg"), **options)
    rgb.convert("L").save(os.path.join(HERE, "grey.jpg"))
    rgb.convert("L").save(os.path.join(HERE, "grey-progressive.jpg"), progressive=True)
    rgb.crop((0, 0, 1, 1)).save(os.path.join(HERE, "1x1.jpg"))
    rgb.crop((0, 0, 17, 3)).save(os.path.join(HERE, "17x3.jpg"), progressive=True, restart_marker_blocks=1)
    for file in sorted(os.listdir(HERE)):
        if file.endswith(".jpg") and file not in ("progressive.jpg", "restart.jpg", "exif.jpg", "grey-progressive.jpg"):
            Image.open(os.path.join(HERE, file)).convert("RGB").save(os.path.join(HERE, file + ".png"), optimize=True)


if __name__ == "__main__":
    make_png()
    make_jpeg()
    print(sum(os.path.getsize(os.path.join(HERE, f)) for f in os.listdir(HERE)), "bytes")
