#!/bin/sh
# Unpack Debian's OpenSSH server into a folder, without root and without installing it.
# Where that cannot be done the tests that need it are skipped, and say so.
set -eu
folder=$1
packages="openssh-server libwrap0"
mkdir -p "$folder"
if command -v sshd >/dev/null || [ -x /usr/sbin/sshd ] || [ -x "$folder/usr/sbin/sshd" ]; then
    exit 0
fi
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
    echo "no sshd, and no Debian to take it from: the tests over SSH will be skipped" >&2
    exit 0
fi
cd "$folder"
download() { apt-get -qq download $packages >download.log 2>&1; }
# The lists of packages may be missing or old, which only root can mend.
if download || { apt-get -qq update >download.log 2>&1 && download; }; then
    for package in *.deb; do dpkg -x "$package" .; done
    rm -f ./*.deb
else
    echo "no sshd ($(tail -n 1 download.log)): the tests over SSH will be skipped" >&2
fi
