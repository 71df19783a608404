"""Sound is generated into files and pipes as it comes: whole when interrupted, made again by its settings, and in
memory that does not grow with the prompt."""

from __future__ import annotations

import json
import os
import resource
import struct
from pathlib import Path
from typing import Any

import mambaseq_audio.io
import numpy as np
import pytest
import soundfile
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.speaking import WavSink
from pages import blocks
from runs.test_prediction import saved

from mambaseq.cli.main import main
from mambaseq.data import spooled
from mambaseq.generation import Decoder, decode
from mambaseq.runs import continuing
from mambaseq.runs.generation import generate_to

RATE = 1000


def speaker(folder: Path, backbone: dict[str, Any] | None = None, **card: Any) -> Path:
    """A model of sound with three conditions, not trained."""
    more = {
        "reader": "audio/audio",
        "writer": "audio/wav",
        "reader_options": {"sample_rate": RATE},
        "writer_options": {"sample_rate": RATE},
        "start_ids": [128],
        "tokenizer": {"name": "audio/mulaw", "options": {}},
        "length": 40,
    }
    head = {"name": "lm", "vocab_size": 256}
    return saved(folder, head, MuLaw(), **{**more, **card}, **({"backbone": backbone} if backbone else {}))


def made(model: Path, out: Path, *more: str, device: str = "cpu") -> dict[str, Any]:
    """The settings beside a sound that the command made."""
    assert main(["generate", "--checkpoint", str(model), "--out", str(out), "--device", device, *more]) == 0
    return json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))


def test_a_recording_is_continued_drawn_and_made_again(tmp_path: Path) -> None:
    model, prompt = speaker(tmp_path / "m"), tmp_path / "prompt.wav"
    soundfile.write(prompt, 0.5 * np.sin(np.arange(300) / 5), RATE)
    told = made(model, tmp_path / "a.flac", "--prompt", str(prompt), "-n", "50", "--samples", "1", "--seed", "7")
    sound, rate = soundfile.read(tmp_path / "a.flac")
    assert (len(sound), rate) == (350, RATE)
    np.testing.assert_allclose(sound[:300], 0.5 * np.sin(np.arange(300) / 5), atol=0.03)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    wanted = {"seed": 7, "new_tokens": 50, "complete": True, "prompt_tokens": 300, "sample": 0, "condition": None}
    assert wanted.items() <= told.items()
    assert told["writer_options"] == {"sample_rate": RATE}
    again = ["--repeat", str(tmp_path / "a.json"), "--device", "cpu", "--pictures", "0"]
    assert main(["generate", *again, "--out", str(tmp_path / "b.wav")]) == 0
    assert not (tmp_path / "b.png").exists()
    assert np.array_equal(soundfile.read(tmp_path / "b.wav")[0], sound)
    assert main(["generate", *again, "--out", str(tmp_path / "c.wav"), "--top-k", "3"]) == 2
    soundfile.write(prompt, np.zeros(300), RATE)
    assert main(["generate", *again, "--out", str(tmp_path / "c.wav")]) == 2
    assert not (tmp_path / "c.wav").exists()


def test_a_place_where_no_file_can_be_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["generate", "--checkpoint", str(speaker(tmp_path / "m")), "-n", "5", "--device", "cpu", "--out"]
    assert main([*argv, "/proc/x.wav"]) == 2
    assert "/proc/x.wav cannot be written: No such file or directory." in capsys.readouterr().err


