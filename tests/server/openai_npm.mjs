// OpenAI's npm package against a server: prints a line of JSON for each call. Run by test_openai_npm.py.
import { createRequire } from "node:module";

const [, , baseURL, modules, calls] = process.argv;
const { OpenAI } = createRequire(`${modules}/`)("openai");
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });

for (const [api, params] of JSON.parse(calls)) {
  let told;
  try {
    if (params.stream) {
      const events = [];
      for await (const event of await client.images.generate(params)) events.push(event);
      told = { types: events.map(({ type }) => type), usage: events.at(-1).usage };
    } else if (api === "chat") {
      const { choices, usage } = await client.chat.completions.create(params);
      told = { url: choices[0].message.content[0].image_url.url.slice(0, 22), usage };
    } else {
      const { data, usage, warnings } = await client.images.generate(params);
      const files = await Promise.all(data.map(async ({ b64_json, url }) =>
        b64_json ? Buffer.from(b64_json, "base64") : Buffer.from(await (await fetch(url)).arrayBuffer())));
      told = { heads: files.map((file) => file.subarray(0, 4).toString("latin1")), usage, warnings };
    }
  } catch (error) {
    told = { error: error.constructor.name, status: error.status, param: error.param };
  }
  console.log(JSON.stringify(told));
}
