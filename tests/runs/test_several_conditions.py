"""Several conditions at once, names as well as numbers: from files to a model, and from what a user says to samples."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import re
import shlex
import textwrap
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from cli.test_generating import generated
from mambaseq_audio.clips import ClipData
from pages import blocks
from runs.test_prediction import language_model, predict

from mambaseq.checking.datasets import _check_item
from mambaseq.checking.laws import LawBroken
from mambaseq.checkpoints import load_model
from mambaseq.cli.main import main
from mambaseq.conditions import Condition, encoder_options, of_names, row, told
from mambaseq.encoders import TokenEncoder
from mambaseq.errors import ConfigError, DataError
from mambaseq.generation import generate
from mambaseq.models import build_model
from mambaseq.runs.conditions import Conditions
from mambaseq.runs.known import Known, condition_ids

CONDITIONS = (
    Condition("digit", ("3", "7")),
    Condition("speaker", ("Ann, Bo", "Åsa")),
    Condition("age", low=20.0, high=70.0, mean=40.0, std=10.0, missing=True),
)
PAGE = Path(__file__).parents[2] / "docs" / "audio" / "conditions.md"
OPTIONS: dict[str, Any] = {"n_conditions": 4, **encoder_options(CONDITIONS)}
TWO_WAYS = ("Åsa", unicodedata.normalize("NFD", "Åsa"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    encoder = {"name": "tokens", "vocab_size": 256, **OPTIONS}
    return language_model(tmp_path / "m", encoder=encoder, conditions=[one.plain() for one in CONDITIONS])


def encoder(**options: Any) -> TokenEncoder:
    torch.manual_seed(0)
    made = TokenEncoder(8, 6, **{**OPTIONS, **options})
    assert made.condition is not None
    torch.nn.init.normal_(made.condition.there)
    return made


def given(*rows: tuple[Any, Any, Any]) -> torch.Tensor:
    return torch.tensor([row(one[:2], one[2:]) for one in rows])


def test_conditions_are_the_sum_of_what_each_adds() -> None:
    made = encoder()
    assert made.condition is not None
    weight, ids = made.condition.weight, torch.tensor([[1, 2, 3]] * 5)
    found = made(ids, given((1, 0, 55.0), (None, 1, 25.5), (0, None, None), (None, None, 40.0), (None, None, None)))
    alone, slope, there = made(ids[:1]), made.condition.slopes[0], made.condition.there[0]
    expected = [weight[1] + weight[2] + 1.5 * slope + there, weight[3] - 1.45 * slope + there, weight[0], there]
    torch.testing.assert_close(found, torch.cat([alone + one for one in (*expected, torch.zeros(8))]))
    loss = found.square().sum()
    loss.backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in made.condition.parameters())


def test_one_condition_computes_what_it_always_did() -> None:
    """From the same random numbers, under the same names, so that older models load."""
    torch.manual_seed(1)
    made = TokenEncoder(8, 6, 3)
    torch.manual_seed(1)
    tokens = torch.nn.init.normal_(torch.nn.Embedding(6, 8).weight, std=0.02)
    table = torch.nn.Embedding(3, 8).weight
    assert list(made.state_dict()) == ["embedding.weight", "condition.weight"]
    ids, which = torch.tensor([[1, 2], [0, 5]]), torch.tensor([2, 0])
    assert torch.equal(made(ids, which), tokens[ids] + table[which][:, None])


def test_conditions_that_do_not_fit_are_refused() -> None:
    ids = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"The model has 3 conditions \(2 of names and 1 numbers\), but \(1, 2\)"):
        encoder()(ids, torch.tensor([[0, 0]]))
    with pytest.raises(ConfigError, match="A model of an earlier version, which made one condition of several"):
        TokenEncoder(8, 6, 4)(ids, torch.tensor([[0, 0]]))
    with pytest.raises(IndexError, match="id is 2, but there are 2 names"):  # not the next condition's first name
        encoder()(ids, given((2, 0, 1.0)))
    for wrong in ({"condition_sizes": [2, 3]}, {"condition_stds": [0.0]}, {"condition_means": []}, {"n_conditions": 0}):
        with pytest.raises(ConfigError, match="condition_"):
            encoder(**wrong)
    with pytest.raises(ConfigError, match="condition_dropout must be at least 0 and below 1, not 1"):
        encoder(condition_dropout=1)


def test_dropout_keeps_conditions_from_a_sequence_and_only_in_training() -> None:
    made, ids = encoder(condition_dropout=0.3), torch.zeros(4000, 1, dtype=torch.long)
    condition = given((1, 0, 55.0)).expand(4000, 3)
    with torch.no_grad():
        assert made.eval()(ids, condition).unique(dim=0).shape[0] == 1
        found, counts = made.train()(ids, condition).unique(dim=0, return_counts=True)
        assert len(found) == 8  # each by itself
        none = (found == made(ids[:1])).all(-1)[:, 0]
        # 0.3, and what is dropped by chance of the rest
        assert counts[none].item() / 4000 == pytest.approx(0.3 + 0.7 * 0.3**3, abs=0.03)
        packed = made(torch.zeros(1, 60, dtype=torch.long), condition[:2], torch.tensor([0, 30, 60], dtype=torch.int32))
        assert packed[0, :30].unique(dim=0).shape[0] == packed[0, 30:].unique(dim=0).shape[0] == 1


def test_dropout_of_a_single_condition_is_its_share() -> None:
    torch.manual_seed(0)
    made, ids = TokenEncoder(8, 6, 3, condition_dropout=0.25), torch.zeros(4000, 1, dtype=torch.long)
    with torch.no_grad():
        kept = (made(ids, torch.ones(4000, dtype=torch.long)) != made(ids)).any(-1)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A manifest in which each speaker says one digit only, but for `Åsa`."""
    rng, folder = np.random.default_rng(0), tmp_path / "clips"
    folder.mkdir()
    lines = [["file", "digit", "speaker", "age", "split"]]
    said = [("3", "Ann, Bo", "30"), ("3", TWO_WAYS[0], "50.5"), ("7", TWO_WAYS[1], ""), ("3", "Ann, Bo", "34")]
    for number, one in enumerate(said):
        soundfile.write(folder / f"{number}.wav", rng.uniform(-0.5, 0.5, 50), 8000)
        lines.append([f"{number}.wav", *one, "test" if number == 3 else "train"])
    with (folder / "m.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    return folder / "m.csv"


def data(manifest: Path, **options: Any) -> ClipData:
    settings = {"condition": ["digit", "speaker"], "condition_numbers": ["age"], **options}
    made = ClipData(files=str(manifest), **settings)
    made.setup()
    return made


def test_conditions_of_a_manifest(clips: Path) -> None:
    made = data(clips)
    digit, speaker, age = made.conditions
    assert (digit.names, speaker.names) == (("3", "7"), ("Ann, Bo", "Åsa"))
    assert (age.low, age.high, age.mean, age.std, age.missing) == (30, 50.5, 40.25, 10.25, True)  # of training only
    train, test = made.train(), made.test()
    assert test is not None
    assert train.conditions == [row((0, 0), (30.0,)), row((0, 1), (50.5,)), row((1, 1), (None,))]
    assert test[0].condition.tolist() == [list(row((0, 0), (34.0,)))]  # type: ignore[union-attr]
    assert [told(made.conditions, one) for one in train.conditions] == [  # type: ignore[union-attr,arg-type]
        "digit=3 speaker=Ann, Bo age=30", "digit=3 speaker=Åsa age=50.5", "digit=7 speaker=Åsa"
    ]  # fmt: skip
    _check_item(made, train[0], "item")
    for wrong in ((2, 0, 1.0), (0, 2, 1.0)):
        item = dataclasses.replace(train[0], condition=given(wrong))
        with pytest.raises(LawBroken, match="a condition is 2, and the number of its names is 2"):
            _check_item(made, item, "item")
    # columns may be called with accents, too
    text = clips.read_text(encoding="utf-8").replace("speaker", unicodedata.normalize("NFD", "Sprecherín"))
    clips.write_text(text, encoding="utf-8")
    assert [one.name for one in data(clips, condition=["Sprecherín"]).conditions] == ["Sprecherín", "age"]


def test_the_page_from_a_manifest_to_combinations_that_nobody_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    text, rng = PAGE.read_text(encoding="utf-8"), np.random.default_rng(0)
    (table,) = re.findall(r"(?:^    \S.*\n)+", text, re.MULTILINE)
    Path("clips.csv").write_text(textwrap.dedent(table), encoding="utf-8")
    for line in table.splitlines()[1:]:
        soundfile.write(line.strip().partition(",")[0], rng.uniform(-0.5, 0.5, 50), 8000)
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    settings += "  d_model: 8\n  backbone: {name: residual, n_layers: 1}\n  mixer: {name: mamba}\n  head: {name: lm}\n"
    settings += "trainer: {max_steps: 2, limit_val_batches: 0, accelerator: cpu}\nloader: {batch_size: 3}\n"
    Path("c.yaml").write_text(settings, encoding="utf-8")
    assert main(["fit", "--config", "c.yaml", "--out", "run"]) == 0
    card = load_model("run").card
    assert [one["name"] for one in card.conditions] == ["word", "speaker", "age"]
    assert card.spec["encoder"]["condition_means"] == [pytest.approx((31 + 31 + 54.5) / 3)]
    commands = [shlex.split(line) for _, cell, _ in blocks(PAGE) for line in cell.splitlines()]
    assert len(commands) == 4
    for command in commands:
        assert main([*command[1:], "-n", "20", "--device", "cpu"]) == 0
    assert sorted(one.name for one in tmp_path.glob("*.wav") if one.name[0] != "a" or one.name == "anything.wav") == [
        "anything.wav", "both-000.wav", "both-001.wav", "clear.wav", "said.wav"
    ]  # fmt: skip
    assert soundfile.info("said.wav").frames == 20
    capsys.readouterr()
    overrides = ["--model.encoder.name=audio/mel"]
    assert main(["fit", "--config", "c.yaml", "--out", "other", *overrides]) == 2
    assert "which the encoder 'audio/mel' does not take" in " ".join(capsys.readouterr().err.split())


def test_what_a_manifest_must_not_say(clips: Path) -> None:
    text = clips.read_text(encoding="utf-8")
    for old, new, told_ in (
        ("50.5", '"50,5"', r"line 3\): age is '50,5', which is no number\. Write 50\.5\."),
        ("50.5", "inf", r"line 3\): age is 'inf', which is no number"),
        ("50.5", "30", "age is 30 for all training sequences"),
        ('"Ann, Bo",34', ",34", r"line 5\) has no speaker, and no training sequence lacks it"),
        ('"Ann, Bo",34', "Bo,34", r"line 5\) has the speaker 'Bo', which no training sequence has"),
    ):
        clips.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(DataError, match=told_):
            data(clips)
    clips.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data\.condition and data\.condition_numbers name 'digit' twice"):
        data(clips, condition_numbers=["digit"])


def test_a_condition_that_is_empty_or_damaged_is_told() -> None:
    with pytest.raises(DataError, match="mood is empty for all training sequences"):
        of_names("mood", ["", "", "glad"], [0, 1])
    for damaged in ({"name": "a", "names": 5}, {"name": "a", "names": "ab"}, {"names": ["a"]}):
        with pytest.raises(ConfigError, match="conditions must hold names"):
            Condition.from_plain(damaged)


def test_what_a_user_asks_for(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_model(model)
    for speaker in TWO_WAYS:
        assert condition_ids(loaded, f"digit=7 speaker={speaker} age=31.5") == [row((1, 1), (31.5,))]
    every = [row((one, other), (None,)) for one in (0, 1) for other in (0, 1)]
    assert condition_ids(loaded, "speaker=Ann, Bo,Åsa, digit=3,7") == every
    assert condition_ids(loaded, ["digit=3 speaker=Ann, Bo", {"digit": 7, "speaker": "Åsa", "age": None}]) == [
        every[0], every[3]
    ]  # fmt: skip
    assert Known(loaded).examples(9) == ["digit=3 speaker=Ann, Bo age=40", "digit=7 speaker=Åsa age=40"]
    nameless = language_model(model.parent / "n", encoder={"name": "tokens", "vocab_size": 256, **OPTIONS})
    assert condition_ids(load_model(nameless), "condition_1=0 condition_2=1 number_1=31.5") == [row((0, 1), (31.5,))]
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert condition_ids(loaded, "digit=7 speaker=Åsa age=99,120") == [row((1, 1), (one,)) for one in (99, 120)]
    assert [one.getMessage() for one in caplog.records] == [
        "age=99 is outside of what training had, 20 to 70: the model has to guess."
    ]


@pytest.mark.parametrize(
    ("asked", "told_"),
    [
        (None, "needs a condition. Give one with --condition: digit=3, 7; speaker='Ann, Bo', Åsa."),
        ("digit=7", "needs speaker as well. Give one with --condition: speaker='Ann, Bo', Åsa."),
        ("digit=7 speaker=Assa", "The condition speaker knows no 'Assa'. Did you mean 'Åsa'? The model knows:"),
        ("digit=7 speker=Åsa", "No condition is called 'speker'. Did you mean 'speaker'? They are: digit=3, 7;"),
        ("digt=7 speaker=Åsa", "No condition is called 'digt'. Did you mean 'digit'?"),
        ({"digt": 7}, "No condition is called 'digt'. Did you mean 'digit'?"),
        ("7 Åsa", "'7 Åsa' does not say which condition that is. Write digit=... speaker=... age=..."),
        ("digit=7 digit=3", "gives digit twice"),
        ("digit=7 speaker=Åsa age=old", "age is a number, not 'old'. Give one such as 40; training had 20 to 70."),
        ("digit=7 speaker=Åsa age=nan", "age is a number, not 'nan'."),
    ],
)
def test_what_cannot_be_asked_for(model: Path, asked: Any, told_: str) -> None:
    with pytest.raises(ConfigError) as caught:
        condition_ids(load_model(model), asked)
    assert told_ in str(caught.value)
    assert len(str(caught.value)) < 1000
    if asked is None:
        with pytest.raises(
            ConfigError, match="jsonl or parquet has a column called digit and speaker, which is used una"
        ):
            Conditions(load_model(model))


def test_records_under_conditions_of_their_columns(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, table = tmp_path / "in.jsonl", tmp_path / "t.csv"
    said = [(7, TWO_WAYS[1], 31.5), ("3", "Ann, Bo", None)]
    lines = [{"text": "To be or not", "digit": one, "who": two, "age": three} for one, two, three in said]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    names = [f"{source}, line {number}" for number in (1, 2)]
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["record", "digit", "speaker", "age"], [names[0], *said[0]], [names[1], *said[1]]])
    asked = ("digit=7 speaker=Åsa age=31.5", "digit=3 speaker=Ann, Bo")
    under = [predict(model, source, "--condition", one) for one in asked]
    assert under[0][0] != under[1][0]
    expected = [under[0][0], under[1][1]]
    assert predict(model, source, "--condition-column", "digit=digit speaker=who age=age") == expected
    assert predict(model, source, "--condition-table", str(table)) == expected
    prompts = generated(
        model, tmp_path / "a.jsonl", "--prompt", str(source), "-n", "5", "--condition-table", str(table)
    )  # fmt: skip
    again = ["--prompt", "To be or not", "-n", "5", "--condition", *asked[1].split(" ", 1), "--condition", asked[0]]
    assert generated(model, tmp_path / "b.jsonl", *again) == prompts[::-1]
    source.write_text(source.read_text(encoding="utf-8").replace('"who"', '"qu\u0069\u0301"'), encoding="utf-8")
    found = predict(
        model, source, "--condition-column", "digit=digit speaker=quí age=age"
    )  # the file has i and an accent
    assert found == expected
    named = source.read_text(encoding="utf-8").replace('"qu\u0069\u0301"', '"speaker"')
    source.with_name("named.jsonl").write_text(named, encoding="utf-8")
    unasked = predict(model, source.with_name("named.jsonl"))  # columns that are called as the conditions
    assert [{**one, "file": "", "record": ""} for one in unasked] == [
        {**one, "file": "", "record": ""} for one in expected
    ]
    command = ["predict", "--checkpoint", str(model), str(source), "--out", str(tmp_path / "o.csv"), "--device", "cpu"]
    assert main([*command, "--condition-column", "digit,who,age"]) == 2
    assert "no condition is called 'who'. They are: digit, speaker, age." in capsys.readouterr().err
    assert main([*command, "--condition-column", "digit,age"]) == 2
    assert "needs speaker as well" in capsys.readouterr().err


def test_decoding_and_packing_under_several_conditions(model: Path) -> None:
    made = load_model(model).model
    condition = given((0, 1, 33.3), (1, 0, None))
    prompt = torch.tensor([[5, 6, 7], [5, 6, 7]])
    calls: list[bool] = []
    hook = made.encoder.condition.register_forward_hook(  # type: ignore[union-attr,operator]
        lambda module, given, output: calls.append(given[0].is_floating_point())
    )
    together = generate(made, prompt, 8, seed=1, condition=condition)
    assert calls.count(False) == 1  # not made again at each step
    hook.remove()
    alone = [generate(made, prompt[:1], 8, seed=1, condition=condition[i : i + 1]) for i in (0, 1)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])
    ids = together[:, :-1]
    full = made(ids, condition=condition).logits
    bounds = torch.tensor([0, ids.shape[1], 2 * ids.shape[1]], dtype=torch.int32)
    packed = made(ids.reshape(1, -1), condition=condition, cu_seqlens=bounds).logits
    torch.testing.assert_close(packed.view_as(full), full)


