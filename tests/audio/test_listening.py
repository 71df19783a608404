from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from mambaseq_audio.references import references
from mambaseq_audio.report import asked_as, report, shipped
from mambaseq_audio.samples import KEPT, Samples, thinned
from pages import blocks

from mambaseq.cli.main import main
from mambaseq.conditions import Condition
from mambaseq.errors import ConfigError, DataError
from mambaseq.plain import parse_yaml
from mambaseq.reporting.runs import RunFolder
from mambaseq.resources import share
from mambaseq.runs.parsing import parse_config
from mambaseq.runs.training import fit

CONFIG = """
data: {{name: audio/clips, files: "{files}", length: 120, validation: "1", test: "0",
  pattern: '^(?P<digit>\\d+)_(?P<speaker>[a-z]+)_(?P<take>\\d+)$'}}
loader: {{batch_size: 2}}
model: {{d_model: 8, backbone: {{name: residual, n_layers: 1, dropout: 0.2}}, mixer: {{name: mamba, d_state: 4}},
  head: {{name: lm}}}}
ema: {{decay: 0.9}}
optimizer: {{schedule: constant}}
checkpoint: {{every_n_steps: 2}}
trainer: {{accelerator: cpu, enable_progress_bar: false, max_steps: 5, log_every_n_steps: 1}}
"""
DOCS = Path(__file__).parents[2] / "docs" / "audio" / "listening.md"
LISTEN = [{"class_path": "audio/listening", "init_args": {"every_n_steps": 2, "n": 2, "seconds": 0.01}}]
WITH = f"--trainer.callbacks={json.dumps(LISTEN)}"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two digits, two speakers and four takes each."""
    path = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for digit in (3, 10):
        for speaker in ("anna", "ben"):
            for take, length in enumerate((300, 100, 250, 40)):
                soundfile.write(path / f"{digit}_{speaker}_{take}.wav", rng.uniform(-0.5, 0.5, length), 8000)
    file = path / "run.yaml"
    file.write_text(CONFIG.format(files=path / "*.wav"))
    return str(file)


@pytest.fixture(scope="module")
def heard(config: str, shared_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of five steps that is listened to after the second, the fourth and at its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBASEQ_CACHE", str(shared_cache))
        folder = RunFolder(tmp_path_factory.mktemp("runs") / "heard")
        assert fit(config, folder, [WITH], progress=False).status == "finished"
    return folder


def clips_of(folder: RunFolder) -> dict[str, bytes]:
    files = (folder.path / "samples").rglob("*.flac")
    return {file.relative_to(folder.path / "samples").as_posix(): file.read_bytes() for file in files}


def test_training_is_as_it_would_be_without(heard: RunFolder, config: str, tmp_path: Path) -> None:
    plain = RunFolder(tmp_path / "plain")
    fit(config, plain, [], progress=False)
    assert plain.curve("train/loss") == heard.curve("train/loss")
    assert len(plain.curve("train/loss")) == 5
    assert plain.weights.read_bytes() == heard.weights.read_bytes()  # dropout draws as before


def test_clips_beside_recordings_on_the_page_and_in_tensorboard(heard: RunFolder) -> None:
    names = {f"{place}/{number}.flac" for place in ("real", "step-2", "step-4", "step-5") for number in (0, 1)}
    assert clips_of(heard).keys() == names
    real = soundfile.read(heard.path / "samples" / "real" / "0.flac")[0]
    assert len(real) == 80
    data = parse_config(str(heard.config), []).make_data(setup=True)
    assert [one.name for one in references(data, 2)] == ["3", "10"]
    pieces = parse_config(str(heard.config), ["--data.length=40"]).make_data(setup=True)
    assert len(references(pieces, 8)) == 8  # of four recordings
    np.testing.assert_allclose(real, data.tokenizer.decode(references(data, 2)[0].ids[:80]), atol=1e-4)

    page = heard.report.read_text()
    assert page.count("data:audio/flac") == page.count("<audio") == 8
    assert all(f'data-name="{name}"' in page for name in ("real", "step 2", "step 4", "step 5"))
    assert not re.search(r"""(src|href)=["'](https?:|//)""", page)
    beside = (heard.path / "samples" / "index.html").read_text()
    assert beside.count('src="step-4/') == 2
    assert "data:audio" not in beside

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(heard.path / "tensorboard"))
    events.Reload()
    audio = events.Tags()["audio"]
    assert sorted(audio) == [
        f"listening/{n} {name}, {of}" for n, name in ((0, 3), (1, 10)) for of in ("generated", "real")
    ]
    assert [one.step for one in events.Audio(audio[0])][-1] in (2, 5)
    assert len(events.Tags()["images"]) == 2


