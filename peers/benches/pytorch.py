#!/usr/bin/env python3
"""PyTorch's attention on the CPU, timed as the benches time ours.

    python3 peers/benches/pytorch.py                                 # prints PyTorch's rows
    SFATTENTION_PYTHON=python3 cargo bench -p peers --bench forward  # puts them beside ours, timed in the same run

Needs the package torch, whatever build; no GPU is used. Each call is verified against softmax(QK^T)V first.
"""

import argparse
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

SHAPES = [(8, 1024, 64), (8, 4096, 64), (8, 4096, 128)]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def inputs(heads, tokens, dim, dtype, gradients):
    torch.manual_seed(0)
    shape = (1, heads, tokens, dim)
    tensors = [torch.randn(shape).to(DTYPES[dtype]).requires_grad_(gradients) for _ in range(3)]
    return tensors + [torch.ones(shape, dtype=DTYPES[dtype])]


def call(mode, q, k, v, weights):
    if mode == "forward":
        with torch.no_grad():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return torch.autograd.grad(output, (q, k, v), weights)[0]


def verify(dtype):
    """A small case of the same call against plain operations in float64."""
    q, k, v, _ = (x.detach() for x in inputs(2, 65, 64, dtype, False))
    got = call("forward", q, k, v, None).double()
    scores = q.double() @ k.double().mT / 8
    mask = torch.ones(65, 65, dtype=torch.bool).triu(1)
    want = scores.masked_fill(mask, -torch.inf).softmax(-1) @ v.double()
    bound = {"f32": 1e-5, "f16": 5e-3, "bf16": 4e-2}[dtype]
    worst = (got - want).abs().max().item()
    assert worst <= bound, f"{dtype}: PyTorch differs from softmax by {worst}"


def seconds(mode, heads, tokens, dim, dtype):
    """The median of calls of about two seconds in all."""
    tensors = inputs(heads, tokens, dim, dtype, mode != "forward")
    times, end = [], time.perf_counter() + 2.0
    call(mode, *tensors)
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        start = time.perf_counter()
        call(mode, *tensors)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def memory(mode, heads, tokens, dim, dtype):
    """Bytes that one call holds at its peak beyond its inputs, results included: from the kernel's high-water mark."""

    def read(field):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    tensors = inputs(heads, tokens, dim, dtype, mode != "forward")
    call(mode, *inputs(heads, 64, dim, dtype, mode != "forward"))
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = read("VmRSS")
    call(mode, *tensors)
    return max(0, read("VmHWM") - before)


def serve():
    """One request a line, `time|memory forward|backward heads tokens dim dtype`; one number a line comes back."""
    verified = set()
    for line in sys.stdin:
        what, mode, heads, tokens, dim, dtype = line.split()
        if dtype not in verified:
            verify(dtype)
            verified.add(dtype)
        measure = {"time": seconds, "memory": memory}[what]
        print(measure(mode, int(heads), int(tokens), int(dim), dtype), flush=True)


def table():
    for dtype in DTYPES:
        verify(dtype)
    for heads, tokens, dim in SHAPES:
        print(f"\nH={heads} N={tokens} D={dim}\n{'median of':<34}{'ms':>11}  GFLOP/s")
        for mode, products in (("forward", 2), ("backward", 7)):
            for dtype in DTYPES:
                took = seconds(mode, heads, tokens, dim, dtype)
                name = f"PyTorch SDPA {dtype}" + (", forward + backward" if mode == "backward" else "")
                rate = products * heads * tokens * tokens * dim / took / 1e9
                print(f"{name:<34}{took * 1e3:>11.2f}  {rate:.0f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help=serve.__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads", file=sys.stderr)
    serve() if arguments.serve else table()
