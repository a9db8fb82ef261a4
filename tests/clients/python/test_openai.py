#!/usr/bin/env python3
"""openai-python against real Tandem processes that serve models/tiny.

    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 python test_openai.py     # scripts/check-clients does all of it

Each function whose name starts with `test_` is one test. Prints one line a test and `N passed, N failed`.
"""

import asyncio
import json
import os
import re
import sys
import time
import traceback
import urllib.error
import urllib.request

import openai

BASE = os.environ["OPENAI_BASE_URL"].rstrip("/")
ROOT = BASE.removesuffix("/v1")
client = openai.OpenAI(base_url=BASE, api_key="none", timeout=60, max_retries=0)
MODEL = client.models.list().data[0].id

# What models/tiny says to this, greedily: the first case of its golden.json.
HELLO = [{"role": "user", "content": "Hello"}]
HELLO_IDS = [0, 3, 45, 3081, 1, 4]
# The second case: "What can you do?"
WHAT_IDS = [0, 3, 60, 77, 272, 455, 433, 405, 36, 1, 4]
ANSWER = "Hello! Give me some documents and ask me a question about them."


def chat(**over):
    return client.chat.completions.create(**({"model": MODEL, "messages": HELLO, "temperature": 0} | over))


def complete(**over):
    return client.completions.create(**({"model": MODEL, "prompt": HELLO_IDS, "temperature": 0} | over))


def equal(found, expected, what="value"):
    assert found == expected, f"{what} is {found!r}, expected {expected!r}"


def refused(kind, call, code=None, param=None):
    """The call raises exactly this class, with this code and param."""
    try:
        call()
    except openai.APIStatusError as error:
        assert type(error) is kind, f"{type(error).__name__} ({error}), expected {kind.__name__}"
        assert error.body and error.body.get("message"), f"no message in {error.body!r}"
        assert error.type, f"no type in {error.body!r}"
        if code:
            equal(error.code, code, "code")
        if param:
            equal(error.param, param, "param")
        return error
    raise AssertionError(f"was accepted; {kind.__name__} expected")


def running():
    """Requests that the router has in progress, from its metrics."""
    with urllib.request.urlopen(f"{ROOT}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = re.findall(r"^tandem_router_requests_running(?:\{[^}]*\})? ([0-9.e+]+)$", text, re.M)
    assert found, "tandem_router_requests_running is not among the metrics"
    return sum(float(value) for value in found)


def settles(expected, seconds):
    deadline = time.monotonic() + seconds
    while (now := running()) != expected:
        assert time.monotonic() < deadline, f"{now:g} requests run after {seconds} s, expected {expected}"
        time.sleep(0.05)


# ---- models


def test_models_are_listed_and_retrieved():
    equal([model.id for model in client.models.list()], [MODEL])
    equal(client.models.retrieve(MODEL).id, MODEL)
    equal(client.models.retrieve(MODEL).object, "model")


def test_unknown_model_is_not_retrieved():
    refused(openai.NotFoundError, lambda: client.models.retrieve("nope"), code="model_not_found")


# ---- chat


def test_chat_answers():
    answer = chat()
    equal(answer.object, "chat.completion")
    equal(answer.model, MODEL)
    equal(len(answer.choices), 1)
    equal(answer.choices[0].message.role, "assistant")
    equal(answer.choices[0].message.content, ANSWER)
    equal(answer.choices[0].finish_reason, "stop")


def test_chat_counts_tokens():
    usage = chat().usage
    equal(usage.prompt_tokens, len(HELLO_IDS))
    assert usage.completion_tokens in (17, 18), usage
    equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    assert 0 <= usage.prompt_tokens_details.cached_tokens <= usage.prompt_tokens, usage


def test_chat_takes_content_parts_and_many_turns():
    equal(chat(messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]).choices[0].message.content, ANSWER)
    turns = HELLO + [{"role": "assistant", "content": ANSWER}] + HELLO
    assert chat(messages=turns).usage.prompt_tokens > len(HELLO_IDS)


def test_chat_streams():
    chunks = list(chat(stream=True))
    assert len(chunks) > 5, f"only {len(chunks)} chunks: that is no stream"
    equal(chunks[0].object, "chat.completion.chunk")
    equal(chunks[0].choices[0].delta.role, "assistant")
    equal({chunk.id for chunk in chunks}, {chunks[0].id})
    equal("".join(c.choices[0].delta.content or "" for c in chunks if c.choices), ANSWER)
    equal([c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason], ["stop"])
    assert all(chunk.usage is None for chunk in chunks), "usage was not asked for"