def test_a_resumed_run_goes_on_and_a_clip_that_fails_ends_nothing(
    heard: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("mambaseq_audio.listening.generate", fails)
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(heard.path, folder.path)
    outcome = fit(str(folder.config), folder, ["--trainer.max_steps=6"], resume=True, progress=False)
    assert outcome.status == "finished"
    assert "no clips could be made to listen to at step 6 (OutOfMemoryError: no memory)" in capsys.readouterr().err
    assert clips_of(folder) == clips_of(heard)
    page = folder.report.read_text()
    assert page.count("OutOfMemoryError: no memory") == 2
    assert page.count("data:audio/flac") == 8

    samples, reals = Samples(folder.path), [np.zeros(80, np.float32)] * 2
    settings = samples.record["settings"]
    samples.begin(settings, reals, 4)  # gone on with from an earlier checkpoint
    assert samples.steps() == []  # the recordings are others
    shutil.copytree(heard.path / "samples", folder.path / "samples", dirs_exist_ok=True)
    samples = Samples(folder.path)
    samples.begin(settings, [clip * settings["peak"] for clip in [np.ones(80, np.float32)] * 2], 4)
    assert samples.steps() == [2, 4]
    assert not (folder.path / "samples" / "step-5").exists()


def test_what_makes_no_sound_is_refused_before_the_first_step(config: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation set, and there is none"):
        fit(config, RunFolder(tmp_path / "none"), [WITH, "--data.validation="], progress=False)
    assert not (tmp_path / "none").exists()  # a later command does not look for its checkpoint
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="fewer than one batch of 100"):
        fit(config, RunFolder(tmp_path / "mine"), ["--loader.batch_size=100"], progress=False)
    assert {path.name for path in (tmp_path / "mine").iterdir()} <= {"notes.txt", ".lock"}
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"trainer.callbacks\[0\].*n must be 1 to 16; it is 99"):
        parse_config(config, [WITH.replace('"n": 2', '"n": 99')])
    written = parse_yaml(DOCS.read_text().partition("```yaml\n")[2].partition("```")[0], "the page")
    (made,) = parse_config(config, [f"--trainer.callbacks={json.dumps(written['trainer']['callbacks'])}"]).callbacks()
    assert (made.every_n_steps, made.n) == (500, 4)


