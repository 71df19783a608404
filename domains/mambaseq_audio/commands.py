"""`mambaseq audio/compare`, `mambaseq audio/score` and `mambaseq audio/frechet`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mambaseq.arguments import Arguments, add_condition, parse_inputs
from mambaseq.atomic import json_text
from mambaseq.importing import uncollected
from mambaseq.outputs import check_json, output_file
from mambaseq.resources import model_folder


def compare(argv: list[str]) -> int:
    """`mambaseq audio/compare`. Prints the page's name."""
    parser = Arguments(
        prog="mambaseq audio/compare",
        description="Write a page on which runs are compared by ear: a row for each condition, a column for each run, "
        "real recordings beside them; the same conditions and one seed for all.",
        epilog="The page needs no network. One clip plays at a time; keys are listed on it. With the names hidden the "
        "order of each row is drawn by lot, and the page counts which are chosen as the best.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs, or models that were exported")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE.html", help="the page to write")
    add_condition(parser, "only this condition, in place of those of recordings, spread over the test set")
    parser.add_argument("--rows", type=int, default=10, help="at most so many clips of each run (default: 10)")
    parser.add_argument("--seconds", type=float, help="of each clip (default: what each run says)")
    parser.add_argument("--seed", type=int, default=0, help="of all clips (default: 0)")
    parser.add_argument("--temperature", type=float, help="of all runs (default: what each run says)")
    parser.add_argument("--blind", action="store_true", help="begin with the names hidden")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    given = parse_inputs(parser, argv)
    for run in given.runs:
        model_folder(run)  # before anything slow is imported
    with uncollected(for_good=True):
        from mambaseq.runs.known import in_words
        from mambaseq_audio.comparing import compare as compared

    notes = compared(
        given.runs,
        given.out,
        conditions=[in_words(words) for words in given.condition or []],
        rows=given.rows,
        seconds=given.seconds,
        seed=given.seed,
        temperature=given.temperature,
        blind=given.blind,
        device=given.device,
    )
    for line in [*notes, str(given.out)]:
        print(line)
    return 0


_TOLD = {
    "clips": "clips",
    "fid": "FID",
    "inception_score": "IS",
    "modified_inception_score": "mIS",
    "am_score": "AM",
    "accuracy": "accuracy",
    "published_inception_score": "IS as published",
    "published_modified_inception_score": "mIS as published",
}


def score(argv: list[str]) -> int:
    """`mambaseq audio/score`. Prints a row for each folder."""
    parser = Arguments(
        prog="mambaseq audio/score",
        description="FID, inception score (IS), modified inception score (mIS) and AM score of generated clips against "
        "real ones, by a classifier's features and answers.",
        epilog="Higher is better for IS and mIS, lower for FID and AM. 'as published' is what SaShiMi's code computes; "
        "its IS sums over the wrong axis and can exceed the number of classes. For the scores of test recordings, name "
        "them as --generated.",
    )
    clips = "a folder of sound files, or a pattern"
    parser.add_argument(
        "--generated", required=True, action="append", metavar="DIR", help=f"{clips}; may be given several times"
    )
    parser.add_argument("--real", required=True, metavar="DIR", help=f"{clips}: of training, as published")
    parser.add_argument("--classifier", required=True, metavar="RUN", help="a run of audio/digit_classifier")
    parser.add_argument(
        "--pattern",
        metavar="REGEX",
        help="also the share recognised as the class in clips' names: the first named group, as in '^(?P<digit>\\d)_'",
    )
    parser.add_argument(
        "--likelihoods",
        metavar="RUN",
        help="the unconditional run that made the clips: score those, too, that rejection sampling keeps",
    )
    parser.add_argument(
        "--band",
        choices=("published", "best"),
        default="published",
        help="with --likelihoods: the share of the ranking that SaShiMi's code keeps (0.40 to 0.95), or the band with "
        "the best IS on every second clip, scored on the others",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the scores as JSON")
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; the GPU if there is one")
    given = parser.parse_args(argv)
    check_json(given.out)
    for run in (given.classifier, given.likelihoods):
        if run is not None:
            model_folder(run)  # before anything slow is imported
    with uncollected(for_good=True):
        from mambaseq_audio.scoring import score as scored

    found = scored(
        given.generated,
        given.real,
        given.classifier,
        pattern=given.pattern,
        device=given.device,
        likelihoods=given.likelihoods,
        band=given.band,
    )
    _save(given.out, found)
    for name, values in found.items():
        told = [f"{told} {values[key]:,.4g}" for key, told in _TOLD.items() if key in values]
        if "band" in values:
            told.append(f"band {values['band'][0]:g} to {values['band'][1]:g}")
        notes = [values[key] for key in ("note", "ranked") if key in values]
        print(f"{name}: {', '.join(told)}" + (f" ({'; '.join(notes)})" if notes else ""))
    return 0


def frechet(argv: list[str]) -> int:
    """`mambaseq audio/frechet`. Prints a line for each set."""
    parser = Arguments(
        prog="mambaseq audio/frechet",
        description="The Fréchet audio distance between sets of embeddings, made by whatever model you name beside the "
        "figure (VGGish, CLAP, EnCodec): nothing is downloaded and no model is run here. Lower is better. Distances by "
        "different models, or of sets of different sizes, do not compare.",
        epilog="By our classifier's features, `mambaseq audio/score` gives the same distance as FID.",
    )
    what = "a .npy file of floats, (frames, features), or a folder of them"
    parser.add_argument(
        "--generated", required=True, action="append", metavar="FILE", help=f"{what}; may be given several times"
    )
    parser.add_argument("--real", required=True, metavar="FILE", help=what)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the distances as JSON")
    given = parser.parse_args(argv)
    check_json(given.out)
    with uncollected(for_good=True):
        from mambaseq_audio.frechet import frechet as distances

    found = distances(given.generated, given.real)
    _save(given.out, found)
    for name, distance in found.items():
        print(f"{name}: Fréchet audio distance {distance:,.4g}")
    return 0


def _save(out: Path | None, numbers: dict[str, Any]) -> None:
    if out is not None:
        with output_file(out) as file:
            file.write((json_text(numbers, indent=1) + "\n").encode())
