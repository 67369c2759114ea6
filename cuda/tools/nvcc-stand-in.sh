#!/usr/bin/env bash
# Stands in for nvcc where candle's own kernels are compiled, so that `cargo clippy --features cuda` takes a minute and
# not ten: set NVCC to it. It emits empty PTX and empty objects; what is built with it must not run, and needs a target
# folder of its own. This crate's kernels go through the nvcc on the PATH all the same.
set -euo pipefail
output='' folder=. source='' mode=''
all=("$@")
while [ $# -gt 0 ]; do
  case $1 in
    --version | --list-gpu-code) exec nvcc "${all[@]}" ;;
    --ptx | -c | --lib) mode=$1 ;;
    -o) output=$2; shift ;;
    --output-directory) folder=$2; shift ;;
    *.cu) source=$1 ;;
  esac
  shift
done
case $mode in
  --ptx) printf '.version 8.0\n.target sm_80\n.address_size 64\n' >"${output:-$folder/$(basename "$source" .cu).ptx}" ;;
  -c) echo | gcc -x c -c -o "$output" - ;;
  --lib) rm -f "$output" && ar crs "$output" ;;
  *) echo "nvcc-stand-in: unknown call: ${all[*]}" >&2; exit 2 ;;
esac