def test_all_prompts_that_cannot_be_read_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, folder = speaker(tmp_path / "m"), tmp_path / "prompts"
    folder.mkdir()
    soundfile.write(folder / "good.wav", np.zeros(20), RATE)
    (folder / "text.wav").write_text("no sound")
    (folder / "empty.wav").write_bytes(b"")
    argv = ["generate", "--checkpoint", str(model), "-n", "5", "--out", str(tmp_path / "a.wav"), "--device", "cpu"]
    for prompt in (str(folder), str(folder / "*.wav")):
        assert main([*argv, "--prompt", prompt]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert "2 of 3 prompts cannot be used: '" in told
        assert "empty.wav', '" in told
        assert "text.wav' (cannot be read as audio" in told
        assert "skip_bad" not in told
    assert not list(tmp_path.glob("a*"))
    (folder / "text.wav").unlink()
    assert main([*argv, "--prompt", str(folder)]) == 2
    assert "empty.wav cannot be read as audio" in capsys.readouterr().err


def test_one_of_several_samples_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = speaker(tmp_path / "m", n_conditions=3, condition_names=["low", "high", "very, very"])
    arguments = ["--condition", "very, very,low", "--samples", "2", "-n", "30", "--pictures", "0", "--device", "cpu"]
    assert main(["generate", "--checkpoint", str(model), "--out", str(tmp_path / "all"), *arguments]) == 0
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert files == [tmp_path / "all" / f"{number:03}.wav" for number in range(4)]
    told = json.loads(files[1].with_suffix(".json").read_text(encoding="utf-8"))
    assert (told["condition"], told["condition_ids"], told["sample"]) == ("very, very", 2, 1)
    again = ["--repeat", str(files[1].with_suffix(".json")), "--out", str(tmp_path / "b.wav"), "--device", "cpu"]
    assert main(["generate", *again, "--pictures", "0"]) == 0
    assert (tmp_path / "b.wav").read_bytes() == files[1].read_bytes()
    assert len({file.read_bytes() for file in files}) == 4


def test_nothing_is_replaced_but_an_earlier_result(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = speaker(tmp_path / "m")
    arguments = ["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "5"]
    weights = (model / "model.json").read_bytes()
    assert main([*arguments, "--out", str(model / "model.wav")]) == 2  # the settings would go to model.json
    assert str(model / "model.json") in capsys.readouterr().err
    assert (model / "model.json").read_bytes() == weights
    (tmp_path / "a.png").write_bytes(b"mine")
    assert main([*arguments, "--out", str(tmp_path / "a.wav")]) == 2
    assert (tmp_path / "a.png").read_bytes() == b"mine"

    recording = tmp_path / "q-001.wav"
    soundfile.write(recording, np.zeros(30), RATE)
    (tmp_path / "all.csv").write_text("file\nq-001.wav\n", encoding="utf-8")
    for prompt in (recording, tmp_path / "all.csv"):  # its own numbered result
        several = ["--prompt", str(prompt), "--out", str(tmp_path / "q.wav"), "--samples", "2"]
        assert main([*arguments, *several]) == 2
        assert "q-001.wav" in capsys.readouterr().err
        assert soundfile.info(recording).frames == 30
        assert not (tmp_path / "q-000.wav").exists()

    made(model, tmp_path / "b.wav", "-n", "5")
    assert (tmp_path / "b.png").exists()
    assert made(model, tmp_path / "b.wav", "-n", "6", "--pictures", "0")["new_tokens"] == 6
    assert not (tmp_path / "b.png").exists()  # of the earlier sound
    settings = (tmp_path / "b.json").read_bytes()
    assert json.loads(settings)["result"] == "b.wav"
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "b.flac")]) == 2  # one name of settings for both
    assert f"{tmp_path / 'b.json'} says how {tmp_path / 'b.wav'} was made" in capsys.readouterr().err
    assert (tmp_path / "b.json").read_bytes() == settings
    assert not (tmp_path / "b.flac").exists()
    (tmp_path / "b.wav").unlink()
    assert made(model, tmp_path / "b.flac", "-n", "5")["result"] == "b.flac"


