"""Weights are read one by one into the dtype that is asked for: the same values as of a model that is cast afterwards,
and never more in memory than the model and a tensor."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mambaseq.checkpoints import ModelCard, export, load_model, save_model
from mambaseq.checkpoints.adapters import merged, saved_factors, split
from mambaseq.checkpoints.dtypes import cast_
from mambaseq.domain import catalog
from mambaseq.encoders import TokenEncoder
from mambaseq.errors import UserError
from mambaseq.models import SequenceModel, build_empty, build_model, causal_lm

MIXERS = [entry.name for entry in catalog()["mixers"] if entry.origin.startswith("mambaseq")]
PAIRS = {"vocab_size": 6, "complement": [3, 2, 1, 0, 4, 5]}


def saved(folder: Path, model: SequenceModel, **options: Any) -> Path:
    assert model.spec is not None
    save_model(folder, model, ModelCard(spec=model.spec), **options)
    return folder


def spec_of(encoder: dict[str, Any], backbone: str, head: dict[str, Any]) -> dict[str, Any]:
    parts = {"encoder": encoder, "backbone": {"name": backbone, "n_layers": 1}, "head": head}
    return {"d_model": 8, "mixer": {"name": "mamba"}, **parts}


def tensors_of(model: SequenceModel) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def same(one: SequenceModel, other: SequenceModel) -> None:
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.requires_grad) == (theirs[name].dtype, theirs[name].requires_grad), name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_same_values_as_cast_afterwards(mixer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = causal_lm(20, 16, 2, mixer, **({"head_dim": 8} if mixer == "mamba2" else {})).eval()
    folder = saved(tmp_path / "m", model)
    whole, narrow = load_model(folder).model, load_model(folder, dtype="bfloat16").model
    same(whole, model)
    cast_(model, torch.bfloat16)
    same(narrow, model)
    assert narrow.head.linear.weight is narrow.encoder.embedding.weight


@pytest.mark.parametrize(
    "spec",
    [
        spec_of({"name": "rc_tokens", **PAIRS}, "reverse_complement", {"name": "rc_lm", **PAIRS}),
        spec_of({"name": "audio/mel", "n_mels": 4, "window": 16, "stride": 5}, "unet", {"name": "regression"}),
        spec_of(
            {"name": "signal", "n_channels": 2, "channel_mean": [1.0, 2.0], "channel_std": [1.0, 3.0]},
            "residual",
            {"name": "forecast", "n_channels": 2, "loss": "quantile", "channel_mean": [1.0, 2.0],
             "channel_std": [1.0, 3.0]},
        ),
        spec_of(
            {"name": "tokens", "vocab_size": 6},
            "bidirectional",
            {"name": "classification", "n_classes": 2, "class_weights": [1.0, 2.0]},
        ),
    ],
    ids=lambda spec: spec["head"]["name"],
)  # fmt: skip
def test_what_is_not_saved_is_there(spec: dict[str, Any], tmp_path: Path) -> None:
    model = build_model(spec)
    same(load_model(saved(tmp_path / "m", model)).model, model)
    assert list(model.buffers())
    empty = build_empty(spec)
    assert all(one.is_meta for one in empty.parameters())
    for name, one in empty.named_buffers():
        assert torch.equal(one, model.get_buffer(name)), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e5m2, torch.uint16, torch.bool])
def test_files_may_hold_weights_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", causal_lm(20, 16, 1, "mamba"))
    card = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**card, "sha256": {}}))  # as of a file that was made elsewhere
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("in_proj.weight"))
    tensors[name] = tensors[name].abs().to(dtype)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(load_model(folder).model.get_parameter(name), tensors[name].float())
    if dtype.is_floating_point:
        tensors[name][0, 0] = torch.nan
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(UserError, match="not finite"):
            load_model(folder)


def living(before: set[int]) -> int:
    """Bytes of all tensors but those that were there before."""
    found: dict[int, int] = {}
    for one in in_memory():
        if one.untyped_storage().data_ptr() not in before:
            found[one.data_ptr()] = max(one.nbytes, found.get(one.data_ptr(), 0))
    return sum(found.values())


def in_memory() -> Iterator[Tensor]:
    """All tensors with numbers; what compilers trace with, which other tests may leave behind, has none."""
    return (one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and not one.is_meta)


@pytest.mark.parametrize("ending", ["exported", "checkpoint"])
def test_no_more_is_in_memory_than_the_model_and_a_tensor(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = causal_lm(300, 64, 6, "mamba")
    assert model.spec is not None
    sizes = sorted((one.nbytes for one in model.parameters()), reverse=True)
    folder = saved(tmp_path / "run" / "model", model)
    if ending == "checkpoint":
        save_model(folder, None, ModelCard(spec=model.spec))
        (tmp_path / "run" / "checkpoints").mkdir()
        state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "global_step": 3}, tmp_path / "run" / "checkpoints" / "last.ckpt")
        del state
    del model
    gc.collect()
    before = {one.untyped_storage().data_ptr() for one in in_memory()}
    peak, own = 0, export._check_finite

    def looking(name: str, tensor: Tensor, source: Path, remedy: str) -> None:
        nonlocal peak
        # those of a mapped checkpoint are tensors, all of them, but not in memory
        mapped = sum(sizes) if ending == "checkpoint" else 0
        peak = max(peak, living(before) - mapped)
        own(name, tensor, source, remedy)

    monkeypatch.setattr(export, "_check_finite", looking)
    read: list[bool] = []
    read_checkpoint = export.read_checkpoint

    def reading(*arguments: Any, **options: Any) -> Any:
        read.append(options["mapped"])
        return read_checkpoint(*arguments, **options)

    monkeypatch.setattr(export, "read_checkpoint", reading)
    loaded = load_model(tmp_path / "run", dtype="bfloat16").model
    assert sum(one.nbytes for one in loaded.parameters()) == sum(sizes) // 2
    assert sum(sizes) // 2 - sizes[-1] <= peak <= sum(sizes) // 2 + sizes[0]
    assert read == [True] * (ending == "checkpoint")


def test_adapters_are_merged_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = causal_lm(20, 16, 2, "mamba")
    names = [f"backbone.layers.{number}.mixer.in_proj.weight" for number in range(2)]
    factors = {name: (torch.randn(2, 16), torch.randn(64, 2)) for name in names}
    settings = {"rank": 2, "alpha": 6.0, "dropout": 0.0}
    folder = saved(tmp_path / "m", model, adapter=(factors, settings))
    expected = {
        name: one + 3.0 * (factors[name][1] @ factors[name][0]) if name in factors else one
        for name, one in model.state_dict().items()
    }
    for dtype in (torch.float32, torch.bfloat16):
        found = load_model(folder, dtype=str(dtype).removeprefix("torch.")).model.state_dict()
        assert all(torch.equal(found[name], one.to(dtype)) for name, one in expected.items())
    adapter, source = load_file(folder / "adapter" / "adapter_model.safetensors"), Path("a.safetensors")
    described = {name: one.to("meta") for name, one in model.state_dict().items()}
    assert saved_factors(adapter, described, source).keys() == factors.keys()
    for wrong, said in (
        ({name: one for name, one in adapter.items() if "lora_B" not in name}, "incomplete"),
        ({name: one[:1] if "lora_B" in name else one for name, one in adapter.items()}, "does not fit the model"),
        (adapter | {"base_model.model.other": torch.ones(1)}, "The model has no other"),
    ):
        with pytest.raises(UserError, match=rf"The adapter in a\.safetensors.*{said}"):
            saved_factors(wrong, described, source)
    assert split(merged({"x": torch.ones(1)}, 1.0))[0].keys() == {"x"}


class Measuring(TokenEncoder):
    """An encoder with numbers that are made of its weights. mixed: with others, which are not on the meta device."""

    def __init__(self, d_model: int, vocab_size: int, mixed: bool = False) -> None:
        super().__init__(d_model, vocab_size)
        ones = self.embedding.weight.detach()[0] * 0 + (torch.ones(d_model) if mixed else 1)
        self.register_buffer("ones", ones, persistent=False)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_part_that_needs_values_while_it_is_made_has_them(
    mixed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered = catalog()["encoders"].get
    monkeypatch.setattr(
        catalog()["encoders"], "get", lambda name, *more: Measuring if name == "m" else registered(name)
    )
    spec = spec_of({"name": "m", "vocab_size": 20, "mixed": mixed}, "residual", {"name": "lm", "vocab_size": 20})
    model = build_model(spec)
    assert not any(one.is_meta for one in build_empty(spec).parameters())
    same(load_model(saved(tmp_path / "m", model)).model, model)


def parts(tensors: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    return ({name: tensor} for name, tensor in tensors.items())


def test_weights_go_to_the_device_that_is_asked_for() -> None:
    model = causal_lm(20, 8, 1, "mamba")
    assert model.spec is not None
    tensors = model.state_dict()
    empty = build_empty(model.spec)
    export.assign_weights(empty, tensors, parts(tensors), Path("m"), None, "cpu")
    same(empty, model)
    export.assign_weights(empty, tensors, parts(tensors), Path("m"), None, "meta")
    assert all(one.is_meta for one in empty.parameters())
