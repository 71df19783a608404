"""`mambaseq predict`: apply a run to files of its own kind."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(argv: list[str], command: str) -> int:
    parser = argparse.ArgumentParser(
        prog="mambaseq predict",
        description="Label windows of records (classifiers), give their values (regression), or measure bits a token "
        "of records (language models). Writes a CSV with a row a window or record.",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files that the run's reader understands")
    parser.add_argument("--out", required=True, metavar="FILE.csv")
    parser.add_argument("--reader", help="another reader (`mambaseq list readers`)")
    parser.add_argument("--condition", help="what the records are, for conditional models: one name")
    parser.add_argument(
        "--window", type=int, help="tokens a window of a classifier or regression; as in training when left out"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    arguments = parser.parse_args(argv)
    from mambaseq.cli.predicting import predict

    rows = predict(
        arguments.checkpoint,
        [Path(p) for p in arguments.inputs],
        Path(arguments.out),
        reader=arguments.reader,
        condition=arguments.condition,
        window=arguments.window,
        batch_size=arguments.batch_size,
        device=arguments.device,
    )
    print(f"{rows} rows in {arguments.out}")
    return 0
