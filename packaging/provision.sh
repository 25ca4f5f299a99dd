#!/usr/bin/env bash
# Installs dispatcher on a plain Debian (12 or later) or Ubuntu (22.04 or later) and starts it: HTTPS on port 8080 with
# a self-signed certificate, manager and proxy as two systemd units.  Run it again to upgrade; it keeps configuration,
# certificate, users and data.
#
# Usage: provision.sh [--root DIR] [--no-packages] [--no-systemd] [--extras LIST] [--python PROGRAM] [--wheel FILE]
#   --root DIR       install below DIR, with changed paths in the files; create users in DIR/etc only
#   --no-packages    do not install Debian packages
#   --no-systemd     install the units, but do not start them
#   --extras LIST    also install these extras: docker, libvirt, postgresql, all
#   --python PROGRAM create the virtual environment with this Python
#   --wheel FILE     install this wheel instead of building one (a run leaves its own in /opt/dispatcher/share)
set -euo pipefail

root="" packages=yes systemd=yes extras="" python=python3 wheel=""
while [ $# -gt 0 ]; do
    case $1 in
    --root) root=${2:?--root needs a directory}; shift ;;
    --no-packages) packages=no ;;
    --no-systemd) systemd=no ;;
    --extras) extras=${2:?--extras needs a list}; shift ;;
    --python) python=${2:?--python needs a program}; shift ;;
    --wheel) wheel=${2:?--wheel needs a file}; shift ;;
    *) echo "provision.sh: unknown option $1" >&2; exit 2 ;;
    esac
    shift
done

here=$(cd "$(dirname "$0")" && pwd)
source=$(dirname "$here")
venv=$root/opt/dispatcher
etc=$root/etc/dispatcher
step() { echo "==> $*"; }
die() { echo "provision.sh: $*" >&2; exit 1; }

[ "$(id -u)" -eq 0 ] || die "become root first (sudo $0)"
[ -z "$root" ] || case $root in /*) ;; *) die "--root needs an absolute path" ;; esac
[ -z "$root" ] || [ $systemd = no ] || die "--root needs --no-systemd: systemd runs only what is installed at /"
[ $systemd = no ] || [ -d /run/systemd/system ] || die "systemd is not running (see --no-systemd)"

if [ $packages = yes ]; then
    step "Debian packages"
    command -v apt-get >/dev/null || die "this is not Debian or Ubuntu (see --no-packages)"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends \
        python3 python3-venv bubblewrap slirp4netns openssl ca-certificates curl >/dev/null
fi

step "Program, in $venv"
"$source/tests/machine/make-venv" "$python" "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
if [ -z "$wheel" ]; then
    copy=$(mktemp -d) # built in a copy, so that the clone stays as it is
    trap 'rm -rf "$copy"' EXIT
    cp -a "$source"/{setup.py,pyproject.toml,README.md,LICENSE,dispatcher,providers} "$copy"
    pip wheel --no-deps --wheel-dir "$copy/wheel" "$copy"
    wheel=$(echo "$copy"/wheel/*.whl)
    install -D -m 644 -t "$venv/share" "$wheel"
fi
pip install --upgrade -c "$source/constraints.txt" "$wheel${extras:+[$extras]}"
pip install --force-reinstall --no-deps "$wheel" # the same version may be of other sources
install -D -m 644 -t "$venv/share/doc" "$source/README.md" "$source/LICENSE" "$source/CHANGELOG.md"
mkdir -p "$root/usr/local/bin"
ln -sfn "$venv/bin/dispatcher" "$root/usr/local/bin/dispatcher"

# The files contain absolute paths; with --root they get the prefix.
place() { # place SOURCE TARGET MODE
    mkdir -p "$(dirname "$2")"
    sed -E "s#(^|[\" =-])/(opt|etc|run|var/lib)/dispatcher#\1$root/\2/dispatcher#g" "$1" >"$2.new"
    chmod "$3" "$2.new"
    mv "$2.new" "$2"
}

step "Users and directories"
place "$here/dispatcher.sysusers" "$root/usr/lib/sysusers.d/dispatcher.conf" 644
place "$here/dispatcher.tmpfiles" "$root/usr/lib/tmpfiles.d/dispatcher.conf" 644
if [ -n "$root" ]; then
    for file in passwd group; do
        [ -e "$root/etc/$file" ] || install -D -m 644 "/etc/$file" "$root/etc/$file"
    done
fi
systemd-sysusers ${root:+--root="$root"} dispatcher.conf
proxy_ids=$(awk -F: '$1 == "dispatcher-proxy" { print $3 ":" $4 }' "$root/etc/passwd")
[ -n "$proxy_ids" ] || die "the user dispatcher-proxy was not created"
if [ -z "$root" ]; then
    systemd-tmpfiles --create dispatcher.conf
else
    # systemd-tmpfiles --root looks the owners up elsewhere, so the directories are created here.
    while read -r kind path mode user _; do
        [ "$kind" = d ] || continue
        mkdir -p "$path"
        chmod "$mode" "$path"
        [ "$user" = root ] || chown "$proxy_ids" "$path"
    done <"$root/usr/lib/tmpfiles.d/dispatcher.conf"
    chown "0:${proxy_ids#*:}" "$etc/tls"
fi

step "Certificate"
if [ ! -e "$etc/tls/cert.pem" ]; then
    name=$(hostname -f 2>/dev/null || hostname)
    (umask 077 && openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 825 \
        -subj "/CN=$name" -addext "subjectAltName=DNS:$name,DNS:localhost,IP:127.0.0.1" \
        -keyout "$etc/tls/key.pem" -out "$etc/tls/cert.pem" 2>/dev/null)
fi
chown "0:${proxy_ids#*:}" "$etc/tls/key.pem" "$etc/tls/cert.pem"
chmod 640 "$etc/tls/key.pem"
chmod 644 "$etc/tls/cert.pem"

step "Configuration"
[ -e "$etc/dispatcher.toml" ] || place "$here/dispatcher.toml" "$etc/dispatcher.toml" 644
"$venv/bin/dispatcher" --config "$etc/dispatcher.toml" config check

step "Units"
for unit in dispatcher-agents dispatcher-manager dispatcher-proxy; do
    place "$here/$unit.service" "$root/etc/systemd/system/$unit.service" 644
done
if [ $systemd = yes ]; then
    systemctl daemon-reload
    systemctl enable dispatcher-manager dispatcher-proxy
    systemctl restart dispatcher-manager dispatcher-proxy
    for _ in $(seq 60); do
        curl --silent --insecure --output /dev/null https://127.0.0.1:8080/auth/login && break
        sleep 1
    done
    curl --silent --show-error --insecure --output /dev/null https://127.0.0.1:8080/auth/login ||
        die "nothing answers on port 8080: journalctl -u dispatcher-manager -u dispatcher-proxy"
fi

fingerprint=$(openssl x509 -in "$etc/tls/cert.pem" -noout -fingerprint -sha256 | cut -d= -f2)
echo "Open https://$(hostname):8080/ (its certificate's SHA-256: $fingerprint)"
echo "Add users with: dispatcher add NAME"
