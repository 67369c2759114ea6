#!/usr/bin/env bash
# Runs a pack of cuda/tools/pack.sh on a machine with an NVIDIA GPU and writes one report. Each part has a time limit of
# its own, so that one that hangs does not stop the others.
#
#   run-report.sh FOLDER [PART...]     PART: tests memcheck racecheck synccheck initcheck llama bench;
#                                      all of them by default
#
# Needs the driver, and CUDA 13's cudart, cublas and curand: PyTorch's own are found through python3, a toolkit's in
# /usr/local/cuda.
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1"
folder=$(realpath "$1")
shift
[ $# -gt 0 ] || set -- tests memcheck racecheck synccheck initcheck llama bench
cd "$(dirname "$0")"
libraries=$(python3 - <<'PYTHON' 2>/dev/null
import glob, os, site, sysconfig
roots = {sysconfig.get_paths()["purelib"], *site.getsitepackages()}
print(":".join(sorted({os.path.dirname(path)
                       for root in roots for path in glob.glob(root + "/nvidia/*/lib/lib*.so*")})))
PYTHON
)
export LD_LIBRARY_PATH="${libraries:+$libraries:}/usr/local/cuda/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# A missing GPU is a failure here, not a skip.
export SFA_REQUIRE_GPU=1 RUST_BACKTRACE=1
# Where tests look for their files.
export CARGO_MANIFEST_DIR=$PWD
report=$folder/report.txt
failed=0
exec > >(tee -a "$report") 2>&1

limited() { # SECONDS NAME COMMAND...
  local seconds=$1 name=$2 start=$SECONDS
  shift 2
  echo "=== $name: $*"
  timeout --kill-after=5 "$seconds" "$@"
  local status=$?
  [ $status -eq 0 ] || failed=1
  echo "=== $name: exit status $status after $((SECONDS - start)) s"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
for binary in bin/*; do
  ldd "$binary" | grep 'not found' && echo "$binary: not found, see above"
done
for part in "$@"; do
  case $part in
    tests)
      for module in attention cache fades layer llama streams; do
        limited 240 "tests of $module" bin/device "$module::" --nocapture
      done
      ;;
    memcheck | racecheck | synccheck | initcheck)
      # A handful of settings and short sequences: the sanitizer is some hundred times slower. SFA_CASE and SFA_TOKENS
      # choose others.
      for module in attention cache; do
        SFA_CASE=${SFA_CASE:-window} SFA_TOKENS=${SFA_TOKENS:-140} limited 120 "$part of $module" \
          compute-sanitizer --tool "$part" --error-exitcode 9 --print-limit 20 bin/device "$module::table" --nocapture
      done
      ;;
    llama)
      model=(--model "${LLAMA_MODEL:-examples/llama/assets}")
      for device in cpu cuda:0; do
        limited 60 "llama generate on $device" bin/llama generate "${model[@]}" --device $device --fold drop \
          --max-tokens 60
        limited 60 "llama eval on $device" bin/llama eval "${model[@]}" --device $device \
          --text "${LLAMA_TEXT:-README.md}" --context 256
        limited 60 "llama bench on $device" bin/llama bench "${model[@]}" --device $device --fold drop \
          --text "${LLAMA_TEXT:-README.md}" --prompts 100,200
      done
      ;;
    bench)
      limited 240 bench bin/bench_gpu
      ;;
    *) echo "run-report.sh: unknown part $part"; failed=1 ;;
  esac
done
echo "=== all parts: $([ $failed -eq 0 ] && echo passed || echo FAILED)"
exit $failed
