"""`save_pretrained`, `from_pretrained` and `push_to_hub`, with a Hub in a local folder."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from mambaseq_text.tokenization import ByteTokenizer
from torch import nn

import mambaseq as ms
from mambaseq.checkpoints import LoadedModel, ModelCard, load_model, save_model
from mambaseq.checkpoints.hub import download, from_pretrained, push_to_hub
from mambaseq.checkpoints.published import GENERATION, TOKENIZER_FILES
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError, UserError
from mambaseq.models import SequenceModel, causal_lm


def small(**options) -> SequenceModel:
    return causal_lm(vocab_size=256, d_model=8, n_layers=1, **options)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Repositories in a folder; `asked` lists what was downloaded."""
    repositories, cache, asked = tmp_path / "repositories", tmp_path / "cache", []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            (repositories / "me" / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, repo_id: str, name: str) -> bool:
            return (repositories / repo_id / name).exists()

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, revision: str | None, **_) -> str:
            shutil.copytree(folder_path, repositories / repo_id, dirs_exist_ok=True)
            return f"commit of {repo_id}: {commit_message}"

    def hf_hub_download(repo_id: str, filename: str, *, revision: str | None = None, **_) -> str:
        asked.append(filename)
        there = repositories / repo_id / filename
        if not there.is_file():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {filename}")
        copy = cache / repo_id / (revision or "main") / filename
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(there, copy)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return SimpleNamespace(repositories=repositories, asked=asked)


def test_what_is_pushed_is_what_is_loaded(hub: SimpleNamespace, tmp_path: Path) -> None:
    model = small()
    assert model.push_to_hub("tiny") == "commit of me/tiny: Push model using mambaseq"
    repository = hub.repositories / "me" / "tiny"
    assert sorted(path.name for path in repository.iterdir()) == ["README.md", "model.json", "model.safetensors"]
    assert 'from_pretrained("me/tiny")' in (repository / "README.md").read_text()
    (repository / "README.md").write_text("mine")
    (repository / "pytorch_model.bin").write_bytes(b"\x80pickle")
    model.push_to_hub("tiny")
    assert (repository / "README.md").read_text() == "mine"

    again = SequenceModel.from_pretrained("me/tiny", revision="v2")
    assert hub.asked == ["model.json", "model.safetensors"]  # and nothing else that the repository has
    assert not again.training
    ids = torch.randint(0, 256, (1, 5))
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)

    # with a tokenizer: all that a folder holds
    made = load_model(_with_tokenizer(tmp_path / "run"))
    push_to_hub(made, "bytes")
    loaded = from_pretrained("me/bytes")
    assert isinstance(loaded.tokenizer, ByteTokenizer)
    assert loaded.card == made.card
    assert ms.load(download("me/bytes")).model("cpu").card.length == 4


def _with_tokenizer(folder: Path) -> Path:
    model = small()
    assert model.spec is not None
    card = ModelCard(spec=model.spec, length=4, tokenizer={"name": "text/bytes", "options": {}})
    save_model(folder, model, card, ByteTokenizer())
    return folder


def test_what_is_on_the_hub_may_be_anybodys(hub: SimpleNamespace) -> None:
    repository = hub.repositories / "me" / "tiny"
    small().push_to_hub("tiny")
    whole = json.loads((repository / "model.json").read_text())
    digest = "0" * 64
    for sums, said in (
        ({"../escaped": digest}, "must hold checksums of files beside it"),
        ({}, "no checksum of model.safetensors"),
        ({"model.safetensors": digest}, "is damaged, or not"),
        ({"model.safetensors": digest, "gone.json": digest}, r"gone\.json of 'me/tiny' cannot be downloaded"),
        ({"model.safetensors": digest} | {f"{i}.json": digest for i in range(1000)}, "MAMBASEQ_MAX_HUB_FILES"),
    ):
        (repository / "model.json").write_text(json.dumps(whole | {"sha256": sums}))
        hub.asked.clear()
        with pytest.raises(UserError, match=said):
            from_pretrained("me/tiny")
        assert not [name for name in hub.asked if ".." in name]
        assert len(hub.asked) <= 3
    with pytest.raises(
        UserError, match=r"config\.json\) of 'me/none' cannot be downloaded .*the cache here has no such file"
    ):
        from_pretrained("me/none")
    hub.asked.clear()
    for name in ("a/b/c", "../up", "/etc", "x\n", "", "a" * 300):
        with pytest.raises(UserError, match="nor the name of a repository"):
            download(name)
    assert not hub.asked


def test_a_folder_is_replaced_only_where_it_holds_a_model_alone(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    small().save_pretrained(folder)
    last = small(tie_embeddings=False)
    last.save_pretrained(folder)
    loaded = from_pretrained(folder)
    assert isinstance(loaded, LoadedModel)
    assert torch.equal(loaded.model.head.linear.weight, last.head.linear.weight)
    for name in ("README.md", "notes.txt"):
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match=rf"other files than a model's \({name}\)"):
            last.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    with pytest.raises(UserError, match="is a file"):
        last.save_pretrained(folder / "notes.txt")
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(UserError, match=r"checkpoint-2, m"):
        last.save_pretrained(tmp_path)


