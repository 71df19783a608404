"""The server of `mambaseq serve` on loopback: speed and latency under load, the prefix cache, minutes of mixed load.

    python benchmarks/serving.py --checkpoint RUN [--device cuda] [--dtype bfloat16] [--json FILE] [--picture FILE.svg]
    python benchmarks/serving.py --checkpoint RUN --parts check prefix      8 requests that share a prompt, or none
    python benchmarks/serving.py --checkpoint RUN --parts mixed --minutes 10      with the memory told each 10 s

A server is started for it, unless `--url` names one of the same run, started with as many `--slots` as the highest
concurrency. check: answers to requests
of all kinds at once are held against those of `generate`, each alone. load: `--concurrency` clients ask again and again
for `--new` tokens after prompts of `--prompt` tokens, and read the stream: tokens a second of all together, seconds
until the first token and until the last. `generate` with a batch of that size stands beside it, measured while the
server has nothing to do. Both do a little of the same before the clock starts. Requests that are not answered as they
should be are lost, and told. drain: SIGTERM comes while requests are answered; all of them must be. Exits with 1 where
something is lost or differs; in 16 bits answers may, since a batch of another size rounds otherwise, and are counted
only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving_client import Got, Site

from mambaseq.arguments import DTYPES
from mambaseq.atomic import json_text
from mambaseq.checkpoints import LoadedModel, load_model
from mambaseq.generation import generate, generate_all
from mambaseq.generation.stopping import StopStrings
from mambaseq.reporting.charts import DARK, LIGHT, STYLE, WIDTH, Curve, frame, lines, text
from mambaseq.resources import located
from mambaseq.serving.text import Answer

EVERY = 10.0  # seconds between two looks at the memory
GROWTH = 0.03  # of the memory, which is none: pages of the allocators
JUDGED = 3.0  # minutes of mixed load from which on memory that grows counts: it is level only when the caches are full
PARTS = ("check", "load", "prefix", "mixed", "drain")
CORPUS = "mambaseq:data/text/tinyshakespeare.txt"


class Prompts:
    """Pieces of Shakespeare, as ids of the run's tokenizer."""

    def __init__(self, loaded: LoadedModel) -> None:
        assert loaded.tokenizer is not None
        words = Path(located(CORPUS)).read_text(encoding="utf-8")
        self._ids = np.asarray(loaded.tokenizer.encode(words), dtype=np.int64)
        self._random = random.Random(0)

    def of(self, length: int) -> list[int]:
        """So many tokens from some place."""
        begin = self._random.randrange(len(self._ids) - length)
        found: list[int] = self._ids[begin : begin + length].tolist()
        return found


def started(arguments: argparse.Namespace) -> tuple[str, subprocess.Popen[bytes]]:
    """A server of the run in a process of its own, which starts meanwhile: its address and the process."""
    slots = max(arguments.concurrency) if "load" in arguments.parts else 16
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--checkpoint", str(arguments.checkpoint), "--port", str(port), "--slots", str(slots)]
    soon = "mixed" in arguments.parts and "prefix" not in arguments.parts
    cache = min(arguments.cache_mb, 32) if soon else arguments.cache_mb  # is to be full soon
    options += ["--cache-mb", str(cache), "--cache-every", str(arguments.cache_every)]
    options += ["--queue", str(max(64, slots)), "--name", "served", *arguments.option]
    options += ["--device", arguments.device] if arguments.device else []
    options += ["--dtype", arguments.dtype] if arguments.dtype else []
    command = [sys.executable, "-m", "mambaseq.cli.main", "serve", *options]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL if not arguments.told else None)
    return f"http://127.0.0.1:{port}", process


def wait(site: Site, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    end = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError), socket.create_connection((site.host, site.port), 1):
            return
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit("The server did not start; --told shows what it says.")
        time.sleep(0.1)


KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 40},
    {"temperature": 1.2, "min_p": 0.05},
    {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"temperature": 0.8, "stop": ["\n\n", "the"]},
]


