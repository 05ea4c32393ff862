#!/usr/bin/env python3
"""test_export.py: export/llava.py on P-LLaVA (plava.py) in every layout, against tensors computed directly from the formula.

    python3 tests/test_export.py            needs export/requirements.txt; .bin checkpoints are tested where PyTorch is installed
"""

import contextlib
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
EXPORT = os.path.join(os.path.dirname(HERE), "export")
sys.path.insert(0, EXPORT)
try:
    import numpy as np
    import flat
    import llava
except ImportError as e:
    sys.exit(f"error: {e}\nhint:  pip install -r export/requirements.txt")
from counting import check, finish
import plava



def same(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def bytes_of(path):
    with open(path, "rb") as f:
        return f.read()


# ----------------------------------------------------------------------------
# what must come out, written out a second time

def expected(w, n_layers=3, vision_layers=3):
    """{name in the model file: float32 (rows, cols)} from weights under the names of layout "old"."""
    v, t = "vision_tower.vision_model.", "language_model.model."
    row = lambda name: w[name].reshape(1, -1)
    out = {
        "vision.patch": w[v + "embeddings.patch_embedding.weight"].reshape(64, 588),
        "vision.class": row(v + "embeddings.class_embedding"),
        "vision.pos": w[v + "embeddings.position_embedding.weight"],
        "vision.pre_norm_w": row(v + "pre_layrnorm.weight"), "vision.pre_norm_b": row(v + "pre_layrnorm.bias"),
        "projector.w1": w["multi_modal_projector.linear_1.weight"], "projector.b1": row("multi_modal_projector.linear_1.bias"),
        "projector.w2": w["multi_modal_projector.linear_2.weight"], "projector.b2": row("multi_modal_projector.linear_2.bias"),
        "tok_emb": w[t + "embed_tokens.weight"], "norm": row(t + "norm.weight"), "head": w["language_model.lm_head.weight"],
    }
    for i in range(vision_layers):
        s, d = f"{v}encoder.layers.{i}.", f"vision.layers.{i}."
        out[d + "norm1_w"], out[d + "norm1_b"] = row(s + "layer_norm1.weight"), row(s + "layer_norm1.bias")
        out[d + "norm2_w"], out[d + "norm2_b"] = row(s + "layer_norm2.weight"), row(s + "layer_norm2.bias")
        out[d + "wqkv"] = np.vstack([w[s + "self_attn.q_proj.weight"], w[s + "self_attn.k_proj.weight"], w[s + "self_attn.v_proj.weight"]])
        out[d + "bqkv"] = np.hstack([row(s + "self_attn.q_proj.bias"), row(s + "self_attn.k_proj.bias"), row(s + "self_attn.v_proj.bias")])
        out[d + "wo"], out[d + "bo"] = w[s + "self_attn.out_proj.weight"], row(s + "self_attn.out_proj.bias")
        out[d + "w1"], out[d + "b1"] = w[s + "mlp.fc1.weight"], row(s + "mlp.fc1.bias")
        out[d + "w2"], out[d + "b2"] = w[s + "mlp.fc2.weight"], row(s + "mlp.fc2.bias")
    for i in range(n_layers):
        s, d = f"{t}layers.{i}.", f"layers.{i}."
        out[d + "att_norm"], out[d + "ffn_norm"] = row(s + "input_layernorm.weight"), row(s + "post_attention_layernorm.weight")
        out[d + "wqkv"] = np.vstack([w[s + "self_attn.q_proj.weight"], w[s + "self_attn.k_proj.weight"], w[s + "self_attn.v_proj.weight"]])
        out[d + "wo"] = w[s + "self_attn.o_proj.weight"]
        out[d + "w13"] = np.vstack([w[s + "mlp.gate_proj.weight"], w[s + "mlp.up_proj.weight"]])
        out[d + "w2"] = w[s + "mlp.down_proj.weight"]
    return out


FIELDS = {
    "dim": 96, "hidden_dim": 272, "n_layers": 3, "n_heads": 3, "n_kv_heads": 3, "head_dim": 32, "vocab_size": 512, "n_pieces": 500, "max_positions": 512,
    "norm_eps": 1e-5, "rope_theta": 10000.0, "bos_id": 1, "eos_id": 2, "image_id": 500, "prefix_after_special": 1, "template": 2, "image_mode": 0,
    "vision_dim": 64, "vision_hidden_dim": 256, "vision_layers": 3, "vision_heads": 4, "image_size": 56, "patch_size": 14, "vision_eps": 1e-5, "vision_act": 1,
    "image_mean_0": 0.48145466, "image_mean_1": 0.4578275, "image_mean_2": 0.40821073, "image_std_0": 0.26862954, "image_std_1": 0.26130258, "image_std_2": 0.27577711,
}
PIECES = [(text.encode(), score, kind) for text, score, kind in plava.pieces()]


def half(x):
    """float32 array to float16, one weight at a time, by struct."""
    return np.array([struct.unpack("<e", struct.pack("<e", v))[0] for v in x.ravel().tolist()], "f2").reshape(x.shape)


def bfloat(x):
    """float32 array to the bits of bf16: of the two neighbours the nearer, of two as near the even one."""
    out = []
    for v in x.ravel().tolist():
        bits = struct.unpack("<I", struct.pack("<f", v))[0]
        below, above = bits >> 16, (bits >> 16) + 1
        d = [abs(v - struct.unpack("<f", struct.pack("<I", b << 16))[0]) for b in (below, above)]
        out.append(below if d[0] < d[1] or d[0] == d[1] and below % 2 == 0 else above)
    return np.array(out, "u2").reshape(x.shape)


def q8_0(x):
    """float32 array to int8 and float16 scales, one weight at a time."""
    q, scales = [], []
    flat_x = x.ravel()
    for b in range(0, x.size, 32):
        block = flat_x[b:b + 32]
        scale = half(np.array([max(abs(v) for v in block) / np.float32(127)], "f4"))[0]
        scales.append(scale)
        for v in block:
            q.append(max(-127, min(127, round(float(v / np.float32(scale))))) if scale else 0)      # Python rounds halves to even
    return np.array(q, "i1").reshape(x.shape), np.array(scales, "f2").reshape(len(x), -1)


# ----------------------------------------------------------------------------
# running the exporter

def run(*args):
    """llava.main in this process: (message, hint) of its error, or None."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            llava.main(list(args))
    except flat.ExportError as e:
        return str(e), e.hint
    return None


def leftovers(folder):
    return [n for n in os.listdir(folder) if n.endswith(".tmp")]


def export(what, *args, **fields):
    """Exports, and checks fields and tokenizer. Returns what flat.read gives."""
    error = run(*args)
    check(error is None, f"{what}: {error}")
    if error:
        return None
    f = flat.read(args[1])
    wanted = {**FIELDS, **fields}
    check(f.arch == "llava" and f.fields == wanted, f"{what}: fields: {({k: (f.fields.get(k), v) for k, v in wanted.items() if f.fields.get(k) != v})}")
    check([type(v) for v in f.fields.values()] == [type(wanted[k]) for k in f.fields], f"{what}: kinds of the fields")
    check(f.tokenizer_kind == 1 and f.tokenizer == PIECES, f"{what}: tokenizer")
    check(not leftovers(os.path.dirname(args[1])), f"{what}: no file is left beside it")
    return f


def check_tensors(what, f, want):
    """Every tensor equals want[name], an array or a (q, scale) pair."""
    if f is None:
        return
    check(set(f.tensors) == set(want), f"{what}: names: {sorted(set(f.tensors) ^ set(want))}")
    for name in f.tensors.keys() & want.keys():
        got, w = f.tensors[name], want[name]
        pairs = zip(got, w) if isinstance(w, tuple) else [(got, w)]
        check(isinstance(got, tuple) == isinstance(w, tuple) and all(same(np.ascontiguousarray(g), x) for g, x in pairs), f"{what}: {name}")


def test_formula():
    check(plava.seed("lm_head.weight") == 0xae5ab6ed, "the seed of lm_head.weight")
    check(np.allclose(plava.values("lm_head.weight", (4,), 0.12, 0), [0.07432011, 0.10674424, -0.11621907, 0.09093306], atol=1e-8), "lm_head.weight")
    check(np.allclose(plava.values("pixel_values", (4,), 2.0, 0), [-1.1089606, 1.2344193, -0.2848611, -0.14642787], atol=1e-7), "pixel_values")
    check(sum(x.size for x in plava.weights().values()) == 699104, "P-LLaVA's number of weights")


def test_layouts(tmp):
    """The same model file from every layout of the checkpoint."""
    want = expected(plava.weights())
    first = None
    for layout, n_shards in (("old", 1), ("old", 3), ("new", 1), ("flat", 1), ("new-flat", 2)):
        what = f"layout {layout}, {n_shards} files"
        plava.write_hf(f"{tmp}/{layout}{n_shards}", layout, n_shards=n_shards)
        check_tensors(what, export(what, f"{tmp}/{layout}{n_shards}", f"{tmp}/{layout}{n_shards}.bin", "--type", "f32"), want)
        first = first or bytes_of(f"{tmp}/old1.bin")
        check(bytes_of(f"{tmp}/{layout}{n_shards}.bin") == first, f"{what}: byte for byte the first one")
    plava.write_hf(f"{tmp}/gqa", gqa=True)
    check_tensors("gqa", export("gqa", f"{tmp}/gqa", f"{tmp}/gqa.bin", "--type", "f32", n_kv_heads=1), expected(plava.weights(gqa=True)))

    authors = {"image_id": -1, "prefix_after_special": 0, "template": 0, "image_mode": 1}
    plava.write_original(f"{tmp}/authors", f"{tmp}/clip")
    check_tensors("--clip", export("--clip", f"{tmp}/authors", f"{tmp}/authors.bin", "--clip", f"{tmp}/clip", "--type=f32", **authors), want)
    plava.write_original(f"{tmp}/authors", f"{tmp}/clip", mm_vision_tower=f"{tmp}/clip", image_aspect_ratio="square")
    check_tensors("mm_vision_tower", export("mm_vision_tower", f"{tmp}/authors", f"{tmp}/authors.bin", "--type", "f32", **{**authors, "image_mode": 0}), want)
    plava.write_original(f"{tmp}/inside", mm_vision_tower=f"{tmp}/clip")
    check_tensors("tower inside", export("tower inside", f"{tmp}/inside", f"{tmp}/inside.bin", "--type", "f32", **authors), want)
    f = export("options", f"{tmp}/old1", f"{tmp}/options.bin", "--template", "vicuna_v1", "--image-mode", "pad", "--type", "f32", template=0, image_mode=1)
    check_tensors("options", f, want)


def test_bin(tmp):
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: .bin checkpoints are not tested")
        return
    want = expected(plava.weights())
    authors = {"image_id": -1, "prefix_after_special": 0, "template": 0, "image_mode": 1}
    for zipped in True, False:
        def save(folder, w):
            torch.save({n: torch.from_numpy(np.array(x)) for n, x in w.items()}, f"{folder}/pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        plava.write_original(f"{tmp}/bin", f"{tmp}/bin-clip", save)
        f = export(".bin", f"{tmp}/bin", f"{tmp}/bin.bin", "--clip", f"{tmp}/bin-clip", "--type", "f32", **authors)
        check_tensors(".bin", f, want)

    def save_shards(folder, w):
        names = list(w)
        index = {}
        for i in range(2):
            part = names[i::2]
            torch.save({n: torch.from_numpy(np.array(w[n])).to(torch.bfloat16) if w[n].dtype == np.float32 else torch.from_numpy(w[n]) for n in part}, f"{folder}/part{i}.bin")
            index.update({n: f"part{i}.bin" for n in part})
        plava.save_json(f"{folder}/pytorch_model.bin.index.json", {"weight_map": index})
    plava.write_original(f"{tmp}/shards", f"{tmp}/shards-clip", save_shards)
    f = export(".bin shards", f"{tmp}/shards", f"{tmp}/shards.bin", "--clip", f"{tmp}/shards-clip", "--type", "f32", **authors)
    check_tensors(".bin shards, bf16", f, {n: flat.bf16_to_f32(bfloat(x)) for n, x in want.items()})
    with open(f"{tmp}/shards/part1.bin", "r+b") as f:
        f.truncate(5000)
    expect("a truncated .bin", run(f"{tmp}/shards", f"{tmp}/x.bin", "--clip", f"{tmp}/shards-clip"), "part1.bin", "PyTorch cannot read it")


VECTORS = ("norm", "_w", "_b", "class", ".pos", ".b1", ".b2", ".bo", ".bqkv")


def test_types(tmp):
    """Conversions against naive ones, and which tensors take the type."""
    w = plava.weights()
    block = w["language_model.model.layers.0.self_attn.q_proj.weight"]
    block[0, :32] = 0                                           # a block of zeros
    block[1, :32] = 1e-9                                        # one that is too small for an f16 scale
    block[2, :3] = 1 + 2.0 ** -11, 1 + 3 * 2.0 ** -11, -(1 + 2.0 ** -8)     # halves: to even
    block[3, :32] = np.float32(2) ** -14 * np.linspace(-0.01, 0.01, 32, dtype="f4")      # subnormal scales
    block[4, 0] = 65519                                         # the largest that still fits into f16
    plava.write_hf(f"{tmp}/t", w=w)
    want = expected(w)
    small = {n: x if n.endswith(VECTORS) else half(x) for n, x in want.items()}
    check_tensors("f16", export("f16", f"{tmp}/t", f"{tmp}/f16.bin"), small)
    check_tensors("bf16", export("bf16", f"{tmp}/t", f"{tmp}/bf16.bin", "--type", "bf16"), {n: x if n.endswith(VECTORS) else bfloat(x) for n, x in want.items()})
    quantised = {}
    for i in range(3):                                          # w2 of the decoder is 272 wide, no multiple of 32
        for n in f"layers.{i}.wqkv", f"layers.{i}.wo", f"layers.{i}.w13", f"vision.layers.{i}.wqkv", f"vision.layers.{i}.wo", f"vision.layers.{i}.w1", f"vision.layers.{i}.w2":
            quantised[n] = q8_0(want[n])
    f = export("q8_0", f"{tmp}/t", f"{tmp}/q8_0.bin", "--type", "q8_0")
    check_tensors("q8_0", f, {**small, **quantised})
    if f:
        q, scale = f.tensors["layers.0.wqkv"]
        check(not q[:2, :32].any() and not scale[:2, 0].any(), "q8_0: blocks without a scale are zero")
        q, scale = f.tensors["layers.1.w13"]
        back = q.astype("f4").reshape(len(q), -1, 32) * scale.astype("f4")[..., None]
        check(np.abs(back.reshape(q.shape) - want["layers.1.w13"]).max() <= 0.12 / 127 * 0.51, "q8_0: half a step off at most")

    # checkpoints in f16 and bf16
    plava.write_hf(f"{tmp}/h", w={n: half(x) for n, x in w.items()})
    f = export("f16 to f16", f"{tmp}/h", f"{tmp}/h16.bin", "--type", "f16")
    check_tensors("f16 to f16", f, {n: half(x).astype("f4") if n.endswith(VECTORS) else half(x) for n, x in want.items()})
    plava.write_hf(f"{tmp}/b", w={n: bfloat(x) for n, x in w.items()})
    widened = {n: flat.bf16_to_f32(bfloat(x)) for n, x in want.items()}
    check_tensors("bf16 to f32", export("bf16 to f32", f"{tmp}/b", f"{tmp}/b32.bin", "--type", "f32"), widened)
    check_tensors("bf16 to bf16", export("bf16 to bf16", f"{tmp}/b", f"{tmp}/b16.bin", "--type", "bf16"), {n: x if n.endswith(VECTORS) else bfloat(want[n]) for n, x in widened.items()})
    expect("bf16 to f16, too large", run(f"{tmp}/b", f"{tmp}/x.bin"), "q_proj", "too large for f16", hint="--type bf16")      # 65519 became 65536
    w["language_model.lm_head.weight"][3, 3] = 3.4e38
    plava.write_hf(f"{tmp}/large", w=w)
    expect("f32 to bf16, too large", run(f"{tmp}/large", f"{tmp}/x.bin", "--type", "bf16"), "lm_head", "too large for bf16", hint="--type f32")
    expect("f32 to f16 in a q8_0 file", run(f"{tmp}/large", f"{tmp}/x.bin", "--type", "q8_0"), "lm_head", "too large for f16", hint="--type f32")
    for bad in np.inf, -np.inf, np.nan:
        w["language_model.lm_head.weight"][3, 3] = bad
        plava.write_hf(f"{tmp}/large", w=w)
        for kind in flat.TYPES:
            expect(f"{bad} in {kind}", run(f"{tmp}/large", f"{tmp}/x.bin", "--type", kind), "lm_head", "NaN")
    check(not leftovers(tmp) and not os.path.exists(f"{tmp}/x.bin"), "a failed export leaves nothing")


def test_tokenizers(tmp):
    folder, out = f"{tmp}/tok", f"{tmp}/tok.bin"
    plava.write_hf(folder)
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    listed = plava.tokenizer_json()
    listed["model"]["vocab"].update({"<image>": 500, "<pad>": 501})
    pairs = plava.tokenizer_json()
    pairs["model"]["merges"] = [m.split(" ") for m in pairs["model"]["merges"]]
    for with_model in True, False:
        for what, fast, prefix in (("Prepend", plava.tokenizer_json(), 1), ("Metaspace first", plava.tokenizer_json(normalizer=None, pre_tokenizer=first), 0),
                                   ("Metaspace always", plava.tokenizer_json(normalizer=None, pre_tokenizer={**first, "prepend_scheme": "always"}), 1),
                                   ("added tokens in the vocabulary", listed, 1), ("merges as pairs", pairs, 1)):
            plava.save_json(f"{folder}/tokenizer.json", fast)
            export(f"tokenizer.json, {what}", folder, out, prefix_after_special=prefix)
        if with_model:
            os.remove(f"{folder}/tokenizer.model")

    def broken(what, change, *words):
        fast = plava.tokenizer_json()
        change(fast)
        plava.save_json(f"{folder}/tokenizer.json", fast)
        expect(f"tokenizer.json: {what}", run(folder, f"{tmp}/x.bin"), "tokenizer.json", *words)

    def swap(merges):
        merges[3], merges[9] = merges[9], merges[3]
    broken("merges in another order", lambda j: swap(j["model"]["merges"]), "order of the ids")
    broken("a merge that is missing", lambda j: j["model"]["merges"].remove("h at"), "do not merge")
    broken("a merge into nothing", lambda j: j["model"]["merges"].append("Q Q"), "no piece")
    broken("a hole in the ids", lambda j: j["model"]["vocab"].pop("the"), "ids are not")
    broken("another kind", lambda j: j["model"].update(type="Unigram"), "not a BPE")
    broken("another normalizer", lambda j: j.update(normalizer={"type": "NFKC"}), "spaces")
    broken("no vocabulary", lambda j: j["model"].pop("vocab"), "usual form", "vocab")
    broken("a model that is a list", lambda j: j.update(model=[1]), "usual form")
    broken("no byte piece", lambda j: (j["model"]["vocab"].update({"<0xzz>": 100}), j["model"]["vocab"].pop("<0x61>")), "byte pieces")
    with open(f"{folder}/tokenizer.model", "wb") as f:
        f.write(plava.tokenizer_model().replace(b"<0x61>", b"<0xzz>"))
    plava.save_json(f"{folder}/tokenizer.json", plava.tokenizer_json())
    expect("two tokenizers that differ", run(folder, f"{tmp}/x.bin"), "its pieces are not those")
    os.remove(f"{folder}/tokenizer.json")
    expect("a byte piece that is missing", run(folder, f"{tmp}/x.bin"), "tokenizer.model", "byte pieces")
    for what, data, word in (("a unigram model", plava.tokenizer_model(model_type=1), "BPE"), ("no space in front", plava.tokenizer_model(add_dummy_prefix=0), "in front"),
                             ("no byte fallback", plava.tokenizer_model(byte_fallback=0), "byte fallback"), ("user-defined pieces", plava.tokenizer_model(user=300), "user-defined"),
                             ("a piece twice", plava.tokenizer_model().replace(b"\x03tha", b"\x03hat"), "twice"),
                             ("truncated", plava.tokenizer_model()[:-3], "not a SentencePiece model"), ("empty", b"", "BPE"), ("noise", bytes(range(7, 200)), "not a SentencePiece model")):
        with open(f"{folder}/tokenizer.model", "wb") as f:
            f.write(data)
        expect(f"tokenizer.model: {what}", run(folder, f"{tmp}/x.bin"), "tokenizer.model", word)
    os.remove(f"{folder}/tokenizer.model")
    expect("no tokenizer", run(folder, f"{tmp}/x.bin"), "neither tokenizer.model nor tokenizer.json")

    with open(f"{folder}/tokenizer.model", "wb") as f:
        f.write(plava.tokenizer_model())
    for legacy, prefix in (True, 1), (False, 0), (None, 1):
        plava.save_json(f"{folder}/tokenizer_config.json", {} if legacy is None else {"legacy": legacy})
        export(f"legacy {legacy}", folder, out, prefix_after_special=prefix)


# ----------------------------------------------------------------------------
# what must be refused

def expect(what, error, *words, hint=None):
    check(error is not None and all(w in error[0] for w in words) and (hint is None or hint in (error[1] or "")), f"{what}: got {error}")


def test_errors(tmp):
    folder, out = f"{tmp}/e", f"{tmp}/e.bin"
    w = plava.weights()

    def refuse(what, *words, hint=None, args=(), **changes):
        plava.write_hf(folder, **changes)
        expect(what, run(folder, out, *args), *words, hint=hint)
        check(not os.path.exists(out) and not leftovers(tmp), f"{what}: leaves nothing")

    q = "language_model.model.layers.1.self_attn.q_proj.weight"
    refuse("a missing tensor", "decoder.layers.1.self_attn.q_proj.weight", "layers.1.wqkv", w={n: x for n, x in w.items() if n != q})
    refuse("a missing head", "head.weight", w={n: x for n, x in w.items() if "lm_head" not in n})
    refuse("an unknown tensor", "model.image_newline", "unknown", w={**w, "model.image_newline": np.zeros(96, "f4")})
    refuse("a bias in attention", "q_proj.bias", "unknown", w={**w, q.replace("weight", "bias"): np.zeros(96, "f4")})
    refuse("a layer too many", "layers.2.", "unknown", text={"num_hidden_layers": 2})
    refuse("a layer too few", "layers.3.", text={"num_hidden_layers": 4})
    refuse("a wrong shape", q, "[96, 95]", "[96, 96]", w={**w, q: np.zeros((96, 95), "f4")})
    refuse("a transposed matrix", "fc1.weight", "[64, 256]", w={**w, "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": np.zeros((64, 256), "f4")})
    refuse("a tensor twice", "another name", w={**w, "lm_head.weight": w["language_model.lm_head.weight"]})
    refuse("whole numbers as weights", q, "I64", w={**w, q: np.zeros((96, 96), "i8")})
    refuse("another architecture", "model_type", "llava_next", model_type="llava_next")
    refuse("scaled positions", "rope_scaling", "linear", text={"rope_scaling": {"type": "linear", "factor": 2.0}})
    refuse("scaled positions of transformers 5", "rope_parameters", "yarn", text={"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}})
    refuse("several taps", "vision_feature_layer", "[-2, -5]", vision_feature_layer=[-2, -5])
    refuse("a tap beyond", "vision_feature_layer", "-9", vision_feature_layer=-9)
    refuse("the class token kept", "vision_feature_select_strategy", "full", vision_feature_select_strategy="full")
    refuse("another projector", "projector_hidden_act", "relu", projector_hidden_act="relu")
    refuse("another activation", "hidden_act", "gelu", text={"hidden_act": "gelu"})
    refuse("another vision activation", "hidden_act", "gelu_pytorch_tanh", vision={"hidden_act": "gelu_pytorch_tanh"})
    refuse("another vision tower", "siglip_vision_model", vision={"model_type": "siglip_vision_model"})
    refuse("attention_bias", "attention_bias", text={"attention_bias": True})
    refuse("a sliding window", "sliding_window", "4096", text={"sliding_window": 4096})
    refuse("another decoder", "model_type", "mistral", text={"model_type": "mistral"})
    refuse("a config that is no object", "vision_config", vision_config=7)
    refuse("heads", "num_attention_heads", "'three'", text={"num_attention_heads": "three"})
    refuse("heads that do not divide", "do not fit", text={"num_key_value_heads": 2})
    refuse("several ends", "eos_token_id", text={"eos_token_id": [2, 7]})
    refuse("an image token among the pieces", "image 77", image_token_index=77)
    refuse("an embedding smaller than the vocabulary", "500 pieces", "400 rows", text={"vocab_size": 400})
    refuse("--clip where it is not needed", "--clip", args=("--clip", folder))
    refuse("an unknown type", "--type", args=("--type", "q4"))

    plava.write_hf(folder)
    plava.save_json(f"{folder}/preprocessor_config.json", {**plava.PROCESSOR, "crop_size": {"height": 336, "width": 336}})
    expect("another image size", run(folder, out), "preprocessor_config.json", "crop_size", "56")
    plava.save_json(f"{folder}/preprocessor_config.json", {**plava.PROCESSOR, "resample": 2})
    expect("another filter", run(folder, out), "resample")
    for mean in [0.5, 0.5], 0.5, [128, 128, 128], ["a", "b", "c"]:
        plava.save_json(f"{folder}/preprocessor_config.json", {**plava.PROCESSOR, "image_mean": mean})
        expect(f"image_mean {mean}", run(folder, out), "preprocessor_config.json", "image_mean")
    plava.write_hf(folder)
    os.remove(f"{folder}/config.json")
    expect("no config", run(folder, out), "config.json", "No such file")
    with open(f"{folder}/config.json", "w") as f:
        f.write("{")
    expect("a broken config", run(folder, out), "config.json")
    expect("no folder", run(f"{tmp}/nowhere", out), "nowhere", "not a folder")
    expect("one argument", run(out), "CHECKPOINT and OUT.bin")
    expect("an unknown option", run(folder, out, "--frobnicate"), "--frobnicate")

    # broken files
    folder = f"{tmp}/s"
    plava.write_hf(folder, n_shards=3)
    shard = f"{folder}/model-00002-of-00003.safetensors"
    whole = bytes_of(shard)
    for what, data, word in (("truncated", whole[:-1], "past the end"), ("an empty file", b"", "past the end"), ("no JSON", whole[:8] + b"[" + whole[9:], "safetensors header"),
                             ("another size", whole.replace(b'"shape": [96, 96]', b'"shape": [96, 97]'), "do not fit")):
        with open(shard, "wb") as f:
            f.write(data)
        expect(f"a shard, {what}", run(folder, out), "00002-of-00003", word)
    os.remove(shard)
    expect("a missing shard", run(folder, out), "00002-of-00003", "missing")
    shutil.copy(f"{folder}/model-00001-of-00003.safetensors", shard)
    expect("a shard twice", run(folder, out), "00002-of-00003", "is missing, though")
    os.remove(f"{folder}/model.safetensors.index.json")
    expect("no weights", run(folder, out), "holds neither")

    # the layout of LLaVA's authors
    def refuse_original(what, *words, args=(), clip=f"{tmp}/e-clip", **config):
        shutil.rmtree(f"{tmp}/o", ignore_errors=True)
        plava.write_original(f"{tmp}/o", clip, **config)
        expect(what, run(f"{tmp}/o", out, *args), *words)
    refuse_original("no vision tower", "without its vision tower", "openai/clip-vit-large-patch14-336")
    refuse_original("two vision towers", "of its own", clip=None, args=("--clip", f"{tmp}/e-clip"))
    refuse_original("a linear projector", "mm_projector_type", "linear", args=("--clip", f"{tmp}/e-clip"), mm_projector_type="linear")
    refuse_original("anyres", "image_aspect_ratio", "anyres", args=("--clip", f"{tmp}/e-clip"), image_aspect_ratio="anyres")
    refuse_original("the checkpoint as its own tower", "model_type", args=("--clip", f"{tmp}/o"))
    check(not os.path.exists(out) and not leftovers(tmp), "refused exports leave nothing")


def test_configs(tmp):
    """Sparse configs, tied embeddings, the processor's config in its places."""
    w = plava.weights()
    folder, out = f"{tmp}/c", f"{tmp}/c.bin"
    plava.write_hf(folder, w={n: x for n, x in w.items() if "lm_head" not in n}, text={"tie_word_embeddings": True})
    want = expected(w)
    check_tensors("tied", export("tied", folder, out, "--type", "f32"), {**want, "head": want["tok_emb"]})
    plava.write_hf(folder, text={"num_key_value_heads": None, "rope_theta": 5e5, "rms_norm_eps": None})
    with open(f"{folder}/config.json") as f:
        config = json.load(f)
    del config["text_config"]["rms_norm_eps"], config["vision_config"]["hidden_act"]
    del config["vision_feature_layer"], config["image_token_index"]
    config["image_token_id"] = 500
    plava.save_json(f"{folder}/config.json", config)
    export("sparse", folder, out, norm_eps=1e-6, rope_theta=5e5)
    plava.write_hf(folder, text={"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}})
    export("rope_parameters", folder, out, rope_theta=1e6)
    plava.write_hf(folder, vision_feature_layer=4, vision={"hidden_act": "gelu"})
    check_tensors("the last layer", export("the last layer", folder, out, "--type=f32", vision_layers=4, vision_act=0), expected(w, vision_layers=4))
    plava.write_hf(folder)
    os.remove(f"{folder}/preprocessor_config.json")
    export("no processor", folder, out)
    plava.save_json(f"{folder}/processor_config.json", {"image_processor": {**plava.PROCESSOR, "do_center_crop": False, "image_mean": [0.5, 0.25, 0.125]}})
    export("processor_config.json", folder, out, image_mode=1, image_mean_0=0.5, image_mean_1=0.25, image_mean_2=0.125)


def test_writing(tmp):
    """The file appears whole or not at all."""
    folder, out = f"{tmp}/w", f"{tmp}/w.bin"
    plava.write_hf(folder)
    export("whole", folder, out)
    before = bytes_of(out)
    export("over an old file", folder, out)
    check(bytes_of(out) == before, "the same file again")
    expect("a folder as file", run(folder, folder), "is a folder")
    expect("nowhere", run(folder, f"{tmp}/none/x.bin"), "its folder does not exist")

    class Stop:
        def __init__(self, error):
            self.error = error

        def rows(self, kind, cols):
            yield np.zeros((1, cols), "f4"), None
            raise self.error
    for error in KeyboardInterrupt(), SystemExit(143), OSError(28, "No space left on device"):
        try:
            flat.write(out, "llava", {}, b"", [flat.Tensor("x", flat.F32, 2, 40, [Stop(error)])])
            check(False, f"{error!r} goes on")
        except (KeyboardInterrupt, SystemExit):
            check(not isinstance(error, OSError), f"{error!r} goes on")
        except flat.ExportError as e:
            check("No space left" in str(e), f"{error!r} is reported")
        check(bytes_of(out) == before and not leftovers(tmp), f"{error!r}: the old file stays, the new one goes")

    for parts in [Stop(0)], []:                      # a signal whose exception Python dropped: noticed before the next piece, or at the end
        flat.stopped = 130
        try:
            flat.write(out, "llava", {}, b"", [flat.Tensor("x", flat.F32, len(parts), 40, parts)])
            check(False, "a dropped exception stops the export")
        except SystemExit as e:
            check(e.code == 130 and bytes_of(out) == before and not leftovers(tmp), "a dropped exception stops the export")
        flat.stopped = 0

    program = [sys.executable, os.path.join(EXPORT, "llava.py")]
    p = subprocess.run([*program, f"{tmp}/none", out], capture_output=True, text=True)
    check(p.returncode == 1 and p.stderr.startswith(f"error: {tmp}/none: ") and "hint:" in p.stderr and not p.stdout, f"the program's error: {p}")
    p = subprocess.run([*program, "--type", "f32", folder, out], capture_output=True, text=True)
    check(p.returncode == 0 and not p.stderr and "2.6 MB" in p.stdout, f"the program: {p}")
    p = subprocess.run([*program, "--help"], capture_output=True, text=True)
    check(p.returncode == 0 and "example: python3 export/llava.py" in p.stdout, "--help")

    # a real signal in the middle of a real export; the file is large so that there is a middle
    w = plava.weights()
    big = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    w.update({n: np.zeros((400000, 96), "f4") for n in big})
    plava.write_hf(f"{tmp}/big", w=w, text={"vocab_size": 400000})
    signal.signal(signal.SIGINT, signal.default_int_handler)           # a shell's background jobs ignore it, and their children would
    for sig, status in (signal.SIGINT, 130), (signal.SIGTERM, 143):
        p = subprocess.Popen([*program, f"{tmp}/big", f"{tmp}/big.bin", "--type", "q8_0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.time() + 60
        while not leftovers(tmp) and p.poll() is None and time.time() < until:
            time.sleep(0.002)
        p.send_signal(sig)
        check(p.wait() == status and not leftovers(tmp) and not os.path.exists(f"{tmp}/big.bin"), f"{sig.name}: status {p.returncode}, {leftovers(tmp)}")


def test_read(tmp):
    """flat.read refuses what it should, so that the other tests mean something."""
    plava.write_hf(f"{tmp}/r")
    export("r", f"{tmp}/r", f"{tmp}/r.bin")
    good = bytes_of(f"{tmp}/r.bin")
    n_fields, n_tensors = struct.unpack_from("<II", good, 12)
    entry = 64 + 64 * n_fields
    changes = {"magic": (0, b"x"), "version": (8, b"\2"), "file bytes": (40, b"\1"), "a tensor's offset": (entry + 80, b"\1"), "a tensor's bytes": (entry + 88, b"\1"),
               "a tensor's columns": (entry + 72, b"\1"), "padding": (struct.unpack_from("<Q", good, entry + 80)[0] + 588 * 2, b"\1")}
    for what, (at, byte) in changes.items():
        with open(f"{tmp}/r.bin", "wb") as f:
            f.write(good[:at] + byte + good[at + 1:])
        try:
            flat.read(f"{tmp}/r.bin")
            check(False, f"a wrong {what} is noticed")
        except flat.ExportError:
            check(True, "")


def test_random():
    """--random, without the gigabytes: a few rows of every kind."""
    for size, kind in ("llava-7b", flat.F16), ("llava-13b", flat.Q8_0):
        fields, section, tensors = llava.random_model(size, kind)
        dim = 4096 if size == "llava-7b" else 5120
        count = sum(t.rows * t.cols for t in tensors) - fields["dim"] * 64 * 2
        check(fields["dim"] == dim and count == {4096: 7062902784, 5120: 13350839296}[dim] - 303507456 + 290909184, f"{size}: {count} weights")
        names = {t.name: t for t in tensors}
        for n in "vision.patch", "layers.0.wqkv", "layers.3.w2", "layers.1.att_norm", "norm", "vision.layers.2.norm1_w", "vision.layers.2.b1", "head":
            t = names[n]
            x, scale = next(t.parts[0].rows(t.kind, t.cols))
            y = x.astype("f4") if scale is None else x.astype("f4").reshape(len(x), -1, 32) * scale.astype("f4")[..., None]
            mean = 1 if "norm" in n else 0
            check(x.shape[1] == t.cols and np.isfinite(y).all() and abs(y.mean() - mean) < 0.002 and abs(y.std() - 0.02) < 0.002, f"{size}: {n}: {y.mean()}, {y.std()}")
            check(len(x) == 1 or not np.array_equal(x[0], x[1]), f"{size}: {n}: rows differ")
            check(sum(len(x) for x, _ in t.parts[0].rows(t.kind, t.cols)) == t.rows, f"{size}: {n}: rows")
        check(len(section) > 32000 * 12 and fields["n_pieces"] == 32000, f"{size}: tokenizer")


if __name__ == "__main__":
    test_formula()
    for test in test_layouts, test_bin, test_types, test_tokenizers, test_errors, test_configs, test_writing, test_read:
        with tempfile.TemporaryDirectory() as folder:
            test(folder)
    test_random()
    finish()
