#!/usr/bin/env bash
# A C++ compiler for lints: every object is empty, and whatever else is asked of it g++ answers. Clippy runs the build
# script once more than a build does, and links nothing.
#
#   CXX=$PWD/cuda/tools/cxx-stand-in.sh cargo clippy --features cuda-emu
set -euo pipefail
compiles=
out=
previous=
for argument in "$@"; do
  [ "$argument" = -c ] && compiles=1
  [ "$previous" = -o ] && out=$argument
  previous=$argument
done
if [ -n "$compiles" ] && [ -n "$out" ]; then
  exec g++ -x c++ -c /dev/null -o "$out"
fi
exec g++ "$@"