def test_chat_stream_includes_usage_when_asked():
    chunks = list(chat(stream=True, stream_options={"include_usage": True}))
    equal(chunks[-1].choices, [])
    equal(chunks[-1].usage.prompt_tokens, len(HELLO_IDS))
    equal(chunks[-1].usage.completion_tokens, chat().usage.completion_tokens)
    assert all(chunk.usage is None for chunk in chunks[:-1]), "usage before the end"


def test_chat_stream_helper_accumulates():
    with client.chat.completions.stream(model=MODEL, messages=HELLO, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        equal(text, ANSWER)
        equal(stream.get_final_completion().choices[0].message.content, ANSWER)


def test_chat_stops_at_length():
    for limit in ("max_tokens", "max_completion_tokens"):
        answer = chat(**{limit: 3})
        equal(answer.usage.completion_tokens, 3, limit)
        equal(answer.choices[0].finish_reason, "length")
        assert ANSWER.startswith(answer.choices[0].message.content)


def test_chat_stops_at_text():
    for stop in (" documents", ["never seen", " documents"]):
        for stream in (False, True):
            answer = chat(stop=stop, stream=stream)
            if stream:
                chunks = list(answer)
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
                reason = [c.choices[0].finish_reason for c in chunks if c.choices][-1]
            else:
                text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            equal(text, "Hello! Give me some")
            equal(reason, "stop")


def test_chat_gives_n_choices():
    answer = chat(n=2)
    equal([choice.index for choice in answer.choices], [0, 1])
    equal([choice.message.content for choice in answer.choices], [ANSWER, ANSWER])
    equal(answer.usage.completion_tokens, 2 * chat().usage.completion_tokens)
    texts = ["", ""]
    for chunk in chat(n=2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    equal(texts, [ANSWER, ANSWER])


def test_seed_repeats_and_changes_the_answer():
    def sampled(seed):
        over = {"temperature": 2.0, "seed": seed, "max_tokens": 24}
        return complete(prompt=HELLO_IDS[:4], extra_body={"ignore_eos": True}, **over).choices[0].text

    equal(sampled(7), sampled(7))
    assert len({sampled(seed) for seed in range(4)}) > 1, "every seed gives one text"


def test_chat_gives_logprobs():
    answer = chat(logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    equal(content[0].token, ANSWER[: len(content[0].token)], "the first token")
    equal(bytes(content[0].bytes).decode(), content[0].token, "its bytes")
    assert len(content) in (17, 18), len(content)
    for token in content:
        equal(len(token.top_logprobs), 3)
        values = [top.logprob for top in token.top_logprobs]
        equal(values, sorted(values, reverse=True), "order")
        equal(token.top_logprobs[0].token, token.token, "the greedy token")
        assert token.logprob <= 0.0 and abs(token.logprob - values[0]) < 1e-4, token
    assert chat().choices[0].logprobs is None


def test_chat_streams_logprobs():
    chunks = [c for c in chat(logprobs=True, top_logprobs=1, stream=True) if c.choices]
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    whole = chat(logprobs=True, top_logprobs=1).choices[0].logprobs.content
    equal([t.token for t in streamed], [t.token for t in whole])


# ---- completions


def test_completion_of_token_ids():
    answer = complete()
    equal(answer.object, "text_completion")
    equal(answer.choices[0].text, ANSWER)
    equal(answer.choices[0].finish_reason, "stop")
    equal(answer.usage.prompt_tokens, len(HELLO_IDS))


def test_completion_of_text():
    answer = complete(prompt="The capital", max_tokens=8)
    assert answer.usage.prompt_tokens >= 2, answer.usage
    assert isinstance(answer.choices[0].text, str)


def test_completion_of_a_list_of_texts():
    prompts = ["The capital", "Once upon a time"]
    one_by_one = [complete(prompt=prompt, max_tokens=8) for prompt in prompts]
    together = complete(prompt=prompts, max_tokens=8)
    equal([choice.index for choice in together.choices], [0, 1])
    equal([c.text for c in together.choices], [single.choices[0].text for single in one_by_one])
    equal(together.usage.prompt_tokens, sum(single.usage.prompt_tokens for single in one_by_one))


def test_completion_of_a_list_of_token_lists():
    answer = complete(prompt=[HELLO_IDS, WHAT_IDS, HELLO_IDS], max_tokens=32)
    equal([choice.index for choice in answer.choices], [0, 1, 2])
    equal(answer.choices[0].text, ANSWER)
    equal(answer.choices[2].text, ANSWER)
    equal(answer.choices[1].text, complete(prompt=WHAT_IDS, max_tokens=32).choices[0].text)


def test_completion_streams():
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    equal("".join(c.choices[0].text for c in chunks if c.choices), ANSWER)
    equal(chunks[-1].usage.prompt_tokens, len(HELLO_IDS))


def test_completion_gives_logprobs():
    logprobs = complete(logprobs=2).choices[0].logprobs
    lengths = {len(x) for x in (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, logprobs.text_offset)}
    equal(len(lengths), 1, "kinds of length")
    assert "".join(logprobs.tokens).startswith(ANSWER), logprobs.tokens
    equal(logprobs.text_offset[1], len(logprobs.tokens[0]), "the second token's offset")
    assert all(len(top) >= 2 and value <= 0.0 for top, value in zip(logprobs.top_logprobs, logprobs.token_logprobs))


# ---- refusals


def test_unknown_model_is_refused():
    refused(openai.NotFoundError, lambda: chat(model="nope"), code="model_not_found", param="model")
    refused(openai.NotFoundError, lambda: complete(model="nope"), code="model_not_found", param="model")


def test_long_prompt_is_refused():
    long = {"prompt": [45] * 100_000, "max_tokens": 1}
    refused(openai.BadRequestError, lambda: complete(**long), code="context_length_exceeded", param="prompt")
    words = [{"role": "user", "content": "one two three four " * 20_000}]
    refused(openai.BadRequestError, lambda: chat(messages=words), code="context_length_exceeded", param="messages")
    refused(openai.BadRequestError, lambda: chat(messages=words, stream=True), code="context_length_exceeded")


def test_wrong_types_are_refused():
    refused(openai.BadRequestError, lambda: chat(extra_body={"temperature": "hot"}), param="temperature")
    refused(openai.BadRequestError, lambda: chat(extra_body={"messages": "Hello"}), param="messages")
    refused(openai.BadRequestError, lambda: chat(extra_body={"stream": "yes"}), param="stream")
    refused(openai.BadRequestError, lambda: complete(extra_body={"max_tokens": 1.5}), param="max_tokens")
    refused(openai.BadRequestError, lambda: complete(extra_body={"prompt": {"text": "x"}}), param="prompt")


def test_out_of_range_is_refused():
    for name, value in {
        "temperature": 2.5,
        "top_p": 1.5,
        "presence_penalty": 3,
        "frequency_penalty": -3,
        "n": 0,
        "max_tokens": -1,
        "top_logprobs": 21,
    }.items():
        over = {name: value} | ({"logprobs": True} if name == "top_logprobs" else {})
        refused(openai.BadRequestError, lambda: chat(**over), param=name)  # noqa: B023 called at once


def test_empty_messages_are_refused():
    refused(openai.BadRequestError, lambda: chat(messages=[]), param="messages")


def test_unknown_token_id_is_refused():
    refused(openai.BadRequestError, lambda: complete(prompt=[0, 3, 4_000_000]), param="prompt[2]")


def test_bad_json_is_refused():
    request = urllib.request.Request(
        f"{BASE}/chat/completions", data=b'{"model": ', headers={"Content-Type": "application/json"}
    )
    try:
        urllib.request.urlopen(request, timeout=10)
    except urllib.error.HTTPError as error:
        equal(error.code, 400)
        body = json.load(error)
        assert body["error"]["message"] and body["error"]["type"] == "invalid_request_error", body
    else:
        raise AssertionError("was accepted")


# ---- many at once, and none left


def test_many_at_once():
    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=BASE, api_key="none", timeout=60, max_retries=0) as many:

            async def one():
                stream = await many.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

            return await asyncio.gather(*(one() for _ in range(16)))

    equal(set(asyncio.run(all_of_them())), {ANSWER})


def test_closing_the_stream_cancels():
    settles(0, seconds=5)
    stream = complete(max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    for _ in range(3):
        next(stream)
    equal(running(), 1.0, "requests running before the close")
    stream.close()
    settles(0, seconds=5)
    equal(chat().choices[0].message.content, ANSWER)


def main():
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    failed = 0
    for name, test in tests:
        began = time.monotonic()
        try:
            test()
            verdict = "ok"
        except Exception:
            verdict, failed = "FAILED", failed + 1
            traceback.print_exc()
        print(f"{verdict:6} {time.monotonic() - began:6.2f}s {name}", flush=True)
    print(f"openai-python {openai.__version__}: {len(tests) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
