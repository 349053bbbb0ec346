# Installs Debian packages. Sourced by tests/run and deploy/bench/setup.sh, under `set -euo pipefail`.

# install_packages PACKAGE...: installs packages without starting the services in them, which would take ports and processor
# time. Waits up to 5 minutes for another process that installs packages. While it runs, `policy-rc.d` forbids every start of a
# service. The former file is restored at the end, also after an error or a signal. The body is a subshell, so that its traps do
# not replace those of the calling script.
install_packages() (
  [ "$(id -u)" = 0 ] || { echo "missing: $*; install these, or run this as root" >&2; exit 2; }
  policy=/usr/sbin/policy-rc.d
  former=$policy.former
  mark='# Made by install_packages of ccsqm-gateway; removed when it ends.'
  exec 9</usr/sbin # one run at a time: else the second run would save the policy of the first as the former file
  flock --wait 300 9 || { echo "another run has been installing packages for 5 minutes" >&2; exit 1; }

  trap 'if [ -e "$former" ]; then mv -f "$former" "$policy"; else rm -f "$policy"; fi' EXIT
  trap 'exit 1' HUP INT TERM
  # A file with the mark was left by a run that was killed; it is not kept.
  if [ -e "$policy" ] && ! grep -qF "$mark" "$policy"; then mv "$policy" "$former"; fi
  printf '#!/bin/sh\n%s\nexit 101\n' "$mark" >"$policy"
  chmod 755 "$policy"

  update_package_lists
  DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@" >/dev/null 9<&-
)

# Updates the package lists, and retries for up to 5 minutes while another process holds their lock. DPkg::Lock::Timeout covers
# only dpkg's lock; without the loop the update would fail at once.
update_package_lists() {
  local said deadline=$((SECONDS + 300))
  until said=$(LC_ALL=C apt-get -o DPkg::Lock::Timeout=300 update -qq 2>&1 9<&-); do
    if [[ $said != *"Could not get lock"* ]] || [ $SECONDS -ge $deadline ]; then
      printf '%s\n' "$said" >&2
      return 1
    fi
    sleep 2
  done
}
