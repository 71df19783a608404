"""Recipes of published results on raw waveforms: sizes of models, codes, splits, and all of it on made data."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from mambaseq_audio.recipes import sc09, youtubemix
from mambaseq_audio.recipes.published import Sounds, codes, nats_a_sample, sizes_of, spec

from mambaseq.checkpoints import load_model
from mambaseq.cli.main import main
from mambaseq.errors import DataError
from mambaseq.mixers.mamba import Mamba
from mambaseq.models import build_model, count_parameters
from mambaseq.reproduction import Context
from mambaseq.runs.parsing import parse_config

CPU = torch.device("cpu")
PAGE = Path(__file__).parents[2] / "docs" / "audio" / "published.md"
SC09 = (*sc09.TABLE_4, *sc09.TABLE_5)
FIGURE_10 = (*youtubemix.LEFT, *youtubemix.RIGHT)
ALL = (*SC09, *youtubemix.FIGURE_7, *FIGURE_10)
CONFIGS = list(dict.fromkeys(variant.config for variant in ALL))


def millions(config: str) -> float:
    """The backbone's parameters, without embedding and head."""
    model = spec(config)
    return (count_parameters(model) - 2 * 256 * model["d_model"]) / 1e6


def test_models_are_as_large_as_published() -> None:
    """Where the paper says "about 6 M", within 6 %."""
    exact = [variant for variant in ALL if variant.published is not None]
    assert {variant.config: variant.published for variant in exact} == {
        "audio/sc09": 6.1,
        "audio/sc09_large": 24.3,
        "audio/sc09_sashimi": 5.8,
        "audio/youtubemix": 3.5,
    }
    for variant in exact:
        assert millions(variant.config) == pytest.approx(variant.published, rel=0.01)
        assert round(millions(variant.config), 1) == variant.published
    about_six = {one.config: millions(one.config) for one in (*sc09.TABLE_5, *FIGURE_10)}
    assert all(abs(count / 6 - 1) <= 0.06 for count in about_six.values()), about_six
    assert millions("audio/youtubemix_s4") == pytest.approx(3.5, rel=0.05)


MAMBA, S4 = ["mamba"], ["s4", "mlp"]
OF_LINES = {
    "audio/sc09": [MAMBA] * 3,
    "audio/sc09_large": [MAMBA] * 3,
    "audio/sc09_sashimi": [S4] * 3,
    "audio/table5_s4_attention": [S4, S4, ["attention", "mlp"]],
    "audio/table5_s4_mamba": [S4, S4, MAMBA],
    "audio/table5_mamba_attention": [MAMBA, MAMBA, ["attention", "mlp"]],
    "audio/table5_mamba_s4": [MAMBA, MAMBA, S4],
    "audio/youtubemix": [["complex"]] * 3,
    "audio/youtubemix_s4": [S4] * 3,
    "audio/figure10_s4": [S4] * 3,
    "audio/figure10_real": [MAMBA] * 3,
    "audio/figure10_complex": [["complex"]] * 3,
    "audio/figure10_constant": [["complex, constant"]] * 3,
    "audio/figure10_lti": [["lti"]] * 3,
    "audio/figure10_center_real": [["lti"], ["lti"], MAMBA],
    "audio/figure10_center_complex": [["lti"], ["lti"], ["complex"]],
    "audio/figure10_center_constant": [["lti"], ["lti"], ["complex, constant"]],
}
"""The paper's lines: what a layer is in each tier, the finest first."""


def kind(layer: torch.nn.Module) -> str:
    mixer = layer.mixer
    if not isinstance(mixer, Mamba):
        return type(mixer).__name__.lower()
    own = {name for name, _ in mixer.named_parameters()}
    if mixer.lti:
        assert "ssm.A_imag" in own  # complex
        return "lti"
    return ("complex" if mixer.complex else "mamba") + (", constant" if {"B", "C"} <= own else "")


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_are_the_papers_lines(config: str) -> None:
    """As `fit` reads them, and as the recipes do."""
    run = parse_config(config, [])
    with torch.device("meta"):
        theirs, ours = build_model(run.model_spec(run.make_data())), build_model(spec(config))
    assert str(theirs) == str(ours)
    assert {name: p.shape for name, p in theirs.named_parameters()} == {
        name: p.shape for name, p in ours.named_parameters()
    }
    tier, found = theirs.backbone.top, []
    for _ in range(3):
        kinds = [kind(layer) for layer in tier.down]
        assert [kind(layer) for layer in tier.up] in ([], kinds)
        found.append(list(dict.fromkeys(kinds)))
        tier = tier.inner
    assert found == OF_LINES[config]


