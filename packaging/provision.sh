#!/usr/bin/env bash
# Installs dispatcher on a plain Debian (12 or later) or Ubuntu (22.04 or later) as a package and starts it: HTTPS on port
# 8080 with a self-signed certificate, manager and proxy as systemd units.  Run it again to upgrade; it keeps
# configuration, certificate, users and data, agents keep running, and no connection is refused.
#
# Usage: provision.sh [--package FILE] [--no-systemd]
#   --package FILE   install this package (packaging/build-deb, make deb) instead of building one
#   --no-systemd     install the units, but do not start them
set -euo pipefail

package="" systemd=yes
while [ $# -gt 0 ]; do
    case $1 in
    --package) package=${2:?--package needs a file}; shift ;;
    --no-systemd) systemd=no ;;
    -h | --help) sed -n '2,8p' "$0" | cut -c3-; exit ;;
    *) echo "provision.sh: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
    shift
done

step() { echo "==> $*"; }
die() { echo "provision.sh: $*" >&2; exit 1; }

[ "$(id -u)" -eq 0 ] || die "become root first (sudo $0)"
command -v apt-get >/dev/null || die "this is not Debian or Ubuntu"
[ -z "$package" ] || [ -f "$package" ] || die "there is no file $package"
[ $systemd = no ] || [ -d /run/systemd/system ] || die "systemd is not running (see --no-systemd)"
[ ! -e /etc/systemd/system/dispatcher-manager.service ] ||
    die "units in /etc/systemd/system (dispatcher-*.service) would replace those of the package: remove them first"
export DEBIAN_FRONTEND=noninteractive
# Packages of the distribution are needed.  A machine without a network may have them all.
apt-get update -qq || true

if [ -z "$package" ]; then
    step "Building the package"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work" # apt reads it as a user of its own
    "$(dirname "$0")/build-deb" --install-dependencies --no-check --output "$work"
    package=$(echo "$work"/*.deb)
fi

step "Installing the package"
# A changed configuration is kept; the same version may be of other sources.
apt-get install -y -qq --reinstall --allow-downgrades -o Dpkg::Options::=--force-confold "$(realpath "$package")" >/dev/null
if [ $systemd = no ]; then
    echo "Installed, not started.  Start it with: systemctl start dispatcher-manager dispatcher-proxy"
    exit
fi

step "Starting"
systemctl start dispatcher-manager dispatcher-proxy || {
    journalctl --no-pager --quiet --output=cat --lines=20 -u dispatcher-manager -u dispatcher-proxy >&2
    die "the service did not start: see above, and journalctl -u dispatcher-manager -u dispatcher-proxy"
}
# -I: nothing is imported from the working directory, which may be another user's.
found=$(/usr/lib/agent-dispatcher/bin/python -I - /etc/dispatcher/dispatcher.toml <<'END_OF_PYTHON'
import sys
import time
from pathlib import Path

from dispatcher.cli.serve import browser_url, listen_endpoint, sign_in_page_answers
from dispatcher.config.load import load

config = load(Path(sys.argv[1]))
endpoint = listen_endpoint(config.proxy.listen[0])
end = time.monotonic() + 60
while endpoint is not None and not sign_in_page_answers(endpoint, config.proxy, browser_url(config)):
    if time.monotonic() > end:
        sys.exit(f"the sign-in page does not answer at {config.proxy.listen[0]}")
    time.sleep(0.5)
print(browser_url(config), config.proxy.tls_cert or "")
END_OF_PYTHON
) || die "journalctl -u dispatcher-manager -u dispatcher-proxy says why"
read -r url certificate <<<"$found"
# The address as others reach it, if it is one of this host.
url=$(sed -E "s#^(https?://)(127\.0\.0\.1|\[::1\])#\1$(hostname)#; s#^(https://[^/]*):443/#\1/#; s#^(http://[^/]*):80/#\1/#" <<<"$url")
echo "Open $url"
[ -z "$certificate" ] ||
    echo "SHA-256 of its certificate: $(openssl x509 -in "$certificate" -noout -fingerprint -sha256 | cut -d= -f2)"
echo "Add users with: dispatcher add NAME"
