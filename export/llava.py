#!/usr/bin/env python3
"""llava.py: a LLaVA-1.5 checkpoint, as Hugging Face or its authors publish it, into one model file for ./llava.

    python3 export/llava.py llava-1.5-7b-hf llava-7b.bin
    python3 export/llava.py llava-v1.5-7b llava-7b.bin --clip clip-vit-large-patch14-336 --type q8_0

The first argument is the folder of the checkpoint. Any size of the architecture is taken: Llama decoder, CLIP vision tower,
two-layer projector; anything else that a config asks for is an error, as is a tensor that is missing, of another shape, or
unknown. Needs export/requirements.txt; for .bin checkpoints PyTorch too. flat.py holds the file formats.
"""

import argparse
import math
import os
import re
import signal
import struct
import sys

import numpy as np

import flat
from flat import F16, F32, Q8_0, ExportError, Tensor, read_json

TEMPLATES = ["vicuna_v1", "llava_v1", "hf", "chatml", "plain", "milebench", "raw"]     # llava.c's numbers
IMAGE_MODES = ["crop", "pad"]


# ----------------------------------------------------------------------------
# the config: a checkpoint's config.json into the fields of the model file

# What a sparse config leaves out: the defaults of transformers' LlamaConfig and CLIPVisionConfig.
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2}
CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "layer_norm_eps": 1e-5}
# Where a checkpoint has no vision config at all: its tower is the one that LLaVA-1.5 was trained with.
CLIP_L_336 = {**CLIP, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
              "image_size": 336, "patch_size": 14}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


class Config:
    """A JSON config with the defaults of its class; `where` names it in messages."""

    def __init__(self, where, values, defaults=None):
        self.where, self.values, self.defaults = where, values, defaults or {}

    def get(self, key, default=None):
        return self.values.get(key, self.defaults.get(key, default))

    def sub(self, key, defaults):
        values = self.values.get(key) or {}
        if not isinstance(values, dict):
            raise ExportError(f"{self.where}: {key} is {values!r}, expected an object", flat.BROKEN)
        return Config(f"{self.where}: {key}", values, defaults)

    def whole(self, key, default=None):
        v = self.get(key, default)
        if not isinstance(v, int) or isinstance(v, bool) or not 0 < v < 2**31:
            raise ExportError(f"{self.where}: {key} is {v!r}, expected a whole number above 0")
        return v

    def real(self, key):
        v = self.get(key)
        if isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 < v < math.inf:
            raise ExportError(f"{self.where}: {key} is {v!r}, expected a number above 0")
        return float(v)

    def allow(self, key, *allowed, default=None):
        """An option of which ./llava computes only some values: the first one unless given."""
        v = self.get(key, default)
        if v is None:
            v = allowed[0]
        if v not in allowed:
            raise ExportError(f"{self.where}: {key} is {v!r}, supported: {', '.join(map(repr, allowed))}", "./llava computes LLaVA-1.5 as it was published")
        return v


def decoder_fields(c):
    """The Llama decoder's part of the fields, from a Config of its own."""
    c.allow("hidden_act", "silu")
    for bias in ("attention_bias", "mlp_bias"):
        c.allow(bias, False)
    if c.get("sliding_window") is not None and c.get("use_sliding_window", True):
        raise ExportError(f"{c.where}: sliding_window is {c.get('sliding_window')!r}, not supported", "./llava attends to all tokens")
    for key in ("rope_scaling", "rope_parameters"):             # the second is what transformers 5 calls the first, theta included
        rope = c.get(key) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ExportError(f"{c.where}: {key} is {rope}, not supported", "./llava computes unscaled rotary positions")
        if "rope_theta" in rope:
            c = Config(c.where, {**c.values, "rope_theta": rope["rope_theta"]}, c.defaults)
    n_heads, dim = c.whole("num_attention_heads"), c.whole("hidden_size")
    n_kv_heads = c.whole("num_key_value_heads", n_heads) if c.get("num_key_value_heads") is not None else n_heads
    head_dim = c.whole("head_dim") if c.get("head_dim") is not None else dim // n_heads
    if n_heads % n_kv_heads or head_dim % 2 or c.get("head_dim") is None and dim % n_heads:
        raise ExportError(f"{c.where}: {n_heads} heads, {n_kv_heads} key-value heads and a hidden size of {dim} do not fit each other")
    eos = c.get("eos_token_id")
    if isinstance(eos, list):
        if len(eos) != 1:
            raise ExportError(f"{c.where}: eos_token_id is {eos}, expected one id", "leave the one in the config that ends an answer")
        eos = eos[0]
    return {"dim": dim, "hidden_dim": c.whole("intermediate_size"), "n_layers": c.whole("num_hidden_layers"), "n_heads": n_heads,
            "n_kv_heads": n_kv_heads, "head_dim": head_dim, "vocab_size": c.whole("vocab_size"),
            "max_positions": c.whole("max_position_embeddings"), "norm_eps": c.real("rms_norm_eps"), "rope_theta": c.real("rope_theta"),
            "bos_id": c.whole("bos_token_id"), "eos_id": Config(c.where, {"eos_token_id": eos}).whole("eos_token_id")}


