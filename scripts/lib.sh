# shellcheck shell=bash
# What the scripts share: the messages, and one virtual environment with everything in it. Sourced, not run.
# Sets ROOT (the repository) and PYTHON (the environment's interpreter, after `bootstrap`).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${AFYA_VENV:-$ROOT/.venv}"
PYTHON="$VENV/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '%s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

find_python() {  # prints the first interpreter that is 3.11 or newer
    local candidate
    for candidate in "${AFYA_PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        command -v "$candidate"
        return 0
    done
    die "Python 3.11 or newer was not found; install it (Debian 12: apt-get install python3 python3-venv), or name one with AFYA_PYTHON=/path/to/python3."
}

make_venv() {
    local python
    python="$(find_python)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "this Python has no pip and venv; install them (Debian: apt-get install python3-venv python3-pip), then run this again."
    say "Making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" || die "the virtual environment could not be made in $VENV; is the disk full, or the folder not yours?"
}

pip_install() {
    "$PYTHON" -m pip install --quiet -c "$ROOT/constraints.txt" "$@"
}

# The torch that the package index offers by default for Linux carries CUDA: about 3 GB. Without an NVIDIA driver the
# CPU build (0.2 GB) is asked for first: from where pip is set up to look, then by uv, which knows where torch keeps it.
install_torch() {
    local version
    version="$(sed -n 's/^torch==//p' "$ROOT/constraints.txt")"
    "$PYTHON" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$version')" 2>/dev/null && return
    if [ "$(uname -s)" = Linux ] && [ "$(uname -m)" = x86_64 ] && ! nvidia-smi -L >/dev/null 2>&1; then
        say "Installing torch $version for the CPU (no NVIDIA driver found)"
        "$PYTHON" -m pip install --quiet "torch==$version+cpu" 2>/dev/null && return
        pip_install uv && UV_HTTP_TIMEOUT=60 UV_HTTP_RETRIES=1 "$VENV/bin/uv" pip install --quiet --python "$PYTHON" \
            --torch-backend cpu --constraint "$ROOT/constraints.txt" "torch==$version" 2>/dev/null && return
        say "The CPU build was not reachable; taking the ordinary one, about 3 GB"
    fi
    say "Installing torch $version"
    pip_install "torch==$version" || die "torch $version could not be installed (pip's own words are above); is there a network, and 6 GB of disk?"
}

fingerprint() {  # changes whenever what is installed should change
    "$PYTHON" -c 'import hashlib, sys
print(sys.version_info[:2], hashlib.sha256(b"".join(open(p, "rb").read() for p in sys.argv[1:])).hexdigest())' \
        "$ROOT/pyproject.toml" "$ROOT/constraints.txt"
}

bootstrap() {  # the environment, complete; instant when nothing changed
    local stamp="$VENV/.afya-installed" started=$SECONDS
    [ -x "$PYTHON" ] && [ -f "$stamp" ] && [ "$(fingerprint)" = "$(cat "$stamp")" ] && return
    "$PYTHON" -m pip --version >/dev/null 2>&1 || make_venv
    install_torch
    say "Installing Afya and everything it uses (1 to 3 minutes)"
    # DeepSpeed comes as source: nothing of it is compiled now, only what a training run turns out to need.
    DS_BUILD_OPS=0 pip_install -e "$ROOT[kiosk,client,server,dev]" ||
        die "the installation failed (pip's own words are above); mend that and run the same command again, it goes on where it stopped."
    fingerprint >"$stamp"
    say "Installed in $((SECONDS - started)) s"
}

need_compiler() {
    local name
    for name in "${CXX:-}" c++ g++ clang++; do
        [ -n "$name" ] && command -v "$name" >/dev/null 2>&1 && return
    done
    die "no C++ compiler was found, and DeepSpeed compiles a small part when it trains; install one (Debian: apt-get install g++)."
}
