#!/usr/bin/env bash
# Sets up a CUDA 13.0 toolkit from PyPI, for machines without a system-wide one: enough to build `--features cuda`.
#
#   cuda/tools/toolkit.sh DIR     installs into DIR (about 1.2 GB) unless it is there, and prints the settings to `eval`
#   eval "$(cuda/tools/toolkit.sh DIR)"
#
# Needs python3 with pip, and gcc. 13.0 on purpose: PTX of a newer nvcc does not load on drivers of the 580 series.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
dir=$(cd "$1" && pwd)
root=$dir/nvidia/cu13
if [ ! -e "$root/.complete" ]; then
  rm -rf "$dir/nvidia"
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$dir" \
    nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-nvrtc==13.0.88 \
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 nvidia-cublas==13.1.0.3 nvidia-curand==10.4.0.35 >&2
  # The packages carry versioned libraries only; linkers look for the plain names, and for lib64.
  ln -sfn lib "$root/lib64"
  for library in "$root"/lib/*.so.*; do
    name=$(basename "$library")
    ln -sf "$name" "$root/lib/${name%%.so.*}.so"
  done
  # A libcuda.so.1 to link with, and to start with where no driver is: every call answers CUDA_ERROR_STUB_LIBRARY (34).
  mkdir -p "$root/stubs"
  grep -ohE '\bCUDAAPI[[:space:]]+cu[A-Za-z0-9_]+\(' "$root/include/cuda.h" | grep -oE 'cu[A-Za-z0-9_]+' | sort -u |
    awk '{ print "int " $1 "(void) { return 34; }" }' >"$root/stubs/cuda.c"
  # Names that the header's macros redirect to (cuMemAlloc -> cuMemAlloc_v2) are exported by drivers as well.
  grep -oE '^[[:space:]]*#[[:space:]]*define[[:space:]]+cu[A-Za-z0-9_]+[[:space:]]+'\
'(__CUDA_API_PT[A-Z]+\()?cu[A-Za-z0-9_]+' \
    "$root/include/cuda.h" | grep -oE 'cu[A-Za-z0-9_]+$' | sort -u |
    awk '{ print "__attribute__((weak)) int " $1 "(void) { return 34; }" }' >>"$root/stubs/cuda.c"
  awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^cu[A-Za-z0-9_]+\(void\)$/ && !seen[$i]++) { print; break } }' \
    "$root/stubs/cuda.c" >"$root/stubs/unique.c"
  gcc -w -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$root/stubs/libcuda.so.1" "$root/stubs/unique.c"
  ln -sf libcuda.so.1 "$root/stubs/libcuda.so"
  touch "$root/.complete"
fi
cat <<SETTINGS
export CUDA_HOME='$root' CUDA_PATH='$root' CUDA_ROOT='$root'
export PATH='$root/bin':"\$PATH"
export LIBRARY_PATH='$root/lib:$root/stubs'"\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
export CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-80}"
SETTINGS
if [ ! -e /proc/driver/nvidia/version ]; then
  echo "export LD_LIBRARY_PATH='$root/lib:$root/stubs'\"\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}\""
fi
