#!/usr/bin/env bash
# Sets up a virtual environment and runs everything that CI runs: linter, formatter, type checker, and the tests with both
# supported versions of TensorRT-RTX; on a machine with a GPU the tests that need one, too.
# A failing step does not stop those after it; the last line counts them all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

OTHER_RTX=1.7.1.116
# Two workers of one thread each: more threads than cores wait for one another. Each worker begins with one half of the
# tests in their order, so that what tests of a file share is made once, and takes from the other when it is done.
WORKERS=(-n 2 --dist worksteal)
export OMP_NUM_THREADS=1
logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
failed_checks=()

# check NAME COMMAND...: runs a step that has no tests to count.
check() {
    local name="$1"
    shift
    heading "$name"
    "$@" || failed_checks+=("$name")
}

# tests NAME ARGUMENTS...: runs pytest and keeps its output for the count. No tests found (status 5) is a failure.
tests() {
    local name="$1" status=0
    shift
    heading "$name"
    "$PYTHON" -m pytest "$@" 2>&1 | tee "$logs/$name.log" || status=$?
    # Failing tests (status 1) are in pytest's own count.
    if [[ $status -gt 1 ]]; then
        failed_checks+=("$name (pytest ended with status $status)")
    fi
}

check "ruff check" "$PYTHON" -m ruff check .
check "ruff format" "$PYTHON" -m ruff format --check .
check "type check against TensorRT 10.16, 11.4, RTX 1.6 and RTX 1.7" "$PYTHON" scripts/typecheck.py

version() { "$PYTHON" -c 'import tensorrt_rtx; print(tensorrt_rtx.__version__)'; }

tests "tests with TensorRT-RTX $(version)" "${WORKERS[@]}" -m "not gpu and not slow"

other="$VENV/rtx-$OTHER_RTX"
if [[ ! -f "$other/installed" ]]; then
    heading "Installing TensorRT-RTX $OTHER_RTX into $other"
    rm -rf "$other"
    "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check --no-deps --target "$other" \
        "tensorrt-rtx-cu13==$OTHER_RTX" "tensorrt-rtx-cu13-bindings==$OTHER_RTX" "tensorrt-rtx-cu13-libs==$OTHER_RTX"
    touch "$other/installed"
fi
export PYTHONPATH="$PWD/$other"
if [[ "$other" = /* ]]; then
    export PYTHONPATH="$other"
fi
if [[ "$(version)" != "$OTHER_RTX" ]]; then
    failed_checks+=("TensorRT-RTX $OTHER_RTX in $other (found $(version))")
fi
tests "tests with TensorRT-RTX $(version)" "${WORKERS[@]}" -m "rtx and not gpu and not slow"
unset PYTHONPATH OMP_NUM_THREADS

if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    tests "tests on the GPU" tests/gpu
else
    heading "No GPU here: tests/gpu is left out"
fi

heading "Result"
for name in ${failed_checks[@]+"${failed_checks[@]}"}; do
    echo "failed: $name"
done
# Sums pytest's own summary lines; a failed step counts as one failure.
"$PYTHON" - "${#failed_checks[@]}" "$logs"/*.log <<'PY'
import re
import sys
from pathlib import Path

passed, failed = 0, int(sys.argv[1])
for path in sys.argv[2:]:
    lines = [line for line in Path(path).read_text(errors="replace").splitlines() if re.search(r" in [\d.]+s", line)]
    for count, kind in re.findall(r"(\d+) (passed|failed|error)", lines[-1] if lines else ""):
        if kind == "passed":
            passed += int(count)
        else:
            failed += int(count)
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0 or passed == 0)
PY
