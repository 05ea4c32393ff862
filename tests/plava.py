#!/usr/bin/env python3
"""plava.py: P-LLaVA, a checkpoint of 0.7 M weights made by a formula, in the layouts that published checkpoints come in.

    python3 tests/plava.py OUT_DIR [--gqa] [--layout old|new|flat]

It needs no download, and whoever computes the formula (tests in C do) has the same weights. A tensor's name (as in layout "old") and
an element's index k give the value:

    x = FNV1a32(name) + k 0x9E3779B9,  mixed (murmur3's finaliser);   u = (x >> 8) / 2^24;   value = (2u - 1) a + b

a = 0.2, b = 1 for the weights of norms; a = 0.1, b = 0 for other vectors; a = 0.12, b = 0 for everything with two or more dimensions.
--gqa: one key-value head instead of three.
"""

import json
import os
import struct
import sys

import numpy as np

TEXT = {"model_type": "llama", "vocab_size": 512, "hidden_size": 96, "intermediate_size": 272, "num_hidden_layers": 3, "num_attention_heads": 3,
        "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "tie_word_embeddings": False}
VISION = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
          "image_size": 56, "patch_size": 14, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
PROCESSOR = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
             "do_center_crop": True, "crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 56}}
N_PIECES, IMAGE_ID, PAD_ID = 500, 500, 501


def seed(name):
    h = 2166136261
    for c in name.encode():
        h = (h ^ c) * 16777619 & 0xffffffff
    return h


def values(name, shape, a, b):
    x = np.uint32(seed(name)) + np.arange(int(np.prod(shape)), dtype=np.uint32) * np.uint32(0x9E3779B9)     # modulo 2^32
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85ebca6b)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xc2b2ae35)
    x ^= x >> np.uint32(16)
    u = (x >> np.uint32(8)) / 2.0 ** 24
    return ((2 * u - 1) * a + b).astype(np.float32).reshape(shape)


def weight(name, shape):
    if len(shape) > 1:
        return values(name, shape, 0.12, 0)
    return values(name, shape, 0.2, 1) if name.endswith("weight") and ("norm" in name or "layrnorm" in name) else values(name, shape, 0.1, 0)


def weights(gqa=False):
    """{name: float32 array} under the names of layout "old"."""
    w = {}

    def add(name, *shape):
        w[name] = weight(name, shape)

    def linear(name, rows, cols, bias):
        add(name + ".weight", rows, cols)
        if bias:
            add(name + ".bias", rows)

    def layernorm(name, n):
        add(name + ".weight", n)
        add(name + ".bias", n)

    d, h = VISION["hidden_size"], VISION["intermediate_size"]
    v = "vision_tower.vision_model."
    add(v + "embeddings.class_embedding", d)
    add(v + "embeddings.patch_embedding.weight", d, 3, 14, 14)
    add(v + "embeddings.position_embedding.weight", 17, d)
    layernorm(v + "pre_layrnorm", d)
    for i in range(VISION["num_hidden_layers"]):
        layer = f"{v}encoder.layers.{i}."
        layernorm(layer + "layer_norm1", d)
        for x in ("q", "k", "v", "out"):
            linear(f"{layer}self_attn.{x}_proj", d, d, True)
        layernorm(layer + "layer_norm2", d)
        linear(layer + "mlp.fc1", h, d, True)
        linear(layer + "mlp.fc2", d, h, True)
    layernorm(v + "post_layernorm", d)

    n = TEXT["hidden_size"]
    linear("multi_modal_projector.linear_1", n, d, True)
    linear("multi_modal_projector.linear_2", n, n, True)

    h, t = TEXT["intermediate_size"], "language_model.model."
    add(t + "embed_tokens.weight", TEXT["vocab_size"], n)
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"{t}layers.{i}."
        add(layer + "input_layernorm.weight", n)
        for x, rows in (("q", n), ("k", 32 if gqa else n), ("v", 32 if gqa else n), ("o", n)):
            linear(f"{layer}self_attn.{x}_proj", rows, n, False)
        add(layer + "post_attention_layernorm.weight", n)
        linear(layer + "mlp.gate_proj", h, n, False)
        linear(layer + "mlp.up_proj", h, n, False)
        linear(layer + "mlp.down_proj", n, h, False)
    add(t + "norm.weight", n)
    linear("language_model.lm_head", TEXT["vocab_size"], n, False)
    return w


