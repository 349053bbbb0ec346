# Shared by `run` here and `deploy/build`: packages, and the small programs and certificates that both use.
# Sourced, from the top of the project, under `set -euo pipefail`.

. deploy/packages.sh

work=$PWD/target/bench
mkdir -p "$work"

say() { printf '== %s\n' "$*" >&2; }

install_missing() {
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
  done
  [ ${#missing[@]} -eq 0 ] && return
  say "installing ${missing[*]}"
  install_packages "${missing[@]}"
}

compile() {
  local tool
  for tool in "$@"; do cc -O2 -Wall -Wextra -o "$work/$tool" "deploy/bench/$tool.c"; done
}

# A test authority and a leaf for the TLS upstream, made once.
certify() {
  [ -s "$work/leaf.pem" ] && openssl x509 -in "$work/leaf.pem" -noout -checkend 86400 >/dev/null && return
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj "/CN=bench" \
    -keyout "$work/ca.key" -out "$work/ca.pem" 2>/dev/null
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=service.besclouds.com" \
    -keyout "$work/leaf.key" -out "$work/leaf.csr" 2>/dev/null
  openssl x509 -req -in "$work/leaf.csr" -CA "$work/ca.pem" -CAkey "$work/ca.key" -CAcreateserial -days 30 \
    -out "$work/leaf.pem" -extfile deploy/bench/peers/leaf.ext 2>/dev/null
}
