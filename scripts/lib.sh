# shellcheck shell=bash
# Functions shared by the scripts here and by tests/vm. To be sourced by a bash script that has set -euo pipefail.
# ASSUME_YES=1, or a standard input that is no terminal, answers every question with yes.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
missing=()
# Not in the PATH of Debian's ordinary users, but mke2fs and modprobe are there.
PATH=$PATH:/usr/sbin:/sbin

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# confirm QUESTION
confirm() {
    local answer
    if [ "${ASSUME_YES:-}" = 1 ] || [ ! -t 0 ]; then return 0; fi
    read -r -p "$1 [Y/n] " answer || return 1
    case $answer in '' | [Yy]*) return 0 ;; *) return 1 ;; esac
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "this needs root, and there is no sudo: $*"
    fi
}

# retry COMMAND...: three attempts. Mirrors and networks have bad moments.
retry() {
    local pause
    for pause in 2 10 0; do
        if "$@"; then return 0; fi
        sleep "$pause"
    done
    return 1
}

installed() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# need PACKAGE...: notes those that are missing, for install_missing.
need() {
    local package
    for package; do
        installed "$package" || missing+=("$package")
    done
}

install_missing() {
    [ ${#missing[@]} -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "needed, and there is no apt-get to install them: ${missing[*]}"
    say "Missing packages: ${missing[*]}"
    confirm "Install them?" || die "needed: ${missing[*]}"
    # A third-party source that is out of order must not stop us: whether the packages can be had is for install to say.
    retry apt_root update >&2 || say "warning: apt-get update failed, trying with the lists that are there"
    apt_root install --no-install-recommends "${missing[@]}" >&2 || die "could not install: ${missing[*]}"
    missing=()
}

# Waits for another apt (unattended-upgrades on a fresh machine) instead of failing on its lock.
apt_root() {
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -yq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}

# Prints the URI of a Debian archive: the one this machine uses, if it runs Debian. apt itself is asked, which reads both kinds of
# source file and needs no fetched lists for this. Suites named "-updates" are looked for first: third parties hardly have those.
debian_mirror() {
    local codename uris mirror=
    if [ "$(os_release ID)" = debian ]; then
        codename=$(os_release VERSION_CODENAME)
        uris=$(apt-get --print-uris update 2>/dev/null | sed -n "s#^'\(.*\)/dists/\([^/ ]*\)/InRelease' .*#\2 \1#p")
        mirror=$(awk -v c="$codename" '
            $1 == c "-updates" { print $2; found = 1; exit }
            $1 == c && $2 ~ /\/debian$/ { last = $2 }
            END { if (!found) print last }' <<<"$uris")
    fi
    printf '%s\n' "${mirror:-http://deb.debian.org/debian}"
}

# os_release KEY
os_release() {
    # shellcheck disable=SC1091
    (. /etc/os-release && printf '%s\n' "${!1:-}")
}

# apt_own DIR SUITE...: sets apt_own_options so that apt knows these suites of Debian and nothing else, and keeps its state in DIR:
# the machine's own sources and lists stay as they are.
apt_own() {
    local dir=$1 suite mirror trust=
    shift
    local keys=/usr/share/keyrings/debian-archive-keyring.gpg
    [ ! -e "$keys" ] || trust="signed-by=$keys"
    mirror=$(debian_mirror)
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    for suite; do printf 'deb [arch=amd64 %s] %s %s main\n' "$trust" "$mirror" "$suite"; done >"$dir/sources.list"
    apt_own_options=(
        -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/nonexistent
        -o "Dir::State::Lists=$dir/lists" -o "Dir::Cache=$dir/cache"
        # The directory may be one that the user _apt cannot enter.
        -o APT::Sandbox::User=root
        -o Acquire::Retries=3 -o Acquire::Languages=none -o APT::Update::Error-Mode=any
    )
}

# qemu-system-x86 and qemu-utils of one version: they exclude each other otherwise. Bookworm's 7.2 is too old for the tests
# (its qemu-img lacks what they compare with), so there both come from backports.
install_qemu_system() {
    local tmp
    if command -v qemu-system-x86_64 >/dev/null && command -v qemu-img >/dev/null; then return 0; fi
    if [ "$(os_release ID)-$(os_release VERSION_CODENAME)" != debian-bookworm ]; then
        need qemu-system-x86 qemu-utils
        install_missing
        return
    fi
    say "Missing packages: qemu-system-x86 qemu-utils (from bookworm-backports)"
    confirm "Install them?" || die "needed: qemu-system-x86 qemu-utils"
    tmp=$(mktemp -d)
    apt_own "$tmp" bookworm bookworm-backports
    if ! retry apt_root "${apt_own_options[@]}" update >&2 ||
        ! apt_root "${apt_own_options[@]}" install --no-install-recommends -t bookworm-backports qemu-system-x86 qemu-utils >&2; then
        as_root rm -rf "$tmp"
        die "could not install qemu-system-x86 and qemu-utils from bookworm-backports"
    fi
    as_root rm -rf "$tmp"
}

# True if the cargo in PATH is new enough for Cargo.toml.
rust_ok() {
    local have
    have=$(cargo --version 2>/dev/null | awk '{ print $2 }') || return 1
    [ -n "$have" ] && [ "$(printf '%s\n' "$1" "$have" | sort -V | head -n 1)" = "$1" ]
}

need_rust() {
    local want script bin=${CARGO_HOME:-$HOME/.cargo}/bin
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo/Cargo.toml" | head -n 1)
    [ -n "$want" ] || die "no rust-version in $repo/Cargo.toml"
    if rust_ok "$want"; then return 0; fi
    # rustup's programs may be there and only this shell not know of them; they go ahead of a distribution's older cargo.
    PATH=$bin:$PATH
    hash -r
    if rust_ok "$want"; then return 0; fi
    say "Rust $want or newer is missing (found: $(cargo --version 2>/dev/null || echo none))"
    if command -v rustup >/dev/null; then
        confirm "Install the stable toolchain with rustup, and make it the default?" || die "needed: Rust $want"
        retry rustup toolchain install stable --profile minimal --component rustfmt,clippy >&2 || die "rustup could not install stable"
        rustup default stable >&2
    else
        confirm "Install it with rustup (https://rustup.rs) in $(dirname "$bin")?" || die "needed: Rust $want"
        need curl ca-certificates
        install_missing
        # To a file first: a download cut short must not be run.
        script=$(mktemp)
        curl --proto '=https' --tlsv1.2 -sSf --retry 3 -o "$script" https://sh.rustup.rs || die "could not download rustup"
        RUSTUP_INIT_SKIP_PATH_CHECK=yes sh "$script" -y --profile minimal --component rustfmt,clippy >&2 || die "rustup failed"
        rm -f "$script"
    fi
    hash -r
    rust_ok "$want" || die "Rust $want is still missing (found: $(cargo --version 2>/dev/null || echo none))"
}

# Lets everybody use /dev/fuse, as udev does: without udev (containers, microVMs) it may be root's alone, and a test of what users do
# without root would fail.
open_fuse() {
    [ -c /dev/fuse ] && [ "$(stat -c %a /dev/fuse)" != 666 ] || return 0
    say "/dev/fuse is not for all users, as it is where udev runs"
    confirm "chmod 666 /dev/fuse?" || die "needed: /dev/fuse for all users"
    as_root chmod 666 /dev/fuse
}

# A Python with the readers that tests/oracles.rs compares with, named by VDISK_ORACLES. In the cache, as it is nothing of Debian's.
need_oracles() {
    local dir=${XDG_CACHE_HOME:-$HOME/.cache}/vdisk-oracles list=$repo/tests/oracles.txt
    export VDISK_ORACLES=$dir/bin/python
    # Asked to work, too: a new Python of the distribution leaves nothing of the old one's.
    if cmp -s "$list" "$dir/list" && oracles_work 2>/dev/null; then return 0; fi
    say "Missing Python packages: $(sed '/^#/d' "$list" | paste -sd ' ')"
    confirm "Install them in $dir?" || die "needed: the packages in $list"
    rm -rf "$dir"
    # Not another Python in the PATH: this is the one that the package python3-venv is for.
    /usr/bin/python3 -m venv "$dir" >&2 || die "could not make $dir"
    retry "$dir/bin/pip" --quiet --disable-pip-version-check install -r "$list" >&2 || die "could not install the packages in $list"
    oracles_work || die "the packages in $list do not work"
    cp "$list" "$dir/list"
}

oracles_work() { "$VDISK_ORACLES" -c 'import pyvmdk, dissect.hypervisor'; }

# cargo-fuzz builds the fuzz targets. There is no package of it.
need_cargo_fuzz() {
    local bin=${CARGO_HOME:-$HOME/.cargo}/bin
    # As with rustup: it may be there and only this shell not know of it.
    command -v cargo-fuzz >/dev/null || PATH=$bin:$PATH
    if command -v cargo-fuzz >/dev/null; then return 0; fi
    need build-essential
    install_missing
    say "cargo-fuzz is missing"
    confirm "Install it with cargo install?" || die "needed: cargo-fuzz"
    retry cargo install cargo-fuzz --locked >&2 || die "could not install cargo-fuzz"
}
