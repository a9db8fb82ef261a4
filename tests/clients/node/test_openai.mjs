// openai for node against real Tandem processes that serve models/tiny.
//
//     npm ci && OPENAI_BASE_URL=http://127.0.0.1:8000/v1 node test_openai.mjs   # scripts/check-clients does all of it
//
// Prints one line a test and `N passed, N failed`.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { VERSION } from "openai/version";

const base = process.env.OPENAI_BASE_URL.replace(/\/$/, "");
const client = new OpenAI({ baseURL: base, apiKey: "none", timeout: 60_000, maxRetries: 0 });
const model = (await client.models.list()).data[0].id;

// What models/tiny says to this, greedily: the first case of its golden.json.
const messages = [{ role: "user", content: "Hello" }];
const prompt = [0, 3, 45, 3081, 1, 4];
const answer = "Hello! Give me some documents and ask me a question about them.";

const chat = (over = {}) => client.chat.completions.create({ model, messages, temperature: 0, ...over });
const complete = (over = {}) => client.completions.create({ model, prompt, temperature: 0, ...over });

const collect = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
};
const said = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");

const refused = async (kind, call, { code, param } = {}) => {
  const error = await call().then(
    () => assert.fail(`was accepted; ${kind.name} expected`),
    (error) => error,
  );
  assert.ok(error instanceof kind, `${error.constructor.name} (${error.message}), expected ${kind.name}`);
  assert.ok(error.error.message && error.type, JSON.stringify(error.error));
  if (code) assert.equal(error.code, code);
  if (param) assert.equal(error.param, param);
};

// Requests that the router has in progress, from its metrics.
const running = async () => {
  const text = await (await fetch(base.replace(/\/v1$/, "/metrics"))).text();
  const found = [...text.matchAll(/^tandem_router_requests_running(?:\{[^}]*\})? ([0-9.e+]+)$/gm)];
  assert.ok(found.length, "tandem_router_requests_running is not among the metrics");
  return found.reduce((sum, match) => sum + Number(match[1]), 0);
};
const settles = async (expected, seconds) => {
  const deadline = Date.now() + seconds * 1000;
  for (let now; (now = await running()) !== expected; ) {
    assert.ok(Date.now() < deadline, `${now} requests run after ${seconds} s, expected ${expected}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
};

const tests = {
  async "models are listed and retrieved"() {
    assert.deepEqual((await collect(client.models.list())).map(({ id }) => id), [model]);
    assert.equal((await client.models.retrieve(model)).id, model);
    await refused(OpenAI.NotFoundError, () => client.models.retrieve("nope"), { code: "model_not_found" });
  },

  async "chat answers and counts"() {
    const { choices, usage } = await chat();
    assert.equal(choices.length, 1);
    assert.equal(choices[0].message.content, answer);
    assert.equal(choices[0].finish_reason, "stop");
    assert.equal(usage.prompt_tokens, prompt.length);
    assert.equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens);
    assert.ok(usage.prompt_tokens_details.cached_tokens >= 0);
  },

  async "chat streams, with usage when asked"() {
    const plain = await collect(await chat({ stream: true }));
    assert.ok(plain.length > 5, `only ${plain.length} chunks: that is no stream`);
    assert.equal(said(plain), answer);
    assert.ok(plain.every(({ usage }) => !usage));
    const counted = await collect(await chat({ stream: true, stream_options: { include_usage: true } }));
    assert.deepEqual(counted.at(-1).choices, []);
    assert.equal(counted.at(-1).usage.prompt_tokens, prompt.length);
  },

  async "the stream helper accumulates"() {
    const stream = client.chat.completions.stream({ model, messages, temperature: 0 });
    assert.equal(await stream.finalContent(), answer);
  },

  async "completions of text, texts, ids and lists of ids"() {
    assert.equal((await complete()).choices[0].text, answer);
    const one = await complete({ prompt: "The capital", max_tokens: 8 });
    const two = await complete({ prompt: ["The capital", "Once upon a time"], max_tokens: 8 });
    assert.deepEqual(two.choices.map(({ index }) => index), [0, 1]);
    assert.equal(two.choices[0].text, one.choices[0].text);
    const lists = await complete({ prompt: [prompt, prompt], max_tokens: 32 });
    assert.deepEqual(lists.choices.map(({ text }) => text), [answer, answer]);
  },

  async "completion streams"() {
    const chunks = await collect(await complete({ stream: true, stream_options: { include_usage: true } }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.text ?? "").join(""), answer);
    assert.equal(chunks.at(-1).usage.prompt_tokens, prompt.length);
  },

  async "stop, length, n and seed"() {
    assert.equal((await chat({ stop: [" documents"] })).choices[0].message.content, "Hello! Give me some");
    const short = await chat({ max_completion_tokens: 3 });
    assert.equal(short.choices[0].finish_reason, "length");
    assert.equal(short.usage.completion_tokens, 3);
    assert.deepEqual((await chat({ n: 2 })).choices.map(({ message }) => message.content), [answer, answer]);
    const sampled = async () =>
      (await complete({ temperature: 2, seed: 11, max_tokens: 16, ignore_eos: true })).choices[0].text;
    assert.equal(await sampled(), await sampled());
  },

  async "logprobs"() {
    const { content } = (await chat({ logprobs: true, top_logprobs: 2 })).choices[0].logprobs;
    assert.ok(content.length >= 17);
    for (const { token, logprob, top_logprobs } of content) {
      assert.equal(top_logprobs.length, 2);
      assert.equal(top_logprobs[0].token, token);
      assert.ok(logprob <= 0 && top_logprobs[0].logprob >= top_logprobs[1].logprob);
    }
    const { tokens, token_logprobs } = (await complete({ logprobs: 1 })).choices[0].logprobs;
    assert.equal(tokens.length, token_logprobs.length);
  },

  async "bad requests are refused with their param and code"() {
    const bad = OpenAI.BadRequestError;
    await refused(OpenAI.NotFoundError, () => chat({ model: "nope" }), { code: "model_not_found", param: "model" });
    const long = Array(100_000).fill(45);
    await refused(bad, () => complete({ prompt: long }), { code: "context_length_exceeded", param: "prompt" });
    await refused(bad, () => chat({ temperature: "hot" }), { param: "temperature" });
    await refused(bad, () => chat({ temperature: 2.5 }), { param: "temperature" });
    await refused(bad, () => chat({ temperature: 2.5, stream: true }), { param: "temperature" });
    await refused(bad, () => chat({ messages: [] }), { param: "messages" });
  },

  async "many at once"() {
    const all = await Promise.all(Array.from({ length: 16 }, async () => said(await collect(await chat({ stream: true })))));
    assert.deepEqual(new Set(all), new Set([answer]));
  },

  async "aborting the stream cancels"() {
    await settles(0, 5);
    const stream = await complete({ max_tokens: 4000, stream: true, ignore_eos: true });
    let seen = 0;
    for await (const _ of stream) {
      if (++seen < 3) continue;
      assert.equal(await running(), 1);
      stream.controller.abort();
      break;
    }
    await settles(0, 5);
    assert.equal((await chat()).choices[0].message.content, answer);
  },
};

let failed = 0;
for (const [name, test] of Object.entries(tests)) {
  const began = performance.now();
  let verdict = "ok";
  try {
    await test();
  } catch (error) {
    verdict = "FAILED";
    failed += 1;
    console.error(error);
  }
  console.log(`${verdict.padEnd(6)} ${((performance.now() - began) / 1000).toFixed(2).padStart(6)}s ${name}`);
}
console.log(`openai for node ${VERSION}: ${Object.keys(tests).length - failed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