def vision_fields(c, tap, tap_where):
    """The vision tower's part. tap: which hidden state goes on; 0 is what enters layer 0, negative ones count from the last."""
    c.allow("model_type", "clip_vision_model", "clip")
    c.allow("num_channels", 3)
    n_layers, heads = c.whole("num_hidden_layers"), c.whole("num_attention_heads")
    if not isinstance(tap, int) or isinstance(tap, bool):
        raise ExportError(f"{tap_where} is {tap!r}, supported is one layer", "./llava feeds one hidden state to the projector")
    layers = tap if tap >= 0 else n_layers + 1 + tap            # that run: hidden state i is the output of layer i - 1
    if not 1 <= layers <= n_layers:
        raise ExportError(f"{tap_where} is {tap}, but the vision tower has {n_layers} layers")
    if c.whole("hidden_size") % heads or c.whole("image_size") % c.whole("patch_size"):
        raise ExportError(f"{c.where}: {heads} heads do not divide {c.get('hidden_size')}, or patches of {c.get('patch_size')} an image of {c.get('image_size')}")
    return {"vision_dim": c.whole("hidden_size"), "vision_hidden_dim": c.whole("intermediate_size"), "vision_layers": layers,
            "vision_heads": heads, "image_size": c.whole("image_size"), "patch_size": c.whole("patch_size"),
            "vision_eps": c.real("layer_norm_eps"), "vision_act": ["gelu", "quick_gelu"].index(c.allow("hidden_act", "quick_gelu", "gelu"))}


def image_fields(folders, image_size):
    """Mean and std, and whether the checkpoint's processor crops or pads. The first folder with a processor's config counts."""
    c = Config("", {})
    for folder in folders:
        path = os.path.join(folder, "preprocessor_config.json")
        nested = os.path.join(folder, "processor_config.json")      # transformers 5 keeps it in here
        if os.path.exists(path):
            c = Config(path, read_json(path))
            break
        if os.path.exists(nested) and "image_processor" in read_json(nested):
            c = Config(nested, read_json(nested)["image_processor"])
            break
    c.allow("resample", 3)                                          # Pillow's number for bicubic
    for step in ("do_resize", "do_rescale", "do_normalize"):
        c.allow(step, True)
    c.allow("rescale_factor", 1 / 255, 0.00392156862745098)
    for key in ("crop_size", "size"):
        size = c.get(key)
        for side in size.values() if isinstance(size, dict) else [size]:
            if side not in (None, image_size):
                raise ExportError(f"{c.where}: {key} is {size}, but the vision tower takes images of {image_size}", "the folder mixes files of two checkpoints: download it again")
    mean, std = c.get("image_mean") or CLIP_MEAN, c.get("image_std") or CLIP_STD
    try:
        ok = len(mean) == len(std) == 3 and all(-1 <= m <= 2 and 0 < s <= 2 for m, s in zip(mean, std))     # of colours from 0 to 1
    except TypeError:
        ok = False
    if not ok:
        raise ExportError(f"{c.where}: image_mean {mean} and image_std {std}: expected three numbers each, for colours from 0 to 1")
    crops = c.get("do_center_crop", True) and not c.get("do_pad", False)
    return {"image_mode": IMAGE_MODES.index("crop" if crops else "pad"),
            **{f"image_mean_{i}": float(m) for i, m in enumerate(mean)}, **{f"image_std_{i}": float(s) for i, s in enumerate(std)}}


def llava_hf(folder, config):
    """Fields of a Hugging Face folder."""
    c = Config(os.path.join(folder, "config.json"), config)
    c.allow("model_type", "llava")
    c.allow("projector_hidden_act", "gelu")
    c.allow("multimodal_projector_bias", True)
    c.allow("vision_feature_select_strategy", "default")
    text = c.sub("text_config", LLAMA)
    text.allow("model_type", "llama")
    vision = c.sub("vision_config", CLIP if config.get("vision_config") else CLIP_L_336)
    fields = decoder_fields(text)
    fields.update(vision_fields(vision, c.get("vision_feature_layer", -2), f"{c.where}: vision_feature_layer"))
    fields["image_id"] = c.whole("image_token_index", c.get("image_token_id", 32000))
    fields["template"] = TEMPLATES.index("hf")
    fields.update(image_fields([folder], fields["image_size"]))
    return fields, bool(c.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False))


