#!/usr/bin/env bash
# Packs what a machine with a GPU needs to test and to time the crate, and no toolkit: stripped binaries, the files that
# they read, and cuda/tools/run-report.sh. Needs the real nvcc (cuda/tools/toolkit.sh sets one up) and CUDA_COMPUTE_CAP
# of that GPU.
#
#   cuda/tools/pack.sh PACK.tar.xz [NAME...]     NAME: `device` (the tests) or an example; by default those below
#
# There: mkdir pack && tar -xJf PACK.tar.xz -C pack && pack/run-report.sh REPORT-FOLDER
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- device bench_gpu llama
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bin" "$work/tests"
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}
build() { cargo "$@" --locked --features cuda --message-format=json-render-diagnostics; }
for name in "$@"; do
  case $name in
    device) build test --no-run --test "$name" ;;
    *) build build --example "$name" ;;
  esac
done | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])
' >"$work/binaries"
while read -r name path; do
  strip -o "$work/bin/$name" "$path"
done <"$work/binaries"
rm "$work/binaries"
# Tests look for these in the folder they start in.
cp -r tests/data "$work/tests/"
mkdir -p "$work/examples/llama"
cp -r examples/llama/assets "$work/examples/llama/"
cp cuda/tools/run-report.sh README.md "$work/"
# Every binary holds the same PTX: a dictionary that spans them all.
tar -C "$work" -c . | xz --lzma2=preset=3,dict=512MiB >"$out"
ls -l "$out"