# ----------------------------------------------------------------------------
# layouts: what a tensor of layout "old" is called in another

RENAME = {
    "old": [],
    "new": [("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
            ("multi_modal_projector.", "model.multi_modal_projector."), ("vision_tower.", "model.vision_tower.")],
    "flat": [("vision_tower.vision_model.", "vision_tower.")],      # old, without a level: what transformers 5 saves
    "new-flat": [("language_model.lm_head.", "lm_head."), ("language_model.model.", "model.language_model."),
                 ("multi_modal_projector.", "model.multi_modal_projector."), ("vision_tower.vision_model.", "model.vision_tower.")],
    "original": [("language_model.lm_head.", "lm_head."), ("language_model.model.", "model."), ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
                 ("multi_modal_projector.linear_2.", "model.mm_projector.2."), ("vision_tower.", "model.vision_tower.vision_tower.")],
}


def rename(w, layout):
    out = {}
    for name, x in w.items():
        for old, new in RENAME[layout]:
            if name.startswith(old):
                name = new + name[len(old):]
                break
        out[name] = x
    return out


# ----------------------------------------------------------------------------
# files

def save_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1)


def save_safetensors(path, w):
    """Arrays of float32, float16, uint16 (the bits of bf16) or int64."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64"}
    header, end = {}, 0
    for name, x in w.items():
        header[name] = {"dtype": names[str(x.dtype)], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        end += x.nbytes
    head = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(head)) + head + b"".join(x.tobytes() for x in w.values()))


def save_weights(folder, w, n_shards=1):
    if n_shards == 1:
        return save_safetensors(f"{folder}/model.safetensors", w)
    names, index = list(w), {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = names[i::n_shards]                   # dealt out: what is stacked comes from different shards
        save_safetensors(f"{folder}/{shard}", {n: w[n] for n in part})
        index.update({n: shard for n in part})
    save_json(f"{folder}/model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def pieces():
    """500 pieces as Llama's tokenizer has 32000: (text, score, type). Control, bytes, then merges in their order, then characters."""
    out = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)] + [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    common = "etaoinshrd"
    texts = ["▁▁"] + ["▁" + c for c in "abcdefghijklmnopqrstuvwxyz"] + [a + b for a in common for b in common] + ["▁▁▁▁"]
    texts += ["the", "and", "ent", "ion", "her", "hat", "tha", "▁the", "▁and", "▁in", "▁is", "▁on", "▁an", "▁he", "▁to", "▁it", "▁her", "▁that"]
    texts += ["▁"] + [chr(c) for c in range(33, 127)]
    assert len(out) + len(texts) == N_PIECES == len(out) + len(set(texts))
    return out + [(t, -1e9 if not t.strip("▁") else -float(i), 1) for i, t in enumerate(texts)]


def field(number, value):
    """A protobuf field: a whole number, a float or bytes."""
    def varint(v):
        return bytes([v & 127 | 128]) + varint(v >> 7) if v > 127 else bytes([v])
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value) if isinstance(value, int) else varint(number << 3 | 2) + varint(len(value)) + value


def tokenizer_model(model_type=2, byte_fallback=1, add_dummy_prefix=1, user=None):
    """A SentencePiece file: pieces, trainer (BPE, byte fallback), normalizer (identity, space in front, repeated spaces stay).
    user: the id of a piece to be called user-defined."""
    out = b""
    for i, (text, score, kind) in enumerate(pieces()):
        kind = 4 if i == user else kind
        out += field(1, field(1, text.encode()) + field(2, score) + (field(3, kind) if kind != 1 else b""))
    return out + field(2, field(3, model_type) + field(35, byte_fallback)) + field(3, field(1, b"identity") + field(3, add_dummy_prefix) + field(4, 0))


