# Functions that `deploy/bench/run` and `deploy/build` share: they install packages, compile the small C programs and make
# the test certificates. Source this file from the top of the repository, under `set -euo pipefail`.

. deploy/packages.sh

work=$PWD/target/bench
mkdir -p "$work"

say() { printf '== %s\n' "$*" >&2; }

# install_missing PACKAGE...: installs those packages that are not installed.
install_missing() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  say "installing ${missing[*]}"
  install_packages "${missing[@]}"
}

# compile NAME...: compiles deploy/bench/NAME.c to $work/NAME.
compile() {
  local tool
  for tool in "$@"; do cc -O2 -Wall -Wextra -o "$work/$tool" "deploy/bench/$tool.c"; done
}

# Makes a test CA and a certificate for the TLS upstream, unless there is one that is valid for another day.
certify() {
  [ -s "$work/leaf.pem" ] && openssl x509 -in "$work/leaf.pem" -noout -checkend 86400 >/dev/null && return
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj "/CN=bench" \
    -keyout "$work/ca.key" -out "$work/ca.pem" 2>/dev/null
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=service.besclouds.com" \
    -keyout "$work/leaf.key" -out "$work/leaf.csr" 2>/dev/null
  openssl x509 -req -in "$work/leaf.csr" -CA "$work/ca.pem" -CAkey "$work/ca.key" -CAcreateserial -days 30 \
    -out "$work/leaf.pem" -extfile deploy/bench/peers/leaf.ext 2>/dev/null
}
