"""A model on disk with everything needed to use it again: `model.safetensors`, `model.json`, tokenizer files."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mambaseq.atomic import atomic_folder
from mambaseq.checkpoints.adapters import FOLDER, added, merged, save_adapter, saved_factors
from mambaseq.checkpoints.card import ModelCard, read_card
from mambaseq.checkpoints.dtypes import dtype_of, staying
from mambaseq.checkpoints.lightning_io import AVERAGE, LORA, read_checkpoint
from mambaseq.data.tokenizer import Tokenizer
from mambaseq.domain import catalog
from mambaseq.errors import ConfigError, UserError, shown, under_key
from mambaseq.models import SequenceModel, build_empty, count_parameters
from mambaseq.models.building import for_any_machine
from mambaseq.models.modules import further_names
from mambaseq.plain import read_json
from mambaseq.resources import located, model_folder
from mambaseq.specs import fits


@dataclasses.dataclass
class LoadedModel:
    """A model in eval mode, its card, its tokenizer (None for continuous inputs) and the file of its weights."""

    model: SequenceModel
    card: ModelCard
    tokenizer: Tokenizer | None
    source: Path


def weights(model: SequenceModel) -> dict[str, torch.Tensor]:
    """The model's tensors by name, contiguous, each once: a tied head is left out (it is the embedding), and so are all
    uses of a shared mixer after the first."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def save_model(
    folder: str | Path,
    model: SequenceModel | None,
    card: ModelCard,
    tokenizer: Tokenizer | None = None,
    *,
    adapter: tuple[Mapping[str, tuple[torch.Tensor, torch.Tensor]], Mapping[str, Any]] | None = None,
) -> None:
    """Write the folder atomically; an older model in it stays until the new one is complete. The backends that the
    card's description names are left out: it is for any machine.

    model: None writes the description without weights (for a run that has just started).
    adapter: what is added to the weights when the model is loaded, and its settings; see `save_adapter`.

    Raises UserError if the disk is full or not writable.
    """
    with atomic_folder(Path(folder)) as temporary:
        if tokenizer is not None:
            assert card.tokenizer is not None
            card = dataclasses.replace(
                card, tokenizer={"name": card.tokenizer["name"], "options": tokenizer.save_files(temporary)}
            )
        if model is not None:
            save_file(weights(model), temporary / "model.safetensors", metadata={"format": "pt"})
        if adapter is not None:
            save_adapter(temporary / FOLDER, *adapter)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        sums = {path.relative_to(temporary).as_posix(): _digest(path) for path in files}
        card = dataclasses.replace(card, spec=for_any_machine(card.spec), sha256=sums)
        (temporary / "model.json").write_text(card.to_json(), encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_files(folder: Path, card: ModelCard) -> None:
    """Raise UserError that names the file, if one is not what was exported."""
    for name, digest in card.sha256.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {folder / 'model.json'} names it. Copy or export the model again.")
        if _digest(path) != digest:
            raise UserError(
                f"{path} is damaged, or not what was exported: its SHA-256 differs from that in model.json. Copy or "
                "export the model again."
            )


def load_weights(model: SequenceModel, tensors: dict[str, torch.Tensor], source: Path, remedy: str = "") -> None:
    """Load tensors by name. remedy: for weights from elsewhere, in place of advice on the training that made them.

    Raises UserError that names the file and the tensors, if some do not fit, are not finite, or differ although the
    model shares one tensor."""
    own = model.state_dict()
    tensors = _fitting(model, own, tensors, source, remedy)
    for name in own:
        _check_finite(name, tensors[name], source, remedy)
    model.load_state_dict(tensors)


def assign_weights(
    model: SequenceModel,
    described: Mapping[str, torch.Tensor],
    parts: Iterable[Mapping[str, torch.Tensor]],
    source: Path,
    dtype: torch.dtype | Literal["keep"] | None,
    device: str | torch.device = "cpu",
    remedy: str = "",
) -> None:
    """Give a model whose parameters have no values yet its weights, some at a time, each copied once, to the device.

    described: all of them, whose values are not read. parts: all of them, each in one part, which is not used any more
        when the next one is asked for. dtype: of parameters that are floating-point, but what is `staying`; "keep" for
        each one's own in the file, but float32 for float64; None for the model's. remedy: see `load_weights`.
    Raises what `load_weights` raises. Tensors of the model that are no weights stay as they are.
    """
    there = {name: tensor.to("meta") for name, tensor in described.items()}
    _fitting(model, model.state_dict(), there, source, remedy)
    further, places, wide = further_names(model), _places(model), staying(model)
    given: dict[str, torch.nn.Parameter | torch.Tensor] = {}  # what has several names, which may all be stored
    several = {name for pair in further.items() for name in pair}
    for part in parts:
        for name, tensor in part.items():
            first = further.get(name, name)
            if first in given:
                if not _equal(tensor, given[first]):
                    raise _differing(next(one for one, other in further.items() if other == first), first, source)
                continue
            _check_finite(name, tensor, source, remedy)
            module, attribute = places[first][0]
            old = getattr(module, attribute)
            is_parameter = isinstance(old, torch.nn.Parameter)
            of = old.dtype
            if dtype == "keep":
                of = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
            elif dtype is not None and is_parameter and old.is_floating_point() and id(old) not in wide:
                of = dtype
            made = tensor.to(device, of, copy=True).contiguous()
            new = torch.nn.Parameter(made, old.requires_grad) if is_parameter else made
            if first in several:
                given[first] = new
            for module, attribute in places[first]:
                setattr(module, attribute, new)


def _places(model: SequenceModel) -> dict[str, list[tuple[torch.nn.Module, str]]]:
    """The attributes that hold each tensor, by its first name."""
    first: dict[int, str] = {}
    found: dict[str, list[tuple[torch.nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            whole = first.setdefault(id(tensor), f"{path}.{name}" if path else name)
            found.setdefault(whole, []).append((module, name))
    return found


def _equal(other: torch.Tensor, one: torch.Tensor) -> bool:
    """Whether two tensors are the same; on the meta device, by their shapes alone."""
    if other.shape != one.shape or other.is_meta:
        return other.shape == one.shape
    return torch.allclose(other.to(one), one, rtol=0, atol=0, equal_nan=True)


def _differing(name: str, earlier: str, source: Path) -> UserError:
    return UserError(
        f"The weights in {source} have an embedding and an output layer that differ, but the model has one tensor for "
        "both. Set tie_embeddings to false (tie_word_embeddings in a config.json of transformers)."
        if name == "head.linear.weight"
        else f"The weights in {source} have a {name} that differs from {earlier}, but the model has one tensor for "
        "both. Use a pattern without shared mixers."
    )


def _fitting(
    model: SequenceModel,
    own: Mapping[str, torch.Tensor],
    tensors: dict[str, torch.Tensor],
    source: Path,
    remedy: str,
) -> dict[str, torch.Tensor]:
    """Tensors by the names that the model has them under. Raises UserError if they are not the model's."""
    for name, earlier in further_names(model).items():
        if (other := tensors.get(name)) is None:
            continue
        one = tensors.get(earlier, other)
        if not _equal(other, one):
            raise _differing(name, earlier, source)
        tensors = {key: value for key, value in tensors.items() if key != name} | {earlier: one}
    wrong = [
        f"{name} is {tuple(tensors[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    wrong += [
        f"{name} holds {'complex' if tensors[name].is_complex() else 'real'} numbers, unlike the model's"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].is_complex() != own[name].is_complex()
    ]
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    problems = wrong + [f"{name} is missing" for name in missing] + [f"{name} is not in the model" for name in extra]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        remedy = remedy or (
            "Use the configuration that they were trained with (d_model, n_layers, mixer, vocabulary), or train "
            "without them."
        )
        raise UserError(f"The weights in {source} do not fit the model: {'; '.join(problems[:3])}{more}. {remedy}")
    return tensors


def _check_finite(name: str, tensor: torch.Tensor, source: Path, remedy: str) -> None:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if not values.is_floating_point():
        return
    values = values.float() if values.element_size() == 1 else values  # PyTorch compares no numbers of 8 bits
    if values.numel() and not all(end.isfinite() for end in values.aminmax()):  # NaN is both; no copy is made
        why = (
            f"they are damaged, or were published so. {remedy}"
            if remedy
            else "the run that made them diverged, or they were damaged. Use an earlier checkpoint, or train again "
            "with a lower optimizer.lr."
        )
        raise UserError(f"The weights in {source} hold values that are not finite numbers (in {name}): {why}")


def read_safetensors(path: Path, names: Iterable[str] | None = None, remedy: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a file, or those with these names. They lie in the mapped file, which is read where they are used;
    its memory is returned when the last of them is gone. Raises UserError when it is damaged; remedy: see
    `load_weights`."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, OSError) as error:
        raise cannot_be_read(path, error, remedy) from error


def described_in(path: Path, remedy: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a file on the meta device, without values. Raises what `read_safetensors` raises."""
    return {name: tensor.to("meta") for name, tensor in read_safetensors(path, remedy=remedy).items()}


def cannot_be_read(path: Path, error: Exception, remedy: str = "") -> UserError:
    """The error for weights that are damaged. remedy: see `load_weights`."""
    return UserError(f"The weights in {path} cannot be read: {error}. {remedy or 'Copy or export the model again.'}")


def has_model(path: str | Path) -> bool:
    """Whether a folder is a run or an exported model."""
    folder = located(path)
    try:
        model_folder(folder)
    except UserError:
        return False
    return True


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: str | None = None) -> LoadedModel:
    """Load a model from a run's folder, from the `model` folder that a run or `save_model` wrote, or from one that
    ships with a package (`mambaseq:data/models/NAME`).

    dtype: of the weights, "float32", "bfloat16" or "float16"; None is float32. States accumulate in float32 in any; so
    are the weights of systems that do not change with time (S4D, S4, S5, LSSL, H3, Hyena's filters).

    Weights are read one by one into the dtype and onto the device, so that no more than the model and its largest
    tensor are in memory.
    If a run has not exported its final weights (it was interrupted, or is still training), its checkpoints are read:
    the best one if there is one, otherwise the last. Files are compared with their checksums in model.json; a model of
    an older version has none and is loaded as it is.
    Raises UserError if there is no model, it is damaged or its weights do not fit; ConfigError for another dtype.
    """
    asked = dtype_of(dtype)
    folder = model_folder(path)
    card = read_card(folder / "model.json")
    _check_files(folder, card)
    source = folder / "model.safetensors"
    if source.is_file():
        described = described_in(source)
        parts: Iterable[Mapping[str, torch.Tensor]] = (read_safetensors(source, [name]) for name in described)
        if f"{FOLDER}/adapter_config.json" in card.sha256:
            parts = _with_adapter(parts, described, folder / FOLDER)
    else:
        checkpoints = folder.parent / "checkpoints"
        source = checkpoints / ("best.ckpt" if (checkpoints / "best.ckpt").is_file() else "last.ckpt")
        checkpoint = read_checkpoint(source, tensors="weights", mapped=True)
        described, card = task_weights(checkpoint), dataclasses.replace(card, step=checkpoint["global_step"])
        parts = ({name: tensor} for name, tensor in described.items())
    model = _model(folder / "model.json", card, described, source)
    assign_weights(model, described, parts, source, asked, device)
    tokenizer = None
    if card.tokenizer is not None:
        tokenizer = _tokenizer(folder, card.tokenizer)
    return LoadedModel(model.to(device).eval(), card, tokenizer, source)


def _with_adapter(
    parts: Iterable[Mapping[str, torch.Tensor]], described: Mapping[str, torch.Tensor], folder: Path
) -> Iterator[dict[str, torch.Tensor]]:
    """A model's tensors with the adapter in a folder merged into them."""
    settings = read_json(folder / "adapter_config.json")
    rank: Any = settings.get("r")
    alpha: Any = settings.get("lora_alpha")
    if not (fits(rank, int) and fits(alpha, float) and rank > 0):
        raise UserError(
            f"{folder / 'adapter_config.json'} must have a whole number r above 0 and a number lora_alpha, not "
            f"{shown(rank)} and {shown(alpha)}. Export the model again."
        )
    path = folder / "adapter_model.safetensors"
    factors, scale = saved_factors(read_safetensors(path), described, path), alpha / rank
    for part in parts:
        yield {name: added(one, *factors[name], scale) if name in factors else one for name, one in part.items()}


def _model(path: Path, card: ModelCard, tensors: Mapping[str, torch.Tensor], source: Path) -> SequenceModel:
    """The model of a description, without weights. One that is far larger than they are is refused first."""
    try:
        asked = count_parameters(card.spec)
        if asked > 2 * (found := sum(tensor.numel() for tensor in tensors.values())) + 2**20:
            raise ConfigError(f"It asks for {asked:,} parameters, but {source} has {found:,}. Export the model again.")
        return build_empty(card.spec)
    except UserError as error:
        raise UserError(f"{path} does not describe a usable model. {error}") from error


def _tokenizer(folder: Path, saved: dict[str, Any]) -> Tokenizer:
    card, name = folder / "model.json", saved["name"]
    kind = catalog()["tokenizers"].get(name, f"{card}: tokenizer.name")
    try:
        with under_key("tokenizer.options", saved["options"], str(card), ConfigError):
            return kind.load_files(folder, saved["options"])
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{card}: tokenizer.options {shown(saved['options'])} are not those of {shown(name)} ({reason}). Export "
            f"the model again."
        ) from error


def task_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The model's tensors in a training checkpoint of a `Task`: their averages if it has them, with adapters merged
    into the weights."""
    tensors, lora = raw_weights(checkpoint), checkpoint.get(LORA)
    return merged(tensors, lora["alpha"] / lora["rank"]) if lora else tensors


def raw_weights(checkpoint: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As `task_weights`, with separate adapters."""
    prefix, tensors = "model.", checkpoint["state_dict"]
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    average = {k: v for k, v in checkpoint.get(AVERAGE, {}).items() if k in tensors}
    return tensors | {name: value.to(tensors[name].dtype) for name, value in average.items()}