def tokenizer_json(**changes):
    """The same pieces as Hugging Face's fast tokenizer keeps them."""
    ids = {text: i for i, (text, _, _) in enumerate(pieces())}
    normal = [(score, text) for text, score, kind in pieces() if kind == 1]
    merges = []
    for _, text in sorted(normal, key=lambda p: -p[0]):         # a stable sort: by score, then by id
        splits = [(text[:k], text[k:]) for k in range(1, len(text)) if text[:k] in ids and text[k:] in ids]
        merges += [f"{a} {b}" for a, b in sorted(splits, key=lambda s: (ids[s[0]], ids[s[1]]))]
    added = [{"id": i, "content": c, "special": True} for i, c in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (IMAGE_ID, "<image>"), (PAD_ID, "<pad>"))]
    return {"version": "1.0", "added_tokens": added, "pre_tokenizer": None,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": ids, "merges": merges}, **changes}


def write_hf(folder, layout="old", gqa=False, n_shards=1, w=None, text={}, vision={}, **config):
    """A folder as Hugging Face publishes it. w, text, vision, config: changes to the weights and configs."""
    os.makedirs(folder, exist_ok=True)
    text = {**TEXT, **({"num_key_value_heads": 1} if gqa else {}), **text}
    save_json(f"{folder}/config.json", {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": IMAGE_ID,
              "pad_token_id": PAD_ID, "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
              "tie_word_embeddings": False, "text_config": text, "vision_config": {**VISION, **vision}, **config})
    save_json(f"{folder}/preprocessor_config.json", PROCESSOR)
    save_json(f"{folder}/tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "legacy": True})
    with open(f"{folder}/tokenizer.model", "wb") as f:
        f.write(tokenizer_model())
    save_weights(folder, rename(weights(gqa) if w is None else w, layout), n_shards)


def write_original(folder, clip=None, save=save_weights, **config):
    """A folder as LLaVA's authors publish it, and that of its vision tower; without one, the tower is inside."""
    os.makedirs(folder, exist_ok=True)
    w = rename(weights(), "original")
    tower = {n: x for n, x in w.items() if "vision_tower" in n}
    if clip:
        os.makedirs(clip, exist_ok=True)
        w = {n: x for n, x in w.items() if n not in tower}
        tower = {n.replace("model.vision_tower.vision_tower.", ""): x for n, x in tower.items()}
        tower.update({"logit_scale": np.float32([1]), "text_projection.weight": np.zeros((4, 4), "f4"), "visual_projection.weight": np.zeros((4, 64), "f4"),
                      "text_model.final_layer_norm.weight": np.ones(4, "f4"), "vision_model.embeddings.position_ids": np.arange(17)})
        save_json(f"{clip}/config.json", {"model_type": "clip", "vision_config": VISION, "text_config": {}})
        save_json(f"{clip}/preprocessor_config.json", {**PROCESSOR, "crop_size": 56, "size": 56})
        save(clip, tower)
    for i in range(TEXT["num_hidden_layers"]):
        w[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(16, "f4")
    save(folder, w)
    save_json(f"{folder}/config.json", {**TEXT, "model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
              "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False, "image_aspect_ratio": "pad", **config})
    save_json(f"{folder}/tokenizer_config.json", {"legacy": False})
    with open(f"{folder}/tokenizer.model", "wb") as f:
        f.write(tokenizer_model())


if __name__ == "__main__":
    args, layout = sys.argv[1:], "old"
    if "--layout" in args and args[-1] != "--layout":
        layout = args.pop(args.index("--layout") + 1)
    folders = [a for a in args if not a.startswith("--")]
    if len(folders) != 1 or layout not in RENAME or layout == "original" or set(args) - set(folders) - {"--gqa", "--layout"}:
        sys.exit("usage: python3 tests/plava.py OUT_DIR [--gqa] [--layout old|new|flat|new-flat]")
    write_hf(folders[0], layout, "--gqa" in args)
