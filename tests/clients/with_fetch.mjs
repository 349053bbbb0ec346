// One call with Node's own fetch, as an app would make it: `node with_fetch.mjs URL BODY`.
const [url, body] = process.argv.slice(2);
const reply = await fetch(url, { method: "POST", headers: { "Content-Type": "application/json" }, body });
console.log(reply.status, reply.headers.get("x-gateway-outcome"), await reply.text());
