#!/usr/bin/env python3
"""How often a served model's answers are exactly right, by type of question, beside what its training measured.

    scripts/up --model DIR                       # in another terminal
    python3 benches/accuracy.py --model DIR --url http://127.0.0.1:8000/v1

Reads DIR/eval/*.jsonl (documents, question, expected answer; conversations turn by turn) and asks through the
chat endpoint, greedily. Compares with `qa` in DIR/train_report.json, and exits with status 1 when a type is more
than --points below or above it. Needs nothing but Python.
"""

import argparse
import concurrent.futures
import glob
import json
import os
import sys
import time
import urllib.error
import urllib.request


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the model's folder, with eval/ and train_report.json")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="the endpoint (default: %(default)s)")
    parser.add_argument("--concurrent", type=int, default=8, help="requests at once (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=None, help="cases of each type, at most (default: all)")
    parser.add_argument("--points", type=float, default=2.0, help="allowed difference (default: %(default)s)")
    return parser.parse_args()


def served_model(url):
    with urllib.request.urlopen(f"{url}/models", timeout=30) as answer:
        return json.load(answer)["data"][0]["id"]


def ask(url, model, messages):
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 160}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        print(f"\n{error.code}: {error.read().decode(errors='replace')}", file=sys.stderr)
        return ""


def questions(case):
    """Each question of a case: the messages before it, and the answer it should get."""
    messages = list(case["messages"])
    if "turns" not in case:
        yield messages, case["expected"]
        return
    for number, turn in enumerate(case["turns"]):
        if number > 0:
            messages = messages + [{"role": "user", "content": turn["user"]}]
        yield messages, turn["assistant"]
        messages = messages + [{"role": "assistant", "content": turn["assistant"]}]


def main():
    args = arguments()
    model = served_model(args.url)
    with open(os.path.join(args.model, "train_report.json")) as file:
        trained = json.load(file)["qa"]
    jobs = []
    for path in sorted(glob.glob(os.path.join(args.model, "eval", "*.jsonl"))):
        with open(path) as file:
            cases = [json.loads(line) for line in file]
        cases = [case for case in cases if "messages" in case][: args.limit]
        jobs += [(case["type"], *question) for case in cases for question in questions(case)]
    start, counts = time.monotonic(), {}
    with concurrent.futures.ThreadPoolExecutor(args.concurrent) as pool:
        answers = pool.map(lambda job: ask(args.url, model, job[1]), jobs)
        for done, ((kind, _, expected), answer) in enumerate(zip(jobs, answers), 1):
            right, asked = counts.get(kind, (0, 0))
            counts[kind] = (right + (answer.strip() == expected.strip()), asked + 1)
            if sys.stderr.isatty() or done % 200 == 0:
                print(f"\r{done} of {len(jobs)}", end="", file=sys.stderr, flush=True)
    print(f"\r{len(jobs)} questions in {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(f"{'type':<14}{'asked':>7}{'exact':>9}{'trained':>9}{'points':>8}")
    worst = 0.0
    for kind, (right, asked) in sorted(counts.items()):
        exact, reference = 100 * right / asked, 100 * trained[kind]["exact"]
        worst = max(worst, abs(exact - reference))
        print(f"{kind:<14}{asked:>7}{exact:>8.1f}%{reference:>8.1f}%{exact - reference:>+8.1f}")
    sys.exit(worst > args.points + 1e-9)


if __name__ == "__main__":
    main()