async def check(site: Site, prompts: Prompts, loaded: LoadedModel, new: int) -> dict[str, Any]:
    """Answers to 24 requests at once, beside what `generate` gives for each alone."""
    rng, device = random.Random(1), next(loaded.model.parameters()).device
    asked = [
        {
            "prompt": prompts.of(rng.randint(1, 300)),
            "max_tokens": rng.randint(2, new),
            "seed": number,
            **KINDS[number % 6],
        }
        for number in range(24)
    ]
    begun = time.perf_counter()
    got = await asyncio.gather(*(site.ask(dict(body)) for body in asked))
    took = time.perf_counter() - begun
    equal, end = 0, getattr(loaded.tokenizer, "eos_id", None)
    for body, one in zip(asked, got, strict=True):
        settings = {key: value for key, value in body.items() if key not in ("prompt", "max_tokens", "stop")}
        assert loaded.tokenizer is not None
        stops = StopStrings(body.get("stop", []), loaded.tokenizer)
        ids = torch.tensor([body["prompt"]], device=device)
        ends = () if end is None else (int(end),)
        out = generate(loaded.model, ids, body["max_tokens"], stop_ids=ends, stop=stops, **settings)
        answer = Answer(stops, ids[0].cpu().numpy())
        for token in out[0, ids.shape[1] :].tolist():
            if token in ends or answer.add(token):
                break
        equal += answer.take(last=True) == one.text
    print(
        f"answers of 24 requests at once, {took:.1f} s, that equal those of generate, each alone "
        f"({time.perf_counter() - begun - took:.1f} s): {equal}",
        flush=True,
    )
    return {"asked": len(asked), "equal": equal}


def beside(loaded: LoadedModel, prompts: Prompts, batch: int, length: int, new: int) -> tuple[float, float]:
    """Tokens a second of `generate` for so many prompts, prefill included; the best of two calls behind those that
    compile and capture, and the seconds of these."""
    device, best, warm_up = next(loaded.model.parameters()).device, 0.0, 0.0
    # a prompt's shape is captured when it is read for the third time
    for count in (min(new, 20), min(new, 20), min(new, 20), new, new):
        rows = [torch.tensor(prompts.of(length), device=device) for _ in range(batch)]
        begun = time.perf_counter()
        generate_all(loaded.model, rows, count, temperature=0.8, top_p=0.95, seed=0)
        took = time.perf_counter() - begun
        if count < new:
            warm_up += took
        else:
            best = max(best, batch * new / took)
    return best, warm_up


async def load(site: Site, prompts: Prompts, clients: int, length: int, new: int, rounds: int) -> dict[str, Any]:
    """So many clients, each of which asks `rounds` times."""
    got: list[Got] = []
    lost: list[str] = []
    bodies = [
        [{"prompt": prompts.of(length), "max_tokens": new, "temperature": 0.8, "top_p": 0.95} for _ in range(rounds)]
        for _ in range(clients)
    ]

    async def client(own: list[dict[str, Any]]) -> None:
        for body in own:
            try:
                one = await site.ask(body)
            except (OSError, EOFError, ValueError) as error:
                lost.append(str(error))
                continue
            if one.status != 200 or not 0 < one.new <= new:
                lost.append(f"{one.status}, {one.new} tokens")
            got.append(one)

    begun = time.perf_counter()
    await asyncio.gather(*map(client, bodies))
    seconds = time.perf_counter() - begun
    firsts, lasts = sorted(one.first for one in got), sorted(one.last for one in got)
    found = {
        "concurrency": clients,
        "requests": clients * rounds,
        "lost": len(lost),
        "why": lost[:3],
        "tokens_per_s": sum(one.new for one in got) / seconds,
        "first_p50_ms": 1e3 * quantile(firsts, 0.5),
        "first_p95_ms": 1e3 * quantile(firsts, 0.95),
        "latency_p50_ms": 1e3 * quantile(lasts, 0.5),
        "latency_p95_ms": 1e3 * quantile(lasts, 0.95),
    }
    return found


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