def test_few_steps_are_kept_and_a_page_holds_few_bytes(
    heard: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert thinned(range(1, 10)) == list(range(1, 10))
    kept: list[int] = []
    for step in range(500, 100_001, 500):
        kept = thinned([*kept, step])
    assert len(kept) == KEPT
    assert [kept[0], kept[-1]] == [500, 100_000]

    monkeypatch.setattr("mambaseq_audio.samples.KEPT", 2)
    shutil.copytree(heard.path / "samples", tmp_path / "samples")
    samples = Samples(tmp_path)
    size = sum(len(content) for name, content in clips_of(heard).items() if name.startswith(("real", "step-2")))
    monkeypatch.setattr("mambaseq_audio.samples.EMBEDDED", size)
    section = samples.section()
    assert section is not None
    assert section.body.count("data:audio") == 4  # of real ones and the first step
    assert section.body.count('src="samples/step-5/') == section.body.count('src="samples/step-4/') == 2
    assert "sounds of 2 columns are in samples/" in section.body


def test_runs_are_compared_by_ear(
    heard: RunFolder, config: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(heard.path, tmp_path / "runs" / "mamba")
    shutil.copytree(heard.model, tmp_path / "runs" / "s4")  # exported alone: without data and figures
    monkeypatch.chdir(tmp_path)
    ((_, command, _),) = blocks(DOCS)
    words = [*command.split()[1:], "--seconds=0.02"]
    assert main(words) == 0
    assert "The recordings are of the test set of" in capsys.readouterr().out
    text = Path("compared.html").read_text()
    rows = re.findall(r'class="heard" role="group" aria-label="([^"]*)"', text)
    assert rows == ["3", "3, 2", "10", "10, 2"]
    sounds = re.findall(r'data-name="([^"]*)" data-row="([^"]*)".*?src="data:audio/flac;base64,([^"]*)"', text)
    by_cell = {(row, name): sound for name, row, sound in sounds}
    assert by_cell.keys() == {(row, name) for row in rows for name in ("real", "mamba", "s4")}
    assert all(by_cell[row, "mamba"] == by_cell[row, "s4"] for row in rows)  # one seed, one model
    assert len({by_cell[row, "mamba"] for row in rows}) == 4  # samples of one condition differ
    first = references(parse_config(str(heard.config), []).make_data(setup=True), 4)[0]
    assert first.said == "3"
    real = soundfile.read(io.BytesIO(base64.b64decode(by_cell["3", "real"])))[0]
    assert len(real) == 160  # 0.02 s, although the test set has pieces of 120 samples
    assert "bits a sample, validation" in text
    assert "data-blind" not in text
    assert not re.search(r"""(src|href)=["'](https?:|//)""", text)

    assert main([*words, "--blind", "--condition=10", "--condition=four"]) == 0
    text = Path("compared.html").read_text()
    assert 'data-blind="1"' in text
    assert text.count("The condition digit knows no") == 2
    assert text.count("data:audio") == 2 * 3
    assert main([*words, "--condition=four", "--out=none.html"]) == 0  # nothing is made, so that nothing was timed
    speeds = re.search(r"times real time, loading included.*?</table>", Path("none.html").read_text(), re.DOTALL)
    assert speeds is not None
    assert speeds[0].count(">-<") == 2
    monkeypatch.setattr("mambaseq_audio.comparing.MOST_SOUND", 100)
    capsys.readouterr()
    assert main(words) == 2
    assert "Lower --seconds or --rows" in capsys.readouterr().err
    assert main(["audio/compare", "mambaseq:data/models/dna-masked", "--out=page.html"]) == 2
    assert "generates no sound" in capsys.readouterr().err


def test_the_demo_plays_what_it_has_learned_beside_models_that_ship(
    heard: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mambaseq_audio.report.share", lambda: tmp_path)
    monkeypatch.setattr("mambaseq_audio.report.SECONDS", 0.01)
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(heard.path, folder.path)
    folder.update_results(**{"test/bits_per_token": 5.0})

    models = tmp_path / "data" / "models"
    assert shipped(["3"]) == ([], "")
    shutil.copytree(heard.model, models / "tiny")
    shutil.copytree(share() / "data" / "models" / "dna-masked", models / "genome")
    (models / "broken").mkdir()
    body = report(folder.path).body
    found = set(re.findall(r'data-name="([^"]*)" data-row="([^"]*)" data-wide', body))
    assert found == {(of, digit) for of in ("real", "learned here", "tiny, which ships") for digit in ("3", "10")}
    assert body.count("data:audio/flac") == len(found)
    assert "a model of 4,848 parameters that ships" in body
    assert "--checkpoint mambaseq:data/models/tiny --condition 3 --out" in body
    assert "The model broken that ships could not speak" in body
    assert "genome" not in body


def test_a_model_with_further_conditions_is_asked_for_a_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [Condition("digit", ("0", "7")), Condition("speaker", ("ann", "ben")), Condition("age", mean=31.5, std=1.0)]
    monkeypatch.setattr("mambaseq_audio.report.Known", lambda _: SimpleNamespace(all=known))
    assert asked_as(None, "7", 3) == "digit=7 speaker=ben age=31.5"  # type: ignore[arg-type]
    assert asked_as(None, "8", 0) == ""  # type: ignore[arg-type]
    known[:] = [Condition("", ("7 ann", "7 ben", "8 ann"))]
    assert [asked_as(None, name, 1) for name in ("7", "8", "9")] == ["7 ben", "8 ann", ""]  # type: ignore[arg-type]
