"""Models on the Hugging Face Hub: `save_pretrained`, `from_pretrained` and `push_to_hub`, with the arguments of its
mixins.

They save and load the folder that every run exports, not a second format: the mixins of `huggingface_hub` would add a
description of their own (config.json) next to model.json, and read it before all checks. Only model.json and the files
with a checksum in it are downloaded from a repository. Nothing is unpickled, and parts of a model are looked up in the
registry, as for every model's folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mambaseq.checkpoints.card import ModelCard, read_card
from mambaseq.checkpoints.export import LoadedModel, has_model, load_model, save_model
from mambaseq.checkpoints.published import GENERATION, TOKENIZER_FILES, load_published
from mambaseq.checkpoints.stored import WEIGHTS, parts_in
from mambaseq.errors import ConfigError, UserError, cut, cut_list, shown
from mambaseq.limits import HUB_FILES
from mambaseq.models import SequenceModel, build_model

_DESCRIPTION, _WEIGHTS, _README = "model.json", "model.safetensors", "README.md"
_EITHER = "The model (model.json, or a published one's config.json)"  # one of both is looked for
_ELSEWHERE = "Try again later, or fetch it elsewhere (hf download NAME --local-dir FOLDER) and give that folder"
_PATIENCE = 5.0  # seconds until the Hub must have answered
_REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def save_pretrained(model: SequenceModel | LoadedModel, folder: str | Path) -> None:
    """Write a model's folder, which `from_pretrained`, `load_model` and `mambaseq predict` read.

    model: a model alone, or with its description and tokenizer, as from `load_model`; these are then kept.
    folder: replaced if it holds a model and nothing else.

    Raises ConfigError for a model that cannot be made again from a description, UserError for a folder that holds other
    files, is a file or cannot be written.
    """
    loaded = model if isinstance(model, LoadedModel) else None
    bare = model.model if isinstance(model, LoadedModel) else model
    folder = Path(folder)
    _check_description(bare)
    _check_folder(folder)
    assert bare.spec is not None
    card = ModelCard(spec=bare.spec) if loaded is None else loaded.card
    save_model(folder, bare, card, None if loaded is None else loaded.tokenizer)


def from_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """A model, its description and its tokenizer, from a local folder (also a run's) or from the Hub.

    source: the folder, or a repository's name, "user/name"; also that of a published Mamba (see `load_published`).
    revision, token, cache_dir, force_download, local_files_only: as of `huggingface_hub.hf_hub_download`.

    Raises what `load_model` and `load_published` raise, and UserError if nothing can be downloaded.
    """
    if not Path(source).is_dir():
        source = download(
            str(source),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
        )
    if not has_model(source) and (Path(source) / "config.json").is_file():
        loaded = load_published(source)
        return dataclasses.replace(loaded, model=loaded.model.to(device))
    return load_model(source, device)


def download(repository: str, **options: Any) -> Path:
    """The folder of a repository's model in the local cache; `mambaseq.load` takes it too, unless it is a published
    Mamba in another house's form, of which config.json, weights and tokenizer are fetched.

    options: revision, token, cache_dir, force_download, local_files_only, as of `huggingface_hub.hf_hub_download`.

    Raises UserError for an invalid name, a repository that does not exist or holds no exported model, and if the
    package is missing.
    """
    if not _REPOSITORY.fullmatch(repository) or len(repository) > 200:
        raise UserError(
            f"{shown(repository)} is neither a folder here nor the name of a repository on the Hugging Face Hub "
            "(user/name)."
        )
    hub = _Hub.of(repository, options)
    try:
        description = hub.fetch(_DESCRIPTION, _EITHER)
    except UserError as error:
        if not _is_absent(error.__cause__):
            raise
        return _published(hub)
    card = read_card(description)
    HUB_FILES.check(len(card.sha256), f"{_DESCRIPTION} of {repository}")
    if _WEIGHTS not in card.sha256:
        raise UserError(
            f"{_DESCRIPTION} of {repository} has no checksum of {_WEIGHTS}, so it is not a completely exported model. "
            "Export it again and push it (push_to_hub)."
        )
    for name in card.sha256:
        if hub.fetch(name) != description.parent / name:
            raise UserError(f"{repository} was changed while it was downloaded. Download it again.")
    return description.parent


_NEOX = "EleutherAI/gpt-neox-20b"  # the tokenizer of state-spaces' models, which have none in their repositories


def _published(hub: _Hub) -> Path:
    """The folder of a published model: config.json, weights in the first form that is there, and the tokenizer.

    Raises UserError.
    """
    folder = hub.fetch("config.json", _EITHER).parent
    weights = next((path for name in WEIGHTS if (path := hub.fetch_if_there(name))), None)
    if weights is None:
        if hub.why:
            raise UserError(
                f"The cache here has config.json of {shown(hub.repository)}, but none of {cut_list(WEIGHTS)}, and "
                f"{hub.why}. {_ELSEWHERE}."
            )
        raise UserError(f"{hub.repository} has none of {cut_list(WEIGHTS)}. Name another repository.")
    if weights.suffix == ".json":
        names = parts_in(weights)
        HUB_FILES.check(len(names), f"{weights.name} of {hub.repository}")
        for name in names:
            hub.fetch(name)
    for name in (*TOKENIZER_FILES, GENERATION):
        hub.fetch_if_there(name)
    return folder


def download_tokenizer(repository: str, **options: Any) -> Path | None:
    """The folder of the tokenizer that a published model is used with, where its own repository has none; None if that
    is not known."""
    if not repository.startswith("state-spaces/"):
        return None
    return download_tokenizer_files(_NEOX, **options).parent


def download_tokenizer_files(repository: str, **options: Any) -> Path:
    """The tokenizer.json of a repository, with those beside it that say more of it. Raises UserError if it cannot be
    downloaded."""
    hub = _Hub.of(repository, options)
    path = hub.fetch(TOKENIZER_FILES[0])
    for name in TOKENIZER_FILES[1:]:
        hub.fetch_if_there(name)
    return path


def _is_absent(error: BaseException | None) -> bool:
    """Whether the Hub, or the cache where nothing else may be asked, says that a file is not there."""
    absent = any(kind.__name__.endswith("EntryNotFoundError") for kind in type(error).__mro__)
    return absent and not _failing(None if error is None else error.__cause__)


def push_to_hub(
    model: SequenceModel | LoadedModel,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Push model using mambaseq",
) -> str:
    """Upload what `save_pretrained` writes. A missing repository is created, with a README that says how to load the
    model. Returns the address of the commit. The arguments are those of `huggingface_hub`'s mixins.

    Raises what `save_pretrained` raises, and UserError if the package is missing; the Hub's own errors are passed on.
    """
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_pretrained(model, folder)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if not api.file_exists(repository, _README):
            (folder / _README).write_text(_readme(repository), encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    return str(commit)


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(
            f"Models on the Hugging Face Hub need the package huggingface_hub ({cut(error, 100)}). Install it: pip "
            f"install huggingface_hub."
        ) from error


_UNREACHABLE = {"ConnectionError", "NetworkError", "ProxyError", "TimeoutException", "TimeoutError", "Timeout"}


class _Hub(NamedTuple):
    """A repository, and how its files are had. why: the cache alone is read; otherwise ""."""

    repository: str
    options: dict[str, Any]
    why: str = ""

    @classmethod
    def of(cls, repository: str, options: dict[str, Any]) -> _Hub:
        """Where the Hub cannot be reached, or fails itself (5xx, 429), the cache alone is read. It is asked once and
        shortly: the library itself tries again for a minute, for each file.

        Raises UserError where the cache is not to be read (force_download).
        """
        hub = _hub()
        if options.get("local_files_only"):
            return cls(repository, options, "nothing else may be read (local_files_only)")
        cached = {**options, "local_files_only": True}
        if importlib.import_module("huggingface_hub.constants").HF_HUB_OFFLINE:
            why = "the Hugging Face Hub may not be asked (HF_HUB_OFFLINE)"
            cls._check_cache_will_do(repository, options, why)
            return cls(repository, cached, why)
        try:
            of = {name: options.get(name) for name in ("revision", "endpoint")}
            hub.get_hf_file_metadata(
                hub.hf_hub_url(repository, _DESCRIPTION, **of), token=options.get("token"), timeout=_PATIENCE
            )
        except Exception as error:  # the errors of two libraries of requests; what is no matter of the Hub or the
            if not (why := _failing(error)):  # network, a file that is missing, say, is told by `fetch`
                return cls(repository, options)
            cls._check_cache_will_do(repository, options, why, error)
            return cls(repository, cached, why)
        return cls(repository, options)

    @staticmethod
    def _check_cache_will_do(
        repository: str, options: dict[str, Any], why: str, cause: Exception | None = None
    ) -> None:
        if options.get("force_download"):
            raise UserError(
                f"{shown(repository)} cannot be downloaded anew: {why}. Check the connection and the proxy, or leave "
                "out force_download: then the copy in the cache is read."
            ) from cause

    def fetch(self, name: str, called: str = "") -> Path:
        """A file. called: in the error, in place of its name. Raises UserError if it cannot be had, with the library's
        error as cause."""
        try:
            return Path(_hub().hf_hub_download(self.repository, name, **self.options))
        except Exception as error:  # errors of the Hub, the network and the disk have many types
            if self.why and type(error).__name__ == "LocalEntryNotFoundError":
                reason = f"{self.why}, and the cache here has no such file"
                remedy = f"Check the name, the connection and the proxy. {_ELSEWHERE}"
            elif reason := _failing(error) or _failing(error.__cause__):
                remedy = _ELSEWHERE
            else:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                remedy = "Check the name, the revision, the token and the connection"
            raise UserError(
                f"{called or name} of {shown(self.repository)} cannot be downloaded from the Hugging Face Hub "
                f"({reason}). {remedy}; there is no local folder of that name."
            ) from error

    def fetch_if_there(self, name: str) -> Path | None:
        """A file; None if the repository has none of that name."""
        try:
            return self.fetch(name)
        except UserError as error:
            if _is_absent(error.__cause__):
                return None
            raise


def _failing(error: BaseException | None) -> str:
    """Why the Hub cannot be asked: it is not reached, or fails itself; "" for another error, and for None."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and (status >= 500 or status == 429):
        return f"the Hugging Face Hub answers {status}, so it is down or asked too often"
    if _UNREACHABLE & {kind.__name__ for kind in type(error).__mro__}:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return f"the Hugging Face Hub cannot be reached ({told})"
    return ""


def _check_description(model: SequenceModel) -> None:
    """Raise ConfigError unless the model of its description would have the same tensors."""
    if model.spec is None:
        raise ConfigError(
            "The model has no description (spec), so it could not be made again. Make it with build_model or causal_lm."
        )
    with torch.device("meta"):
        made = build_model(model.spec).state_dict()
    own = model.state_dict()
    shapes, others = ({name: tuple(tensor.shape) for name, tensor in one.items()} for one in (own, made))
    if wrong := sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name)):
        raise ConfigError(
            f"The model no longer fits its description (spec): {cut_list(wrong, 3)} differs. Merge adapters into the "
            "weights and undo what was wrapped before saving it."
        )


def _check_folder(folder: Path) -> None:
    """Raise UserError if a file has the folder's name, or the folder holds more than a model."""
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{folder} is a file, where the model's folder is to be. Give another name.")
        return
    there = {path.name for path in folder.iterdir()}
    known = {_DESCRIPTION}
    if _DESCRIPTION in there:
        known |= {Path(name).parts[0] for name in read_card(folder / _DESCRIPTION).sha256}
    if others := sorted(there - known):
        raise UserError(
            f"{folder} holds other files than a model's ({cut_list(others, 3)}), which would be lost, since the folder "
            "is replaced. Name a folder inside it, or another one."
        )


def _readme(repository: str) -> str:
    return f"""---
library_name: mambaseq
tags: [mamba, mambaseq]
---

# {repository.rpartition("/")[2]}

```python
from mambaseq import SequenceModel

model = SequenceModel.from_pretrained("{repository}")
```
"""