async def prefix(site: Site, prompts: Prompts, length: int, every: int) -> dict[str, Any]:
    """One request with a prompt, 8 that share one, and 8 that share none; then prefixes of many lengths."""
    rows, alike = [], prompts.of(length - 20)
    for name, group in (
        ("one", [prompts.of(length)]),
        ("8 that share a prompt", [prompts.of(length)] * 8),
        ("8 that share all but their last 20 tokens", [alike + prompts.of(20) for _ in range(8)]),
        ("8 that share none", [prompts.of(length) for _ in range(8)]),
    ):
        before, begun = await site.metrics(), time.perf_counter()
        got = await asyncio.gather(*(site.ask({"prompt": one, "max_tokens": 1, "temperature": 0}) for one in group))
        seconds, after = time.perf_counter() - begun, await site.metrics()
        read = int(after["prompt_tokens_run_total"] - before["prompt_tokens_run_total"])
        rows.append({"what": name, "seconds": seconds, "asked": length * len(group), "read": read})
        rows[-1]["fine"] = all(one.status == 200 for one in got)
        print(f"{name}: {seconds:.2f} s, {read:,} of {length * len(group):,} tokens read", flush=True)
    hits, base = [], prompts.of(length)
    await site.ask({"prompt": base, "max_tokens": 1})
    for shares in sorted({1, every - 1, every, every + 1, 528, 1000, length // 2 + 7, length - 1, length}):
        if not 1 <= shares <= length:
            continue
        other = (base[shares - 1] + 1) % (max(base) + 1)
        one = await site.ask({"prompt": [*base[:shares], other, *prompts.of(7)], "max_tokens": 1})
        hits.append({"shared": shares, "known": one.known, "read_again": shares - one.known})
    worst = max(hit["read_again"] for hit in hits)
    state = await site.metrics()
    print(f"prefixes of {[hit['shared'] for hit in hits]} tokens: {[hit['known'] for hit in hits]} known")
    print(
        f"K = {every}: at most {worst} shared tokens read again; a state is {state['state_bytes']:,.0f} bytes, ", end=""
    )
    print(f"{state['cache_states']:,.0f} are kept in {state['cache_bytes'] / 2**20:,.1f} MiB", flush=True)
    told = {"k": every, "state_bytes": state["state_bytes"], "kept": state["cache_states"]}
    return {"rows": rows, "hits": hits, "at_most_again": worst, **told, "cache_bytes": state["cache_bytes"]}


async def mixed(site: Site, prompts: Prompts, minutes: float, clients: int, longest: int) -> dict[str, Any]:
    """Short and long requests, some of whom go away, that are too long or no JSON, and floods; the memory with time."""
    end, outcomes, lost = time.monotonic() + 60 * minutes, Counter[str](), list[str]()
    rng = random.Random(2)

    def body(kind: str) -> dict[str, Any] | bytes:
        if kind == "no JSON":
            return rng.choice([b"{", b"[]", b'{"prompt": NaN}', b'{"temprature": 1}', b"\xff", b'{"max_tokens": 0}'])
        length = {"long": 2000, "too long": longest + 1}.get(kind, rng.randint(1, 200))
        made: dict[str, Any] = {"prompt": prompts.of(min(length, 200_000)), "max_tokens": rng.randint(1, 100)}
        if kind == "too long":
            made["max_tokens"] = longest
        return {**made, "stream": rng.random() < 0.7, "n": 2 if kind == "two" else 1, **rng.choice(KINDS)}

    async def once(kind: str) -> None:
        leave = rng.randint(1, 8) if kind == "goes away" else None
        asked = body(kind)
        if leave is not None and isinstance(asked, dict):
            asked |= {"stream": True, "max_tokens": 2000}
        wanted = (400,) if kind in ("too long", "no JSON") else (200, 429)
        try:
            one = await site.ask(asked, leave)
        except (OSError, EOFError, ValueError) as error:
            lost.append(f"{kind}: {type(error).__name__}: {str(error)[:100]}")
            return
        outcomes[f"{kind}: {one.status}"] += 1
        if one.status not in wanted:
            lost.append(f"{kind}: {one.status}")
        if one.status == 429:
            await asyncio.sleep(0.5)

    async def client() -> None:
        while time.monotonic() < end:
            await once(
                rng.choices(["short", "long", "goes away", "two", "too long", "no JSON"], [50, 10, 15, 10, 5, 10])[0]
            )

    async def floods() -> None:
        while time.monotonic() + 15 < end:
            await asyncio.sleep(15)
            await asyncio.gather(*(once("flood") for _ in range(300)))

    rows: list[dict[str, float]] = []

    async def watch() -> None:
        begun = time.monotonic()
        while time.monotonic() < end:
            await asyncio.sleep(min(EVERY, max(end - time.monotonic(), 0.1)))
            told = await site.metrics()
            row = {"s": round(time.monotonic() - begun, 1), "resident": told.get("resident_bytes", float("nan"))}
            row |= {"gpu": told.get("gpu_bytes", 0.0), "cache": told.get("cache_bytes", 0.0)}
            rows.append(row | {"active": told["requests_active"], "waiting": told["requests_waiting"]})
            sizes = ", ".join(f"{name} {row[name] / 2**20:,.0f} MiB" for name in ("resident", "gpu", "cache"))
            print(f"{row['s']:>6.0f} s: {sizes}; {sum(outcomes.values()):,} requests, {len(lost)} lost", flush=True)

    await asyncio.gather(watch(), floods(), *(client() for _ in range(clients)))
    for _ in range(600):  # those that went away leave at the next step
        told = await site.metrics()
        if not told["requests_active"] + told["requests_waiting"]:
            break
        await asyncio.sleep(0.05)
    left = told["requests_active"] + told["requests_waiting"]
    found = {"rows": rows, "outcomes": dict(sorted(outcomes.items())), "lost": len(lost), "why": lost[:5]}
    found |= {"left": left, "failed": told["requests_failed_total"]}
    found["grows"] = grows(rows) if minutes >= JUDGED else ""
    print(f"{found['outcomes']}\nlost {len(lost)} {lost[:3]}, left behind {left:.0f}, failed {found['failed']:.0f}")
    print(f"memory: {found['grows'] or ('does not grow' if minutes >= JUDGED else 'not judged')}", flush=True)
    return found


def grows(rows: list[dict[str, float]]) -> str:
    """What grows from the second third of the time to the last, by medians, "" for nothing. States that are kept on a
    CPU are in the process and have a bound of their own, so they do not count."""
    on_gpu = any(row["gpu"] for row in rows)
    third, found = len(rows) // 3, []
    for name in ("resident", "gpu"):
        sizes = [row[name] - (0 if on_gpu else row["cache"]) for row in rows]
        before, after = statistics.median(sizes[third : 2 * third]), statistics.median(sizes[2 * third :])
        if name == "resident" or on_gpu:
            print(f"{name}: {before / 2**20:,.1f} MiB in the second third, {after / 2**20:,.1f} MiB in the last")
            if after > (1 + GROWTH) * before:
                found.append(f"{name} grows by {after / before - 1:.1%}")
    return ", ".join(found)


async def drained(site: Site, process: subprocess.Popen[bytes], prompts: Prompts) -> bool:
    """Whether requests that are there when SIGTERM comes are answered, and the process ends with 0."""
    asking = [asyncio.ensure_future(site.ask({"prompt": prompts.of(50), "max_tokens": 200})) for _ in range(4)]
    while (told := await site.metrics())["requests_active"] + told["requests_waiting"] < 1 and not asking[0].done():
        await asyncio.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    got = await asyncio.gather(*asking, return_exceptions=True)
    code = await asyncio.to_thread(process.wait, 60)
    fine = code == 0 and all(isinstance(one, Got) and one.status == 200 and one.new > 0 for one in got)
    print(f"SIGTERM with 4 requests: {'all answered' if fine else got}, exit {code}", flush=True)
    return fine


def picture(rows: list[dict[str, Any]], title: str) -> str:
    """Tokens a second and latency against concurrency, an SVG text."""
    at = [row["concurrency"] for row in rows]
    speed = [Curve("server", at, [row["tokens_per_s"] for row in rows], "dots", 0)]
    if all(row.get("generate_tokens_per_s") for row in rows):
        speed.append(Curve("generate", at, [row["generate_tokens_per_s"] for row in rows], "dots", 2))
    names = (("first token, p50", "first_p50_ms", 0), ("whole, p50", "latency_p50_ms", 1), ("p95", "latency_p95_ms", 2))
    waits = [Curve(name, at, [row[key] / 1e3 for row in rows], "dots", colour) for name, key, colour in names]
    panels = [lines(speed, "requests at once", "tokens/s"), lines(waits, "requests at once", "s")]
    inner = [re.sub(r"^<svg[^>]*>|</svg>$", "", panel) for panel in panels]
    placed = [f'<g transform="translate({16 + i * (WIDTH + 16)} 16)">{one}</g>' for i, one in enumerate(inner)]
    wide, high = 2 * WIDTH + 48, 296
    style = f".chart {{ {LIGHT} }} @media (prefers-color-scheme: dark) {{ .chart {{ {DARK} }} }} {STYLE}"
    ground = f'<rect width="{wide}" height="{high}" rx="8" fill="var(--ground)"/>'
    placed.append(text(20, high - 12, title))
    return (
        frame(wide, high, "Speed and latency of the server", f"<style>{style}</style>{ground}{''.join(placed)}") + "\n"
    )


async def measured(
    arguments: argparse.Namespace, loaded: LoadedModel, site: Site, process: Any, told: dict[str, Any], end: float
) -> None:
    """What is asked for, one after the other until `end`; written as it comes."""
    prompts = Prompts(loaded)
    length, new = arguments.prompt, arguments.new

    def wanted(part: str) -> bool:
        if arguments.json:
            arguments.json.write_text(json_text(told, indent=2) + "\n", encoding="utf-8")
        if part not in arguments.parts:
            return False
        if time.monotonic() > end:
            print(f"{part}: the time is up", flush=True)
        return time.monotonic() <= end

    told["warm_up_s"] = (await site.metrics()).get("warm_up_seconds")
    print(f"of its start, the server's warm-up took {told['warm_up_s'] or 0:.1f} s\n", flush=True)
    if wanted("load"):
        print(
            f"{'clients':>7} {'tokens/s':>9} {'generate':>9} {'first p50':>9} {'p95 ms':>8} {'whole p50':>9} "
            f"{'p95 ms':>8} lost  s before the clock"
        )
        for clients in arguments.concurrency:
            if not wanted("load"):
                break
            begun = time.perf_counter()
            await load(site, prompts, clients, length, min(new, 8), 1)
            warm_up = time.perf_counter() - begun
            row = await load(site, prompts, clients, length, new, arguments.rounds)
            row["generate_tokens_per_s"], generates = beside(loaded, prompts, clients, length, new)
            row |= {"warm_up_s": warm_up, "generate_warm_up_s": generates}
            told.setdefault("load", []).append(row)
            print(
                f"{row['concurrency']:>7} {row['tokens_per_s']:>9,.0f} {row['generate_tokens_per_s']:>9,.0f} "
                f"{row['first_p50_ms']:>9,.0f} {row['first_p95_ms']:>8,.0f} {row['latency_p50_ms']:>9,.0f} "
                f"{row['latency_p95_ms']:>8,.0f} {row['lost']:>4}  {warm_up:.1f}, generate {generates:.1f}",
                flush=True,
            )
    if wanted("prefix"):
        told["prefix"] = await prefix(site, prompts, arguments.prefix_tokens, arguments.cache_every)
    if wanted("check"):
        told["check"] = await check(site, prompts, loaded, min(new, 60))
    if wanted("mixed"):
        minutes = min(arguments.minutes, (end - time.monotonic()) / 60)
        told["mixed"] = await mixed(site, prompts, minutes, arguments.clients, 65_536)
    if process is not None and "drain" in arguments.parts:  # it is to end anyway
        told["drained"] = await drained(site, process, prompts)


def fine(told: dict[str, Any], exact: bool) -> bool:
    """Whether nothing is lost, differs, grows or is left. exact: whether answers must be those of `generate`."""
    lost = sum(row["lost"] for row in told.get("load", ())) + told.get("mixed", {}).get("lost", 0)
    kept = "mixed" not in told or not (told["mixed"]["left"] or told["mixed"]["failed"] or told["mixed"]["grows"])
    hits = "prefix" not in told or told["prefix"]["at_most_again"] < told["prefix"]["k"]
    same = not exact or "check" not in told or told["check"]["equal"] == told["check"]["asked"]
    return bool(not lost and kept and hits and same and told.get("drained", True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a run, or of an exported model")
    parser.add_argument("--url", help="a server of it that runs already, such as http://127.0.0.1:8000")
    parser.add_argument("--key", default=os.environ.get("MAMBASEQ_API_KEY"), help="of that server")
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (float32)")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["check", "load", "drain"], help="what is measured"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing further after so long")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--new", type=int, default=128, help="new tokens (128)")
    parser.add_argument("--rounds", type=int, default=4, help="requests of each client (4)")
    parser.add_argument("--prefix-tokens", type=int, default=8000, help="of the prompts of prefix (8000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of mixed load (10)")
    parser.add_argument("--clients", type=int, default=24, help="of mixed load (24)")
    parser.add_argument("--cache-every", type=int, default=256, metavar="K", help="of the server (256)")
    parser.add_argument("--cache-mb", type=int, default=256, help="of the server (256; at most 32 for mixed load)")
    parser.add_argument(
        "--option", action="append", default=[], help="a further option of the server, as --option=--part=64"
    )
    parser.add_argument("--told", action="store_true", help="show what the server says")
    parser.add_argument("--json", type=Path, help="write the figures here too, as they come")
    parser.add_argument("--picture", type=Path, help="write a picture of speed and latency here (SVG)")
    arguments = parser.parse_args()
    clock = time.monotonic()
    url, process = (arguments.url, None) if arguments.url else started(arguments)
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        loaded = load_model(arguments.checkpoint, device, arguments.dtype)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        size = f"{loaded.model.n_parameters() / 1e6:.2f} million parameters, {arguments.dtype or 'float32'}"
        shape = f"prompts of {arguments.prompt} tokens, {arguments.new} new ones"
        print(f"{name}, torch {torch.__version__}, {size}, {shape}", flush=True)
        site = Site(url, arguments.key)
        told: dict[str, Any] = {"device": name, "torch": torch.__version__, "model": size, "shape": shape}
        if process is not None:
            wait(site, process)
            told["start_s"] = time.monotonic() - clock
            print(f"the server answers {told['start_s']:.1f} s after its start", flush=True)
        asyncio.run(measured(arguments, loaded, site, process, told, clock + arguments.seconds))
    finally:
        if process is not None and process.poll() is None:
            process.terminate()
            process.wait(60)
    if arguments.json:
        arguments.json.write_text(json_text(told, indent=2) + "\n", encoding="utf-8")
    if arguments.picture and "load" in told:
        arguments.picture.write_text(picture(told["load"], f"{name}, {size}, {shape}"), encoding="utf-8")
    if not fine(told, arguments.dtype in (None, "float32")):
        raise SystemExit("Something is lost, differs or grows; see above.")


if __name__ == "__main__":
    main()
