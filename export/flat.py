"""flat.py: the flat model file (include/model.h has its layout byte by byte), and tensors out of published checkpoints.

    open_checkpoint(folder)     {name: Stored} of .safetensors or .bin files, one or many; nothing is read yet
    write(path, …)              a model file: header, fields, tokenizer, tensors converted and stacked on the way
    read(path)                  the same back as numpy arrays, checked; for tests and parity scripts

Weights pass through in pieces of a few megabytes, so a 26 GB checkpoint needs no 26 GB of memory. What a model's tensors
are called, and which of them it needs, is its own exporter's business (llava.py).
"""

import json
import math
import os
import shutil
import struct
import sys
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

MAGIC, VERSION = b"vlm.c\r\n\x1a", 1
HEADER = struct.Struct("<8s4I3Q16s")        # magic, version, n_fields, n_tensors, 0, tokenizer offset and bytes, file bytes, architecture
FIELD = struct.Struct("<40s2I8s8x")         # name, kind, 0, value
TENSOR = struct.Struct("<64s4I4Q16x")       # name, type, rows, cols, 0, offset, bytes, scale offset, scale bytes

F32, F16, BF16, Q8_0 = range(4)             # kernels.h
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "q8_0": Q8_0}
NUMPY = {F32: np.dtype("<f4"), F16: np.dtype("<f2"), BF16: np.dtype("<u2"), Q8_0: np.dtype("i1")}   # bf16: numpy has none, so its bits
STORED = {"F32": F32, "F16": F16, "BF16": BF16}     # what a checkpoint may hold, in safetensors' words
BLOCK = 32                                  # inputs that share one q8_0 scale
CHUNK = 1 << 20                             # weights converted at a time


stopped = 0                                 # the status to end with, once a signal has asked for it


def stop(number, _frame):
    """A signal's handler. write() looks at `stopped` too: Python drops what is raised while one of its own callbacks runs."""
    global stopped
    stopped = 128 + number
    sys.exit(stopped)


class ExportError(Exception):
    """What failed, on which file or value; hint: what to try."""

    def __init__(self, what, hint=None):
        super().__init__(what)
        self.hint = hint


def pad64(n):
    return (n + 63) & ~63


def row_bytes(kind, cols):
    return pad64(cols * NUMPY[kind].itemsize)


def scale_row_bytes(cols):
    return pad64(cols // BLOCK * 2)


# ----------------------------------------------------------------------------
# conversion: finite weights of one type into another, rounded to nearest, ties to even

def bf16_to_f32(bits):
    return (bits.astype("<u4") << 16).view("<f4")


def f32_to_bf16(x):
    u = x.view("<u4")
    return ((u + 0x7fff + ((u >> 16) & 1)) >> 16).astype("<u2")     # x is finite: no NaN here that the sum could wrap


def f32_to_q8_0(x):
    """int8 q and f16 scales: q = round(x / scale), scale = max|x| / 127 over 32 inputs, rounded to f16 before it divides."""
    b = x.reshape(-1, BLOCK)
    scale = (np.abs(b).max(axis=1) / np.float32(127)).astype("<f2")
    s = scale.astype("<f4")[:, None]
    q = np.divide(b, s, out=np.zeros_like(b), where=s > 0)          # a block of zeros (or nearly: scale < 2^-25) stays zero
    return np.clip(np.rint(q), -127, 127).astype("i1").reshape(x.shape), scale.reshape(len(x), -1)


EXPONENT = {F32: ("<u4", 0x7f800000), F16: ("<u2", 0x7c00), BF16: ("<u2", 0x7f80)}


def all_finite(x, kind):
    bits, mask = EXPONENT[kind]
    return x.size == 0 or (x.view(bits) & np.array(mask, bits)).max() != mask


def convert(x, have, want, what):
    """x: a contiguous array of type `have`. Returns it as `want`, and its scales (None unless q8_0). `what` is for messages."""
    if not all_finite(x, have):
        raise ExportError(f"{what}: holds an infinity or a NaN", "the checkpoint is damaged or its training diverged: download it again, or take an earlier one")
    if have == want:
        return x, None
    if have != F32:
        x = bf16_to_f32(x) if have == BF16 else x.astype("<f4")
    scale = None
    if want == F16:
        with np.errstate(over="ignore"):
            x = x.astype("<f2")
    elif want == BF16:
        x = f32_to_bf16(x)
    elif want == Q8_0:
        with np.errstate(over="ignore"):
            x, scale = f32_to_q8_0(x)
    if not all_finite(*((x, want) if scale is None else (scale, F16))):
        raise ExportError(f"{what}: a weight is too large for {list(TYPES)[want]}", "use --type bf16 or --type f32")
    return x, scale


def padded(x):
    """Rows of x as bytes, each padded with zeros to a multiple of 64."""
    b = np.ascontiguousarray(x).view("u1").reshape(len(x), -1)
    width = pad64(b.shape[1])
    if width == b.shape[1]:
        return b
    out = np.zeros((len(b), width), "u1")
    out[:, :b.shape[1]] = b
    return out


# ----------------------------------------------------------------------------
# checkpoints

class Stored:
    """One tensor of a checkpoint, still on disk."""

    def __init__(self, path, name, dtype, shape, load):
        self.what = f"{path}: {name}"
        self.dtype = dtype          # "F16"
        self.shape = tuple(shape)
        self.load = load            # (first element, how many) -> 1-d array; bf16 as its bits

    def rows(self, kind, cols):
        """The tensor as rows of `cols` weights of type `kind`, some at a time: (rows, cols), and their scales or None."""
        n, step = math.prod(self.shape) // cols, max(1, CHUNK // cols)
        for r in range(0, n, step):
            m = min(step, n - r)
            yield convert(self.load(r * cols, m * cols).reshape(m, cols), STORED[self.dtype], kind, self.what)


class Joined:
    """Vectors end to end, as one row."""

    def __init__(self, parts):
        self.parts = parts

    def rows(self, kind, cols):
        x = [x for p in self.parts for x, _ in p.rows(kind, 1)]
        yield np.concatenate(x).reshape(1, cols), None


BROKEN = "the file is truncated or damaged: download it again"
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}


