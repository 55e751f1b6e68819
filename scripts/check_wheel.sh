#!/usr/bin/env bash
# Build sdist and wheel, install the wheel in a fresh environment, and use it from an empty directory outside the
# repository: version, check, a cut-down quickstart, verify. Needs the package index (for the dependencies) and minutes.
#   scripts/check_wheel.sh [PYTHON]             PYTHON has `build` and `hatchling` (extra [dev])
#   SHARE_DEPENDENCIES=1 scripts/check_wheel.sh the dependencies are PYTHON's own, nothing is fetched: a minute
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${1:-python3}")
case $python in /*) ;; *) python=$PWD/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

"$python" -m build --no-isolation --outdir "$work/dist" "$root" >/dev/null
echo "built: $(cd "$work/dist" && ls | tr '\n' ' ')"
"$python" -m venv "$work/venv"
wheel=$(echo "$work"/dist/*.whl)
if [ -n "${SHARE_DEPENDENCIES:-}" ]; then
  "$work/venv/bin/python" -m pip install --quiet --no-deps --no-index "$wheel"
  # a path in a .pth file comes last, and the .pth files in it (an editable salsa) are not followed
  "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
else
  "$work/venv/bin/python" -m pip install --quiet -c "$root/constraints.txt" "$wheel[demo]"
fi

mkdir "$work/elsewhere"
cp "$root/recipes/quickstart.yaml" "$work/elsewhere"
cd "$work/elsewhere"
salsa=$work/venv/bin/salsa
"$work/venv/bin/python" -c "import salsa, sys; sys.exit(0 if salsa.__file__.startswith('$work/venv/') else salsa.__file__)"
"$salsa" --version
"$salsa" check quickstart.yaml
"$salsa" run quickstart.yaml 'sft.seeds=[0,1]' sft.dataset.limit=32 sft.batch_size=8 preferences.prompts.limit=8 'rl.seeds=[0]' \
  rl.num_updates=1 rl.rollout_size=8 rl.max_new_tokens=8 preferences.max_new_tokens=8 eval.prompts.limit=4 \
  'rl.arms={ppo: {init: "sft[0]", reference: "sft[0]"}, salsa: {init: "sft[0]", reference: soup}}'
test -s runs/quickstart/report.html
"$salsa" verify runs/quickstart
echo "the wheel works outside the repository"
