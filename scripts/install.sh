#!/usr/bin/env bash
# Make the environment $VENV and install the checkout into it, editable, with the compiled kernel where a compiler is
# found. Called by the Makefile, which documents the settings: PYTHON, VENV, PIP_FLAGS, SYSTEM_PYTHON, MARLIN_GPTQ_*.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}
log=build/install.log
mkdir -p build

fail() { # message, hint
    echo "install: $1" >&2
    echo "  $2" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "$python not found" "Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" -V) is too old, Python 3.11 or newer is needed" "Name one: make PYTHON=python3.12 ..."

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "install: making the environment $venv with $("$python" -V)"
    rm -rf "$venv/bin" "$venv/lib" "$venv/include"
    options=()
    [ -n "${SYSTEM_PYTHON:-}" ] && options=(--without-pip)
    "$python" -m venv "${options[@]}" "$venv" >"$log" 2>&1 ||
        fail "$python -m venv failed: $(tail -n 1 "$log")" "On Debian and Ubuntu: apt install python3-venv"
    if [ -n "${SYSTEM_PYTHON:-}" ]; then
        # --system-site-packages would skip the packages of a $python that is itself in an environment: name its folders.
        "$python" -c 'import sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' \
            >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/_system.pth"
    fi
fi

# Called as $python -m pip: the folder of the environment may have a long name, which no script's first line may hold.
pip=("$venv/bin/python" -m pip install -v)
if [ -n "${SYSTEM_PYTHON:-}" ]; then
    pip+=(--no-deps --no-build-isolation -e .)
    echo "install: marlin-gptq into $venv beside the packages of $python (log: $log)"
else
    pip+=(-c constraints.txt -e ".[dev]")
    echo "install: marlin-gptq and what it needs into $venv (log: $log; about 2 GB on a machine without a GPU, more with CUDA)"
fi

# The log has everything; the terminal one line for each step.
steps() {
    local line step last=
    while IFS= read -r line; do
        case "$line" in
        *"Running command pip subprocess to install build dep"*) step="fetching the build tools (and a CUDA compiler, used if there is no other)" ;;
        *"Collecting "* | *"Downloading "*) step="fetching packages" ;;
        *"Running command Building"*) step="compiling the kernel (some minutes on a small machine)" ;;
        "Installing collected packages"*marlin-gptq*) step="copying packages into place" ;;
        *) continue ;;
        esac
        [ "$step" = "$last" ] || echo "install:   $step"
        last=$step
    done
}
# shellcheck disable=SC2086  # PIP_FLAGS holds several options
if ! "${pip[@]}" ${PIP_FLAGS:-} 2>&1 </dev/null | tee "$log" | steps; then
    echo "install: pip failed; the end of $log:" >&2
    tail -n 30 "$log" | sed 's/^/  | /' >&2
    fail "nothing usable was installed" \
        "No network? Keep the Python you have: make SYSTEM_PYTHON=1 ... Compiler trouble? MARLIN_GPTQ_KERNEL=off installs without the kernel."
fi
"$venv/bin/python" scripts/kernel_status.py