def test_a_changed_recording_of_a_manifest_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, recording, out = speaker(tmp_path / "m"), tmp_path / "in.wav", tmp_path / "a.wav"
    soundfile.write(recording, np.zeros(30), RATE)
    (tmp_path / "all.csv").write_text("file\nin.wav\n", encoding="utf-8")
    made(model, out, "-n", "5", "--prompt", str(tmp_path / "all.csv"), "--pictures", "0")
    again = ["generate", "--device", "cpu", "--pictures", "0", "--out", str(tmp_path / "b.wav"), "--repeat"]
    assert main([*again, str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "b.wav").read_bytes() == out.read_bytes()
    soundfile.write(recording, np.ones(30), RATE)
    assert main([*again, str(tmp_path / "a.json")]) == 2
    assert f"{recording} is another file" in capsys.readouterr().err


class Stops:
    """A player that leaves, or a user who does, after some pieces."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, sink: WavSink, ids: np.ndarray, write: Any = WavSink.write) -> None:
        write(sink, ids)
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("ending", ["wav", "flac", "pcm"])
def test_what_came_before_an_interruption_is_whole(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, out = speaker(tmp_path / "m"), tmp_path / f"a.{ending}"
    arguments = ["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "40", "--pictures", "1"]
    assert main([*arguments, "--out", str(tmp_path / "whole.wav")]) == 0
    whole = soundfile.read(tmp_path / "whole.wav", dtype="int16")[0]
    monkeypatch.setattr(decode, "_PATIENCE", 0.0)
    stops = Stops(7)
    monkeypatch.setattr(WavSink, "write", lambda sink, ids: stops(sink, ids))
    assert main([*arguments, "--out", str(out)]) == 130
    assert str(out) in capsys.readouterr().out
    found = np.fromfile(out, "<i2") if ending == "pcm" else soundfile.read(out, dtype="int16")[0]
    assert len(found) == 7
    assert np.array_equal(found, whole[:7])
    told = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert (told["complete"], told["new_tokens"]) == (False, 7)


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_a_short_write_is_no_success(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, prompt, out = speaker(tmp_path / "m"), tmp_path / "prompt.wav", tmp_path / f"a.{ending}"
    soundfile.write(prompt, np.random.default_rng(0).uniform(-1, 1, 9_000), RATE)
    arguments = ["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "5", "--pictures", "0"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5001, before[1]))
    try:
        assert main([*arguments, "--prompt", str(prompt), "--out", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert f"{out} cannot be written further" in error
    assert "What has been written stays" in error
    assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["complete"] is False
    if ending == "wav":
        assert out.stat().st_size == 44 + 2 * soundfile.info(out).frames


def test_a_failure_leaves_no_earlier_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    model, out = speaker(tmp_path / "m"), tmp_path / "a.wav"
    first = made(model, out, "-n", "30", "--seed", "1")
    sound, left, step = out.read_bytes(), [0], Decoder.step

    def fails(decoder: Any, token: Any) -> Any:
        left[0] -= 1
        return step(decoder, token) * (float("nan") if left[0] < 0 else 1.0)

    monkeypatch.setattr(decode, "_PATIENCE", 0.0)
    monkeypatch.setattr(Decoder, "step", fails)
    arguments = ["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "30", "--out", str(out)]
    assert main([*arguments, "--seed", "2"]) == 2  # before anything could be written
    assert out.read_bytes() == sound
    assert json.loads(out.with_suffix(".json").read_text(encoding="utf-8")) == first
    left[0] = 10
    assert main([*arguments, "--seed", "2", "--pictures", "0"]) == 2
    assert f"written before the error: {out}" in capsys.readouterr().err
    told = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    wanted = {"seed": 2, "complete": False, "new_tokens": 10}
    assert wanted.items() <= told.items()
    assert soundfile.info(out).frames == 10
    assert not out.with_suffix(".png").exists()


def test_two_runs_do_not_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, out = speaker(tmp_path / "m"), tmp_path / "a.wav"
    arguments = ["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "5", "--pictures", "0"]
    other = WavSink(out, MuLaw(), 100, RATE, 1)
    other.write(np.arange(3))
    assert main([*arguments, "--out", str(out)]) == 2
    assert f"{out} is being written by another run" in capsys.readouterr().err
    other.close()
    assert soundfile.info(out).frames == 3
    assert made(model, out, "-n", "5", "--pictures", "0")["real_time"] is None  # all came at once


def test_a_wav_is_readable_while_it_is_written(tmp_path: Path) -> None:
    sink = WavSink(tmp_path / "a.wav", MuLaw(), 100, RATE, 2)
    for ids in (np.arange(3), np.arange(4), np.arange(6)):
        sink.write(ids)
        assert soundfile.info(tmp_path / "a.wav").samplerate == RATE  # as after a kill
    sink.close()
    expected = MuLaw().decode(np.concatenate([np.arange(3), np.arange(4), np.arange(5)])).reshape(-1, 2)
    np.testing.assert_allclose(soundfile.read(tmp_path / "a.wav")[0], expected, atol=2**-15)


@pytest.mark.parametrize("name", ["-", "-.pcm"])
def test_a_player_reads_the_standard_output(name: str, tmp_path: Path, capfdbinary: pytest.CaptureFixture) -> None:
    model = speaker(tmp_path / "m")
    arguments = ["generate", "--checkpoint", str(model), "--device", "cpu", "-n", "25", f"--out={name}"]
    assert main(arguments) == 0
    found = capfdbinary.readouterr().out
    if name == "-":
        assert found[:4] == b"RIFF"
        assert struct.unpack("<I", found[40:44])[0] == 50  # a right header, though nothing can be mended
        found = found[44:]
    assert len(found) == 50
    assert not list(Path.cwd().glob("-*"))
    assert main([*arguments, "--samples", "2"]) == 2


def test_a_prompt_is_read_once_for_many_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = speaker(tmp_path / "m"), tmp_path / "prompt.wav"
    soundfile.write(prompt, np.zeros(500), RATE)
    monkeypatch.setattr(continuing, "AT_ONCE", 4)
    seen: list[int] = []
    load = continuing.prefill

    def counted(of: Any, prompts: Any, condition: Any, **options: Any) -> Any:
        hook = of.backbone.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0] * args[0].shape[1]))
        with_hook = load(of, prompts, condition, **options)
        hook.remove()
        return with_hook

    monkeypatch.setattr(continuing, "prefill", counted)
    monkeypatch.setattr(decode, "prefill", counted)
    options: dict[str, Any] = {"prompt": str(prompt), "max_new_tokens": 5, "device": "cpu", "seed": 1}
    several = generate_to(model, tmp_path / "a", samples=11, **options).files
    assert sum(seen) == 500
    alone = generate_to(model, tmp_path / "b.wav", first_sample=9, **options).files
    assert several[9].read_bytes() == alone[0].read_bytes()


def resident(peak: bool) -> int:
    """KiB in memory now, or at most since the peak was forgotten."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM" if peak else "VmRSS")).split()[1])


