#!/usr/bin/env python3
"""llama.cpp on the tokens that `llama bench` runs: prompt at once, then one token at a time; prints tokens per second.

    python3 -m pip install llama-cpp-python        # builds llama.cpp: needs cmake and a C++ compiler
    python3 peers/llama_cpp_peer.py --model data/SmolLM2-135M-Instruct.Q4_1.gguf --prompts 64,1024 --threads 1

Without that package it prints a line that says so, and succeeds. With --nll it prints the mean negative log likelihood
of the decoded tokens, so that its logits can be compared with ours on the same text.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path


def nll(logits, token):
    most = max(logits)
    return most + math.log(sum(math.exp(x - most) for x in logits)) - logits[token]


def measure(llama, tokens, prompt, with_nll):
    llama.reset()
    start = time.perf_counter()
    llama.eval(tokens[:prompt])
    prefill = time.perf_counter() - start
    seconds, loss = 0.0, 0.0
    for token in tokens[prompt:]:
        if with_nll:
            loss += nll(llama.scores[llama.n_tokens - 1].tolist(), token)
        start = time.perf_counter()
        llama.eval([token])
        seconds += time.perf_counter() - start
    decoded = len(tokens) - prompt
    return prompt / prefill, decoded / seconds, loss / decoded


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default="data/moby-dick.txt")
    parser.add_argument("--prompts", default="64,1024", help="lengths in tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens after each prompt, of the text")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--nll", action="store_true")
    args = parser.parse_args()
    try:
        from llama_cpp import Llama
    except ImportError as error:
        print(f"llama.cpp's rows are left out: {error}; install llama-cpp-python")
        return 0
    prompts = [int(prompt) for prompt in args.prompts.split(",")]
    longest = max(prompts) + args.decode
    llama = Llama(args.model, n_ctx=longest, n_batch=512, n_threads=args.threads, n_threads_batch=args.threads,
                  logits_all=args.nll, verbose=False)
    # A token has far fewer than 16 bytes of text.
    text = Path(args.text).read_bytes()[: 16 * longest]
    tokens = llama.tokenize(text)[:longest]  # with BOS where the file says so, as there
    if len(tokens) < longest:
        sys.exit(f"error: text: expected at least {longest} tokens, got {len(tokens)}; give a longer one with --text")
    print("prompt  attention   prefill tok/s  decode tok/s" + ("  nll of the decoded tokens" if args.nll else ""))
    for prompt in prompts:
        prefill, decode, loss = measure(llama, tokens[: prompt + args.decode], prompt, args.nll)
        line = f"{prompt:>6}  {'llama.cpp':<10}  {prefill:>13.1f}  {decode:>12.1f}"
        print(line + (f"  {loss:.4f}" if args.nll else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
