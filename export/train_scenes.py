"""The micro-LLaVA that ships with vlm.c: draws its pictures, trains it, measures it.

A LLaVA-type network of 1.5M parameters learns to describe rendered scenes: one to six coloured shapes in a 3 x 3 grid.
Pictures and texts are code, so nothing is downloaded, and two CPU cores train it in about an hour. It is small, but its
perplexity falls apart when the cache loses the picture, which makes it a test bed for KV-cache compression.

    python3 export/train_scenes.py train  --work scenes-train --out scenes-hf   # the tokenizer, four stages, export
    python3 export/train_scenes.py eval   scenes-hf                             # the table of models/README.md; exit 1 below a gate
    python3 export/train_scenes.py scenes models/scenes                         # 64 test scenes as PNG, JSON and TSV
    python3 export/train_scenes.py export --work scenes-train --out scenes-hf   # the newest checkpoint, once more

`train` may be interrupted at any time: started again with the same --work it goes on from its last checkpoint.
Needs torch, numpy, sentencepiece, safetensors and pillow.
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# ----------------------------------------------------------------------------
# random numbers: number k of a scene is a hash of (seed, k), so that C can draw the same
#
#     x  = seed + k * 0x9E3779B9                                        (mod 2^32, here and below)
#     x ^= x >> 16;  x *= 0x85ebca6b;  x ^= x >> 13;  x *= 0xc2b2ae35;  x ^= x >> 16
#     unit  = (x >> 8) / 2^24                                           in [0, 1)
#     below = ((x >> 8) * n) >> 24                                      in 0 .. n-1
#
# k       draws
# 0       the background (3)
# 1       the number of objects, less one (6)
# 2 + i   i = 0..5: swap cell i with cell i + below(9 - i) of the list 0..8; the first n of the list, sorted, are the cells
# 8 + 8i  object i in reading order: +0 shape (6), +1 colour (8), +2 size (2), +3 and +4 the jitter in x and y (unit)
# 64 ..   the training conversation, 512 .. the caption of a test, 1024 .. its questions: one after the other

def draw(seed, k):
    x = (seed + k * 0x9E3779B9) & 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x85EBCA6B & 0xFFFFFFFF
    x ^= x >> 13
    x = x * 0xC2B2AE35 & 0xFFFFFFFF
    return (x ^ x >> 16) >> 8


class Draws:
    """Draws of one scene, one after the other from index k."""

    def __init__(self, seed, k):
        self.seed, self.k = seed, k

    def unit(self):
        self.k += 1
        return draw(self.seed, self.k - 1) / 2**24

    def below(self, n):
        self.k += 1
        return draw(self.seed, self.k - 1) * n >> 24

    def pick(self, items):
        return items[self.below(len(items))]


VALIDATION, TEST, TRAIN = 0, 1000, 1_000_000         # first seeds: 1000 validation scenes, 1000 test scenes, no end of training scenes

# ----------------------------------------------------------------------------
# a scene, and its picture

SIDE = 112                                           # of the picture, pixels
PATCH = 14                                           # of the vision tower, pixels
CELL = SIDE / 3                                      # side of a grid cell, pixels
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50),
           "purple": (150, 60, 180), "orange": (240, 140, 30), "pink": (245, 150, 190), "brown": (130, 85, 45)}
SIZES = {"small": 0.25, "large": 0.36}               # radius in cell sides
BACKGROUNDS = {"white": 245, "gray": 150, "black": 20}
CELLS = ["top left", "top center", "top right", "middle left", "center", "middle right",
         "bottom left", "bottom center", "bottom right"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]

Object = namedtuple("Object", "cell size colour shape x y radius")     # cell 0..8; x, y, radius in pixels
Scene = namedtuple("Scene", "seed background objects")                 # objects in reading order


def make_scene(seed):
    def below(k, n):
        return draw(seed, k) * n >> 24

    def jitter(k):
        return (2 * draw(seed, k) / 2**24 - 1) * 0.12 * CELL

    background = list(BACKGROUNDS)[below(0, 3)]
    n = 1 + below(1, 6)
    cells = list(range(9))
    for i in range(n):
        j = i + below(2 + i, 9 - i)
        cells[i], cells[j] = cells[j], cells[i]
    objects = []
    for i, cell in enumerate(sorted(cells[:n])):
        k = 8 + 8 * i
        size = list(SIZES)[below(k + 2, 2)]
        objects.append(Object(cell, size, list(COLOURS)[below(k + 1, 8)], SHAPES[below(k, 6)],
                              (cell % 3 + 0.5) * CELL + jitter(k + 3), (cell // 3 + 0.5) * CELL + jitter(k + 4),
                              SIZES[size] * CELL))
    return Scene(seed, background, objects)


def distance(shape, X, Y, R):
    """Pixels from the edge, positive inside. X, Y: offsets from the centre, y down."""
    if shape == "circle":
        return R - np.sqrt(X * X + Y * Y)
    if shape == "square":
        return 0.85 * R - np.maximum(abs(X), abs(Y))
    if shape == "triangle":
        return np.minimum(0.8 * R - Y, 0.447 * (Y + R) - 0.894 * abs(X))
    if shape == "diamond":
        return 0.7 * (R - abs(X) - abs(Y))
    if shape == "cross":
        return np.maximum(np.minimum(0.3 * R - abs(X), R - abs(Y)), np.minimum(0.3 * R - abs(Y), R - abs(X)))
    return 0.25 * R - abs(np.sqrt(X * X + Y * Y) - 0.72 * R)           # ring


def render(scene):
    """(SIDE, SIDE, 3) bytes. All in double; pixel (0, 0) has its centre at (0.5, 0.5)."""
    image = np.full((SIDE, SIDE, 3), float(BACKGROUNDS[scene.background]))
    for o in scene.objects:
        reach = int(o.radius) + 2                                      # no pixel farther off is covered
        x0, y0 = max(0, int(o.x) - reach), max(0, int(o.y) - reach)
        part = image[y0:y0 + 2 * reach + 1, x0:x0 + 2 * reach + 1]
        Y = np.arange(y0, y0 + part.shape[0])[:, None] + 0.5 - o.y
        X = np.arange(x0, x0 + part.shape[1])[None, :] + 0.5 - o.x
        cover = np.clip(distance(o.shape, X, Y, o.radius) + 0.5, 0, 1)[:, :, None]
        part += cover * (np.array(COLOURS[o.colour]) - part)
    return image.astype(np.uint8)                                      # truncates


# ----------------------------------------------------------------------------
# what is said of a scene
#
# A caption leaves two things free, its style (3) and the pair that the third sentence compares: 2.4 nats together, in about
# 70 tokens, so the best possible perplexity is about 1.036.

INSTRUCTIONS = ["Describe the image in detail.", "Describe this image.", "What is shown in this image?", "What do you see?"]
QUESTIONS = {"count": 0.10, "count_shape": 0.15, "cell": 0.40, "yes_no": 0.25, "background": 0.10}    # type: its share
DRILL = {"count": 0.05, "count_shape": 0.30, "cell": 0.15, "yes_no": 0.45, "background": 0.05}       # the same in stage 2


def a(words):
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(shape, n):
    return shape if n == 1 else shape + ("es" if shape.endswith("s") else "s")


def name(o):
    return f"{o.size} {o.colour} {o.shape}"


def caption(scene, rng, style=None):
    if style is None:
        style = rng.below(3)
    objects, n = scene.objects, len(scene.objects)
    shapes, are = f"{NUMBERS[n]} {plural('shape', n)}", "is" if n == 1 else "are"
    text = [[f"The image shows {shapes} on a {scene.background} background.",
             f"There {are} {shapes} on a {scene.background} background.",
             f"On a {scene.background} background there {are} {shapes}."][style]]
    for o in objects:
        text.append([f"A {name(o)} is in the {CELLS[o.cell]}.",
                     f"In the {CELLS[o.cell]} there is a {name(o)}.",
                     f"The {CELLS[o.cell]} holds a {name(o)}."][style])
    if n > 1:
        i, j = rng.pick([(i, j) for j in range(n) for i in range(j)])
        relation = "above" if objects[i].cell // 3 != objects[j].cell // 3 else "to the left of"
        text.append(f"The {name(objects[i])} is {relation} the {name(objects[j])}.")
    count = Counter(o.shape for o in objects)
    parts = [f"{NUMBERS[count[s]]} {plural(s, count[s])}" for s in sorted(count)]
    listed = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    text.append(f"In total there {'is' if count[min(count)] == 1 else 'are'} {listed}.")
    return " ".join(text)


CAPTION_OBJECT = re.compile(
    "|".join([r"A (?P<s0>\w+) (?P<c0>\w+) (?P<h0>\w+) is in the (?P<p0>[\w ]+)\.",
              r"In the (?P<p1>[\w ]+) there is a (?P<s1>\w+) (?P<c1>\w+) (?P<h1>\w+)\.",
              r"The (?P<p2>[\w ]+) holds a (?P<s2>\w+) (?P<c2>\w+) (?P<h2>\w+)\."]))


def parse_caption(text):
    """The set of (cell, size, colour, shape) that a caption of any style claims."""
    found = set()
    for m in CAPTION_OBJECT.finditer(text):
        style = next(k for k in "012" if m["p" + k])
        found.add(tuple(m[part + style] for part in "psch"))
    return found


def scene_objects(scene):
    return {(CELLS[o.cell], o.size, o.colour, o.shape) for o in scene.objects}


def question(scene, rng, kind=None, shares=QUESTIONS):
    """(question, answer, type). Yes and no are equally likely; half of the shapes counted are in the picture."""
    if kind is None:
        u = rng.unit()
        kind = next(k for i, k in enumerate(shares) if u < sum(list(shares.values())[:i + 1]) or k == "background")
    objects = scene.objects
    if kind == "count":
        return "How many shapes are there?", NUMBERS[len(objects)].capitalize(), kind
    if kind == "count_shape":
        shape = rng.pick(objects).shape if rng.below(2) else rng.pick(SHAPES)
        return f"How many {plural(shape, 2)} are there?", NUMBERS[sum(o.shape == shape for o in objects)].capitalize(), kind
    if kind == "cell":
        o = rng.pick(objects)
        return f"What is in the {CELLS[o.cell]}?", f"A {name(o)}", kind
    if kind == "yes_no":
        present = {(o.colour, o.shape) for o in objects}
        if rng.below(2):
            o = rng.pick(objects)
            return f"Is there {a(o.colour)} {o.shape}?", "Yes", kind
        colour, shape = rng.pick([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present])
        return f"Is there {a(colour)} {shape}?", "No", kind
    return "What colour is the background?", scene.background.capitalize(), kind


def conversation(scene):
    """[(question, answer)]: a caption, left out of 22.5 % of them, and up to three questions."""
    rng = Draws(scene.seed, 64)
    n_questions = rng.below(4)
    turns = []
    if n_questions == 0 or rng.unit() >= 0.3:
        turns.append((rng.pick(INSTRUCTIONS), caption(scene, rng)))
    for _ in range(n_questions):
        turn = question(scene, rng)[:2]
        if turn not in turns:
            turns.append(turn)
    return turns


def drill(scene):
    """[(question, answer)]: up to six questions, mostly of the types learnt last; before a quarter of them a caption."""
    rng = Draws(scene.seed, 64)
    turns = []
    if rng.below(4) == 0:
        turns.append((rng.pick(INSTRUCTIONS), caption(scene, rng)))
    for _ in range(6):
        turn = question(scene, rng, shares=DRILL)[:2]
        if turn not in turns:
            turns.append(turn)
    return turns


def mixture(scene):
    """Stage 3's: three scenes in four as in stage 1, the fourth as in stage 2."""
    return conversation(scene) if scene.seed % 4 else drill(scene)