def test_lines_of_a_table_are_trained_alike() -> None:
    """What a table says of its training is read from one of its configurations. Figure 10 has 2^20 samples a step."""
    for group, steps, lr in ((SC09, 200_000, 2e-3), (youtubemix.FIGURE_7, 200_000, 2e-3), (FIGURE_10, 100_000, 1e-3)):
        (sizes,) = {str(sizes_of(one.config)): sizes_of(one.config) for one in group}.values()
        assert (sizes.steps, sizes.optimizer.lr, sizes.optimizer.warmup_steps) == (steps, lr, steps // 10)
        assert sizes.clip == (0.1 if group == SC09 else 1.0)
        assert sizes.shorter(50).optimizer.warmup_steps == 5
    assert sizes.length * sizes.batch_size == 2**20
    assert youtubemix.LENGTHS_10[2] == (sizes.length, sizes.batch_size)
    settings = parse_config("audio/figure10_complex", []).settings
    assert settings["data"]["epoch_size"] % settings["loader"]["batch_size"] == 0


def test_the_page_of_published_models_has_their_configurations() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(audio/\w+)` \|.* ([\d.]+) M \|$", page, re.MULTILINE)
    assert rows == [(config, f"{millions(config):.2f}") for config in CONFIGS]
    wanted = re.findall(r"--only (.*?) +#", page)
    assert len(wanted) == 3
    for only in wanted:
        assert {one for one in shlex.split(only) if not one.isdigit()} <= {variant.name for variant in ALL}
    for name, rungs in (("Figure 7", youtubemix.TABLE_14), ("Figure 10", youtubemix.LENGTHS_10)):
        assert f"| {name} | {'; '.join(f'{one.length:,}: {one.batch_size}' for one in rungs)} |" in page
    for length, batch in re.findall(r"--data.length=(\d+) --loader.batch_size=(\d+)", page):
        assert (int(length), int(batch)) in (*youtubemix.TABLE_14, *youtubemix.LENGTHS_10)


def test_the_configuration_on_the_page_of_published_models(tmp_path: Path) -> None:
    (written,) = re.findall(r"^    base:.*\n(?:    .*\n)+", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    (tmp_path / "mine.yaml").write_text(textwrap.dedent(written), encoding="utf-8")
    mine, large = (parse_config(name, []).settings for name in (str(tmp_path / "mine.yaml"), "audio/sc09_large"))
    assert mine["model"]["backbone"] == {
        **large["model"]["backbone"],
        "tiers": [["s4+mlp"]] * 3,
        "dropout": 0.1,
    }
    assert (mine["model"]["d_model"], mine["data"]) == (96, large["data"])


def test_codes_are_those_of_the_published_code() -> None:
    """By hand: the least sample is code 0 and the largest 255, whatever the recording's scale. What is half-way
    comes to 127, as the published code adds a little to the range."""
    signal = np.array([-0.2, 0.0, 0.2, 0.02, -0.002], dtype=np.float32)
    expected = [0, 127, 255, *(_by_hand(x) for x in (0.1, -0.01))]
    assert codes(signal).tolist() == expected
    assert codes(3 * signal).tolist() == expected
    assert codes(signal + 0.1).tolist() == expected  # an offset is taken out, too


def _by_hand(x: float) -> int:
    y = math.copysign(math.log(1 + 255 * abs(x)) / math.log(256), x)
    return math.floor((y + 1) / 2 * 255.99 + 0.005)


def test_windows_begin_after_silence_and_every_sample_is_predicted_once() -> None:
    levels = [np.arange(1, 8, dtype=np.uint8), np.arange(101, 106, dtype=np.uint8)]
    sounds = Sounds._of(levels, CPU)
    places = sounds.windows(3, drop_last=False)
    assert places.tolist() == [[0, 3], [3, 3], [6, 1], [7, 3], [10, 2]]
    assert sounds.windows(3, drop_last=True).tolist() == [[0, 3], [3, 3], [7, 3]]
    batch = sounds.batch(places[[1, 4]], 3)
    assert batch.inputs[:, :2].tolist() == [[128, 4], [128, 104]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[4, 5, 6], [104, 105, -100]]
    drawn = sounds.drawn(places, 3, 200, 0)(torch.tensor(1))
    assert {tuple(row) for row in drawn.targets.tolist()} == {  # type: ignore[union-attr]
        tuple(row)
        for row in sounds.batch(places, 3).targets.tolist()  # type: ignore[union-attr]
    }
    with pytest.raises(DataError, match="No recording has 8 samples"):
        sounds.windows(8, drop_last=True)

    class Uniform(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> object:
            loss = torch.nn.functional.cross_entropy(torch.zeros(labels.numel(), 256), labels.flatten())
            return type("Output", (), {"loss": loss})

    assert nats_a_sample(Uniform(), sounds, places, 2) == pytest.approx(math.log(256))  # type: ignore[arg-type]


def write(path: Path, seed: int, samples: int = 300) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    signal = np.random.default_rng(seed).normal(0, 0.1, samples)
    soundfile.write(path, signal, 16_000)


def context(tmp_path: Path, *only: str) -> Context:
    (tmp_path / "out" / "trials").mkdir(parents=True, exist_ok=True)
    return Context(CPU, "tiny", [0], tmp_path / "out", list(only), "here", data=tmp_path)


SMALL = [
    *("--model.d_model=8", "--model.backbone.n_layers=1", "--data.length=64", "--loader.batch_size=2"),
    *("--loader.num_workers=0", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"),
    *("--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"),
    *("--trainer.val_check_interval=1", "--trainer.enable_progress_bar=false"),
]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Made clips and recordings, as `fit` takes them for SC09 and for YouTubeMix."""
    folder = tmp_path_factory.mktemp("sounds")
    splits = {"train": range(4), "validation": range(4, 5), "test": range(5, 6)}
    rows = []
    for split, numbers in splits.items():
        for number in numbers:
            write(folder / "sc09" / "one" / f"{number}.wav", number, 100)
            rows.append(f"sc09/one/{number}.wav,{split}\n")
        (folder / f"{split}.txt").write_text("".join(f"one/{number}.wav\n" for number in numbers))
    (folder / "split.csv").write_text("".join(["file,split\n", *rows]))
    lists = [f"--data.{split}_list={folder / split}.txt" for split in ("validation", "test")]
    return [[f"--data.files={folder}/sc09/*/*.wav", *lists], [f"--data.files={folder / 'split.csv'}"]]


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_are_trained(config: str, sounds: list[list[str]], tmp_path: Path) -> None:
    data = sounds[0] if config in [one.config for one in SC09] else sounds[1]
    assert main(["fit", "--config", config, "--out", str(tmp_path / "run"), *data, *SMALL]) == 0
    assert load_model(tmp_path / "run").model.n_parameters() > 0
    saved = parse_config(str(tmp_path / "run" / "config.yaml"), []).settings["model"]
    assert saved["backbone"] == {**parse_config(config, []).settings["model"]["backbone"], "n_layers": 1}


def run_on_the_page(begin: str, folder: Path) -> None:
    """Run the lines of the page from one on, up to an empty one."""
    (lines,) = re.findall(rf"^    {re.escape(begin)}\n(?:    .*\n)*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    subprocess.run(["bash", "-euc", textwrap.dedent(lines)], cwd=folder, check=True)


def test_sc09_on_made_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, word in enumerate((*sc09.WORDS, "bed")):
        for speaker in range(3):
            write(tmp_path / "sc09" / word / f"a{speaker}_nohash_0.wav", 3 * number + speaker)  # stems in many folders
    folder = tmp_path / "sc09"
    for split, speaker in (("validation", 0), ("test", 1)):
        names = [f"{word}/a{speaker}_nohash_0.wav\n" for word in ("bed", *sc09.WORDS)]
        (folder / sc09.LISTS[split]).write_text("".join(names))
    found = sc09.clips(folder, whole=False)
    assert [len(part) for part in found] == [10, 10, 10]
    assert {path.name for path in found.test} == {"a1_nohash_0.wav"}
    assert {path.parent.name for part in found for path in part} == set(sc09.WORDS)
    with pytest.raises(DataError, match="not the published SC09: 10 train clips instead of 31,158"):
        sc09.clips(folder, whole=True)
    (tmp_path / "speech_commands").symlink_to(folder)
    run_on_the_page("mkdir -p DATA/sc09", tmp_path)  # the ten words alone
    assert {path.name for path in (tmp_path / "DATA" / "sc09").iterdir()} == {*sc09.WORDS, *sc09.LISTS.values()}
    assert sc09.clips(tmp_path / "DATA" / "sc09", whole=False).test[0].name == found.test[0].name
    monkeypatch.chdir(tmp_path / "DATA")
    data = parse_config("audio/sc09", []).make_data()
    data.setup()
    assert (data.n_conditions, len(data.train()), len(data.validation()), len(data.test())) == (0, 10, 10, 10)
    lines = ["Mamba, 6.1 M", "S4+MLP, MHA+MLP in the center", "Mamba, Mamba in the center"]
    tables = sc09.run(context(tmp_path, *lines))
    assert [[line.name for line in table.lines] for table in tables] == [lines[:1], lines[1:]]
    assert tables[0].lines[0].values == tables[1].lines[1].values  # trained once
    for table in tables:
        for line in table.lines:
            assert line.values["bits"][0] == pytest.approx(line.values["nats"][0] / math.log(2))
            assert 7 < line.values["bits"][0] < 9
    (kept,) = (tmp_path / "out" / "models").glob("Mamba*")
    loaded = load_model(kept)
    assert loaded.card.writer_options == {"sample_rate": 16_000}
    assert loaded.model.n_parameters() == tables[0].lines[0].values["parameters"][0]
    (folder / "nine" / "a1_nohash_0.wav").unlink()
    with pytest.raises(DataError, match="names 1 of the clips, but they are not there: nine/a1"):
        sc09.clips(folder, whole=False)
    (folder / sc09.LISTS["test"]).unlink()
    with pytest.raises(DataError, match=r"no .*testing_list\.txt"):
        sc09.clips(folder, whole=False)


def test_youtubemix_on_made_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        write(tmp_path / "youtubemix" / f"out{number}.wav", number)
    parts = youtubemix.splits(tmp_path / "youtubemix")
    assert [[path.name for path in part] for part in parts[1:]] == [["out17.wav"], ["out18.wav", "out19.wav"]]
    assert [path.name for path in parts[0]] == [f"out{number}.wav" for number in range(17)]  # 10 comes after 9
    names = ("train", "validation", "test")
    table = [f"{path.name},{split}\n" for split, part in zip(names, parts, strict=True) for path in part]
    (tmp_path / "DATA").symlink_to(tmp_path)
    run_on_the_page("cd DATA", tmp_path)
    assert (tmp_path / "youtubemix" / "split.csv").read_text() == "".join(["file,split\n", *table])
    monkeypatch.chdir(tmp_path)
    data = parse_config("audio/youtubemix", ["--data.length=100"]).make_data()
    assert [len(data.validation()), len(data.test())] == [3, 6]
    one, other = "Mamba, 3.5 M", youtubemix.RIGHT[2].name
    tables = youtubemix.run(context(tmp_path, one, other, "64"))
    assert [[line.name for line in table.lines] for table in tables] == [[one], [other]]
    assert all(line.values.keys() == {"bits at 64", "parameters"} for table in tables for line in table.lines)
    with pytest.raises(DataError, match=r"hours of sound, not the published four"):
        youtubemix._check_hours(tmp_path, Sounds.read(parts[2], CPU, ""))
