#!/usr/bin/env python3
"""kvpress on the questions of `llama report`: prunes after the text, then reads question and answer; prints each press.

    python3 -m pip install kvpress==0.5.5 gguf     # brings PyTorch and transformers 5; gguf reads GGUF files
    llama report $M $T --out unused --write-tasks tasks.json
    python3 peers/kvpress_peer.py --model FOLDER_OR_ID --tasks tasks.json --hidden 0.5 --out kvpress.json

`--model` is the checkpoint of tasks.json as transformers reads it; of a GGUF file give its folder and --gguf NAME. The
presses keep as many tokens as ours do at that --hidden, --window and --sinks. Without kvpress it prints a line that
says so, and succeeds.
"""

import argparse
import json
import math
import sys
from collections import defaultdict


def kept(context, tokens, hidden, window, sinks):
    """How many tokens of a context, of all tokens, the report's own prunings keep."""
    return max(1, context - round(hidden * max(0, tokens - 1 - window - sinks)))


def mean_and_error(numbers):
    count = len(numbers)
    mean = sum(numbers) / count
    squares = sum((x - mean) ** 2 for x in numbers)
    return mean, math.sqrt(squares / max(count - 1, 1) / count)


def answer(torch, cache, model, question, press):
    """The nats of the answer, and whether each of its tokens is the likeliest."""
    tokens = torch.tensor([question["tokens"]], device=model.device)
    context, count = question["context"], question["answer"]
    if press is None:
        model.model(input_ids=tokens[:, :context], past_key_values=cache)
    else:
        with press(model):
            model.model(input_ids=tokens[:, :context], past_key_values=cache)
    rest = tokens[:, context:]
    # Tokens keep their places, as if nothing were dropped.
    places = torch.arange(context, tokens.shape[1], device=model.device).unsqueeze(0)
    logits = model(input_ids=rest, past_key_values=cache, position_ids=places).logits[0, -count - 1 : -1].float()
    targets = rest[0, -count:]
    nats = -logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).sum().item()
    return nats, bool((logits.argmax(-1) == targets).all())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", help="the GGUF file in that folder")
    parser.add_argument("--tasks", required=True, help="a file of llama report --write-tasks")
    parser.add_argument("--hidden", type=float, default=0.5, help="the share to drop of tokens past window and sinks")
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="a file for the results as JSON")
    args = parser.parse_args()
    try:
        import torch
        from kvpress import ExpectedAttentionPress, KnormPress, SnapKVPress
        from transformers import AutoModelForCausalLM, DynamicCache
        from transformers.utils import logging
    except ImportError as error:
        print(f"kvpress's rows are left out: {error}; install kvpress")
        return 0
    logging.disable_progress_bar()
    with open(args.tasks) as file:
        questions = json.load(file)["questions"]
    kwargs = {"gguf_file": args.gguf} if args.gguf else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), **kwargs)
    model = model.to(args.device).eval()
    presses = {
        "dense": None,
        "knorm": lambda ratio: KnormPress(ratio),
        "snapkv": lambda ratio: SnapKVPress(ratio, window_size=32, kernel_size=7),
        "expected": lambda ratio: ExpectedAttentionPress(ratio),
    }
    rows = defaultdict(list)
    with torch.no_grad():
        for question in questions:
            context = question["context"]
            # A press keeps int(context * (1 - ratio)).
            count = kept(context, len(question["tokens"]), args.hidden, args.window, args.sinks)
            ratio = 1 - (count + 0.5) / context
            task = " ".join(question["name"].split()[:2])
            for name, make in presses.items():
                press = make and make(max(ratio, 0.0))
                rows[task, name].append(answer(torch, DynamicCache(), model, question, press))
    results = []
    for (task, name), answers in rows.items():
        nats, error = mean_and_error([nats for nats, _ in answers])
        found = sum(right for _, right in answers) / len(answers)
        results.append({"task": task, "method": name, "samples": len(answers), "nats": nats, "standard_error": error,
                        "found": found})
        print(f"{task:18} {name:9} {len(answers):4} samples  {nats:8.3f} ± {error:.3f} nats  {found:.2f} right")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"hidden": args.hidden, "rows": results}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
