// One call with axios, as an app would make it: `node with_axios.cjs URL BODY`.
const axios = require("axios");
const [url, body] = process.argv.slice(2);
axios.post(url, JSON.parse(body)).then((reply) => {
  console.log(reply.status, reply.headers["x-gateway-outcome"], JSON.stringify(reply.data));
});
