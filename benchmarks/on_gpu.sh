#!/bin/sh
# What only a GPU can tell, in one command of under eight minutes, without a network: the tests of
# tests/test_cuda.py, then a page of measurements on CUB-shaped data (11,788 random images).
#   sh benchmarks/on_gpu.sh > benchmarks/gpu.md
# It ends with exit code 1 if a test fails. Arguments go to benchmarks/on_gpu.py.
set -u
here=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$here/environment.sh"
find_python requirements.txt
cd "$here"
code=0
tests=$("$python" -m pytest -q -rs -p no:cacheprovider tests/test_cuda.py 2>&1) || code=1
echo "$tests" >&2
"$python" benchmarks/on_gpu.py "$@" || code=1
echo "Tests (\`tests/test_cuda.py\`): $(echo "$tests" | tail -n 1)"
exit "$code"
