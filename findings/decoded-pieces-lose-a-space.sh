#!/usr/bin/env bash
# tokenizers 0.23.3 with the decoder of SentencePiece models (Llama 2): the pieces that DecodeStream gives after a
# prompt do not add up to the decoded whole, because the first one lacks its leading space. And a run of byte tokens in
# which one character is broken or unfinished loses its whole characters too.
#
#   findings/decoded-pieces-lose-a-space.sh     prints both, and fails if they are others
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" -q install --disable-pip-version-check tokenizers==0.23.3
"$dir/venv/bin/python" - <<'PYTHON' | tee "$dir/got"
from tokenizers import Tokenizer, models
from tokenizers.decoders import ByteFallback, DecodeStream, Fuse, Replace, Sequence, Strip

words = ["<unk>", "▁The", "▁whale", "▁went"] + [f"<0x{b:02X}>" for b in range(256)]
tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>"))
tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
pieces = tokenizer.decode([1, 2]) + DecodeStream().step(tokenizer, 3)
print("whole", repr(tokenizer.decode([1, 2, 3])), "pieces", repr(pieces))
broken = b"\xc3\xa9\xe2"
ids = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in broken]
print("whole characters lost", repr(tokenizer.decode(ids)), "bytes", repr(broken.decode(errors="replace")))
PYTHON
diff "$dir/got" - <<'EXPECTED'
whole 'The whale went' pieces 'The whalewent'
whole characters lost '���' bytes 'é�'
EXPECTED
