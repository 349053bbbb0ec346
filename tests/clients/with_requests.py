"""One call with Python requests, as an app would make it: `with_requests.py URL BODY`."""

import sys

import requests

reply = requests.post(sys.argv[1], data=sys.argv[2], headers={"Content-Type": "application/json"}, timeout=20)
print(reply.status_code, reply.headers["x-gateway-outcome"], reply.text)
