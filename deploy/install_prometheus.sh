#!/bin/sh
# Prints the folder that has `prometheus` and `promtool`: one on PATH, or FOLDER, filled with Debian's own package if it
# is not there yet. Needs no root: the package is unpacked, not installed. Exit code 1, and a line on stderr, without.
#   deploy/install_prometheus.sh FOLDER
set -eu
folder=${1:?usage: install_prometheus.sh FOLDER}

if command -v promtool >/dev/null && found=$(command -v prometheus); then
  dirname "$found"
  exit
fi
if [ ! -x "$folder/usr/bin/promtool" ]; then
  for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || { echo "no prometheus on PATH, and no $tool to get Debian's" >&2; exit 1; }
  done
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  cd "$work"
  # A machine that never ran `apt-get update` has no lists; they are fetched into a place of our own.
  mkdir -p state/lists/partial cache/archives/partial
  quiet="-qq -o APT::Sandbox::User= -o Acquire::Retries=1 -o Acquire::http::Timeout=20"
  # shellcheck disable=SC2086 # several options
  apt-get $quiet download prometheus >log 2>&1 \
    || { ours="-o Dir::State=$work/state -o Dir::Cache=$work/cache -o Dir::State::status=/var/lib/dpkg/status"
         apt-get $quiet $ours update >>log 2>&1 && apt-get $quiet $ours download prometheus >>log 2>&1; } \
    || { echo "Debian's prometheus cannot be had: $(tail -n 1 log)" >&2; exit 1; }
  mkdir -p "$work/unpacked"
  dpkg-deb -x prometheus_*.deb unpacked
  mkdir -p "$(dirname "$folder")"
  rm -rf "$folder"
  mv unpacked "$folder"
fi
echo "$folder/usr/bin"