def open_safetensors(path):
    """u64 header length, a JSON header {name: {dtype, shape, data_offsets}}, then the data that the offsets count from."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = 8 + int.from_bytes(f.read(8), "little")
        if start > size:
            raise ExportError(f"{path}: its header lies past the end of the file", BROKEN)
        try:
            header = json.loads(f.read(start - 8))
            header.pop("__metadata__", None)
            entries = [(name, e["dtype"], e["shape"], *e["data_offsets"]) for name, e in header.items()]
            for name, dtype, shape, begin, end in entries:
                if not isinstance(dtype, str) or not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
                    raise ValueError(f"the entry of {name}")
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ExportError(f"{path}: not a safetensors header: {e}", BROKEN)
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        if end < begin or dtype in SIZES and end - begin != math.prod(shape) * SIZES[dtype]:
            raise ExportError(f"{path}: {name}: {end - begin} bytes do not fit {dtype} {shape}", BROKEN)
        if start + end > size:
            raise ExportError(f"{path}: {name} lies past the end of the file ({size} bytes)", BROKEN)

        def load(first, n, offset=start + begin, dtype=dtype, name=name):
            numpy_type = NUMPY[STORED[dtype]]
            x = np.fromfile(path, numpy_type, n, offset=offset + first * numpy_type.itemsize)
            if len(x) != n:
                raise ExportError(f"{path}: {name}: the file ended while it was read", BROKEN)
            return x
        tensors[name] = Stored(path, name, dtype, shape, load)
    return tensors


def open_bin(path):
    """A PyTorch file: a pickle, which only PyTorch reads; weights_only keeps it from running code."""
    try:
        import torch
    except ImportError:
        raise ExportError(f"{path}: .bin files are read through PyTorch, which is not installed",
                          "pip install -r export/requirements-torch.txt, or get the checkpoint as .safetensors")
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:        # a file from before PyTorch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:          # pickle, zip and PyTorch errors of many kinds
        raise ExportError(f"{path}: PyTorch cannot read it: {str(e).splitlines()[0] if str(e) else type(e).__name__}", BROKEN)
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors = {}
    for name, t in state.items():
        if not isinstance(t, torch.Tensor):
            raise ExportError(f"{path}: {name} is no tensor", "give the folder of a checkpoint as it was published, not of a training run")

        def load(first, n, t=t):
            x = t.detach().reshape(-1)[first:first + n]
            return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy().view(NUMPY[STORED[names[t.dtype]]])
        tensors[name] = Stored(path, name, names.get(t.dtype, str(t.dtype)), t.shape, load)
    return tensors


def read_json(path):
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (OSError, ValueError) as e:
        raise ExportError(f"{path}: {getattr(e, 'strerror', None) or e}", "give the folder of a checkpoint with all the files that were published with it")
    if not isinstance(value, dict):
        raise ExportError(f"{path}: not a JSON object", BROKEN)
    return value


def open_checkpoint(folder):
    """{name: Stored} of all tensors in a checkpoint's folder: one file, or shards and an index; safetensors before .bin."""
    for stem, opener in (("model.safetensors", open_safetensors), ("pytorch_model.bin", open_bin)):
        index = os.path.join(folder, stem + ".index.json")
        if os.path.exists(index):
            shard_of = read_json(index).get("weight_map")
            if not isinstance(shard_of, dict):
                raise ExportError(f"{index}: has no weight_map", BROKEN)
            tensors = {}
            for shard in sorted(set(shard_of.values())):
                path = os.path.join(folder, shard)
                if not os.path.exists(path):
                    raise ExportError(f"{path}: missing, though {index} names it", "download the checkpoint again, with all its parts")
                tensors.update(opener(path))
            for name, shard in shard_of.items():
                if name not in tensors:
                    raise ExportError(f"{os.path.join(folder, shard)}: {name} is missing, though {index} names it", BROKEN)
            return tensors
        if os.path.exists(os.path.join(folder, stem)):
            return opener(os.path.join(folder, stem))
    raise ExportError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin (nor an index of their parts)",
                      "give the folder of a whole checkpoint; an adapter (LoRA) must be merged into its base model first")


