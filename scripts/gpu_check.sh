#!/usr/bin/env bash
# Measure on a bare machine with one GPU what no CPU can tell, within 12 minutes, into one JSON file:
#
#   scripts/gpu_check.sh [gpu_check.json] [options of benchmarks/speed/gpu_check.py]
#
# Run it again after a cut, and it goes on with the step that was cut. No weights are downloaded. PYTHON names an interpreter that
# has the package; without one it is installed into .venv first, which is not part of the 12 minutes (SECONDS_LIMIT sets others).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
if [ -z "${PYTHON:-}" ] && ! "$python" -c "import conceptseg, torch" 2>/dev/null; then
  python3 -m venv .venv
  .venv/bin/python -m pip install -q -c constraints.txt -e .
fi
[ $# -gt 0 ] || set -- gpu_check.json
end=$((SECONDS + ${SECONDS_LIMIT:-720}))
status=75
while [ "$status" -eq 75 ] && [ "$SECONDS" -lt "$end" ]; do # 75: an error left the GPU unusable for that process
  status=0
  timeout -k 10 $((end - SECONDS)) "$python" benchmarks/speed/gpu_check.py "$@" || status=$?
done
[ "$status" -ne 124 ] || echo "Time is up. Run the same command again: it goes on where it was cut." >&2
exit "$status"
