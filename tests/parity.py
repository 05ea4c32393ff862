#!/usr/bin/env python3
"""parity.py: ./llava against Hugging Face transformers, in float32 on the CPU: the logits of a prompt's last row and of ten decoded tokens.

    python3 tests/parity.py [MODEL.bin]       the trained model; default models/scenes-llava.bin. The program: $BUILD/llava (build/llava)

    P-LLaVA       weights by a formula (tests/plava.py), in several layouts; first, transformers itself gives the published numbers
    kinds         the same in f16, bf16 and q8_0, against transformers with the weights of the model file
    other shapes  grouped KV heads, a head size that is not dim / heads; as transformers saves them today, in shards
    scenes        the trained model, its own weights put into transformers, on real pictures
    real widths   dim 4096, inner 11008, 32 heads, CLIP of 1024 at 336 pixels; two layers of each

Ids are fed, not text: those that `--tokens` prints, and transformers' own greedy answer. Pictures go through its Pillow processor.
Tolerance: relative L2 of a row of logits at most 1e-4. Both sum in float32, in another order: 1e-6 to 1e-5 is what that gives;
a wrong weight, position or picture gives 1e-2 and more (checked, too).
"""

import glob
import os
import shutil
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # threads that wait must not spin beside the other program's
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.join(ROOT, "export"), os.path.join(ROOT, "tests")]

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

import flat
import plava

BUILD = os.path.join(ROOT, os.environ.get("BUILD", "build"))
PROGRAM = os.path.join(BUILD, "llava")
DIR = os.path.join(BUILD, "parity")
TOLERANCE, N_DECODED = 1e-4, 10
logging.disable_progress_bar()
torch.set_grad_enabled(False)
passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(("ok      " if ok else "FAILED  ") + what, flush=True)
    return ok


# ----------------------------------------------------------------------------
# our side

