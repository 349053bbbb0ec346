"""Load for a build that is watched (`deploy/build`): what a busy gateway does, on each kind of upstream.

Usage: train.py BINARY, an instrumented gateway, which writes its profile when it ends.
"""

import os
import sys

import proxies
from proxies import Gateway, Invalid, body_of, load


def serve(gateway):
    """Full speed with few and many connections, one request at a time, and large bodies."""
    for connections, requests in ((32, 40_000), (256, 40_000), (1, 2_000)):
        load(gateway, "--connections", connections, "--requests", requests)
    load(gateway, "--connections", 32, "--requests", 2_000, body=body_of(10_000))


def main():
    proxies.GATEWAY = os.path.abspath(sys.argv[1])
    proxies.raise_file_limit()
    proxies.leave_on_signals()
    try:
        upstreams = proxies.start_upstreams()
        for transport in ("plain", "tls1", "h2"):
            gateway = Gateway("watched", upstreams, transport).start()
            serve(gateway)
            gateway.stop()
    except Invalid as error:
        sys.exit(f"no profile: {error}")


if __name__ == "__main__":
    main()
