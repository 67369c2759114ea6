"""Times PyTorch's attention, by cuDNN and by its own flash kernels, on the shapes of examples/bench_gpu and prints the
same lines, each with its backend. Also times the published SFAttention algorithm as published: tests of all levels,
sweeps, folded tensors and an N x N softmax, forward only, up to N = 4096 (larger matrices would not fit).

Run: python3 peers/benches/pytorch_gpu.py [LONGEST [SHORTEST [PARTS]]] (N, and some of attention,published,decode; all
by default). Needs a CUDA device and PyTorch 2.5 or newer.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def timed(call):
    """Seconds of one call: the median of five rounds, after a warm-up."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    repeats = int(min(max(0.05 / (time.perf_counter() - start), 2), 200))
    rounds = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - start) / repeats)
    return statistics.median(rounds)


def ceilings():
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * 8192**3 / timed(lambda: a @ a) / 1e12
    big = torch.zeros(1 << 30, device="cuda", dtype=torch.bfloat16)
    copy = 4 * (1 << 30) / timed(big.clone) / 1e12
    return product, copy


def tensors(batch, heads, kv_heads, rows, tokens, dim, grad=False):
    def one(heads, tokens):
        return torch.randn(batch, heads, tokens, dim, device="cuda", dtype=torch.bfloat16, requires_grad=grad)

    return one(heads, rows), one(kv_heads, tokens), one(kv_heads, tokens)


def name(batch, heads, kv_heads, tokens, dim):
    return f"B {batch} H {heads} Hk {kv_heads} N {tokens:>6} D {dim:>3}"


def attention(backend, batch, heads, kv_heads, tokens, dim, product, parts):
    tflop = 4 * batch * heads * tokens * tokens / 2 * dim / 1e12
    grouped = heads != kv_heads

    def line(what, seconds, tflop):
        speed = tflop / seconds
        shape = name(batch, heads, kv_heads, tokens, dim)
        share = 100 * speed / product
        print(
            f"{what:<17} {shape} r 0    {seconds * 1e3:>9.3f} ms {speed:>7.1f} TFLOP/s {share:>5.1f}% of a product, "
            f"{backend}"
        )

    q, k, v = tensors(batch, heads, kv_heads, tokens, tokens, dim)
    forward = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if "attention" in parts:
        line("forward", timed(forward), tflop)
    if "published" in parts and tokens <= 4096 and backend == "flash":
        line("published dense", timed(lambda: published(q, k, v)), tflop)
    qg, kg, vg = tensors(batch, heads, kv_heads, tokens, tokens, dim, grad=True)
    ones = torch.ones_like(qg)

    def both():
        out = F.scaled_dot_product_attention(qg, kg, vg, is_causal=True, enable_gqa=grouped)
        torch.autograd.grad(out, (qg, kg, vg), ones)

    if "attention" in parts:
        line("forward+backward", timed(both), 3.5 * tflop)


def merge_indicators(q, k, threshold=0.0175, levels=5):
    """The published rule with the difference strategy: candidates of every level, then sweeps that clear bits."""
    tokens = q.shape[2]
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    candidates = torch.zeros(*q.shape[:2], tokens - 1, levels, dtype=torch.bool, device=q.device)
    for level in range(levels):
        cosine = (q[:, :, level + 1 :] * k[:, :, : tokens - level - 1]).sum(-1)
        candidates[:, :, : tokens - level - 1, level] = cosine.abs() < threshold
    bits = candidates[..., 0].clone()
    index = torch.arange(tokens - 1, device=q.device)
    for _ in range(2 * levels):
        if not (bits[..., 1:] & bits[..., :-1]).any():
            break
        gap = torch.where(bits, -1, index).cummax(-1).values
        # From 0 in a run, from 1 in the run at the very start.
        number = index - gap - 1 + (gap < 0)
        reached = candidates.gather(-1, number.clamp(0, levels - 1).unsqueeze(-1)).squeeze(-1)
        invalid = bits & ((number > levels) | ((number >= 1) & (number < levels) & ~reached))
        if not invalid.any():
            break
        bits &= ~invalid
    return bits


def published(q, k, v):
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bits = merge_indicators(q, k)
    left = F.pad(bits, (1, 0)).unsqueeze(-1)
    q, k, v = (x + left * F.pad(x, (0, 0, 1, -1)) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    tokens = q.shape[2]
    hidden = F.pad(bits, (0, 1)).unsqueeze(-2) & ~torch.eye(tokens, dtype=torch.bool, device=q.device)
    future = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    return logits.masked_fill(hidden | future, float("-inf")).softmax(-1) @ v


def decode(backend, batch, heads, kv_heads, tokens, dim, copy):
    q, k, v = tensors(batch, heads, kv_heads, 1, tokens, dim)
    seconds = timed(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads))
    speed = 4 * batch * kv_heads * tokens * dim / seconds / 1e12
    shape = name(batch, heads, kv_heads, tokens, dim)
    print(
        f"{'decode':<17} {shape}        {seconds * 1e3:>9.3f} ms {speed:>7.3f} TB/s "
        f"{100 * speed / copy:>5.1f}% of a copy, {backend}"
    )


def main():
    longest = int(sys.argv[1]) if len(sys.argv) > 1 else 65536
    shortest = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    parts = sys.argv[3].split(",") if len(sys.argv) > 3 else ["attention", "published", "decode"]
    print(f"PyTorch {torch.__version__} on {torch.cuda.get_device_name()}")
    product, copy = ceilings()
    print(f"ceilings: product {product:.0f} TFLOP/s, copy {copy:.2f} TB/s")
    backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    print(f"cuDNN {torch.backends.cudnn.version()}")

    def each(lengths, groups, run):
        for tokens in (n for n in lengths if shortest <= n <= longest):
            for dim, heads in ((64, 32), (128, 16)):
                for kv_heads in (heads // group for group in groups):
                    for backend, kind in backends.items():
                        with sdpa_kernel(kind):
                            run(backend, heads, kv_heads, tokens, dim)

    each(
        (1024, 4096, 16384, 65536),
        (1, 4),
        lambda backend, heads, kv_heads, tokens, dim: attention(
            backend, min(max(16384 // tokens, 1), 4), heads, kv_heads, tokens, dim, product, parts
        ),
    )
    if "decode" in parts:
        each((8192, 16384, 32768, 65536), (1, 4, 8), lambda backend, *shape: decode(backend, 4, *shape, copy))


if __name__ == "__main__":
    main()
