#!/usr/bin/env bash
# safetensors 0.8.0 saves beside the file and renames. A link becomes a file, and the file that it named keeps its old
# content. Only the owner may read the new file, independent of the process's mask and the old file's permissions.
#
#   findings/safetensors-replaces-links.sh     prints this, and fails if it is otherwise
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" -q install --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$dir/venv/bin/python" - "$dir" <<'PYTHON' | tee "$dir/got"
import os
import stat
import sys

import numpy
from safetensors.numpy import save_file

os.umask(0o022)
real, link = (os.path.join(sys.argv[1], name) for name in ("real", "link"))
with open(real, "w") as file:
    file.write("old")
os.chmod(real, 0o644)
os.symlink(real, link)
save_file({"x": numpy.zeros(1, numpy.float32)}, link)
print("still a link", os.path.islink(link))
print("the file that it named", open(real).read())
print("permissions", oct(stat.S_IMODE(os.stat(link).st_mode)))
PYTHON
diff "$dir/got" - <<'EXPECTED'
still a link False
the file that it named old
permissions 0o600
EXPECTED
