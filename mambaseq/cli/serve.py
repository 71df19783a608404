"""`mambaseq serve`: a run's completions over HTTP."""

from __future__ import annotations

from mambaseq.arguments import Arguments, add_dtype
from mambaseq.cli.imports import add_allow_import
from mambaseq.importing import uncollected
from mambaseq.resources import model_folder


def run(argv: list[str], command: str) -> int:
    parser = Arguments(
        prog="mambaseq serve",
        description="Answer over HTTP as OpenAI's API does: /v1/completions and /v1/chat/completions (streams or not) "
        "and /v1/models; a page to type into (/), /health and /metrics (Prometheus) beside them. SIGTERM answers what "
        "was asked and ends. Needs mambaseq[serve].",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (8000); 0 takes a free one")
    parser.add_argument("--name", help="of the model in requests; by default the run's folder's")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what requests must bring (Authorization: Bearer KEY); by default the variable MAMBASEQ_API_KEY, or none",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which the server may be called (Host), beside localhost; may be given several times",
    )
    parser.add_argument("--slots", type=int, default=16, help="answers that are made at once (16)")
    parser.add_argument("--queue", type=int, default=64, help="requests that may wait (64); more are answered with 429")
    parser.add_argument("--longest", type=int, default=65_536, help="most tokens of a prompt and its answer (65536)")
    parser.add_argument("--part", type=int, help="tokens of prompts read between two tokens (512; 2048 on a GPU)")
    parser.add_argument("--cache-every", type=int, default=256, metavar="K", help="tokens between kept states (256)")
    parser.add_argument("--cache-mb", type=int, default=1024, help="MiB of states of prompts that are kept (1024)")
    parser.add_argument("--drain", type=int, default=30, metavar="SECONDS", help="for answers after SIGTERM (30)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    parser.add_argument(
        "--no-warm-up",
        dest="warm_up",
        action="store_false",
        help="listen at once; requests then wait for what is compiled when it is first needed",
    )
    add_dtype(parser)
    add_allow_import(parser)
    given = vars(parser.parse_args(argv))
    model_folder(given["checkpoint"])  # before anything slow is imported
    with uncollected(for_good=True):
        from mambaseq.web import serve

    serve(given.pop("checkpoint"), **given)
    return 0
