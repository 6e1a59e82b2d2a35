#!/bin/sh
# install.sh onnx|dev: this checkout with that extra (pyproject.toml) in .venv, made if need be; nothing to do: silent.
# PYTHON=... chooses the interpreter. Needs Python 3.11 or newer and no rights: never touches the system's packages.
set -eu
extra=$1
venv=.venv
log=$venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

die() {
    echo "install: $*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# A stamp holds what was installed, so a failed install, another pyproject.toml or a moved checkout is never taken for done.
current() {
    [ "$wanted" = "$(cat "$venv/installed-$1" 2>/dev/null)" ]
}

# The first of the usual names that is new enough and can make environments; else the first that is new enough.
choose_python() {
    second=
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.13 python3.12 python3.11 python3.14 python3 python; fi
    for candidate; do
        new_enough "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
        second=${second:-$candidate}
    done
    echo "$second"
}

make_venv() {
    echo "      making $venv with $("$python" --version 2>&1) ($(command -v "$python"))"
    rm -rf "$venv"
    "$python" -m venv "$venv" >/dev/null 2>&1 && return
    # Debian and Ubuntu split ensurepip off: let the system's pip put one into the environment.
    "$python" -m venv --clear --without-pip "$venv" >/dev/null 2>&1 &&
        "$python" -m pip --python "$venv/bin/python" install --quiet pip >/dev/null 2>&1 && return
    rm -rf "$venv"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    die "$python can make no virtual environment here: apt-get install python$version-venv (Debian, Ubuntu) or name another (PYTHON=/path/to/python3)"
}

# pip in the background, so that somebody who waits sees every ten seconds what it is doing.
install() {
    .venv/bin/python -m pip install --progress-bar off --editable ".[$extra]" >"$log" 2>&1 &
    pip=$!
    trap '{ kill $pip; wait $pip; } 2>/dev/null || :; die "interrupted; the same command goes on from here"' HUP INT TERM
    start=$(date +%s)
    said=0
    while kill -0 $pip 2>/dev/null; do
        sleep 1
        seconds=$(($(date +%s) - start))
        if [ $((seconds - said)) -ge 10 ]; then
            said=$seconds
            if grep -q '^Installing collected' "$log"; then
                doing="unpacking, $(($(du -sk "$venv" | cut -f 1) / 1024)) MB so far"
            else
                doing=$(tail -n 1 "$log" | cut -c 1-90)
            fi
            printf '      %4d s  %s\n' "$seconds" "$doing"
        fi
    done
    if ! wait $pip; then
        tail -n 5 "$log" | cut -c 1-200 >&2
        die "pip failed (last lines above, all of it in $log); the same command tries again"
    fi
    printf '%s\n' "$wanted" >"$venv/installed-$extra"
    echo "      done in $(($(date +%s) - start)) s"
}

cd "$(dirname "$0")/.."
wanted=$(pwd && cat pyproject.toml)
if new_enough "$venv/bin/python" && { current "$extra" || current dev; }; then
    exit 0
fi
python=
if ! new_enough "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(choose_python)
    if [ -z "$python" ]; then
        found=$("${PYTHON:-python3}" --version 2>/dev/null) || found="no working ${PYTHON:-python3}"
        die "needs Python 3.11 or newer, found $found: install one, or name it (PYTHON=/path/to/python3)"
    fi
fi
echo "[1/2] installing into $venv: torch and friends, about 6 GB on Linux, 2 to 5 minutes the first time; log: $log"
[ -z "$python" ] || make_venv
install