def test_caption(scene):
    """(instruction, caption), the same at every call."""
    rng = Draws(scene.seed, 512)
    return rng.pick(INSTRUCTIONS), caption(scene, rng)


def test_references(scene):
    """The caption of test_caption in each of the three styles, with the same pair."""
    return [caption(scene, Draws(scene.seed, 514), style) for style in range(3)]


def test_questions(scene):
    """One (question, answer, type) of each type, the same at every call."""
    rng = Draws(scene.seed, 1024)
    return [question(scene, rng, kind) for kind in QUESTIONS]


# ----------------------------------------------------------------------------
# the tokenizer, and what a conversation looks like in its ids
#
#     <s>USER: <image>\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>
#
# As in the llava-hf checkpoints the text is cut at <image> and </s>, and every piece is encoded by itself and so begins with a
# "▁" of its own. Training encodes question and answer in one piece; while generating, the prompt ends with "ASSISTANT:". Both
# give the same ids, because no token reaches over a space from the left.

BOS, EOS, IMAGE, PAD = 1, 2, 512, 513
N_PIECES, VOCAB = 512, 576                           # what the tokenizer knows; rows of the tables, a multiple of 64 as in LLaVA


def train_tokenizer(path):
    import sentencepiece as spm
    lines = []
    for seed in range(TRAIN, TRAIN + 20_000):
        for q, answer in conversation(make_scene(seed)):
            lines.append(f"USER: {q} ASSISTANT: {answer}")
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=N_PIECES, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        character_coverage=1.0, allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1, minloglevel=1)
    write(path, model.getvalue())


