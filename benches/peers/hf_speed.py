#!/usr/bin/env python3
"""How fast Hugging Face transformers runs a model folder on this CPU: the peer that benches/serve is held against.

    python -m venv .venv && .venv/bin/pip install -r benches/peers/requirements.txt
    .venv/bin/python benches/peers/hf_speed.py --model models/tiny --threads 1

Measures, in float32 with scaled-dot-product attention under torch.inference_mode:
  prefill  tokens/s of one forward over a prompt, KV cache filled, logits of the last position only
  decode   tokens/s of one stream, greedy, KV cache, starting from a context of --context tokens

Decode is a bare loop over forward (generate() adds its own bookkeeping), run with each cache that transformers
offers, and the fastest is the figure to beat. `--compile` adds the loop under torch.compile over a static cache
(needs a C++ compiler; its compilation is not timed). Prints progress on stderr and one JSON object on stdout.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face model folder")
    parser.add_argument("--threads", type=int, default=1, help="threads for compute (default: %(default)s)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2000], help="prefill lengths in tokens")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache when decode starts")
    parser.add_argument("--decode-tokens", type=int, default=96, help="tokens decoded in each repeat")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats after one warm-up; the median is given")
    parser.add_argument("--compile", action="store_true", help="also time decode under torch.compile")
    return parser.parse_args()


def say(text):
    print(text, file=sys.stderr, flush=True)


def cpu_name():
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def summary(tokens, seconds):
    return {
        "tokens": tokens,
        "repeats": len(seconds),
        "median_s": round(statistics.median(seconds), 6),
        "tokens_per_s": round(tokens / statistics.median(seconds), 2),
        "best_tokens_per_s": round(tokens / min(seconds), 2),
        "worst_tokens_per_s": round(tokens / max(seconds), 2),
    }


def main():
    args = arguments()
    # Before torch is imported: its thread pools read these once.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa").eval()
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(1)

    def prompt(length):
        return torch.randint(5, vocab, (1, length), generator=generator)

    def prefill(ids, cache):
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]

    @torch.inference_mode()
    def time_prefill(length):
        ids, seconds = prompt(length), []
        for _ in range(args.repeats + 1):
            cache = DynamicCache(config=model.config)
            start = time.perf_counter()
            prefill(ids, cache)
            seconds.append(time.perf_counter() - start)
        return summary(length, seconds[1:])

    @torch.inference_mode()
    def time_decode(make_cache, step):
        ids, seconds = prompt(args.context), []
        for _ in range(args.repeats + 1):
            cache = make_cache()
            token = prefill(ids, cache).argmax(-1)
            start = time.perf_counter()
            for _ in range(args.decode_tokens):
                token = step(token, past_key_values=cache, use_cache=True).logits.argmax(-1)
            seconds.append(time.perf_counter() - start)
        return summary(args.decode_tokens, seconds[1:])

    def dynamic():
        return DynamicCache(config=model.config)

    def static():
        return StaticCache(config=model.config, max_cache_len=args.context + args.decode_tokens + 1)

    result = {
        "peer": "transformers",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "threads": args.threads,
        "dtype": "float32",
        "attention": "sdpa",
        "model": os.path.basename(os.path.abspath(args.model)),
        "command": " ".join(sys.argv),
        "prefill": {},
        "decode": {},
    }
    for length in args.prompts:
        result["prefill"][str(length)] = found = time_prefill(length)
        say(f"prefill {length} tokens: {found['tokens_per_s']} tokens/s")

    loops = {"dynamic cache": (dynamic, model), "static cache": (static, model)}
    if args.compile:
        loops["static cache, compiled"] = (static, torch.compile(model))
    for name, (make_cache, step) in loops.items():
        result["decode"][name] = found = time_decode(make_cache, step)
        say(f"decode at {args.context} tokens, {name}: {found['tokens_per_s']} tokens/s")
    result["decode_best"] = max(result["decode"].values(), key=lambda loop: loop["tokens_per_s"])
    result["load_after"] = os.getloadavg()[0]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