def llava_original(folder, config, clip):
    """Fields of a folder in the layout of LLaVA's authors; clip: the folder of its vision tower, None where that is inside."""
    c = Config(os.path.join(folder, "config.json"), config, LLAMA)
    c.allow("model_type", "llava", "llava_llama")
    c.allow("mm_projector_type", "mlp2x_gelu", default="linear")    # "linear" is LLaVA 1.0, and what a missing field means
    c.allow("mm_vision_select_feature", "patch")
    c.allow("mm_use_im_start_end", False)
    c.allow("mm_patch_merge_type", "flat")
    aspect = c.allow("image_aspect_ratio", "pad", "square")
    fields = decoder_fields(c)
    vision = Config(c.where, {}, CLIP_L_336)
    if clip and os.path.exists(os.path.join(clip, "config.json")):
        path = os.path.join(clip, "config.json")
        values = read_json(path)
        vision = Config(path, values.get("vision_config") or values, CLIP)      # CLIP with its text half, or the vision half alone
    elif clip:
        raise ExportError(f"{clip}: holds no config.json", "give the folder of openai/clip-vit-large-patch14-336, with its config.json and weights")
    fields.update(vision_fields(vision, c.get("mm_vision_select_layer", -2), f"{c.where}: mm_vision_select_layer"))
    fields["image_id"] = -1                                         # the prompt is cut at "<image>" before the tokenizer sees it
    fields["template"] = TEMPLATES.index("vicuna_v1")
    fields.update(image_fields([clip] if clip else [], fields["image_size"]))
    fields["image_mode"] = IMAGE_MODES.index("pad" if aspect == "pad" else "crop")
    return fields, bool(c.get("tie_word_embeddings", False))


# ----------------------------------------------------------------------------
# the tokenizer: SentencePiece's tokenizer.model, or Hugging Face's tokenizer.json with the same pieces

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6     # tokenizer.h
SPACE = "▁"                                     # U+2581, how SentencePiece writes a space
LLAMA_ONLY = "./llava has Llama's tokenizer; give a checkpoint that uses it"


def protobuf(b):
    """(field, value) of a protobuf message: ints, bytes, or the raw bytes of fixed32 and fixed64."""
    def varint(i):
        v = shift = 0
        while True:
            v |= (b[i] & 127) << shift
            shift += 7
            i += 1
            if b[i - 1] < 128:
                return v, i
    i = 0
    while i < len(b):
        key, i = varint(i)
        if key & 7 == 0:
            value, i = varint(i)
        else:
            n, i = varint(i) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], i)
            value, i = b[i:i + n], i + n
            if i > len(b):
                raise IndexError
        yield key >> 3, value


