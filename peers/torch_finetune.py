"""Dense fine-tuning of a Llama by PyTorch, for the speed and memory rows of docs/results/training.md.

The model has SmolLM2-135M's sizes and random weights: f32 masters, bf16 products by autocast, PyTorch's flash
attention, cross entropy over the whole vocabulary, and its fused AdamW. Prints the median seconds of a step and the
peak memory.

    python3 peers/torch_finetune.py [BATCH] [CONTEXT] [STEPS]
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM, VOCABULARY = 576, 1536, 30, 9, 3, 64, 49152
BATCH, CONTEXT, STEPS = (int(sys.argv[i]) if len(sys.argv) > i else n for i, n in ((1, 16), (2, 1024), (3, 30)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        linear = lambda columns, rows: nn.Linear(columns, rows, bias=False)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.q = linear(HIDDEN, HEADS * DIM)
        self.k, self.v = linear(HIDDEN, KV_HEADS * DIM), linear(HIDDEN, KV_HEADS * DIM)
        self.o = linear(HEADS * DIM, HIDDEN)
        self.gate, self.up, self.down = linear(HIDDEN, INNER), linear(HIDDEN, INNER), linear(INNER, HIDDEN)

    def forward(self, xs, cos, sin):
        batch, tokens, _ = xs.shape
        normed = self.attention_norm(xs)
        split = lambda rows, heads: rows.view(batch, tokens, heads, DIM).transpose(1, 2)
        q, k, v = split(self.q(normed), HEADS), split(self.k(normed), KV_HEADS), split(self.v(normed), KV_HEADS)
        turn = lambda x: torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)
        q, k = q * cos + turn(q) * sin, k * cos + turn(k) * sin
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            ys = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        xs = xs + self.o(ys.transpose(1, 2).reshape(batch, tokens, HEADS * DIM))
        normed = self.mlp_norm(xs)
        return xs + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(HIDDEN)

    def forward(self, ids, cos, sin):
        xs = self.embedding(ids)
        for layer in self.layers:
            xs = layer(xs, cos, sin)
        return F.linear(self.norm(xs), self.embedding.weight)


def main():
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Llama().cuda()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    angles = torch.outer(torch.arange(CONTEXT), 1e5 ** (-torch.arange(0, DIM, 2) / DIM)).repeat(1, 2).cuda()
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    step_of = {"eager": model, "torch.compile": torch.compile(model)}
    for name, run in step_of.items():
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(STEPS):
            ids = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), device="cuda")
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                logits = run(ids[:, :-1], cos, sin)
                loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / 2**30
        print(
            f"torch {torch.__version__} {name}: {statistics.median(seconds[5:]):.4f} s a step of {BATCH} x {CONTEXT}, "
            f"peak {peak:.1f} GiB, loss {loss.item():.3f}"
        )


main()
