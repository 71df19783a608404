"""Hold a finished demo against its promises: `python tests/check_demo.py runs/demo`. Used by CI after `make demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

SECONDS = 360
# the published floor of the six-speaker digits; the report's own bigram is of the shipped speakers
MULAW_BIGRAM = 5.45


def main(folder: Path) -> int:
    results = {d: json.loads((folder / d / "results.json").read_text()) for d in ("dna", "audio", "text")}
    dna, audio, text = results["dna"], results["audio"], results["text"]
    report = folder / "report.html"
    page = report.read_text(encoding="utf-8")
    checks = {
        "species at 1 kb above chance, its 95% interval too": dna["report/low_1024"] > 0.20 + 0.05,
        "species at 4 kb above chance, its 95% interval too": dna["report/low_4096"] > 0.20 + 0.05,
        "audio below the mu-law bigram": audio["test/bits_per_token"] < min(MULAW_BIGRAM, audio["report/bigram"]),
        "text below the byte bigram": text["test/bits_per_byte"] < text["report/bigram"],
        f"at most {SECONDS} s": sum(r["demo_seconds"] for r in results.values()) <= SECONDS,
        "the report holds its pictures and sounds itself": page.count("<svg") >= 10
        and page.count("data:image/png") >= 20  # a spectrogram beside each sound
        and page.count("data:audio/") >= 20
        and 'src="http' not in page,
        "every run has a page": all("training, smoothed" in (folder / d / "report.html").read_text() for d in results),
    }
    for domain, found in results.items():
        print(domain, {k: v for k, v in found.items() if isinstance(v, int | float)})
    for name, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED'}  {name}")
    failed = sum(not passed for passed in checks.values())
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