def load_tokenizer(path):
    import sentencepiece as spm
    if not os.path.exists(path):
        fail(f"{path}: no such file", "`train` writes it first of all")
    return spm.SentencePieceProcessor(model_file=path)


def image_ids(tok):
    """What every conversation begins with: the picture takes the place of its id, once a patch."""
    return [BOS] + tok.encode("USER: ") + [IMAGE] * N_PATCHES


def prompt(q, first=True):
    return f"\n{q} ASSISTANT:" if first else f"USER: {q} ASSISTANT:"


def conversation_ids(tok, turns):
    """ids, and for each whether it is learnt: answers and the </s> after them are."""
    ids = image_ids(tok)
    learnt = [False] * len(ids)
    for i, (q, reply) in enumerate(turns):
        asked = tok.encode(prompt(q, i == 0))
        whole = tok.encode(prompt(q, i == 0) + " " + reply)
        if whole[:len(asked)] != asked:
            fail(f"the ids of the question {q!r} are not the beginning of those with its answer", "train the tokenizer anew")
        ids += whole + [EOS]
        learnt += [False] * len(asked) + [True] * (len(whole) - len(asked) + 1)
    return ids, learnt


# ----------------------------------------------------------------------------
# the network: CLIP, two linear layers, LLaMA; parameters are named as in the llava-hf checkpoints

N_PATCHES = (SIDE // PATCH) ** 2                     # 64
V_DIM, V_HIDDEN, V_LAYERS, V_HEADS = 96, 384, 4, 3   # the last vision layer is never run, as in LLaVA: it stays at its init
DIM, HIDDEN, LAYERS, HEADS = 128, 352, 4, 4
HEAD_DIM = DIM // HEADS
MAX_POSITIONS, NORM_EPS, THETA = 512, 1e-5, 10000.0
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)       # of CLIP's pictures
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PIXEL = (((np.arange(256) * 0.00392156862745098).astype(np.float32)[None] - MEAN[:, None]) / STD[:, None])    # (3, 256)


def pixel_values(images):
    """(B, SIDE, SIDE, 3) bytes to (B, 3, SIDE, SIDE) floats, as CLIPImageProcessor makes them."""
    return torch.from_numpy(np.stack([PIXEL[c][images[..., c]] for c in range(3)], axis=1))


class VisionLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(V_DIM, NORM_EPS)
        self.self_attn = nn.ModuleDict({p: nn.Linear(V_DIM, V_DIM) for p in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.layer_norm2 = nn.LayerNorm(V_DIM, NORM_EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(V_DIM, V_HIDDEN), "fc2": nn.Linear(V_HIDDEN, V_DIM)})

    def forward(self, x):                            # (B, 1 + N_PATCHES, V_DIM)
        B, T, _ = x.shape
        h = self.layer_norm1(x)
        q, k, v = (self.self_attn[p](h).view(B, T, V_HEADS, -1).transpose(1, 2) for p in ("q_proj", "k_proj", "v_proj"))
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, V_DIM)
        x = x + self.self_attn["out_proj"](o)
        u = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](u * torch.sigmoid(1.702 * u))       # quick_gelu


class DecoderLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(DIM, NORM_EPS)
        self.self_attn = nn.ModuleDict({p: nn.Linear(DIM, DIM, bias=False) for p in ("q_proj", "k_proj", "v_proj", "o_proj")})
        self.post_attention_layernorm = nn.RMSNorm(DIM, NORM_EPS)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(DIM, HIDDEN, bias=False), "up_proj": nn.Linear(DIM, HIDDEN, bias=False),
                                  "down_proj": nn.Linear(HIDDEN, DIM, bias=False)})

    def forward(self, x, cos, sin, past):            # x: (B, T, DIM); past: None or [keys, values] so far, each (B, HEADS, t, HEAD_DIM)
        B, T, _ = x.shape
        h = self.input_layernorm(x)
        q, k, v = (self.self_attn[p](h).view(B, T, HEADS, HEAD_DIM).transpose(1, 2) for p in ("q_proj", "k_proj", "v_proj"))
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past[:] = [k, v]
        o = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1).transpose(1, 2).reshape(B, T, DIM)
        x = x + self.self_attn["o_proj"](o)
        h = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h))