def test_what_no_description_makes_again_is_not_saved(tmp_path: Path) -> None:
    model = small()
    model.backbone.layers[0].mixer.in_proj = nn.Linear(8, 16, bias=True)
    with pytest.raises(ConfigError, match=r"no longer fits its description.*in_proj\.bias"):
        model.save_pretrained(tmp_path / "m")
    model.spec = None
    with pytest.raises(ConfigError, match="no description"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_without_the_package_folders_work_and_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    small().save_pretrained(tmp_path / "m")
    SequenceModel.from_pretrained(tmp_path / "m")
    for call in (lambda: SequenceModel.from_pretrained("me/tiny"), lambda: small().push_to_hub("tiny")):
        with pytest.raises(UserError, match=r"need the package huggingface_hub .*pip install huggingface_hub"):
            call()


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, nobody)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(UserError, match=r"config\.json\) of 'me/none' cannot be downloaded .*hf download NAME"):
        SequenceModel.from_pretrained("me/none", cache_dir=tmp_path)
    assert not waited


@pytest.mark.parametrize("force", [False, True])
def test_a_copy_in_the_cache_is_no_new_one(force: bool, hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    small().push_to_hub("tiny")
    asked: list[str] = []

    def unreachable(address: str, **_) -> None:
        asked.append(address)
        raise ConnectionError("nobody there")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    options = {"force_download": force, "endpoint": "https://hub.example"}
    if force:
        with pytest.raises(UserError, match=r"'me/tiny' cannot be downloaded anew.*nobody there.*force_download"):
            download("me/tiny", **options)
        assert not hub.asked
    else:
        assert (download("me/tiny", **options) / "model.safetensors").is_file()
    assert asked == ["https://hub.example/me/tiny/resolve/main/model.json"]


@pytest.fixture
def down(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A Hub that answers what `answers` says for each file's name, else 503; `asked` lists the names."""
    from huggingface_hub import constants

    asked: list[str] = []
    answers: dict[str, tuple[int, bytes]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = self.path.rpartition("/")[2]
            asked.append(name)
            status, body = answers.get(name, (503, b""))
            self.send_response(status)
            if status == 200:
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", "1" * 40)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_address[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", here)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    yield SimpleNamespace(asked=asked, answers=answers)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_hub_that_is_down_is_asked_once_and_named(
    status: int, down: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    down.answers["model.json"] = (status, b"")
    with pytest.raises(
        UserError, match=rf"config\.json\) of 'me/none' cannot be .* answers {status}, .*Try again later"
    ):
        SequenceModel.from_pretrained("me/none", cache_dir=tmp_path)
    with pytest.raises(UserError, match=rf"'me/none' cannot be downloaded anew: .* answers {status}"):
        SequenceModel.from_pretrained("me/none", cache_dir=tmp_path, force_download=True)
    assert down.asked == ["model.json"] * 2
    assert not waited


def test_a_hub_that_fails_after_the_first_file(
    down: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    down.answers |= {"model.json": (404, b""), "config.json": (200, b"{}")}
    assert main(["import", "--checkpoint", "state-spaces/none", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert "of 'state-spaces/none' cannot be downloaded from the Hugging Face Hub" in told
    assert "answers 503" in told
    assert "Try again later" in told
    assert sum(waited) < 60


def test_a_published_model_in_the_cache_is_read_where_the_hub_may_not_be_asked(
    down: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no model.json, and other files that published models may have are missing too."""
    from huggingface_hub import constants

    missing = ("model.json", "model.safetensors.index.json", *TOKENIZER_FILES, GENERATION)
    down.answers |= {name: (404, b"") for name in missing}
    down.answers |= {"config.json": (200, b"{}"), "model.safetensors": (200, b"weights")}
    folder = download("me/published", cache_dir=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    down.answers.clear()
    down.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("me/published", cache_dir=tmp_path) == folder
    with pytest.raises(UserError, match=r"'me/published' cannot be downloaded anew: .*HF_HUB_OFFLINE"):
        download("me/published", cache_dir=tmp_path, force_download=True)
    with pytest.raises(UserError, match=r"config\.json\) of 'me/other' .*HF_HUB_OFFLINE.* has no such file"):
        download("me/other", cache_dir=tmp_path)
    (folder / "model.safetensors").unlink()
    told = r"cache here has config\.json of 'me/published', but none of model.*HF_HUB_OFFLINE.* or fetch it elsewhere"
    with pytest.raises(UserError, match=told):
        download("me/published", cache_dir=tmp_path)
    assert not down.asked
