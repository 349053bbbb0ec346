"""One call with Python httpx, as an app would make it: `with_httpx.py URL BODY`."""

import sys

import httpx

reply = httpx.post(sys.argv[1], content=sys.argv[2], headers={"Content-Type": "application/json"}, timeout=20)
print(reply.status_code, reply.headers["x-gateway-outcome"], reply.text)
