# shellcheck shell=bash
# Sourced by the scripts beside it: where things are, which cluster is meant, and how progress is told.
#
# CLUSTER=local|existing   which cluster; default: existing when REGISTRY is set or KUBECONFIG names another than ours
# REGISTRY=host/path       where an existing cluster pulls images from; they are pushed there
# ENGINE=docker|podman|buildah   what builds images; default: the first of them that works
# CARGO_TARGET_DIR         as for cargo

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH="$PATH:$HOME/.cargo/bin:/usr/local/go/bin:/usr/local/sbin:/usr/sbin:/sbin"
export DEBIAN_FRONTEND=noninteractive
# An error is a sentence here, also for somebody who wants backtraces of panics.
export RUST_LIB_BACKTRACE=0

say() { printf '%s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
step() { printf '\n==> %s\n' "$*" >&2; }

# Folder of the compiled programs: .cargo/config.toml names the host as the target.
bin_dir() { printf '%s/%s/release' "${CARGO_TARGET_DIR:-target}" "$(rustc --print host-tuple)"; }

# The project's folder under the user's cache; the cluster tool has its own rule for it, the same.
cache_dir() {
    case "${XDG_CACHE_HOME:-}" in
    /*) printf '%s/ernie-operator' "$XDG_CACHE_HOME" ;;
    *) printf '%s/.cache/ernie-operator' "$HOME" ;;
    esac
}

# Installs Debian's packages.
install_packages() {
    [ "$(id -u)" -eq 0 ] || die "root is needed to install: $*"
    command -v apt-get >/dev/null || die "this machine has no apt-get; install by hand what Debian calls: $*"
    say "installing $*"
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 ||
        { apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }
}

at_least() { # at_least WANTED FOUND
    [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]
}

# Stops where Rust is missing, too old or lacks a component. Sets `rust` to its version.
rust=
need_rust() {
    local wanted component
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    command -v cargo >/dev/null || die "cargo is not installed; install Rust $wanted or newer with rustup"
    rust=$(rustc --version | cut -d' ' -f2)
    at_least "$wanted" "$rust" || die "Rust $rust is too old, $wanted is needed: run 'rustup update'"
    for component in rustfmt clippy-driver; do
        command -v "$component" >/dev/null || die "$component is missing: run 'rustup component add rustfmt clippy'"
    done
}

version() { sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1; }

# The first twelve digits of a digest over files: an image's tag says what is in it.
content_tag() { printf '%s-%s' "$(version)" "$(cat "$@" | sha256sum | cut -c1-12)"; }

# Compiles every program of the workspace, always with one selection of packages: another one would make cargo compile
# shared dependencies again with other features. scripts/test compiles them together with the tests.
build_programs() {
    [ -z "${ERNIE_COMPILED:-}" ] || return 0
    step "Compiling operator, worker and cluster tool (minutes the first time)"
    cargo build --release --workspace --bins
}

cluster_kind() {
    case "${CLUSTER:-}:${REGISTRY:-}:${KUBECONFIG:-}" in
    local:* | existing:*) printf '%s' "$CLUSTER" ;;
    :: | ::*/ernie-operator/clusters/*) printf local ;;
    :*) printf existing ;;
    *) die "CLUSTER=$CLUSTER is neither local nor existing" ;;
    esac
}

# Puts kubectl, helm and grpcurl on the PATH: those built for the local cluster, or the user's own for an existing one.
use_tools() {
    if [ "$(cluster_kind)" = local ] || ! { command -v kubectl && command -v helm; } >/dev/null; then
        PATH=$("$(bin_dir)/cluster" build):$PATH
    fi
}

# Sets `engine` to what builds images. Stops where there is none, or where an existing cluster has no registry to pull from.
use_engine() {
    if [ "$(cluster_kind)" = existing ] && [ -z "${REGISTRY:-}" ]; then
        local why="CLUSTER=existing"
        [ -n "${CLUSTER:-}" ] || why="KUBECONFIG=$KUBECONFIG"
        die "$why names your own cluster, which pulls from a registry: name one that you may push to, as in" \
            "REGISTRY=registry.example/team, or take the local cluster with CLUSTER=local"
    fi
    case ${ENGINE:=} in
    docker | podman | buildah)
        command -v "$ENGINE" >/dev/null || die "ENGINE=$ENGINE is not installed"
        engine=$ENGINE
        return
        ;;
    ?*) die "ENGINE=$ENGINE is none of docker, podman and buildah" ;;
    esac
    for engine in docker podman; do
        if command -v $engine >/dev/null && $engine info >/dev/null 2>&1; then
            return
        fi
    done
    engine=buildah
    command -v buildah >/dev/null || die "neither docker nor podman works, and buildah is not installed: install one of them"
}

# Makes KUBECONFIG name the cluster that is meant.
use_cluster() {
    if [ "$(cluster_kind)" = local ]; then
        KUBECONFIG=$("$(bin_dir)/cluster" kubeconfig --path)
        export KUBECONFIG
    fi
}