# ----------------------------------------------------------------------------
# writing

class Tensor(NamedTuple):
    name: str
    kind: int               # F32 …
    rows: int
    cols: int
    parts: list             # what is stacked, top to bottom: objects with rows(kind, cols), as Stored has


def tokenizer_section(kind, pieces):
    """include/tokenizer.h. kind: 1 SentencePiece, 2 tiktoken. pieces: (bytes, score, type) in the order of their ids."""
    entries, end = [], 0
    for text, score, piece_type in pieces:
        end += len(text)
        entries.append(struct.pack("<fII", score, piece_type, end))
    return struct.pack("<4I", kind, len(pieces), end, 0) + b"".join(entries) + b"".join(p[0] for p in pieces)


def layout(arch, fields, tokenizer, tensors):
    """The bytes before the first tensor, and the length of the whole file."""
    tok_offset = pad64(HEADER.size + FIELD.size * len(fields) + TENSOR.size * len(tensors))
    first = end = pad64(tok_offset + len(tokenizer))
    directory = b""
    for t in tensors:
        offset, size = end, t.rows * row_bytes(t.kind, t.cols)
        scale_size = t.rows * scale_row_bytes(t.cols) if t.kind == Q8_0 else 0
        end += size + scale_size
        directory += TENSOR.pack(t.name.encode(), t.kind, t.rows, t.cols, 0, offset, size, offset + size if scale_size else 0, scale_size)
    head = HEADER.pack(MAGIC, VERSION, len(fields), len(tensors), 0, tok_offset, len(tokenizer), end, arch.encode())
    for name, v in fields.items():
        head += FIELD.pack(name.encode(), isinstance(v, float), 0, struct.pack("<d" if isinstance(v, float) else "<q", v))
    return (head + directory).ljust(tok_offset, b"\0") + tokenizer.ljust(first - tok_offset, b"\0"), end


def write(path, arch, fields, tokenizer, tensors):
    """A model file. fields: {name: int or float}; tokenizer: a section's bytes; tensors: [Tensor]. Returns the file's length.

    It is written under another name and renamed at the end: a file called `path` is a whole one, the old or the new.
    """
    head, size = layout(arch, fields, tokenizer, tensors)
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.path.isdir(folder):
        raise ExportError(f"{path}: {'is a folder' if os.path.isdir(path) else 'its folder does not exist'}", "give the path of the file to write: llava.bin")
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ExportError(f"{path}: the model takes {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB left", "free some space, or take a smaller --type")
    unfinished = f"{path}.{os.getpid()}.tmp"
    try:
        with open(unfinished, "wb") as f, tqdm(total=size, unit="B", unit_scale=True, disable=None, desc=os.path.basename(path)) as bar:
            bar.update(f.write(head))
            for t in tensors:
                n_rows, scales = 0, []
                for part in t.parts:
                    for x, scale in part.rows(t.kind, t.cols):
                        if stopped:
                            sys.exit(stopped)
                        bar.update(f.write(padded(x)))
                        n_rows += len(x)
                        if scale is not None:
                            scales.append(padded(scale))
                for scale in scales:
                    bar.update(f.write(scale))
                assert n_rows == t.rows, f"{t.name}: {n_rows} rows came, {t.rows} were announced"
            assert f.tell() == size, f"{f.tell()} bytes were written, {size} announced"
        if stopped:
            sys.exit(stopped)
        os.replace(unfinished, path)
    except OSError as e:
        raise ExportError(f"{unfinished}: {e.strerror or e}", "check the folder's permissions and free space")
    finally:                        # also after Ctrl-C
        if os.path.exists(unfinished):
            os.remove(unfinished)
    return size