def rope(x, cos, sin):                               # pairs (i, i + HEAD_DIM/2)
    half = HEAD_DIM // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def tree(**parts):
    """A module that is only a name with parts below it."""
    m = nn.Module()
    for key, part in parts.items():
        setattr(m, key, part)
    return m


class Llava(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision_tower = tree(vision_model=tree(
            embeddings=tree(class_embedding=nn.Parameter(torch.zeros(V_DIM)),
                            patch_embedding=nn.Conv2d(3, V_DIM, PATCH, PATCH, bias=False),
                            position_embedding=nn.Embedding(1 + N_PATCHES, V_DIM)),
            pre_layrnorm=nn.LayerNorm(V_DIM, NORM_EPS),                # HF's spelling
            encoder=tree(layers=nn.ModuleList(VisionLayer() for _ in range(V_LAYERS))),
            post_layernorm=nn.LayerNorm(V_DIM, NORM_EPS)))             # LLaVA does not use it
        self.multi_modal_projector = tree(linear_1=nn.Linear(V_DIM, DIM), linear_2=nn.Linear(DIM, DIM))
        self.language_model = tree(
            model=tree(embed_tokens=nn.Embedding(VOCAB, DIM), layers=nn.ModuleList(DecoderLayer() for _ in range(LAYERS)),
                       norm=nn.RMSNorm(DIM, NORM_EPS)),
            lm_head=nn.Linear(DIM, VOCAB, bias=False))
        inv = torch.tensor([THETA ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)])
        angle = torch.arange(MAX_POSITIONS).float()[:, None] * inv[None].repeat(1, 2)
        self.cos, self.sin = angle.cos(), angle.sin()                  # (MAX_POSITIONS, HEAD_DIM)
        generator = torch.Generator().manual_seed(1)
        for key, p in self.named_parameters():
            if p.dim() > 1 or "class_embedding" in key:
                small = "embed" in key                                 # tables, the patch convolution, positions
                p.data.normal_(0, 0.02 if small else 0.8 / math.sqrt(p[0].numel()), generator=generator)
            elif key.endswith("bias"):
                p.data.zero_()

    def see(self, pixels):
        """The tapped hidden state -2 without CLS, (B, N_PATCHES, V_DIM)."""
        vision, g = self.vision_tower.vision_model, SIDE // PATCH
        e = vision.embeddings
        patches = pixels.view(-1, 3, g, PATCH, g, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), N_PATCHES, -1)
        x = patches @ e.patch_embedding.weight.flatten(1).T
        x = torch.cat([e.class_embedding.expand(len(x), 1, -1), x], 1) + e.position_embedding.weight
        x = vision.pre_layrnorm(x)
        for layer in vision.encoder.layers[:-1]:
            x = layer(x)
        return x[:, 1:]

    def project(self, features):
        p = self.multi_modal_projector
        return p.linear_2(F.gelu(p.linear_1(features)))

    def read(self, ids, image_rows=None, past=None):
        """Last hidden state after the final norm, (B, T, DIM). ids: (B, T); image_rows: (B, N_PATCHES, DIM) for the <image> ids."""
        lm = self.language_model.model
        x = lm.embed_tokens(ids)
        if image_rows is not None:                   # the prompt's head is the same for all: the picture is at the same place
            at = (ids[0] == IMAGE).nonzero()[0].item()
            x = torch.cat([x[:, :at], image_rows, x[:, at + N_PATCHES:]], 1)
        t = past[0][0].shape[2] if past and past[0] else 0
        cos, sin = self.cos[t:t + ids.shape[1]], self.sin[t:t + ids.shape[1]]
        for i, layer in enumerate(lm.layers):
            x = layer(x, cos, sin, past[i] if past is not None else None)
        return lm.norm(x)

    def logits(self, x):
        return F.linear(x, self.language_model.lm_head.weight[:N_PIECES])      # the rows above stay untrained: nobody may pick them


# ----------------------------------------------------------------------------
# batches

def patch_labels(scene):
    """(N_PATCHES, 4): shape, colour, size (the last class of each: none), background.

    A patch shows the object whose centre is within radius + 0.4 patches of its own; the nearest, if two are.
    """
    labels = np.empty((N_PATCHES, 4), np.int64)
    labels[:] = [len(SHAPES), len(COLOURS), len(SIZES), list(BACKGROUNDS).index(scene.background)]
    centre = np.arange(SIDE // PATCH) * PATCH + PATCH / 2
    x, y = np.tile(centre, len(centre)), np.repeat(centre, len(centre))
    nearest = np.full(N_PATCHES, np.inf)
    for o in scene.objects:
        far = np.hypot(x - o.x, y - o.y)
        hit = (far < o.radius + 0.4 * PATCH) & (far < nearest)
        nearest[hit] = far[hit]
        labels[hit, :3] = [SHAPES.index(o.shape), list(COLOURS).index(o.colour), list(SIZES).index(o.size)]
    return labels


def cell_labels(scene):
    """(9, 3): shape, colour, size of what every cell holds (the last class of each: nothing)."""
    labels = np.empty((len(CELLS), 3), np.int64)
    labels[:] = [len(SHAPES), len(COLOURS), len(SIZES)]
    for o in scene.objects:
        labels[o.cell] = [SHAPES.index(o.shape), list(COLOURS).index(o.colour), list(SIZES).index(o.size)]
    return labels


def pictures(scenes):
    return pixel_values(np.stack([render(s) for s in scenes]))


def pad_batch(rows):
    """[(ids, learnt)] to ids (B, T) and targets (B, T): the next id where it is learnt, else -100. Padding stands at the end."""
    T = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), T), EOS)
    targets = torch.full((len(rows), T), -100)
    for b, (row, learnt) in enumerate(rows):
        row = torch.tensor(row)
        ids[b, :len(row)] = row
        targets[b, :len(row) - 1] = torch.where(torch.tensor(learnt[1:]), row[1:], -100)
    return ids, targets


