#!/usr/bin/env bash
# Prints a table of the registers, stack and spills that ptxas gives every kernel. Needs nvcc on the PATH
# (cuda/tools/toolkit.sh sets one up).
#
#   cuda/tools/ptxas.sh [80]     compute capability; files for one alone keep theirs
set -euo pipefail
cd "$(dirname "$0")/../.."
arch=sm_${1:-80}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "| kernel ($arch) | registers | stack | spill stores | spill loads |"
echo "| --- | ---: | ---: | ---: | ---: |"
for file in cuda/{forward,backward,decide,cache}/*.cu; do
  of_file=$arch
  case $file in *_sm90a.cu) of_file=sm_90a ;; esac
  nvcc -std=c++17 -O3 -Icuda --gpu-architecture="$of_file" -Xptxas -v --cubin -o "$work/out.cubin" "$file" \
    >"$work/said" 2>&1 ||
    { cat "$work/said" >&2; exit 1; }
  # Warpgroup products that ptxas serializes.
  grep -E 'C75[0-9]+' "$work/said" >&2 || true
  awk '
      /Compiling entry function/ { split($0, part, "\x27"); name = part[2] }
      /bytes stack frame/ { stack = $1; stores = $5; loads = $9 }
      /Used [0-9]+ registers/ {
        match($0, /Used [0-9]+/)
        print name, substr($0, RSTART + 5, RLENGTH - 5), stack, stores, loads
      }' "$work/said" |
    sort | awk '{ printf "| `%s` | %d | %d | %d | %d |\n", $1, $2, $3, $4, $5 }'
done
