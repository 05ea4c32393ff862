"""What PyTorch and transformers reach on this card at the shapes that gpu_model.c measures: random f16 weights, the same rows.

    python3 tests/gpu_peer.py matmul        TFLOP/s of torch.matmul, bf16, 8192 x 8192
    python3 tests/gpu_peer.py 7B|13B        tables: vision tower (7B), prompt, decode, batch 16
    python3 tests/gpu_peer.py dry           toy sizes on the CPU: the numbers mean nothing, but every line has run

Eager with attentions is what research code for KV-cache compression runs, because it needs the maps; sdpa is the fast path.
"""

import sys
import time

import torch

DRY = sys.argv[1:] == ["dry"]
DEVICE = "cpu" if DRY else "cuda"


def median_ms(run, n):
    times = []
    for i in range(n + 2):
        if not DRY:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if not DRY:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times[2:])[n // 2]


def matmul():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    print(f"{2 * 8192 ** 3 / median_ms(lambda: a @ b, 20) / 1e9:.0f}")


def models(size):
    import transformers
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
    torch.set_default_dtype(torch.float32 if DRY else torch.float16)
    runs = 1 if DRY else 5
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32} if size == "7B" else \
            {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    prompts, context, batch_rows, batch_tokens = (620, 2048), 650, 1024, 512
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
    if DRY:
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
        vision.update(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=56)
        prompts, context, batch_rows, batch_tokens = (30, 70), 40, 40, 4
    shape["num_key_value_heads"] = shape["num_attention_heads"]

    versions = f"PyTorch {torch.__version__}, transformers {transformers.__version__}"
    with torch.device(DEVICE), torch.no_grad():
        if size != "13B":
            tower = CLIPVisionModel._from_config(CLIPVisionConfig(**vision), attn_implementation="sdpa").eval()
            pixels = torch.randn(1, 3, vision["image_size"], vision["image_size"])
            print(f"vision tower, sdpa ({versions}): {median_ms(lambda: tower(pixels), runs):.2f} ms\n", flush=True)
            del tower
        heads = [f"prompt {T}, ms" for T in prompts] + [f"decode at {context}, tokens/s: batch {B}" for B in (1, 8, 16)] \
            + [f"batch 16, {batch_rows} + {batch_tokens}, tokens/s"]
        print(f"| {size}, {versions} | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 1))
        for kind in "eager", "sdpa":
            model = LlamaForCausalLM._from_config(LlamaConfig(vocab_size=32064, **shape), attn_implementation=kind).eval()

            def ids(*rows):
                return torch.randint(0, 32000, rows)

            def read(x, past=None):
                return model(x, past_key_values=past, use_cache=True, output_attentions=kind == "eager" and past is None, logits_to_keep=1)

            row = [f"{median_ms(lambda: read(prompt), runs):.1f}" for prompt in (ids(1, T) for T in prompts)]
            for B, slots, steps in (1, context, 20), (8, context, 20), (16, context, 20), (16, batch_rows, 40):
                past = model(ids(B, slots), use_cache=True, logits_to_keep=1).past_key_values
                if slots == batch_rows:                        # a few steps at the middle length stand for all of them
                    past = model(ids(B, batch_tokens // 2), past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
                one = ids(B, 1)
                row.append(f"{B * 1e3 / median_ms(lambda: read(one, past), 1 if DRY else steps):.1f}")
                del past
            print(f"| {kind}{' with attentions' if kind == 'eager' else ''} | " + " | ".join(row) + " |", flush=True)
            del model
            if not DRY:
                torch.cuda.empty_cache()
    print()


if len(sys.argv) != 2 or sys.argv[1] not in ("matmul", "7B", "13B", "dry"):
    sys.exit(__doc__)
if sys.argv[1] == "matmul":
    matmul()
else:
    models("7B" if DRY else sys.argv[1])