def batches(tok, talk, step, batch, first_seed):
    """Batches of talk(scene) from number `step` on. Eight at a time are sorted by length, cut and shuffled: little padding, little bias.

    Yields pixels, ids, targets, the patches' labels, the cells' labels (-100 all of them where the first turn asks for no caption).
    """
    while True:
        group = step // 8
        seeds = range(first_seed + group * 8 * batch, first_seed + (group + 1) * 8 * batch)
        scenes = [make_scene(s) for s in seeds]
        talks = [talk(s) for s in scenes]
        rows = [conversation_ids(tok, turns) for turns in talks]
        cells = [cell_labels(s) if turns[0][0] in INSTRUCTIONS else np.full((len(CELLS), 3), -100) for s, turns in zip(scenes, talks)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        parts = [order[i:i + batch] for i in range(0, len(order), batch)]
        np.random.default_rng(group).shuffle(parts)
        for part in parts[step % 8:]:
            chosen = [scenes[i] for i in part]
            ids, targets = pad_batch([rows[i] for i in part])
            yield (pictures(chosen), ids, targets, torch.from_numpy(np.stack([patch_labels(s) for s in chosen])),
                   torch.from_numpy(np.stack([cells[i] for i in part])))
        step = (group + 1) * 8


# ----------------------------------------------------------------------------
# training
#
# Stage 0 teaches the vision tower alone: a linear head on every patch's tapped feature names what the patch shows. It stands in
# for CLIP's pre-training; without it the decoder learns the grammar first and ignores the picture for very long. Stage 1 trains
# everything on answers, and keeps the loss of the patches (with a fresh head), or the shapes are forgotten again. Nine in ten of its
# answer tokens are captions, and after 190,000 conversations yes-or-no questions are still guessed: stage 2 asks mostly those.
#
# Stage 3 is there for FastV, which ranks the image rows by what the prompt's last row gives them in the second layer. Nothing so far asks
# more of that row than the caption's first word, and to prune by it was worse than by lot. Now its attention gets a task: from what
# it brings together in that layer, a linear head that is thrown away afterwards names what every cell of the grid holds.

STAGE0_STEPS, STAGE0_BATCH = 1500, 64
BATCH, PATCH_LOSS, LOOK_LOSS, LOOK_LAYER = 32, 0.3, 0.1, 1
LEARNING_RATE, WEIGHT_DECAY = [2e-3, 2e-3, 1e-3, 5e-4], 0.05      # by stage
PATCH_CLASSES = [len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1, len(BACKGROUNDS)]


class Stage:
    """What one stage trains and where it stands: the network, the patches' head, the optimiser, the schedule."""

    def __init__(self, number, steps, warmup, floor, model):
        self.number, self.steps, self.warmup, self.floor, self.step, self.model = number, steps, warmup, floor, 0, model
        n_parts = 4 if number == 0 else 3            # the later stages have no use for the background
        self.classes = PATCH_CLASSES[:n_parts]
        torch.manual_seed(2 + number)
        self.head = nn.Linear(V_DIM, sum(self.classes))
        heads = [self.head]
        if number == 3:
            self.looker = nn.Linear(DIM, len(CELLS) * sum(PATCH_CLASSES[:3]))
            model.language_model.model.layers[LOOK_LAYER].self_attn["o_proj"].register_forward_pre_hook(self.keep_attention)
            heads.append(self.looker)
        params = [p for head in heads for p in head.parameters()] + [p for key, p in model.named_parameters() if number > 0 or "vision" in key]
        self.params = params
        self.optimizer = torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                                            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}],
                                           lr=0.0, betas=(0.9, 0.98), fused=True)

    def patch_loss(self, features, labels):
        loss, right = 0.0, []
        for i, scores in enumerate(self.head(features).split(self.classes, -1)):
            weight = torch.ones(self.classes[i])
            if i < 3:
                weight[-1] = 0.25                    # most patches show nothing
            part = F.cross_entropy(scores.flatten(0, 1), labels[..., i].flatten(), weight)
            loss = loss + (part if i < 3 else 0.1 * part)
            shown = labels[..., i] < (self.classes[i] - 1 if i < 3 else self.classes[i])
            right.append((scores.argmax(-1) == labels[..., i])[shown].float().mean().item())
        return loss, right                           # right: of the patches that show an object, by part

    def keep_attention(self, module, inputs):
        self.attention = inputs[0]                   # (B, T, DIM): what every row's attention brought together, head by head

    def look_loss(self, targets, cells):
        """Of the row that predicts the first answer's first token; zero where no conversation of the batch begins with a caption."""
        last = (targets >= 0).float().argmax(1)
        scores = self.looker(self.attention[torch.arange(len(targets)), last]).view(len(targets), len(CELLS), -1)
        loss = torch.zeros(())
        for i, part in enumerate(scores.split(PATCH_CLASSES[:3], -1)):
            weight = torch.ones(PATCH_CLASSES[i])
            weight[-1] = 0.25                        # as for the patches: most cells are empty
            if (cells >= 0).any():
                loss = loss + F.cross_entropy(part.flatten(0, 1), cells[..., i].flatten(), weight)
        return loss

    def update(self, loss):
        rate = min(1, (self.step + 1) / self.warmup)
        if self.step >= self.warmup:
            t = (self.step - self.warmup) / max(1, self.steps - self.warmup)
            rate = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1, t)))
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE[self.number] * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.step += 1

    def save(self, work):
        state = {"stage": self.number, "step": self.step, "steps": self.steps, "model": self.model.state_dict(),
                 "head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.number == 3:
            state["looker"] = self.looker.state_dict()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write(os.path.join(work, "checkpoint.pt"), buffer.getvalue())

    def load(self, state):
        if state["steps"] != self.steps:
            fail(f"stage {self.number} was begun with {state['steps']} steps, not {self.steps}", "give the same numbers, or another --work")
        self.step = state["step"]
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.number == 3:
            self.looker.load_state_dict(state["looker"])


def train(args):
    os.makedirs(args.work, exist_ok=True)
    torch.set_num_threads(args.threads)
    spm_path = os.path.join(args.work, "tokenizer.model")
    if not os.path.exists(spm_path):
        say("tokenizer: from 20,000 conversations")
        train_tokenizer(spm_path)
    tok = load_tokenizer(spm_path)
    model = Llava()
    state = load_checkpoint(args.work)
    if state:
        model.load_state_dict(state["model"])
        say(f"going on from stage {state['stage']}, step {state['step']}")
    elif args.early:
        export(model, spm_path, args.early)

    if not state or state["stage"] == 0:
        stage = Stage(0, args.stage0_steps, 100, 0.05, model)
        if state:
            stage.load(state)
        train_stage0(stage, args)
        state = None
    first_seed, head = TRAIN + STAGE0_STEPS * STAGE0_BATCH, None
    for number, talk, conversations, warmup in (1, conversation, args.samples, 200), (2, drill, args.drill, 100), (3, mixture, args.look, 100):
        stage = Stage(number, math.ceil(conversations / BATCH), warmup, 0.03, model)
        if head:                                     # the patches' head goes on from stage to stage
            stage.head.load_state_dict(head.state_dict())
        if not state or state["stage"] <= number:
            if state and state["stage"] == number:
                stage.load(state)
            train_answers(stage, tok, talk, first_seed, spm_path, args)
            state, head = None, stage.head
        first_seed += stage.steps * BATCH + 8 * BATCH
    export(model, spm_path, args.out)
    say(f"written: {args.out}; now: python3 export/train_scenes.py eval {args.out}")


def train_stage0(stage, args):
    began, first = time.time(), stage.step
    while stage.step < stage.steps:
        seeds = range(TRAIN + stage.step * STAGE0_BATCH, TRAIN + (stage.step + 1) * STAGE0_BATCH)
        scenes = [make_scene(s) for s in seeds]
        labels = torch.from_numpy(np.stack([patch_labels(s) for s in scenes]))
        loss, right = stage.patch_loss(stage.model.see(pictures(scenes)), labels)
        stage.update(loss)
        if stage.step % 50 == 0:
            say("stage 0  step {}/{}  loss {:.3f}  shape {:.2f} colour {:.2f} size {:.2f} background {:.2f}  {:.0f} ms/step".format(
                stage.step, stage.steps, loss.item(), *right, 1000 * (time.time() - began) / (stage.step - first)))
        if stage.step % 500 == 0:
            stage.save(args.work)


def train_answers(stage, tok, talk, first_seed, spm_path, args):
    model = stage.model
    began, first, sums = time.time(), stage.step, []
    feed = batches(tok, talk, stage.step, BATCH, first_seed)
    while stage.step < stage.steps:
        pixels, ids, targets, labels, cells = next(feed)
        features = model.see(pixels)
        x = model.read(ids, model.project(features))
        learnt = targets >= 0
        answer_loss = F.cross_entropy(model.logits(x[learnt]), targets[learnt])
        patch_loss, right = stage.patch_loss(features, labels)
        look_loss = stage.look_loss(targets, cells) if stage.number == 3 else torch.zeros(())
        stage.update(answer_loss + PATCH_LOSS * patch_loss + LOOK_LOSS * look_loss)
        sums.append((answer_loss.item(), patch_loss.item(), look_loss.item(), *right))
        if stage.step % 50 == 0:
            ms = 1000 * (time.time() - began) / (stage.step - first)
            say("stage {}  step {}/{}  answers {:.4f}  patches {:.3f}  look {:.3f}  shape {:.2f} colour {:.2f} size {:.2f}  {:.0f} ms/step  {:.0f} min left"
                .format(stage.number, stage.step, stage.steps, *np.mean(sums, 0), ms, ms * (stage.steps - stage.step) / 60000))
            sums = []
        if stage.step % 250 == 0 or stage.step == stage.steps:
            stage.save(args.work)
        if stage.step % (1000 if stage.number == 1 else 250) == 0 or stage.step == stage.steps:
            right_ppl, wrong_ppl = perplexity(model, tok, VALIDATION, 128)
            say(f"stage {stage.number}  {stage.step * BATCH} samples  validation captions: perplexity {right_ppl:.4f}, "
                f"with a wrong picture {wrong_ppl:.2f}; questions: "
                + ", ".join(f"{kind} {asked_right(model, tok, VALIDATION, 100, kind):.2f}" for kind in QUESTIONS))
            if args.early:
                export(model, spm_path, args.early)


def load_checkpoint(work):
    path = os.path.join(work, "checkpoint.pt")
    return torch.load(path, weights_only=True) if os.path.exists(path) else None


# ----------------------------------------------------------------------------
# measuring

@torch.no_grad()
def perplexity(model, tok, first_seed, n, batch=32):
    """Of the answer tokens of n captions: with their picture, and with the picture of the next scene."""
    scenes = [make_scene(s) for s in range(first_seed, first_seed + n)]
    rows = [conversation_ids(tok, [test_caption(s)]) for s in scenes]
    order = sorted(range(n), key=lambda i: len(rows[i][0]))
    nll, n_tokens = [0.0, 0.0], 0
    for part in (order[i:i + batch] for i in range(0, n, batch)):
        ids, targets = pad_batch([rows[i] for i in part])
        learnt = targets >= 0
        n_tokens += learnt.sum().item()
        for wrong in (0, 1):
            seen = model.project(model.see(pictures([scenes[(i + wrong) % n] for i in part])))
            x = model.read(ids, seen)
            nll[wrong] += F.cross_entropy(model.logits(x[learnt]), targets[learnt], reduction="sum").item()
    return math.exp(nll[0] / n_tokens), math.exp(nll[1] / n_tokens)


@torch.no_grad()
def answer(model, tok, scenes, questions, most=160, batch=50):
    """Greedy answers, one a scene. Prompts of one length go together, so nothing is padded."""
    prompts = [image_ids(tok) + tok.encode(prompt(q)) for q in questions]
    answers = [None] * len(scenes)
    by_length = {}
    for i, p in enumerate(prompts):
        by_length.setdefault(len(p), []).append(i)
    for same in by_length.values():
        for part in (same[i:i + batch] for i in range(0, len(same), batch)):
            past = [[] for _ in range(LAYERS)]
            ids = torch.tensor([prompts[i] for i in part])
            x = model.read(ids, model.project(model.see(pictures([scenes[i] for i in part]))), past)
            out = []
            ended = torch.zeros(len(part), dtype=torch.bool)
            while True:
                best = model.logits(x[:, -1]).argmax(-1)
                out.append(best)
                ended |= best == EOS
                if ended.all() or len(out) == most:
                    break
                x = model.read(best[:, None], past=past)
            for i, row in zip(part, torch.stack(out, 1).tolist()):
                answers[i] = tok.decode(row[:row.index(EOS)] if EOS in row else row).strip()
    return answers


def asked_right(model, tok, first_seed, n, kind):
    """The share of n scenes of which a question of this type is answered word for word."""
    scenes = [make_scene(s) for s in range(first_seed, first_seed + n)]
    asked = [test_questions(s)[list(QUESTIONS).index(kind)] for s in scenes]
    answers = answer(model, tok, scenes, [q for q, _, _ in asked], most=16)
    return sum(got == true for got, (_, true, _) in zip(answers, asked)) / n


def evaluate(args):
    """The gates of a usable checkpoint: below them the metrics of compression are noise."""
    torch.set_num_threads(args.threads)
    model = load_hf(args.dir)
    tok = load_tokenizer(os.path.join(args.dir, "tokenizer.model"))
    table = []                                       # what, value, gate, passed

    right, wrong = perplexity(model, tok, VALIDATION, args.captions)
    table.append((f"perplexity of {args.captions} validation captions", f"{right:.4f}", "<= 1.06", right <= 1.06))
    table.append(("    with another scene's picture", f"{wrong:.2f}", ">= 8", wrong >= 8))

    scenes = [make_scene(s) for s in range(TEST, TEST + args.scenes)]
    captions = answer(model, tok, scenes, [test_caption(s)[0] for s in scenes])
    hits = claimed = there = exact = 0
    for scene, text in zip(scenes, captions):
        found, true = parse_caption(text), scene_objects(scene)
        hits, claimed, there = hits + len(found & true), claimed + len(found), there + len(true)
        exact += text in all_captions(scene)
    f1 = 2 * hits / max(1, claimed + there)
    table.append((f"objects of {args.scenes} greedy test captions, F1", f"{f1:.3f}", ">= 0.95", f1 >= 0.95))
    table.append(("    captions without any mistake", f"{exact / len(scenes):.3f}", "", True))

    for kind in QUESTIONS:
        share = asked_right(model, tok, TEST, args.questions, kind)
        gate = 0.5 if kind == "count_shape" else 0.9
        table.append((f"{args.questions} questions: {kind}", f"{share:.3f}", f">= {gate}", share >= gate))

    print(f"{'':48} {'value':>8}  gate")
    for what, value, gate, passed in table:
        print(f"{what:48} {value:>8}  {gate:8} {'' if passed else 'FAILED'}")
    sys.exit(0 if all(row[3] for row in table) else 1)


def all_captions(scene):
    """Every right caption of a scene: each style with each pair."""
    class Pair:                                      # stands in for the draws and picks pair number k
        def __init__(self, k):
            self.k = k

        def pick(self, items):
            return items[self.k]

    n_pairs = max(1, len(scene.objects) * (len(scene.objects) - 1) // 2)
    return {caption(scene, Pair(k), style) for style in range(3) for k in range(n_pairs)}


# ----------------------------------------------------------------------------
# files

def export(model, spm_path, out):
    """A folder as Hugging Face's LlavaForConditionalGeneration has it, put in place when it is whole."""
    from safetensors.torch import save
    new = out.rstrip("/") + ".new"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    tensors = {key: p.detach().clone().contiguous() for key, p in model.state_dict().items()}
    write(os.path.join(new, "model.safetensors"), save(tensors, metadata={"format": "pt"}))
    shutil.copy(spm_path, os.path.join(new, "tokenizer.model"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    names = {0: "<unk>", 1: "<s>", 2: "</s>", IMAGE: "<image>", PAD: "<pad>"}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    for file, content in {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "float32",
            "image_token_index": IMAGE, "pad_token_id": PAD, "ignore_index": -100, "projector_hidden_act": "gelu",
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_seq_length": N_PATCHES,
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "llama", "vocab_size": VOCAB, "hidden_size": DIM, "intermediate_size": HIDDEN,
                "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
                "max_position_embeddings": MAX_POSITIONS, "rms_norm_eps": NORM_EPS, "rope_theta": THETA, "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
                "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "torch_dtype": "float32"},
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": V_DIM, "intermediate_size": V_HIDDEN,
                "num_hidden_layers": V_LAYERS, "num_attention_heads": V_HEADS, "num_channels": 3, "image_size": SIDE,
                "patch_size": PATCH, "hidden_act": "quick_gelu", "layer_norm_eps": NORM_EPS, "projection_dim": V_DIM,
                "vocab_size": N_PIECES}},
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": SIDE}, "resample": 3,
            "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE},
            "do_rescale": True, "rescale_factor": 0.00392156862745098, "do_normalize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]},
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": PATCH,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
        "tokenizer_config.json": {                   # legacy: a "▁" before every piece of text, also behind a special token
            "tokenizer_class": "LlamaTokenizer", "processor_class": "LlavaProcessor", "legacy": True, "add_bos_token": True,
            "add_eos_token": False, "add_prefix_space": True, "clean_up_tokenization_spaces": False,
            "model_max_length": MAX_POSITIONS, "padding_side": "left", **special,
            "added_tokens_decoder": {str(i): {"content": s, **flags} for i, s in names.items()}},
        "special_tokens_map.json": special,
        "added_tokens.json": {"<image>": IMAGE, "<pad>": PAD},
        "generation_config.json": {"_from_model_config": True, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD},
    }.items():
        write(os.path.join(new, file), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    old = out.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(out):
        os.rename(out, old)
    os.rename(new, out)
    shutil.rmtree(old, ignore_errors=True)


def load_hf(path):
    from safetensors.torch import load_file
    file = os.path.join(path, "model.safetensors")
    if not os.path.exists(file):
        fail(f"{file}: no such file", "give the folder that `train` or `export` wrote")
    model = Llava()
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as e:
        fail(f"{file}: not the network of this file: {e}", "eval reads what `train` writes, not other LLaVA models")
    return model.eval()


def export_command(args):
    state = load_checkpoint(args.work)
    if not state:
        fail(f"{args.work}: no checkpoint.pt", "run `train` first, with the same --work")
    model = Llava()
    model.load_state_dict(state["model"])
    export(model, os.path.join(args.work, "tokenizer.model"), args.out)
    say(f"stage {state['stage']}, step {state['step']} of {state['steps']} written to {args.out}")


def write_scenes(args):
    """PNG pictures, scenes.json with everything, and two tables that C reads without a JSON parser."""
    from PIL import Image
    os.makedirs(args.dir, exist_ok=True)
    everything, captions, others, questions = [], [], [], []
    for seed in range(TEST, TEST + args.n):
        scene, file = make_scene(seed), f"{seed}.png"
        buffer = io.BytesIO()
        Image.fromarray(render(scene)).save(buffer, "PNG", optimize=True)
        write(os.path.join(args.dir, file), buffer.getvalue())
        instruction, text = test_caption(scene)
        asked = test_questions(scene)
        everything.append({
            "image": file, "seed": seed, "background": scene.background,
            "objects": [{"cell": CELLS[o.cell], "size": o.size, "colour": o.colour, "shape": o.shape,
                         "x": round(o.x, 3), "y": round(o.y, 3), "radius": round(o.radius, 3)} for o in scene.objects],
            "instruction": instruction, "caption": text, "references": test_references(scene),
            "questions": [{"question": q, "answer": reply, "type": kind} for q, reply, kind in asked]})
        captions.append("\t".join([file, instruction, text]))
        others += ["\t".join([file, instruction, one]) for one in test_references(scene) if one != text]
        questions += ["\t".join([file, *one]) for one in asked]
    for file, lines in {"captions.tsv": captions + others, "questions.tsv": questions}.items():
        write(os.path.join(args.dir, file), ("\n".join(lines) + "\n").encode())
    lines = ",\n".join(json.dumps(scene) for scene in everything)
    write(os.path.join(args.dir, "scenes.json"), f"[\n{lines}\n]\n".encode())
    say(f"{args.n} scenes written to {args.dir}")


def write(path, data):
    """All of the file or none of it."""
    with open(path + ".tmp", "wb") as f:
        f.write(data)
    os.replace(path + ".tmp", path)


def say(text):
    print(time.strftime("%H:%M:%S ") + text, flush=True)


def fail(what, hint):
    sys.exit(f"train_scenes: {what}\nHINT: {hint}")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)

    c = commands.add_parser("train", help="make the tokenizer, train all stages, export", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c.add_argument("--work", default="scenes-train", help="folder for the tokenizer and checkpoints")
    c.add_argument("--out", default="scenes-hf", help="folder for the result, in Hugging Face's format")
    c.add_argument("--samples", type=int, default=190_016, help="conversations of stage 1")
    c.add_argument("--drill", type=int, default=48_000, help="conversations of stage 2")
    c.add_argument("--look", type=int, default=32_000, help="conversations of stage 3")
    c.add_argument("--stage0-steps", type=int, default=STAGE0_STEPS, help="steps of stage 0, for trials")
    c.add_argument("--early", help="folder to export unfinished networks to, from the first one on")
    c.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads; 1 where other programs compute too: threads that wait for each other lose more than they gain")
    c.set_defaults(run=train)

    c = commands.add_parser("export", help="write the newest checkpoint in Hugging Face's format", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c.add_argument("--work", default="scenes-train", help="folder of `train`")
    c.add_argument("--out", default="scenes-hf", help="folder for the result")
    c.set_defaults(run=export_command)

    c = commands.add_parser("eval", help="measure an exported network; exit 1 where it misses a gate", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c.add_argument("dir", help="folder that `train` or `export` wrote")
    c.add_argument("--captions", type=int, default=500, help="validation captions for the perplexity, at most 1000")
    c.add_argument("--scenes", type=int, default=200, help="test scenes to caption, at most 1000")
    c.add_argument("--questions", type=int, default=300, help="test questions a type, at most 1000")
    c.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    c.set_defaults(run=evaluate)

    c = commands.add_parser("scenes", help="write test scenes as PNG, JSON and TSV", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    c.add_argument("dir", help="folder to write to")
    c.add_argument("-n", type=int, default=64, help="how many, at most 1000")
    c.set_defaults(run=write_scenes)

    args = p.parse_args()
    try:
        args.run(args)
    except KeyboardInterrupt:
        sys.exit("\ntrain_scenes: stopped; `train` goes on from its last checkpoint when it is started again")


if __name__ == "__main__":
    main()
