from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mambaseq_audio.baselines import unigram_bigram
from mambaseq_audio.clip_splits import selector
from mambaseq_audio.clips import ClipData
from mambaseq_audio.labelled import LabelledClips
from mambaseq_audio.mulaw import MuLaw
from mambaseq_audio.recordings import all_recordings

from mambaseq.data.loaders import SequenceDataModule
from mambaseq.errors import ConfigError, DataError
from mambaseq.runs.parsing import parse_config

LENGTHS = (300, 100, 250, 40)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two digits, two speakers and four takes each, of lengths from 40 to 300 samples."""
    rng = np.random.default_rng(0)
    path = tmp_path / "clips"
    path.mkdir()
    for digit in (3, 10):
        for speaker in ("anna", "ben"):
            for take, length in enumerate(LENGTHS):
                signal = rng.uniform(-0.5, 0.5, length)
                soundfile.write(path / f"{digit}_{speaker}_{take}.wav", signal, 8000)
    return path


def data(folder: Path, **options: object) -> ClipData:
    defaults = {
        "files": str(folder),
        "pattern": r"^(?P<digit>\d+)_(?P<speaker>[a-z]+)_(?P<take>\d+)$",
        "validation": "1",
        "test": "0",
        "length": 120,
    }
    made = ClipData(**{**defaults, **options})  # type: ignore[arg-type]
    made.setup()
    made.setup()
    return made


def test_selector() -> None:
    takes = ("0", "3", "04", "10", "anna", "")
    assert [t for t in takes if selector("0-4")(t)] == ["0", "3", "04"]
    assert [t for t in takes if selector("10, anna")(t)] == ["10", "anna"]
    assert [t for t in takes if selector("")(t)] == []


def test_selector_of_lists_and_accents() -> None:
    takes = ("Smith, Ann", "Åsa", "A\u030asa", "Smith", "2")
    assert [t for t in takes if selector(["Smith, Ann", "1-3"])(t)] == ["Smith, Ann", "2"]
    for name in ("Åsa", "A\u030asa"):
        assert [t for t in takes if selector(name)(t)] == ["Åsa", "A\u030asa"]
    assert not any(map(selector("9" * 5000), takes))


def test_names_with_commas_and_accents(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("Smith, Ann_1", "Åsa_1", "A\u030asa_2", "Müller_1", "Smith, Ann_2"):
        soundfile.write(tmp_path / f"{name}.wav", rng.uniform(-0.5, 0.5, 50), 8000)
    pattern = "^(?P<who>.+)_(?P<take>[0-9]+)$"
    text = f"""
        data: {{name: audio/clips, files: {tmp_path}, pattern: "{pattern}", condition: [who], split: who,
                validation: [], test: ["Smith, Ann"], sample_rate: 8000}}"""
    (tmp_path / "c.yaml").write_text(text.replace("condition: [who]", "condition: []"), encoding="utf-8")
    clips = parse_config(str(tmp_path / "c.yaml"), []).make_data()
    clips.setup()
    assert [len(clips.clips(split)) for split in ("train", "validation", "test")] == [3, 0, 2]  # type: ignore[attr-defined]
    asa = data(tmp_path, pattern=pattern, condition=["who"], split="take", validation=[], test="2")
    assert list(asa.condition_names) == ["Müller", "Smith, Ann", "Åsa"]  # one Åsa, in whichever way it is written
    (tmp_path / "test.txt").write_text("A\u030asa_1.wav\n\u00c5sa_2.wav\n", encoding="utf-8-sig")
    listed = data(tmp_path, pattern=pattern, condition=[], validation=[], test_list=str(tmp_path / "test.txt"))
    assert len(listed.clips("test")) == 2


def test_a_list_of_folders_and_patterns(folder: Path, tmp_path: Path) -> None:
    """Each recording is there once; files of one name in two folders are told apart."""
    other = tmp_path / "more"
    other.mkdir()
    rng = np.random.default_rng(1)
    for name in ("3_anna_1", "3_carl_2"):
        soundfile.write(other / f"{name}.wav", rng.uniform(-0.5, 0.5, 60), 8000)
    both = [str(folder), str(folder / "10_*.wav"), str(other)]
    (tmp_path / "c.yaml").write_text("data: {name: audio/clips}")
    options = {"pattern": r"^(?P<digit>\d+)_(?P<speaker>[a-z]+)_(?P<take>\d+)$", "validation": "1", "test": "0"}
    words = [f"--data.{key}={value}" for key, value in options.items()]
    clips = parse_config(str(tmp_path / "c.yaml"), [f"--data.files={both}", *words]).make_data()
    clips.setup()
    assert [len(clips.clips(split)) for split in ("train", "validation", "test")] == [9, 5, 4]  # type: ignore[attr-defined]
    names = [one.name for one in all_recordings(both)]
    assert len(names) == len(set(names)) == 18
    assert {"clips/3_anna_1", "more/3_anna_1"} <= set(names)
    assert [one.name for one in all_recordings([str(other)])] == ["3_anna_1", "3_carl_2"]
    labelled = LabelledClips(files=both, label="speaker", **options)  # type: ignore[arg-type]
    labelled.setup()
    assert labelled.class_names == ("anna", "ben", "carl")


def test_a_list_of_manifests(folder: Path, tmp_path: Path) -> None:
    for number, names in enumerate((["3_anna_0", "3_ben_1"], ["10_ben_2"])):
        rows = "".join(f"clips/{name}.wav,{'test' if '_1' in name else 'train'}\n" for name in names)
        (tmp_path / f"{number}.csv").write_text(f"file,split\n{rows}")
    files = [str(tmp_path / f"{number}.csv") for number in (0, 1)]
    found = data(folder, files=files, pattern=None, condition=[], validation=None, test=None)
    assert [len(found.clips(split)) for split in ("train", "validation", "test")] == [2, 0, 1]
    with pytest.raises(ConfigError, match=r"data\.files has a manifest, '.*0\.csv', beside sound files"):
        ClipData(files=[str(folder), *files])
    with pytest.raises(ConfigError, match=r"data\.files names nothing"):
        ClipData(files=[])


def test_a_selection_that_no_clip_meets_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.test asks for 'bem', .*Did you mean 'ben'.*There are: anna, ben\."):
        data(folder, split="speaker", validation="", test="bem")
    with pytest.raises(ConfigError, match=r"data\.validation asks for '47-49', but no clip has this take"):
        data(folder, validation="47-49")


def test_values_with_blanks_stay_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a b_c_1", "a_b c_1", "a_b c_2"):
        soundfile.write(tmp_path / f"{name}.wav", rng.uniform(-0.5, 0.5, 50), 8000)
    options = {"pattern": "(?P<one>.+)_(?P<two>.+)_(?P<take>.+)", "validation": "", "test": ""}
    made = data(tmp_path, condition=["one", "two"], **options)
    assert [one.names for one in made.conditions] == [("a", "a b"), ("b c", "c")]
    assert sorted(made.train().conditions) == [(0, 0), (0, 0), (1, 1)]  # type: ignore[arg-type,type-var]


def test_bad_lists(folder: Path, tmp_path: Path) -> None:
    for content, message in ((b"\xff\xfe", "in UTF-8"), (b"\n", "names no clip"), (b".\n", "Line 1 of")):
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(DataError, match=message):
            data(folder, test_list=str(tmp_path / "list.txt"))


def test_sources_are_the_contents_of_the_files(folder: Path) -> None:
    before = data(folder).sources()
    assert len(before) == 16
    path = folder / "3_anna_2.wav"
    assert before[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()
    soundfile.write(path, np.zeros(9), 8000)
    after = data(folder).sources()
    assert {name for name in before if before[name] != after[name]} == {str(path)}


@pytest.mark.parametrize(("key", "value"), [("length", 0), ("length", 2**63), ("seed", -1), ("seed", 2**63)])
def test_numbers_out_of_range(folder: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key} must be"):
        data(folder, **{key: value})


def test_evaluation_predicts_every_sample_once(folder: Path) -> None:
    clips = data(folder)
    test = clips.test()
    assert test is not None
    assert len(test) == 4 * 3  # 300 samples: 120 + 120 + 60
    items = [test[i] for i in range(len(test))]
    targets = torch.cat([item.targets[0] for item in items if item.targets is not None])
    assert targets.tolist() == np.concatenate(clips.clips("test")).tolist()
    for k, item in enumerate(items):
        assert item.targets is not None
        before = MuLaw.start_id if k % 3 == 0 else items[k - 1].targets[0, -1].item()  # type: ignore[index]
        assert item.inputs[0].tolist() == [before, *item.targets[0, :-1].tolist()]


def test_splits_share_no_clip(folder: Path) -> None:
    clips = data(folder)
    parts = {split: {clip.tobytes() for clip in clips.clips(split)} for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [8, 4, 4]
    assert len(set.union(*parts.values())) == 16


def test_training_item_is_a_function_of_seed_and_index(folder: Path) -> None:
    one, two = data(folder).train(), data(folder).train()
    order = [29, 3, 3, 100, 0]
    for index in order:
        a, b = one[index], two[index]
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)  # type: ignore[arg-type]
    other = data(folder, seed=1).train()
    assert any(not torch.equal(one[i].inputs[:, :9], other[i].inputs[:, :9]) for i in range(8))


def test_training_passes_over_all_clips_in_new_orders(folder: Path) -> None:
    clips = data(folder, length=1000)
    train = clips.train()
    wanted = sorted(clip.tobytes() for clip in clips.clips("train"))
    epochs = []
    for epoch in range(3):
        items = [train[epoch * len(train) + i] for i in range(len(train))]
        levels = [item.targets[0].numpy().astype(np.uint8).tobytes() for item in items]  # type: ignore[index]
        assert sorted(levels) == wanted
        epochs.append(tuple(levels))
    assert len(set(epochs)) == 3


def test_long_clips_are_cropped_at_random_and_short_ones_whole(folder: Path) -> None:
    clips = data(folder, length=50)
    train = clips.train()
    starts = set()
    by_content = {clip.tobytes(): clip for clip in clips.clips("train")}
    for i in range(200):
        item = train[i]
        assert item.targets is not None
        levels = item.targets[0].numpy().astype(np.uint8)
        source = next(clip for content, clip in by_content.items() if levels.tobytes() in content)
        start = source.tobytes().index(levels.tobytes())
        assert len(levels) == min(50, len(source))
        assert item.inputs[0, 0] == (source[start - 1] if start else MuLaw.start_id)
        if len(source) == 250:
            starts.add(start)
    assert len(starts) > 50
    assert min(starts) < 20
    assert max(starts) > 180


def test_conditions(folder: Path) -> None:
    digits = data(folder)
    assert list(digits.condition_names) == ["3", "10"]  # by number, not by letter
    assert digits.n_conditions == 2
    both = data(folder, condition=["digit", "speaker"])
    assert [(one.name, one.names) for one in both.conditions] == [("digit", ("3", "10")), ("speaker", ("anna", "ben"))]
    assert both.n_conditions == 4
    test = both.test()
    assert test is not None
    # files are in the order of their names: 10_anna_0, 10_ben_0, 3_anna_0, 3_ben_0
    found = [test[i].condition.tolist() for i in range(0, 12, 3)]  # type: ignore[union-attr]
    assert found == [[[1, 0]], [[1, 1]], [[0, 0]], [[0, 1]]]
    none = data(folder, condition=())
    assert none.n_conditions == 0
    assert none.train()[0].condition is None


def test_batches_are_padded_masked_and_without_targets_there(folder: Path) -> None:
    clips = data(folder, length=1000)
    batch = clips.collate([clips.train()[i] for i in range(8)])
    assert batch.mask is not None
    assert batch.targets is not None
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape
    assert batch.mask.sum() == 4 * (250 + 40)
    assert torch.equal(batch.targets == -100, ~batch.mask)
    assert batch.condition is not None
    assert batch.condition.shape == (8,)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader(folder: Path, num_workers: int) -> None:
    module = SequenceDataModule(data(folder), batch_size=4, num_workers=num_workers)
    module.setup("fit")
    batches = list(module.train_dataloader())
    assert len(batches) == 2
    expected = module.data.collate([module.data.train()[i] for i in range(4)])
    assert torch.equal(batches[0].inputs, expected.inputs)


def test_split_by_speaker(folder: Path) -> None:
    clips = data(folder, split="speaker", validation="", test="ben")
    assert clips.validation() is None
    assert len(clips.clips("test")) == len(clips.clips("train")) == 8


def test_split_by_lists(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("clips/3_anna_0.wav\n\n10_ben_2.wav\n")
    (tmp_path / "test.txt").write_text("3_anna_1.wav\n")
    lists = {"validation_list": str(tmp_path / "val.txt"), "test_list": str(tmp_path / "test.txt")}
    clips = data(folder, **lists)
    assert [len(clips.clips(split)) for split in ("train", "validation", "test")] == [13, 2, 1]
    (tmp_path / "test.txt").write_text("3_anna_1.wav\n3_carl_1.wav\n")
    with pytest.raises(DataError, match=r"Line 2 of .*test\.txt names '3_carl_1\.wav'"):
        data(folder, **lists)


def test_bad_settings(folder: Path) -> None:
    told = r"^8 of 16 names do not match data\.pattern.*3_anna_0\.wav, .* and \d more\. .* leaves such files out"
    with pytest.raises(DataError, match=told):
        data(folder, pattern=r"^(?P<digit>10)_.*_(?P<take>\d+)$")
    with pytest.raises(DataError, match=r"^1 of 16 names do not match data\.pattern.*: \S+3_anna_0\.wav\."):
        data(folder, pattern=r"^(?!3_anna_0)(?P<digit>\d+)_.*_(?P<take>\d+)$")
    with pytest.raises(ConfigError, match=r"no group named 'digits'. Did you mean 'digit'"):
        data(folder, condition=["digits"])
    with pytest.raises(ConfigError, match="not a regular expression"):
        data(folder, pattern="(")
    with pytest.raises(ConfigError, match="both validation and test"):
        data(folder, validation="0-1", test="1-2")
    with pytest.raises(DataError, match="left for training"):
        data(folder, validation="0", test="1-9")
    with pytest.raises(DataError, match=r"has the speaker 'ben', which no training sequence has"):
        data(folder, split="speaker", test="ben", validation="", condition=["digit", "speaker"])
    with pytest.raises(DataError, match="no data file"):
        data(folder / "*.ogg")


def test_files_of_ones_own_need_no_settings(folder: Path, tmp_path: Path) -> None:
    """The defaults of the digits are theirs alone: other files are drawn, and none of their conditions is asked for."""
    told = (
        "clips: train 12, validation 2, test 2; chosen by a draw of files by data.seed 0 (validation 10% and test 10%)"
    )
    own = ClipData(files=str(folder))
    assert own.splits_told() == told
    assert own.conditions == ()
    lines = [f"clips/{path.name};{path.name[0]}" for path in sorted(folder.iterdir())]
    manifest = tmp_path / "semicolons.csv"
    manifest.write_text("\n".join(["file;who", *lines]))
    made = ClipData(files=str(manifest), condition=["who"])
    assert made.splits_told() == told
    assert set(made.train().conditions) == {0, 1}  # type: ignore[arg-type]
    words = ["train"] * 12 + ["dev"] * 3 + ["test"]
    manifest.write_text("\n".join(["file;split", *map(";".join, zip([one[:-2] for one in lines], words, strict=True))]))
    for written in ({}, {"split": "split"}, {"validation": "dev"}):  # a default that is written out is the same
        found = ClipData(files=str(manifest), **written).splits_told()  # type: ignore[arg-type]
        assert found == "clips: train 12, validation 3, test 1; chosen by 'split' of the manifest"
    with pytest.raises(ConfigError, match=r"data\.split is 'who', but neither"):
        ClipData(files=str(folder), pattern="(?P<who>anna|ben)", split="who").setup()
    with pytest.raises(ConfigError, match=r"data\.condition is 'who', but nothing says .* Give data\.pattern"):
        ClipData(files=str(folder), condition=["who"]).setup()
    with pytest.raises(DataError, match=r"do not match data\.pattern, '\^\(\?P<who>\\d\)\$'"):
        ClipData(files=str(folder), pattern=r"^(?P<who>\d)$").setup()
    with pytest.raises(ConfigError, match=r"data\.test_fraction draws a test set, which data\.test gives"):
        ClipData(test_fraction=0.1, test="1")


def test_copies_in_two_splits_are_refused(folder: Path) -> None:
    (folder / "3_anna_2.wav").write_bytes((folder / "3_anna_0.wav").read_bytes())
    with pytest.raises(DataError, match=r"3_anna_0\.wav \(test\) is a copy of .*3_anna_2\.wav \(train\)"):
        data(folder)


def test_copies_in_other_files_are_refused(folder: Path) -> None:
    """By the samples: under another name, in another format, with another header."""
    levels, rate = soundfile.read(folder / "3_anna_0.wav", dtype="int16")
    soundfile.write(folder / "10_ben_7.flac", levels, rate)
    with pytest.raises(DataError, match=r"3_anna_0\.wav \(test\) is a copy of .*10_ben_7\.flac \(train\)"):
        data(folder)


def test_a_bad_clip_is_named(folder: Path) -> None:
    (folder / "3_anna_2.wav").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"3_anna_2\.wav cannot be read as audio"):
        data(folder)


def test_shipped_digits() -> None:
    digits = ClipData()
    digits.setup()
    assert [len(digits.clips(split)) for split in ("train", "validation", "test")] == [1260, 90, 150]
    assert list(digits.condition_names) == list("0123456789")
    assert digits.vocab_size == 256
    assert list(digits.start_ids) == [128]
    assert digits.writer_options() == {"sample_rate": 8000}


def test_baselines_by_hand() -> None:
    train = [np.array([0, 0, 1]), np.array([0, 1])]
    test = [np.array([0, 1])]
    # 0 comes three times and 1 twice; after 128 comes 0 (twice), after 0 comes 1 in two of three cases; every
    # count is one higher, for each of 256 levels
    found = unigram_bigram(train, test, smoothing=1)
    assert found["unigram"] == pytest.approx(-(np.log2(4 / 261) + np.log2(3 / 261)) / 2)
    assert found["bigram"] == pytest.approx(-(np.log2(3 / 258) + np.log2(3 / 259)) / 2)


def test_baselines_of_the_shipped_digits() -> None:
    digits = ClipData(validation="")
    found = unigram_bigram(digits.clips("train"), digits.clips("test"))
    assert found["unigram"] == pytest.approx(7.063, abs=1e-3)
    assert found["bigram"] == pytest.approx(5.119, abs=1e-3)
