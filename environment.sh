# Sourced by run_bilevel.sh and run_tests.sh: sets $python to an interpreter that has what the given
# requirements files ask for. The active environment is used if it has; otherwise .venv beside this
# file is made and filled (about two minutes and 6 GB, most of it PyTorch).
#
#   here=<folder of this file>; . "$here/environment.sh"; find_python requirements.txt ...

# Succeeds if interpreter $1 satisfies the lower bounds in the files $2 ...; importing the two big
# packages as well, since a torch and a torchvision that do not belong together only fail there.
has_requirements() {
    interpreter=$1
    shift
    "$interpreter" - "$@" 2>/dev/null <<'PYTHON'
import re
import sys
from importlib import metadata

if sys.version_info < (3, 10):
    sys.exit(1)
for file in sys.argv[1:]:
    for line in open(file):
        match = re.match(r"([A-Za-z0-9_.-]+)>=([0-9.]+)", line)
        if match:
            name, bound = match.groups()
            numbers = [[int(n) for n in re.findall(r"\d+", v)] for v in (metadata.version(name), bound)]
            if numbers[0] < numbers[1]:
                sys.exit(1)
import torch, torchvision
PYTHON
}

find_python() {
    files=
    for file in "$@"; do
        files="$files $file"
    done
    # The files' names hold no blanks; the folder's may, so the search happens inside it.
    caller=$(pwd)
    cd "$here" || exit 1
    python=
    for candidate in python3 python "$here/.venv/bin/python"; do
        if command -v "$candidate" >/dev/null 2>&1 && has_requirements "$candidate" $files; then
            python=$(command -v "$candidate")
            break
        fi
    done
    if [ -z "$python" ]; then
        python=$here/.venv/bin/python
        echo "Setting up $here/.venv (PyTorch is large: this takes a few minutes, once)" >&2
        # pip's own chatter stays off stdout, whose last line is the result.
        "$(command -v python3 || command -v python)" -m venv "$here/.venv" >&2 || exit 1
        for file in $files; do
            "$python" -m pip install --disable-pip-version-check --quiet -r "$file" >&2 || exit 1
        done
    fi
    cd "$caller" || exit 1
}
