"""`mambaseq generate`: continue a prompt and write the result in the domain's own format."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mambaseq.arguments import Arguments, add_condition, add_condition_columns, add_dtype
from mambaseq.cli.arguments import read_card
from mambaseq.cli.imports import add_allow_import
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, shown
from mambaseq.importing import uncollected
from mambaseq.outputs import check_written, is_stream
from mambaseq.resources import check_draft


def run(argv: list[str], command: str) -> int:
    parser = Arguments(prog="mambaseq generate", description="Continue a prompt, or start without one.")
    parser.add_argument("--checkpoint", metavar="RUN", help="folder of a run, or of an exported model")
    parser.add_argument(
        "--prompt",
        help="the prompt itself, or what the run's reader reads (a file, folder or pattern): each record is continued",
    )
    parser.add_argument(
        "--prompt-text", metavar="TEXT", help="the prompt itself, also where it seems to be the name of a file"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file of prompts, all continued: .txt has one in each line, .jsonl an object in each",
    )
    parser.add_argument(
        "--prompts-key", metavar="KEY", help="of --prompts FILE.jsonl, where the text is (text or prompt)"
    )
    add_condition(parser, "what to generate, for conditional models")
    add_condition_columns(parser)
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file to write, in the domain's format, the prompt included; several are numbered; - for the standard "
        "output (sound: a wav; --out=-.pcm raw samples), into a player while it is generated; without --out, text goes "
        "to the terminal while it is generated",
    )
    parser.add_argument(
        "-n", "--max-new-tokens", type=int, default=None, help="how many to add (bases, samples, bytes, steps)"
    )
    parser.add_argument("--samples", type=int, default=1, help="sequences to generate (for each prompt and condition)")
    parser.add_argument("--temperature", type=float, default=None, help="0 takes the likeliest token, or the mean")
    parser.add_argument("--top-k", type=int, default=None, help="draw from so many of the likeliest tokens; 0 from all")
    parser.add_argument(
        "--top-p", type=float, default=None, help="draw from the likeliest tokens that together have this probability"
    )
    parser.add_argument(
        "--min-p", type=float, default=None, help="leave out tokens less likely than this share of the likeliest one"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=None,
        metavar="X",
        help="above 1, tokens of the prompt or of what was added become less likely",
    )
    parser.add_argument(
        "--presence-penalty",
        type=float,
        default=None,
        metavar="X",
        help="is subtracted from the logits of tokens that were added already",
    )
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end a result before this text; may be given again (a line's end: $'\\n' in bash)",
    )
    parser.add_argument(
        "--beams",
        type=int,
        default=None,
        metavar="N",
        help="search for the likeliest results with N beginnings at a time, instead of drawing; the best are kept",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=None,
        metavar="X",
        help="of --beams: log-probabilities over length^X are compared (default 1; 0 favours short results)",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="take turns: each line that is typed is added to the text, then the model goes on; the state is kept. "
        "Ctrl-C ends a turn, Ctrl-D all",
    )
    parser.add_argument(
        "--save-state",
        metavar="FILE.safetensors",
        help="keep the state after the prompt (after the last turn, with --interactive)",
    )
    parser.add_argument(
        "--from-state", metavar="FILE.safetensors", help="go on from there instead of reading that prompt again"
    )
    parser.add_argument(
        "--draft",
        metavar="RUN",
        help="guess several tokens and check them at once: by a run with a smaller model and the same tokenizer, or "
        "ngram, by what followed the same tokens before; the result stays the same",
    )
    parser.add_argument(
        "--draft-tokens", type=int, default=None, metavar="K", help="of --draft: guesses at once, at most (15)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument(
        "--guidance",
        type=float,
        default=None,
        help="how many times over what the condition changes counts, such as 2; for models with condition_dropout",
    )
    parser.add_argument(
        "--pictures", type=int, default=16, metavar="N", help="draw the first N results, where they are sound (16)"
    )
    parser.add_argument(
        "--repeat",
        metavar="FILE.json",
        help="make the sound again beside which these settings were written; instead of all but --checkpoint, "
        "--device, --dtype, --out and --pictures",
    )
    parser.add_argument("--writer", help="another writer (`mambaseq list writers`)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    add_dtype(parser)
    add_allow_import(parser)
    given = vars(parser.parse_args(argv))
    repeat = given.pop("repeat")
    if given["checkpoint"] is None and repeat is None:
        parser.error("one of --checkpoint and --repeat is needed")
    _check_files(given, repeat)
    with uncollected(for_good=True):
        from mambaseq.runs.generation import generate_text, generate_to
        from mambaseq.runs.repeating import check_alone, repeated
        from mambaseq.runs.streaming import Interrupted

    settings: dict[str, Any]
    interactive = given.pop("interactive")
    if given["out"] is None and repeat is not None:
        parser.error("--repeat needs --out")
    if interactive and (given["out"] is not None or repeat is not None):
        parser.error("--interactive goes to the terminal, without --out or --repeat")
    if given["out"] is None:
        for name in ("out", "pictures"):
            given.pop(name)
        settings = {key: value for key, value in given.items() if value is not None}
        lines = _lines() if interactive else None
        came_of_drafts = generate_text(settings.pop("checkpoint"), _write, lines=lines, **settings)
        _write("" if interactive else "\n")
        _tell_drafts(came_of_drafts)
        return 0
    checkpoint, out, pictures = given.pop("checkpoint"), _output(given.pop("out")), given.pop("pictures")
    settings = {key: value for key, value in given.items() if value is not None}
    if repeat is not None:
        own = {"samples": 1, "seed": 0}  # what they are if nobody says it
        place: dict[str, Any] = {key: settings.pop(key) for key in ("device", "dtype") if key in settings}
        check_alone({key: value for key, value in settings.items() if own.get(key) != value}, Path(repeat))
        settings = {**repeated(Path(repeat), checkpoint), **place}
        checkpoint = settings.pop("checkpoint")
    try:
        generated = generate_to(checkpoint, out, progress=True, pictures=pictures, **settings)
    except Interrupted as error:
        _tell(error.files)
        raise
    _tell(generated.files)
    _tell_drafts(generated.speculation)
    return 0


def _check_files(given: Mapping[str, Any], repeat: str | None) -> None:
    """Raise UserError, before anything slow is imported, where there is no model, no draft or no file of those that are
    named, and for an ending of --out that the writer does not write. repeat: a file that says the writer."""
    card = {} if given["checkpoint"] is None else read_card(given["checkpoint"])
    if given["draft"] is not None:
        check_draft(given["draft"])
    for option in ("repeat", "prompts", "condition_table", "from_state"):
        path = repeat if option == "repeat" else given[option]
        if path is not None and not os.path.lexists(path):
            raise ConfigError(f"There is no file {shown(path, 300)} (--{option.replace('_', '-')}). Check the path.")
    writer = given["writer"] or card.get("writer")
    if given["out"] is not None and repeat is None and isinstance(writer, str) and ":" not in writer:
        with uncollected():
            write = catalog()["writers"].get(writer)
        check_written(write, _output(given["out"]))


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _lines() -> Iterator[str]:
    """What is typed, after a sign that asks for it where a person types."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _output(text: str) -> Path:
    return Path("/dev/stdout") if text == "-" else Path(text)


def _tell_drafts(came_of_drafts: object) -> None:
    if came_of_drafts is not None:
        print(f"mambaseq: {came_of_drafts}", file=sys.stderr)


def _tell(files: list[Path]) -> None:
    for path in files:
        print(path, file=sys.stderr if path.stem == "-" or is_stream(path) else sys.stdout)
