"""Times PyTorch's decoding of a Llama-shaped model of random weights, the peer of `llama bench --shape llama-3.1-8b
--random-weights` in the same run on the same device: scaled_dot_product_attention over a static cache of the whole
context, bf16, eager and as a CUDA graph. Prints tokens a second by batch, for dense attention only.

Run: python3 peers/benches/pytorch_serve.py [CONTEXT[,CONTEXT..] [BATCH[,BATCH..]]] (8192,32768 and 1,8,max by default).
Needs a CUDA device and PyTorch 2.5 or newer.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB = 32, 4096, 14336, 32, 8, 128, 128256
WARM_UP, STEPS = 4, 32


def weight(rows, columns):
    return torch.empty(rows, columns, device="cuda", dtype=torch.bfloat16).uniform_(-0.02, 0.02)


class Layer:
    def __init__(self):
        self.qkv = weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)
        self.out = weight(HIDDEN, HEADS * DIM)
        self.gate_up = weight(2 * INNER, HIDDEN)
        self.down = weight(HIDDEN, INNER)
        self.norms = torch.ones(2, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def __call__(self, x, cache, at, turn):
        batch = x.shape[0]
        qkv = F.linear(F.rms_norm(x, (HIDDEN,), self.norms[0]), self.qkv).view(batch, -1, 1, DIM)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = rotated(q, turn), rotated(k, turn)
        keys, values = cache
        keys.index_copy_(2, at, k)
        values.index_copy_(2, at, v)
        rows = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        x = x + F.linear(rows.reshape(batch, HEADS * DIM), self.out)
        gate, up = F.linear(F.rms_norm(x, (HIDDEN,), self.norms[1]), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


def rotated(x, turn):
    cos, sin = turn
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


class Model:
    def __init__(self):
        self.embedding = weight(VOCAB, HIDDEN)
        self.layers = [Layer() for _ in range(LAYERS)]
        self.head = weight(VOCAB, HIDDEN)
        angle = torch.ones(DIM // 2, device="cuda")
        self.turn = (angle.cos().bfloat16(), angle.sin().bfloat16())

    def step(self, tokens, caches, at):
        x = F.embedding(tokens, self.embedding)
        for layer, cache in zip(self.layers, caches):
            x = layer(x, cache, at, self.turn)
        return F.linear(x, self.head).argmax(-1)


def seconds_of_a_step(run):
    times = []
    for _ in range(WARM_UP + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def caches_of(batch, context):
    shape = (batch, KV_HEADS, context, DIM)
    one = lambda: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    return [(one(), one()) for _ in range(LAYERS)]


@torch.inference_mode()
def measure(model, batch, context):
    caches = caches_of(batch, context)
    tokens = torch.randint(VOCAB, (batch,), device="cuda")
    at = torch.tensor([context - 1], device="cuda")
    eager = seconds_of_a_step(lambda: model.step(tokens, caches, at))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step(tokens, caches, at)
    graphed = seconds_of_a_step(graph.replay)
    print(
        f"context {context:>6}  batch {batch:>3}  KV {batch * context * KV_HEADS * DIM * 4 * LAYERS / 2**30:7.2f} GiB  "
        f"eager {batch / eager:8.1f} tok/s  {eager * 1e3:7.2f} ms   graph {batch / graphed:8.1f} tok/s  "
        f"{graphed * 1e3:7.2f} ms",
        flush=True,
    )


def largest(context):
    free, _ = torch.cuda.mem_get_info()
    # Room for a step's own tensors.
    return int((free - 3 * 2**30) // (context * KV_HEADS * DIM * 4 * LAYERS))


def main():
    given = lambda index, default: (sys.argv[index] if len(sys.argv) > index else default).split(",")
    print(f"PyTorch {torch.__version__}, {torch.cuda.get_device_name()}")
    model = Model()
    for context in map(int, given(1, "8192,32768")):
        for batch in given(2, "1,8,max"):
            torch.cuda.empty_cache()
            rows = largest(context) if batch == "max" else int(batch)
            while rows > 0:
                try:
                    measure(model, rows, context)
                    break
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    rows -= 1


if __name__ == "__main__":
    main()