def run(*args):
    r = subprocess.run([PROGRAM, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if r.returncode:
        sys.exit(f"{' '.join(map(str, args))}: status {r.returncode}\n{r.stderr.decode()}")
    return r.stdout.decode(errors="replace")


def export(folder, model, kind="f32"):
    """A checkpoint's folder -> DIR/model, through export/llava.py."""
    path = os.path.join(DIR, model)
    r = subprocess.run([sys.executable, os.path.join(ROOT, "export", "llava.py"), folder, path, "--type", kind], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if r.returncode:
        sys.exit(f"export/llava.py {folder}: {r.stderr.decode()}")
    return path


def our_tokens(model, args):
    """The prompt as --tokens prints it: image rows are the image's id, as transformers wants them."""
    return [int(line.split("\t")[1]) for line in run(model, *args, "--tokens").splitlines()]


def our_logits(model, args, ids, vocab_size):
    forced, logits = os.path.join(DIR, "ids"), os.path.join(DIR, "logits")
    with open(forced, "w") as f:
        f.write(" ".join(map(str, ids)))
    run(model, *args, "--force-ids", forced, "--logits", logits, "-q", "-b", "cpu")
    return np.fromfile(logits, "<f4").reshape(-1, vocab_size)


# ----------------------------------------------------------------------------
# their side

def processor(f):
    mean, std = ([f[f"image_{x}_{i}"] for i in range(3)] for x in ("mean", "std"))
    return CLIPImageProcessorPil(size={"shortest_edge": f["image_size"]}, crop_size={"height": f["image_size"], "width": f["image_size"]}, image_mean=mean, image_std=std, do_convert_rgb=True)


def pixels(f, pictures):
    """(n, 3, size, size), or None without pictures. For image mode "pad" they are put on a square first, as LLaVA's authors do."""
    images = [Image.open(p).convert("RGB") for p in pictures]
    if f["image_mode"] == 1:
        for i, image in enumerate(images):
            side = max(image.size)
            square = Image.new("RGB", (side, side), (122, 116, 104))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            images[i] = square
    return processor(f)(images, return_tensors="pt")["pixel_values"] if images else None


def their_logits(hf, prompt, pixel_values, n_pieces, answer=None):
    """Logits of the prompt's last row and of each token after it; `answer` or the greedy one, N_DECODED tokens of which are fed."""
    rows, ids = [], []
    out = hf(input_ids=torch.tensor([prompt]), **({} if pixel_values is None else {"pixel_values": pixel_values}), use_cache=True)
    for i in range(N_DECODED + 1):
        rows.append(out.logits[0, -1].float().numpy())
        ids.append(answer[i] if answer else int(rows[-1][:n_pieces].argmax()))
        if i < N_DECODED:
            out = hf(input_ids=torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)
    return np.stack(rows), ids


def fields_of(model):
    return flat.read(model).fields


def theirs_of(model):
    """A model file as a transformers model: its fields as the config, its tensors taken apart again."""
    m = flat.read(model)
    f = m.fields
    act = ["gelu", "quick_gelu"][f["vision_act"]]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=f["vision_dim"], intermediate_size=f["vision_hidden_dim"], num_hidden_layers=f["vision_layers"] + 1, num_attention_heads=f["vision_heads"],
                                       image_size=f["image_size"], patch_size=f["patch_size"], hidden_act=act, layer_norm_eps=f["vision_eps"]),
        text_config=LlamaConfig(vocab_size=f["vocab_size"], hidden_size=f["dim"], intermediate_size=f["hidden_dim"], num_hidden_layers=f["n_layers"], num_attention_heads=f["n_heads"],
                                num_key_value_heads=f["n_kv_heads"], head_dim=f["head_dim"], rms_norm_eps=f["norm_eps"], rope_theta=f["rope_theta"], max_position_embeddings=f["max_positions"], tie_word_embeddings=False),
        image_token_index=f["image_id"], vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu", tie_word_embeddings=False, attn_implementation="eager")

    def get(name):
        x = m.tensors[name]
        if m.types[name] == flat.Q8_0:
            x = x[0].astype("f4") * np.repeat(x[1].astype("f4"), flat.BLOCK, axis=1)
        elif m.types[name] == flat.BF16:
            x = flat.bf16_to_f32(np.ascontiguousarray(x))
        return torch.from_numpy(np.array(x, "f4"))

    w, v, t = {}, "model.vision_tower.", "model.language_model."
    vd, patch, q, kv, hidden = f["vision_dim"], f["patch_size"], f["n_heads"] * f["head_dim"], f["n_kv_heads"] * f["head_dim"], f["hidden_dim"]

    def both(to, source):
        w[to + ".weight"], w[to + ".bias"] = get(source[0]), get(source[1])[0]

    w[v + "embeddings.class_embedding"] = get("vision.class")[0]
    w[v + "embeddings.patch_embedding.weight"] = get("vision.patch").reshape(vd, 3, patch, patch)
    w[v + "embeddings.position_embedding.weight"] = get("vision.pos")

    def norm(to, source):
        w[to + ".weight"], w[to + ".bias"] = get(source + "_w")[0], get(source + "_b")[0]

    norm(v + "pre_layrnorm", "vision.pre_norm")
    for i in range(f["vision_layers"]):
        to, ours = f"{v}encoder.layers.{i}.", f"vision.layers.{i}."
        norm(to + "layer_norm1", ours + "norm1")
        norm(to + "layer_norm2", ours + "norm2")
        for x, a, b in zip("qkv", get(ours + "wqkv").split(vd), get(ours + "bqkv")[0].split(vd)):
            w[f"{to}self_attn.{x}_proj.weight"], w[f"{to}self_attn.{x}_proj.bias"] = a, b
        both(to + "self_attn.out_proj", (ours + "wo", ours + "bo"))
        both(to + "mlp.fc1", (ours + "w1", ours + "b1"))
        both(to + "mlp.fc2", (ours + "w2", ours + "b2"))
    for i in 1, 2:
        both(f"model.multi_modal_projector.linear_{i}", (f"projector.w{i}", f"projector.b{i}"))
    w[t + "embed_tokens.weight"], w[t + "norm.weight"], w["lm_head.weight"] = get("tok_emb"), get("norm")[0], get("head")
    for i in range(f["n_layers"]):
        to, ours = f"{t}layers.{i}.", f"layers.{i}."
        w[to + "input_layernorm.weight"], w[to + "post_attention_layernorm.weight"] = get(ours + "att_norm")[0], get(ours + "ffn_norm")[0]
        for x, a in zip("qkv", get(ours + "wqkv").split([q, kv, kv])):
            w[f"{to}self_attn.{x}_proj.weight"] = a
        w[to + "self_attn.o_proj.weight"], w[to + "mlp.down_proj.weight"] = get(ours + "wo"), get(ours + "w2")
        w[to + "mlp.gate_proj.weight"], w[to + "mlp.up_proj.weight"] = get(ours + "w13").split(hidden)

    hf = LlavaForConditionalGeneration(config).float().eval()
    absent = hf.load_state_dict(w, strict=False)
    last = f"{v}encoder.layers.{f['vision_layers']}."           # never runs
    missing = [n for n in absent.missing_keys if not n.startswith((last, v + "post_layernorm")) and "position_ids" not in n]
    if missing or absent.unexpected_keys:
        sys.exit(f"{model}: transformers lacks {missing}, does not know {absent.unexpected_keys}")
    return hf


# ----------------------------------------------------------------------------
# one against the other

def distance(ours, theirs):
    return np.linalg.norm(ours.astype("f8") - theirs, axis=1) / np.linalg.norm(theirs.astype("f8"), axis=1)


def compare(name, hf, model, pictures, *args):
    """Prompt and ten tokens; returns what was compared, for more checks."""
    f = fields_of(model)
    args = (*pictures, *args)
    prompt = our_tokens(model, args)
    theirs, ids = their_logits(hf, prompt, pixels(f, pictures), f["n_pieces"])
    ours = our_logits(model, args, ids, f["vocab_size"])
    d = distance(ours, theirs)
    check(ours.shape == theirs.shape and d.max() <= TOLERANCE, f"{name}: {len(prompt)} rows, {len(pictures)} picture{'s' * (len(pictures) != 1)}: relative L2 prompt {d[0]:.1e}, worst of {len(ids) - 1} tokens {d[1:].max():.1e}")
    return ours, theirs, ids


def picture(name, w, h, seed):
    """Smooth colours with noise and a hard edge: what resizing, cropping and rounding could get wrong. Landscape: Pillow 13 resizes
    tall pictures in another order of passes than the Pillows of the released results, whose order is ours (image_parity.py has both)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:h, 0:w]
    rgb = np.stack([127 + 100 * np.sin(x / w * (3 + c) + c) * np.cos(y / h * (4 - c)) for c in range(3)], -1) + rng.normal(0, 12, (h, w, 3))
    rgb[h // 3:h // 2, w // 4:w // 2] = rng.integers(0, 256, 3)
    path = os.path.join(DIR, name)
    Image.fromarray(rgb.clip(0, 255).astype("u1")).save(path)
    return path


def load(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def random_checkpoint(folder, text, vision, image_id, seed, shard="50GB"):
    """A random LLaVA as transformers makes and saves it; and its float32 model."""
    torch.manual_seed(seed)
    config = LlavaConfig(text_config=LlamaConfig(tie_word_embeddings=False, rms_norm_eps=1e-5, **text), vision_config=CLIPVisionConfig(patch_size=14, **vision), image_token_index=image_id,
                         pad_token_id=image_id + 1, tie_word_embeddings=False, attn_implementation="eager")
    hf = LlavaForConditionalGeneration(config).float().eval()
    for name, p in hf.named_parameters():                       # norms are 1 and biases 0 at first: that would hide a mistake
        if p.dim() == 1:
            p.add_(torch.randn_like(p) * 0.1)
    shutil.rmtree(folder, ignore_errors=True)
    hf.save_pretrained(folder, max_shard_size=shard)
    size = vision["image_size"]
    plava.save_json(f"{folder}/preprocessor_config.json", {**plava.PROCESSOR, "crop_size": {"height": size, "width": size}, "size": {"shortest_edge": size}})
    plava.save_json(f"{folder}/tokenizer_config.json", {"legacy": True})
    with open(f"{folder}/tokenizer.model", "wb") as out:
        out.write(plava.tokenizer_model())
    return hf


# ----------------------------------------------------------------------------
# the cases

def p_llava():
    folder = os.path.join(DIR, "p-llava")
    plava.write_hf(folder)
    hf = load(folder)

    # transformers with these weights gives the numbers that test_llava.c holds ours to
    expand = [i for t in (1, 17, 18, 500, 19, 20, 13, 500, 77, 78) for i in ([t] * 16 if t == 500 else [t])]
    rows, ids = their_logits(hf, expand, torch.from_numpy(plava.values("pixel_values", (2, 3, 56, 56), 2.0, 0)), 512)
    golden = [0.211750, 0.776589, -0.164312, -0.752620, 0.901337, 0.525735]
    check(np.abs(rows[0][:6] - golden).max() < 2e-5 and ids[:6] == [153, 10, 10, 10, 10, 10], f"P-LLaVA: transformers gives the published numbers (largest difference {np.abs(rows[0][:6] - golden).max():.1e}) and ids {ids[:6]}")

    model = export(folder, "p-llava.bin")
    a, b, c = picture("a.png", 90, 71, 1), picture("b.png", 56, 56, 2), picture("c.png", 300, 40, 3)
    ours, theirs, ids = compare("P-LLaVA", hf, model, [a], "-i", "what is on the hand")
    compare("P-LLaVA, no picture", hf, model, [], "-i", "there and then")
    compare("P-LLaVA, the picture right after BOS", hf, model, [a], "-i", "<image>is that it", "--template", "raw")
    compare("P-LLaVA, nothing but a picture", hf, model, [c], "-i", "", "--template", "plain")
    compare("P-LLaVA, two pictures", hf, model, [a, b], "-i", "here <image> and there <image>, then", "--template", "raw")
    compare("P-LLaVA, side by side", hf, model, [c, b], "-i", "<image><image>", "--template", "raw")
    compare("P-LLaVA, five pictures, system text", hf, model, [a, b, c, b, a], "-i", "which?", "--template", "vicuna_v1")

    # does the measure see a mistake?
    f = fields_of(model)
    prompt = our_tokens(model, [a, "-i", "what is on the hand"])
    d = distance(our_logits(model, [b, "-i", "what is on the hand"], ids, f["vocab_size"]), theirs)
    check(d.min() > 1e-2, f"P-LLaVA, another picture: relative L2 {d.min():.1e} at least: seen")
    d = distance(their_logits(hf, prompt[1:], pixels(f, [a]), f["n_pieces"], ids)[0], theirs)
    check(d.min() > 1e-3, f"P-LLaVA, without BOS: relative L2 {d.min():.1e} at least: seen")

    for layout in ("new", "flat", "new-flat"):
        folder = os.path.join(DIR, "p-llava-" + layout)
        plava.write_hf(folder, layout, n_shards=3)
        compare(f"P-LLaVA, layout {layout}, in shards", hf if layout == "new-flat" else load(folder), export(folder, "layout.bin"), [a], "-i", "what is on the hand")
    return a, b


def kinds(a, b):
    for kind in ("f32", "f16", "bf16", "q8_0"):
        model = export(os.path.join(DIR, "p-llava"), "kind.bin", kind)
        compare(f"P-LLaVA in {kind}", theirs_of(model), model, [a, b], "-i", "what is on the hand")
    f = export(os.path.join(DIR, "p-llava"), "kind.bin", "f32")
    pad = export(os.path.join(DIR, "p-llava"), "pad.bin")
    m = bytearray(open(pad, "rb").read())                       # image mode: pad
    at = m.index(b"image_mode\0") + 48
    m[at] = 1
    with open(pad, "wb") as out:
        out.write(m)
    compare("P-LLaVA, image mode pad", theirs_of(f), pad, [a, picture("tall.png", 60, 171, 4)], "-i", "what is on the hand")


def other_shapes(a, b):
    vision = dict(hidden_size=48, intermediate_size=100, num_hidden_layers=3, num_attention_heads=3, image_size=70)
    shapes = {"8 KV heads for 16": dict(vocab_size=520, hidden_size=256, intermediate_size=344, num_hidden_layers=3, num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=600),
              "one KV head for 6": dict(vocab_size=520, hidden_size=96, intermediate_size=172, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=1, max_position_embeddings=600),
              "heads of 40 in a dim of 100, theta 1e6": dict(vocab_size=520, hidden_size=100, intermediate_size=90, num_hidden_layers=2, num_attention_heads=10, num_key_value_heads=2, head_dim=40, max_position_embeddings=600,
                                                             rope_parameters={"rope_type": "default", "rope_theta": 1e6})}
    for i, (name, text) in enumerate(shapes.items()):
        folder = os.path.join(DIR, "shape")
        hf = random_checkpoint(folder, text, vision, 510, 10 + i, "300KB")
        for p in hf.parameters():                               # transformers starts small: logits of all ids would be alike
            p.data *= 3 if p.dim() > 1 else 1
        hf.save_pretrained(folder, max_shard_size="300KB")
        model = export(folder, "shape.bin")
        compare(name, hf, model, [b, a], "-i", "what <image> is <image> that")
        compare(name + ", a long prompt", hf, model, [b], "-i", "the hand and the other " * 30)


def scenes(model):
    hf = theirs_of(model)
    f = fields_of(model)
    files = sorted(glob.glob(os.path.join(ROOT, "models", "scenes", "*.png")))[:6] or [picture("scene.png", 112, 112, 5)]
    questions = ["Describe the image in detail.", "How many shapes are there?", "What is in the center?", "Is there a red circle?", "What colour is the background?"]
    same = 0
    for i, p in enumerate(files):
        ours, theirs, ids = compare(f"scenes {os.path.basename(p)}", hf, model, [p], "-i", questions[i % len(questions)])
        greedy = our_greedy(model, [p, "-i", questions[i % len(questions)]], f)
        same += greedy == ids[:len(greedy)]
    check(same == len(files), f"scenes: {same} of {len(files)} greedy answers begin with the same ids")
    compare("scenes, a photo's size", hf, model, [picture("photo.png", 640, 480, 6)])
    compare("scenes, two pictures", hf, model, [files[0], files[-1]], "-i", "<image> or <image>?")
    compare("scenes, no picture", hf, model, [], "-i", "How many shapes are there?", "--template", "vicuna_v1")


def our_greedy(model, args, f):
    """Our own answer, up to as many ids as transformers gave."""
    logits = os.path.join(DIR, "logits")
    run(model, *args, "-n", N_DECODED + 1, "--logits", logits, "-q")
    return [int(row[:f["n_pieces"]].argmax()) for row in np.fromfile(logits, "<f4").reshape(-1, f["vocab_size"])]


def real_widths():
    folder = os.path.join(DIR, "real")
    text = dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096)
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=16, image_size=336)
    try:
        hf = random_checkpoint(folder, text, vision, 32000, 1, "1GB")
        model = export(folder, "real.bin")
        shutil.rmtree(folder)
        compare("real widths", hf, model, [picture("large.png", 800, 533, 7)], "-i", "What is unusual about this image?")
        compare("real widths, no picture", hf, model, [], "-i", "What is usual?")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if os.path.exists(os.path.join(DIR, "real.bin")):
            os.remove(os.path.join(DIR, "real.bin"))


model = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else os.path.join(ROOT, "models", "scenes-llava.bin")
os.makedirs(DIR, exist_ok=True)
a, b = p_llava()
kinds(a, b)
other_shapes(a, b)
scenes(model)
real_widths()
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