def test_memory_does_not_grow_with_the_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is longer by 300,000 samples takes no 4 MiB more: as int64, twice, it would, each time anew. What
    else happens in this process may be in one of the peaks, not in all."""
    forget = Path("/proc/self/clear_refs")
    if not os.access(forget, os.W_OK):
        pytest.skip("the peak of memory is read from Linux's /proc, which cannot be reset here")
    model = speaker(tmp_path / "m")
    monkeypatch.setattr(spooled, "_IN_MEMORY", 2**14)
    monkeypatch.setattr(mambaseq_audio.io, "_BLOCK", 2**14)
    grown = []
    for length in (30_000, 30_000, 330_000, 630_000, 930_000):  # the first compiles and warms up
        soundfile.write(tmp_path / "in.wav", np.zeros(length, dtype=np.int16), RATE)
        forget.write_text("5")
        before = resident(peak=False)
        generate_to(model, tmp_path / "out.wav", prompt=str(tmp_path / "in.wav"), max_new_tokens=5, device="cpu")
        grown.append(resident(peak=True) - before)
        assert soundfile.info(tmp_path / "out.wav").frames == length + 5
    assert min(grown[2:]) - grown[1] < 4 * 1024


def test_the_page_says_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    speaker(tmp_path / "run")
    for language, text, _ in blocks(Path(__file__).parents[2] / "docs" / "audio" / "generating.md"):
        assert language == "sh"
        for line in text.splitlines():
            words = line.replace("-n 2000", "-n 20").replace("-n 500", "-n 5").split()
            assert main([*words[1:], "--device", "cpu", "--pictures", "0"]) == 0
    assert soundfile.info("longer.wav").frames == soundfile.info("one.wav").frames + 5
    assert np.array_equal(soundfile.read("again.flac")[0], soundfile.read("many-001.flac")[0])


def test_prompts_are_files_folders_patterns_and_each_is_made_again_by_its_own_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model, clips, rng = speaker(tmp_path / "m"), tmp_path / "clips", np.random.default_rng(0)
    for name in ("0_a.wav", "0_b.wav", "x/0_a.flac"):
        (clips / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(clips / name, rng.uniform(-0.5, 0.5, 20), RATE)
    (clips / "m.csv").write_text("file,start,end\n0_b.wav,,\n0_a.wav,0.005,0.01\n", encoding="utf-8")
    arguments = ["generate", "--checkpoint", str(model), "-n", "5", "--device", "cpu", "--pictures", "0"]
    for prompt, told in (
        (clips, [("0_a", 0), ("0_b", 0), ("x/0_a", 0)]),
        (clips / "0_*.wav", [("0_a", 0), ("0_b", 0)]),
        (clips / "m.csv", [("0_b.wav", 0), ("0_a.wav@0.005-0.01", 1)]),
    ):
        out = tmp_path / f"of-{prompt.name.replace('*', '')}"
        assert main([*arguments, "--prompt", str(prompt), "--out", str(out / "o.wav")]) == 0
        files = [Path(line) for line in capsys.readouterr().out.split()]
        found = [json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["prompt"] for file in files]
        assert [(one["name"], one["record"]) for one in found] == told
        parts = [Path(one["file"]).name for one in found if "source" in one]
        assert parts == (["m.csv"] if prompt.name == "m.csv" else [])  # a part is known by its manifest alone
    (clips / "0_a.wav").rename(clips / "gone.wav")  # only what was continued is read
    names = [file.with_suffix(".json") for file in sorted(tmp_path.glob("of-*/*.wav"))]
    for name in names:
        prompt = json.loads(name.read_text(encoding="utf-8"))["prompt"]
        gone = "0_a.wav" in (Path(prompt["file"]).name, Path(prompt.get("source", "")).name)
        assert (
            main(["generate", "--repeat", str(name), "--out", str(tmp_path / "b.wav"), "--device", "cpu"]) == 2 * gone
        )
        if not gone:
            assert (tmp_path / "b.wav").read_bytes() == name.with_suffix(".wav").read_bytes()
    assert len(names) == 7
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "o.wav"), "--prompt", "nothere.wav"]) == 2
    assert "There is no file 'nothere.wav' (--prompt)" in capsys.readouterr().err


def test_a_clip_of_the_model_that_ships_is_made_again(tmp_path: Path) -> None:
    first = tmp_path / "seven.wav"
    one = generate_to(
        Path("mambaseq:data/models/digits"), first, condition="7 theo", max_new_tokens=20, seed=1, device="cpu"
    )
    told = json.loads(first.with_suffix(".json").read_text())
    assert told["checkpoint"] == "mambaseq:data/models/digits"
    assert main(["generate", "--repeat", str(first.with_suffix(".json")), "--out", str(tmp_path / "again.wav")]) == 0
    assert one.files[0].read_bytes() == (tmp_path / "again.wav").read_bytes()