def sentencepiece_model(path):
    """[(bytes, score, type)] of a tokenizer.model; the numbers are those of sentencepiece_model.proto."""
    pieces, trainer, normalizer = [], {}, {}
    with open(path, "rb") as f:
        data = f.read()
    try:
        for field, value in protobuf(data):
            if field == 1:
                piece = dict(protobuf(value))
                pieces.append((piece[1], struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(protobuf(value))
            elif field == 3:
                normalizer = dict(protobuf(value))
    except (IndexError, KeyError, TypeError, struct.error):
        raise ExportError(f"{path}: not a SentencePiece model", flat.BROKEN)
    for ok, what in ((trainer.get(3, 1) == 2, "is not of the kind BPE"),
                     (trainer.get(35, 0) == 1, "has no byte fallback"),
                     (trainer.get(24, 0) == 0, "puts the space behind a word"),
                     (normalizer.get(1, b"") in (b"", b"identity") and not normalizer.get(2), "normalises text before it is split"),
                     (normalizer.get(3, 1) == 1, "does without the space in front of a text"),
                     (normalizer.get(4, 1) == 0, "removes repeated spaces"),
                     (normalizer.get(5, 1) == 1, "leaves spaces as they are")):
        if not ok:
            raise ExportError(f"{path}: {what}", LLAMA_ONLY)
    return pieces


def check_pieces(pieces, path):
    """What tokenizer.h demands of the pieces."""
    kinds = {kind for _, _, kind in pieces}
    normal = [text for text, _, kind in pieces if kind == NORMAL]
    for ok, what in ((kinds <= {NORMAL, UNKNOWN, CONTROL, BYTE}, "has user-defined or unused pieces"),
                     ({b"<0x%02X>" % i for i in range(256)} == {text for text, _, kind in pieces if kind == BYTE}, "lacks some of the 256 byte pieces"),
                     (all(text for text, _, _ in pieces) and len(set(normal)) == len(normal), "has a piece twice, or one without text")):
        if not ok:
            raise ExportError(f"{path}: {what}", LLAMA_ONLY)


def space_after_special(j):
    """What a tokenizer.json does with a text after a special token: puts a space in front (True), does not (False), or unlike Llama (None)."""
    normalizer, pre = j.get("normalizer") or {}, j.get("pre_tokenizer") or {}
    steps = [n.get("type") for n in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    if steps == ["Prepend", "Replace"] and not pre:
        return True
    if not steps and pre.get("type") == "Metaspace" and not pre.get("split"):
        return {"always": True, "first": False}.get(pre.get("prepend_scheme"))
    return None


def tokenizer_json(j, path):
    """[(bytes, score, type)] of a tokenizer.json, as the tokenizer.model with the same pieces has them.

    Here pairs merge in the order of a list; in SentencePiece, by the score of what they become. A Llama vocabulary's ids stand
    in merge order, its scores are -(id - 259), and pieces of nothing but spaces come last (-1e9): this is put back, after a
    check that the list says the same.
    """
    def need(ok, what):
        if not ok:
            raise ExportError(f"{path}: {what}", "./llava has Llama's tokenizer; put the checkpoint's tokenizer.model beside its other files")

    model = j.get("model") or {}
    need(model.get("type") == "BPE" and model.get("byte_fallback"), "not a BPE tokenizer with byte fallback")
    added = {t["content"] for t in j.get("added_tokens", [])}
    ids = dict(model["vocab"])
    texts = sorted(ids, key=ids.get)
    while texts and texts[-1] in added:                         # <image>, <pad>: some files list them here too
        del ids[texts.pop()]
    need([ids[t] for t in texts] == list(range(len(texts))), f"its ids are not 0 to {len(texts) - 1}")

    is_space = lambda t: not t.strip(SPACE)
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    made = list(dict.fromkeys(a + b for a, b in merges))        # what the merges make, in this order
    need(all(t in ids for t in made), "its merges make something that is no piece")
    n_words = sum(not is_space(t) for t in made)
    spaces_last = all(map(is_space, made[n_words:]))            # else they stand among the words, by id
    order = [ids[t] for t in (made[:n_words] if spaces_last else made)]
    need(order == sorted(order), "its merges do not stand in the order of the ids")
    listed = set(merges)
    for t in made:
        for k in range(1, len(t)):
            need(t[:k] not in ids or t[k:] not in ids or (t[:k], t[k:]) in listed, f"{t[:k]!r} and {t[k:]!r} do not merge, though {t!r} is a piece")

    pieces, first = [], None
    for i, t in enumerate(texts):
        kind = UNKNOWN if t == model.get("unk_token", "<unk>") else CONTROL if t in added else BYTE if re.fullmatch("<0x[0-9A-F]{2}>", t) else NORMAL
        if kind == NORMAL and first is None:
            first = i
        score = 0.0 if kind != NORMAL else -1e9 if spaces_last and is_space(t) else float(first - i)
        pieces.append((t.encode(), score, kind))
    return pieces


def read_tokenizer(folder, original):
    """([(bytes, score, type)], prefix_after_special): the pieces, and whether text after </s> gets a space in front.

    The second follows the tokenizer that the checkpoint's own code would take: LLaVA's authors load tokenizer.model, transformers
    tokenizer.json where there is one. Whoever reads tokenizer.model asks tokenizer_config.json ("legacy": yes).
    """
    model, fast, config = (os.path.join(folder, n) for n in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"))
    prefix = read_json(config).get("legacy") if os.path.exists(config) else None
    if prefix is None:
        prefix = not original
    if not os.path.exists(model) and not os.path.exists(fast):
        raise ExportError(f"{folder}: holds neither tokenizer.model nor tokenizer.json", "download one of them from where the checkpoint comes from")
    pieces = sentencepiece_model(model) if os.path.exists(model) else None
    if os.path.exists(fast) and not (original and pieces):
        j = read_json(fast)
        try:
            if not pieces:
                pieces = tokenizer_json(j, fast)
            elif any(j["model"]["vocab"].get(text.decode(errors="replace")) != i for i, (text, _, _) in enumerate(pieces)):
                raise ExportError(f"{fast}: its pieces are not those of {model}", "remove the one that does not belong to the checkpoint")
            after_special = space_after_special(j)
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ExportError(f"{fast}: not a tokenizer of the usual form: {type(e).__name__} {e}", flat.BROKEN)
        if not original and after_special is None:
            raise ExportError(f"{fast}: an unknown way to treat spaces", "./llava has Llama's tokenizer; remove this file to go by tokenizer.model")
        prefix = prefix if original else after_special
    check_pieces(pieces, model if os.path.exists(model) else fast)
    return pieces, int(prefix)


# ----------------------------------------------------------------------------
# the tensors: what the model file holds, and what that is called in a checkpoint

def model_tensors(f, kind):
    """[(name, type, rows, cols, sources)] in file order; sources: (name, shape) of what is stacked, in the words of `canonical`."""
    dim, vdim = f["dim"], f["vision_dim"]
    q, kv = f["n_heads"] * f["head_dim"], f["n_kv_heads"] * f["head_dim"]
    small = F16 if kind == Q8_0 else kind           # the embedding, the head and the projector are not quantised
    out = []

    def matrix(name, cols, *sources, kind=kind):
        if kind == Q8_0 and cols % flat.BLOCK:
            kind = F16
        out.append((name, kind, sum(shape[0] for _, shape in sources), cols, sources))

    def vector(name, n, *sources):
        out.append((name, F32, 1, n * len(sources), [(s, (n,)) for s in sources]))

    def norm(name, source):
        for ours, theirs in (("_w", ".weight"), ("_b", ".bias")):
            vector(name + ours, vdim, source + theirs)

    patch, n_patches = f["patch_size"], (f["image_size"] // f["patch_size"]) ** 2
    matrix("vision.patch", 3 * patch * patch, ("vision.embeddings.patch_embedding.weight", (vdim, 3, patch, patch)), kind=small)
    vector("vision.class", vdim, "vision.embeddings.class_embedding")
    matrix("vision.pos", vdim, ("vision.embeddings.position_embedding.weight", (1 + n_patches, vdim)), kind=F32)
    norm("vision.pre_norm", "vision.pre_layrnorm")  # sic
    hidden = f["vision_hidden_dim"]
    for i in range(f["vision_layers"]):
        to, src = f"vision.layers.{i}.", f"vision.encoder.layers.{i}."
        qkv = [f"{src}self_attn.{x}_proj" for x in "qkv"]
        norm(to + "norm1", src + "layer_norm1")
        matrix(to + "wqkv", vdim, *((s + ".weight", (vdim, vdim)) for s in qkv))
        vector(to + "bqkv", vdim, *(s + ".bias" for s in qkv))
        matrix(to + "wo", vdim, (src + "self_attn.out_proj.weight", (vdim, vdim)))
        vector(to + "bo", vdim, src + "self_attn.out_proj.bias")
        norm(to + "norm2", src + "layer_norm2")
        matrix(to + "w1", vdim, (src + "mlp.fc1.weight", (hidden, vdim)))
        vector(to + "b1", hidden, src + "mlp.fc1.bias")
        matrix(to + "w2", hidden, (src + "mlp.fc2.weight", (vdim, hidden)))
        vector(to + "b2", vdim, src + "mlp.fc2.bias")

    for i, cols in (1, vdim), (2, dim):
        matrix(f"projector.w{i}", cols, (f"projector.linear_{i}.weight", (dim, cols)), kind=small)
        vector(f"projector.b{i}", dim, f"projector.linear_{i}.bias")

    hidden = f["hidden_dim"]
    matrix("tok_emb", dim, ("decoder.embed_tokens.weight", (f["vocab_size"], dim)), kind=small)
    for i in range(f["n_layers"]):
        to, src = f"layers.{i}.", f"decoder.layers.{i}."
        vector(to + "att_norm", dim, src + "input_layernorm.weight")
        matrix(to + "wqkv", dim, *((f"{src}self_attn.{x}_proj.weight", (n, dim)) for x, n in (("q", q), ("k", kv), ("v", kv))))
        matrix(to + "wo", q, (src + "self_attn.o_proj.weight", (dim, q)))
        vector(to + "ffn_norm", dim, src + "post_attention_layernorm.weight")
        matrix(to + "w13", dim, *((f"{src}mlp.{x}_proj.weight", (hidden, dim)) for x in ("gate", "up")))
        matrix(to + "w2", hidden, (src + "mlp.down_proj.weight", (dim, hidden)))
    vector("norm", dim, "decoder.norm.weight")
    matrix("head", dim, ("head.weight", (f["vocab_size"], dim)), kind=small)
    return out


PREFIXES = [                                        # the first that fits; three layouts of file, and mixtures of them, are in use
    ("model.vision_tower.vision_tower.", "vision."),
    ("model.vision_tower.", "vision."),
    ("vision_tower.", "vision."),
    ("vision_model.", "vision."),                   # CLIP's own folder
    ("model.multi_modal_projector.", "projector."),
    ("multi_modal_projector.", "projector."),
    ("model.mm_projector.0.", "projector.linear_1."),
    ("model.mm_projector.2.", "projector.linear_2."),
    ("language_model.model.", "decoder."),
    ("model.language_model.", "decoder."),
    ("language_model.lm_head.", "head."),
    ("lm_head.", "head."),
    ("model.", "decoder."),
]
UNUSED = re.compile(r"decoder\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq|vision\.embeddings\.position_ids|vision\.post_layernorm\.(weight|bias)"
                    r"|(text_model|visual_projection|text_projection)\..*|logit_scale")    # the last ones: CLIP's text half


def canonical(name):
    """A checkpoint's name in one layout: vision.…, projector.…, decoder.…, head.weight; others are returned as they are."""
    for theirs, ours in PREFIXES:
        if name.startswith(theirs):
            name = ours + name[len(theirs):]
            break
    return "vision." + name[len("vision.vision_model."):] if name.startswith("vision.vision_model.") else name


def collect(tensors, stored, tied, where):
    """[flat.Tensor] of model_tensors' list. Every source must be there in its shape; what nobody asked for must be known as unused."""
    found = {}
    for name, s in stored.items():
        c = canonical(name)
        if c in found:
            raise ExportError(f"{s.what}: {found[c].what} is the same tensor under another name", "the folder mixes files of two checkpoints: download it again")
        found[c] = s
    if tied:
        found["head.weight"] = found.get("decoder.embed_tokens.weight")
    asked, out = set(), []
    for name, kind, rows, cols, sources in tensors:
        for source, shape in sources:
            s = found.get(source)
            if s is None:
                raise ExportError(f"{where}: has no tensor {source} (for {name})", "the checkpoint is not complete: download it again with all its parts")
            if s.shape != tuple(shape):
                raise ExportError(f"{s.what}: has the shape {list(s.shape)}, its config says {list(shape)}", "the folder mixes files of two checkpoints: download it again")
            if s.dtype not in flat.STORED:
                raise ExportError(f"{s.what}: is of type {s.dtype}, supported: {', '.join(flat.STORED)}", "give the unquantised checkpoint; --type q8_0 makes the model file small")
            asked.add(source)
        parts = [found[source] for source, _ in sources]
        out.append(Tensor(name, kind, rows, cols, [flat.Joined(parts)] if rows == 1 else parts))
    # The vision tower's layers after the one that is tapped never run. Those before it were all asked for; so was every decoder layer.
    running = max(int(m[1]) for m in (re.match(r"vision\.encoder\.layers\.(\d+)\.", a) for a in asked) if m) + 1
    for c in found.keys() - asked:
        layer = re.match(r"vision\.encoder\.layers\.(\d+)\.", c)
        if not UNUSED.fullmatch(c) and not (layer and int(layer[1]) >= running):
            raise ExportError(f"{found[c].what}: an unknown tensor, which a LLaVA-1.5 model does not have",
                              "it would be left out and the answers would be wrong: is this another architecture?")
    return out


# ----------------------------------------------------------------------------
# a folder, whole

def export(folder, kind, clip=None, template=None, image_mode=None):
    """(fields, tokenizer section, tensors) of a checkpoint's folder, ready for flat.write."""
    if not os.path.isdir(folder):
        raise ExportError(f"{folder}: not a folder", "give the folder of a downloaded checkpoint: config.json, tokenizer, weights")
    config = read_json(os.path.join(folder, "config.json"))
    original = "mm_vision_tower" in config or "mm_projector_type" in config
    stored = flat.open_checkpoint(folder)
    if original:
        inside = any(n.startswith("model.vision_tower.") for n in stored)
        named = config.get("mm_vision_tower")
        if inside and clip:
            raise ExportError(f"{folder}: holds a vision tower of its own, and --clip {clip} gives another", "leave --clip out")
        if not clip and isinstance(named, str):
            clip = next((d for d in (named, os.path.join(folder, named)) if os.path.isdir(d)), None)
        if not clip and not inside:
            raise ExportError(f"{folder}: the checkpoint comes without its vision tower ({named})", "download that too and give its folder: --clip DIR")
        fields, tied = llava_original(folder, config, clip)
        if not inside:
            tower = flat.open_checkpoint(clip)
            if "embeddings.class_embedding" in tower:           # the vision half alone, saved without a prefix
                tower = {"vision_model." + n: s for n, s in tower.items()}
            stored = {**stored, **tower}
    else:
        if clip:
            raise ExportError(f"--clip {clip}: {folder} holds its vision tower itself", "leave --clip out; it is for checkpoints of LLaVA's authors")
        fields, tied = llava_hf(folder, config)
    pieces, fields["prefix_after_special"] = read_tokenizer(folder, original)
    fields["n_pieces"] = len(pieces)
    if not max(fields["bos_id"], fields["eos_id"]) < len(pieces) <= fields["vocab_size"] or 0 <= fields["image_id"] < len(pieces):
        raise ExportError(f"{folder}: {len(pieces)} pieces of text, {fields['vocab_size']} rows of the embedding, and the ids of bos {fields['bos_id']}, "
                          f"eos {fields['eos_id']} and image {fields['image_id']} do not fit each other", "the folder mixes files of two checkpoints: download it again")
    override(fields, template, image_mode)
    return fields, flat.tokenizer_section(1, pieces), collect(model_tensors(fields, kind), stored, tied, folder)


def override(fields, template, image_mode):
    if template:
        fields["template"] = TEMPLATES.index(template)
    if image_mode:
        fields["image_mode"] = IMAGE_MODES.index(image_mode)


# ----------------------------------------------------------------------------
# --random: a model of the real size without a checkpoint, to measure speed and memory with. Its answers mean nothing.

class Pool:
    """Pseudo-random weights, uniform with deviation 0.02, converted once to each type. Matrices are windows of it: writing one
    costs no more than the disk does. The length is a prime of blocks, so that no two rows of a matrix begin at the same place."""
    BLOCKS = 131071

    def __init__(self):
        u = np.random.default_rng(1).random(self.BLOCKS * flat.BLOCK, "f4")
        self.weights = (u - np.float32(0.5)) * np.float32(0.02 * 12 ** 0.5)
        self.converted = {}

    def get(self, kind):
        """Weights and scales as `kind`, twice in a row: a window may run past the end."""
        if kind not in self.converted:
            x, scale = flat.convert(self.weights.reshape(self.BLOCKS, flat.BLOCK), F32, kind, "the pool")
            self.converted[kind] = np.tile(x.ravel(), 2), None if scale is None else np.tile(scale.ravel(), 2)
        return self.converted[kind]


class Window:
    """What flat.Stored is for a checkpoint."""

    def __init__(self, pool, start, rows, mean):
        self.pool, self.start, self.n, self.mean = pool, start, rows, mean

    def rows(self, kind, cols):
        x, scale = self.pool.get(kind)
        step = max(1, flat.CHUNK // cols)
        for r in range(0, self.n, step):
            m = min(step, self.n - r)
            at = (self.start * flat.BLOCK + r * cols) % (len(x) // 2)
            w = x[at:at + m * cols].reshape(m, cols)
            s = None if scale is None else scale[at // flat.BLOCK:(at + m * cols) // flat.BLOCK].reshape(m, -1)
            yield (w + np.float32(self.mean) if self.mean else w), s


def random_model(size, kind, n_layers=None, vision_layers=None, tokenizer=None):
    """As export(), for llava-1.5-7b-hf or -13b-hf."""
    text = {"rms_norm_eps": 1e-5, "vocab_size": 32064, "max_position_embeddings": 4096, "num_hidden_layers": n_layers or 32}
    if size == "llava-13b":
        text.update(hidden_size=5120, intermediate_size=13824, num_attention_heads=40, num_hidden_layers=n_layers or 40)
    fields = decoder_fields(Config(size, text, LLAMA))
    fields.update(vision_fields(Config(size, {"num_hidden_layers": (vision_layers or 23) + 1}, CLIP_L_336), -2, size))
    fields.update(image_fields([], 336), image_id=32000, template=TEMPLATES.index("hf"), prefix_after_special=1)
    if tokenizer:
        pieces = sentencepiece_model(tokenizer)
        check_pieces(pieces, tokenizer)
    else:                                                       # complete in bytes, and otherwise made of words nobody writes
        pieces = [(b"<unk>", 0.0, UNKNOWN), (b"<s>", 0.0, CONTROL), (b"</s>", 0.0, CONTROL)]
        pieces += [(b"<0x%02X>" % i, 0.0, BYTE) for i in range(256)]
        pieces += [(f"{SPACE}no{i}".encode(), 259.0 - i, NORMAL) for i in range(259, 32000)]
    fields["n_pieces"] = len(pieces)
    if len(pieces) > fields["image_id"]:
        raise ExportError(f"{tokenizer}: {len(pieces)} pieces, the model has room for {fields['image_id']}")
    pool, tensors = Pool(), []
    for i, (name, kind, rows, cols, _) in enumerate(model_tensors(fields, kind)):
        mean = 1 if re.search(r"norm\d?(_w)?$", name) else 0
        tensors.append(Tensor(name, kind, rows, cols, [Window(pool, i * 7919 % Pool.BLOCKS, rows, mean)]))
    return fields, flat.tokenizer_section(1, pieces), tensors


# ----------------------------------------------------------------------------
# the command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ExportError(message, "python3 export/llava.py --help")


def main(argv):
    p = Parser(prog="export/llava.py", formatter_class=argparse.RawDescriptionHelpFormatter, usage="export/llava.py CHECKPOINT OUT.bin [options]",
               description="Writes the model file of a LLaVA-1.5 checkpoint for ./llava.\n\n"
                           "example: python3 export/llava.py llava-1.5-7b-hf llava-7b.bin --type q8_0")
    p.add_argument("paths", nargs="*", metavar="CHECKPOINT OUT.bin", help="the checkpoint's folder, and the file to write")
    p.add_argument("--type", choices=flat.TYPES, default="f16", help="type of the matrices (f16); q8_0 is half of it, embedding, head and projector stay f16")
    p.add_argument("--clip", metavar="DIR", help="the vision tower's folder, for checkpoints of LLaVA's authors (the one that config.json names, if it exists)")
    p.add_argument("--template", choices=TEMPLATES, help="the prompt (hf; vicuna_v1 for checkpoints of LLaVA's authors)")
    p.add_argument("--image-mode", choices=IMAGE_MODES, help="how a picture is made square (what the checkpoint's own code does)")
    r = p.add_argument_group("without a checkpoint")
    r.add_argument("--random", choices=["llava-7b", "llava-13b"], help="random weights in the real size, to measure speed with: --random llava-7b OUT.bin")
    r.add_argument("--layers", type=int, metavar="N", help="decoder layers of it (32, 40)")
    r.add_argument("--vision-layers", type=int, metavar="N", help="vision layers of it that run (23)")
    r.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.model for it (pieces without meaning)")
    a = p.parse_intermixed_args(argv)
    if len(a.paths) != (1 if a.random else 2):
        p.error(f"expected {'OUT.bin' if a.random else 'CHECKPOINT and OUT.bin'}, got {' '.join(a.paths) or 'nothing'}")
    out = a.paths[-1]
    if a.random:
        for option, v in ("--layers", a.layers), ("--vision-layers", a.vision_layers):
            if v is not None and not 1 <= v <= 1000:
                p.error(f"{option} {v}: expected 1 to 1000")
        if a.clip:
            p.error("--clip is for checkpoints; --random makes the vision tower too")
        fields, tokenizer, tensors = random_model(a.random, flat.TYPES[a.type], a.layers, a.vision_layers, a.tokenizer)
        override(fields, a.template, a.image_mode)
    else:
        if a.layers or a.vision_layers or a.tokenizer:
            p.error("--layers, --vision-layers and --tokenizer are for --random")
        fields, tokenizer, tensors = export(a.paths[0], flat.TYPES[a.type], a.clip, a.template, a.image_mode)
    size = flat.write(out, "llava", fields, tokenizer, tensors)
    print(f"{out}: {size / 1e6:.1f} MB, {a.type}, {len(tensors)} tensors, {sum(t.rows * t.cols for t in tensors)} weights, {fields['n_pieces']} pieces, "
          f"template {TEMPLATES[fields['template']]}, image mode {IMAGE_MODES[fields['image_mode']]}")


if __name__ == "__main__":
    for number in signal.SIGINT, signal.SIGTERM:
        if signal.getsignal(number) != signal.SIG_IGN:          # nohup and a shell's background jobs ignore Ctrl-C, and go on doing so
            signal.signal(number, flat.stop)
    try:
        main(sys.argv[1:])
    except ExportError as e:
        sys.exit(f"error: {e}" + (f"\nhint:  {e.hint}" if e.hint else ""))