# ----------------------------------------------------------------------------
# reading

def read(path):
    """A model file: .arch, .fields, .tokenizer [(bytes, score, type)], .tokenizer_kind, .types {name: F32 …}, .tensors {name: array}.

    Arrays are (rows, cols), mapped from the file: float32, float16, uint16 (the bits of bf16), or for q8_0 a pair: int8, and
    float16 scales (rows, cols / 32).
    """
    def need(ok, what):
        if not ok:
            raise ExportError(f"{path}: {what}", "export the checkpoint again")

    data = np.memmap(path, "u1", "r")
    need(len(data) >= HEADER.size, "too short for a model file")
    magic, version, n_fields, n_tensors, _, tok_offset, tok_bytes, size, arch = HEADER.unpack_from(data)
    need(magic == MAGIC and version == VERSION, "not a model file of this version")
    need(size == len(data), f"{len(data)} bytes, its header says {size}")
    need(HEADER.size + n_fields * FIELD.size + n_tensors * TENSOR.size <= tok_offset and tok_offset % 64 == 0, "the tokenizer overlaps the header")
    text = lambda b: b.rstrip(b"\0").decode()
    out = SimpleNamespace(arch=text(arch), fields={}, tokenizer=[], tensors={}, types={})
    at = HEADER.size
    for _ in range(n_fields):
        name, kind, _, value = FIELD.unpack_from(data, at)
        out.fields[text(name)] = struct.unpack("<d" if kind else "<q", value)[0]
        at += FIELD.size
    need(len(out.fields) == n_fields, "a field stands there twice")

    section = bytes(data[tok_offset:tok_offset + tok_bytes])
    out.tokenizer_kind, n, n_bytes, _ = struct.unpack_from("<4I", section)
    need(len(section) == 16 + 12 * n + n_bytes, "the tokenizer's size is wrong")
    texts, begin = section[16 + 12 * n:], 0
    for i in range(n):
        score, piece_type, end = struct.unpack_from("<fII", section, 16 + 12 * i)
        need(begin <= end <= n_bytes, f"piece {i} is broken")
        out.tokenizer.append((texts[begin:end], score, piece_type))
        begin = end

    used = tok_offset + tok_bytes

    def matrix(name, kind, rows, cols, offset, n_bytes):
        nonlocal used
        need(offset % 64 == 0 and offset >= used and offset + n_bytes <= size, f"{name}: overlaps, is not aligned, or lies past the end")
        need(kind in NUMPY and n_bytes == rows * row_bytes(kind, cols), f"{name}: {n_bytes} bytes do not fit ({rows}, {cols})")
        used = offset + n_bytes
        wide = data[offset:used].reshape(rows, -1)
        width = cols * NUMPY[kind].itemsize
        need(not wide[:, width:].any(), f"{name}: padding that is not zero")
        return wide.view(NUMPY[kind])[:, :cols]

    for _ in range(n_tensors):
        name, kind, rows, cols, _, offset, n_bytes, scale_offset, scale_bytes = TENSOR.unpack_from(data, at)
        name = text(name)
        need(name not in out.tensors, f"{name} stands there twice")
        x = matrix(name, kind, rows, cols, offset, n_bytes)
        out.tensors[name] = (x, matrix(name + " (scales)", F16, rows, cols // BLOCK, scale_offset, scale_bytes)) if kind == Q8_0 else x
        out.types[name] = kind
        at += TENSOR.size
    need(pad64(used) == size, "bytes at the end that belong to nothing")
    return out