def test_guidance_of_a_head_of_two_parts() -> None:
    """The coarse part is picked of both, then the fine part given the same coarse one."""
    torch.manual_seed(0)
    spec = {
        "d_model": 8,
        "encoder": {"name": "levels", "vocab_size": 64, "fine": 8, **OPTIONS},
        "backbone": {"name": "residual", "n_layers": 1},
        "mixer": {"name": "mamba"},
        "head": {"name": "levels", "vocab_size": 64, "fine": 8},
    }
    made, prompt, condition = build_model(spec), torch.tensor([[5], [60]]), given((0, 1, 33.3), (1, 0, None))
    found = generate(made, prompt, 3, temperature=0, condition=condition, guidance=4.0)
    ids = prompt
    for _ in range(3):
        told_, untold = (made(ids, condition=one).logits[:, -1].unflatten(-1, (8, 8)) for one in (condition, None))
        which = (4 * told_.logsumexp(-1) - 3 * untold.logsumexp(-1)).argmax(-1)
        rest = (4 * told_ - 3 * untold)[torch.arange(2), which].argmax(-1)
        ids = torch.cat([ids, (which * 8 + rest)[:, None]], 1)
    assert torch.equal(found, ids)


def test_guidance_strengthens_what_a_condition_changes(model: Path, tmp_path: Path, capsys: Any) -> None:
    made, prompt, condition = load_model(model).model, torch.tensor([[5, 6], [7, 8]]), given((0, 1, 33.3), (1, 0, None))
    found = generate(made, prompt, 6, temperature=0, condition=condition, guidance=3.0)
    ids = prompt
    for _ in range(6):
        told_, untold = (made(ids, condition=one).logits[:, -1] for one in (condition, None))
        ids = torch.cat([ids, (3 * told_ - 2 * untold).argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)
    plain, weak = ({"seed": 1, "condition": condition, "samples": 2, **more} for more in ({}, {"guidance": 1.0}))
    assert torch.equal(generate(made, prompt, 6, **plain), generate(made, prompt, 6, **weak))
    with pytest.raises(ConfigError, match="guidance makes a condition count more, and none is given"):
        generate(made, prompt, 6, guidance=2.0)
    with pytest.raises(ConfigError, match="guidance must be a number from 0 to 100, not -1"):
        generate(made, prompt, 6, condition=condition, guidance=-1)
    words = ["generate", "--checkpoint", str(model), "--out", str(tmp_path / "o.jsonl"), "--guidance", "2"]
    assert main([*words, "--condition", "digit=7", "speaker=Åsa"]) == 2
    assert "has not learned to do without digit, speaker. Train with model.encoder.con" in capsys.readouterr().err


@pytest.mark.gpu
def test_graphs_on_a_gpu_under_several_conditions_and_guidance(cuda: torch.device, model: Path) -> None:
    made, prompt = load_model(model).model.to(cuda), torch.tensor([[5, 6], [7, 8]], device=cuda)
    condition = given((0, 1, 33.3), (1, 0, None)).to(cuda)
    for guidance in (1.0, 2.0):
        found = [
            generate(made, prompt, 40, seed=1, condition=condition, guidance=guidance, cuda_graph=wanted)
            for wanted in (True, False)
        ]
        assert torch.equal(*found)
    assert torch.equal(
        made(prompt, condition=condition).logits.cpu().argmax(-1),
        made.cpu()(prompt.cpu(), condition=condition.cpu()).logits.argmax(-1),
    )
