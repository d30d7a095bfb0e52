#!/bin/sh
# Lint and tests, from a fresh clone or any other state. Arguments go to pytest:
#   sh run_tests.sh -k hypernet
# Two processes share the test files.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$here/environment.sh"
find_python requirements.txt requirements-dev.txt

export OMP_WAIT_POLICY=PASSIVE # see run_bilevel.sh
cd "$here"
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest -n 2 --dist loadfile "$@"
