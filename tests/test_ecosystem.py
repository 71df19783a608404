"""What others' tools ask of a model: outputs and masks as in transformers, their Trainer, safetensors, export."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
import torch
from lightning_utilities.core.imports import RequirementCache
from pages import blocks, run_cell
from safetensors.torch import load_file, save_file
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as tree

from mambaseq.cli.main import main
from mambaseq.heads.distributions import Gaussian
from mambaseq.models import ModelOutput, SequenceModel, causal_lm
from mambaseq.ops import OPS, dispatch, only_reference
from mambaseq.ops.linear import can_read_few_rows

IDS = torch.arange(6)[None]
PAGE = Path(__file__).parents[1] / "docs" / "ecosystem.md"


def small(seed: int = 0, **options) -> SequenceModel:
    torch.manual_seed(seed)
    return causal_lm(**{"vocab_size": 13, "d_model": 8, "n_layers": 2, **options})


def test_outputs_are_read_by_names_and_by_numbers() -> None:
    ids = torch.randint(0, 13, (2, 5))
    output = small()(ids, ids, return_logits=True)
    assert output["logits"] is output.logits is output[1] is output[-1]
    assert output[0] is output.loss
    assert output[1:] == (output.logits,)
    assert list(output) == output.keys() == ["loss", "logits"]
    assert len(output) == 2
    assert dict(output) == dict(output.items())
    assert "loss" in output
    assert "state" not in output
    only = ModelOutput(logits=output.logits)
    assert only[0] is output.logits
    assert only.to_tuple() == (output.logits,)
    with pytest.raises(KeyError, match="loss"):
        only["loss"]
    with pytest.raises(IndexError):
        only[1]


def test_attention_masks_are_of_right_padding() -> None:
    model, ids = small(pattern=["mamba", "attention"]).eval(), torch.randint(0, 13, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, return_state=True)
        same = model(ids, mask=mask.bool(), return_state=True)
        alone = model(ids[:1, :4], return_state=True)
    assert torch.equal(padded.logits, same.logits)
    torch.testing.assert_close(padded.logits[:1, :4], alone.logits)
    torch.testing.assert_close(padded.state[0].ssm[:1], alone.state[0].ssm)
    with pytest.raises(ValueError, match=r"right padding.*padding_side='right'"):
        model(ids, attention_mask=mask.flip(1))
    with pytest.raises(ValueError, match="are the same"):
        model(ids, mask=mask.bool(), attention_mask=mask)


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": False, "pattern": ["s4d*", "mamba"], "n_layers": 4}])
def test_tensors_with_several_names_are_saved_once(tmp_path: Path, options: dict) -> None:
    model = small(1, **options)
    once = model.state_dict()
    further = {name for name, _ in model.named_parameters(remove_duplicate=False)} - once.keys()
    assert further
    assert once.keys() == {name for name, _ in model.named_parameters()}
    save_file(once, tmp_path / "weights.safetensors")  # refuses tensors that share memory

    outer = torch.nn.ModuleDict({"inside": model})
    assert outer.state_dict().keys() == {f"inside.{name}" for name in once}
    other = torch.nn.ModuleDict({"inside": small(**options)})
    other.load_state_dict(outer.state_dict())
    assert all(torch.equal(tensor, once[name]) for name, tensor in other["inside"].state_dict().items())

    other["inside"].load_state_dict(
        dict(small(2, **options).named_parameters(remove_duplicate=False))
    )  # as once written
    assert torch.equal(other["inside"](IDS).logits, small(2, **options)(IDS).logits)

    one = min(further)  # under a further name alone, as others' tools may choose to save it
    kept = dict(model.named_parameters(remove_duplicate=False))[one]
    first = next(name for name, tensor in model.named_parameters() if tensor is kept)
    again = small(**options)
    saved = load_file(tmp_path / "weights.safetensors")
    again.load_state_dict({one if name == first else name: tensor for name, tensor in saved.items()})
    assert torch.equal(again.state_dict()[first], kept)
    with pytest.raises(RuntimeError, match=f"Missing key.*{first}"):
        again.load_state_dict({name: tensor for name, tensor in once.items() if name != first})


def test_the_trainer_of_transformers_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 13, (8, 9))
    rows = [{"inputs": row[:-1], "labels": row[1:], "attention_mask": torch.ones(8)} for row in ids]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    once, resumed = small(), small(1)
    trainer = transformers.Trainer(model=once, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert saved.keys() == once.state_dict().keys()
    trainer = transformers.Trainer(model=resumed, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
        assert torch.equal(tensor, once.state_dict()[name]), name


def operators(program: ExportedProgram) -> set[str]:
    """Names of what the graph calls, but for the taking apart of tuples."""
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {name for name in names if not name.startswith(("aten.", "<built-in function getitem>"))}


def test_states_and_outputs_are_containers_of_tensors() -> None:
    model, ids = small(pattern=["mamba", "attention"]), torch.randint(0, 13, (2, 5))
    output = model(ids, return_state=True)
    leaves, form = tree.tree_flatten(output)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = tree.tree_unflatten(leaves, form)
    assert isinstance(again, ModelOutput)
    assert again.loss is None
    assert again.state[1] == output.state[1]
    assert again.state[1].longest == 5  # belongs to the form
    assert tree.treespec_loads(tree.treespec_dumps(form)) == form
    mean = torch.zeros(2, 3)
    doubled = tree.tree_map(lambda tensor: tensor + 2, Gaussian(mean, mean))
    assert torch.equal(doubled.scale, mean + 2)


def test_a_forward_pass_is_exported() -> None:
    model, ids = small().eval(), torch.randint(0, 13, (2, 6))
    # with the kernels of this package, for any batch and length
    sizes = {"inputs": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    program, more = export(model, (ids,), dynamic_shapes=sizes), torch.randint(0, 13, (3, 40))
    assert operators(program) == {"mambaseq.causal_conv_cpu.default", "mambaseq.selective_scan_cpu.default"}
    assert torch.equal(program.module()(more).logits, model(more).logits)
    # chunks of time save memory in training; a graph has none
    cut, usual = small(chunk_length=4).eval(), more[:, :4]
    program = export(cut, (ids,), dynamic_shapes=sizes).module()
    torch.testing.assert_close(program(more).logits, cut(more).logits)
    assert torch.equal(program(usual).logits, cut(usual).logits)
    # in PyTorch's operators alone; left padding is refused by the graph
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with only_reference():
        program = export(model, (ids,), {"attention_mask": mask})
        expected = model(ids, attention_mask=mask).logits
    assert not operators(program)
    assert torch.equal(program.module()(ids, attention_mask=mask).logits, expected)
    torch.testing.assert_close(expected, model(ids, attention_mask=mask).logits)
    with pytest.raises(RuntimeError, match="right padding"):
        program.module()(ids, attention_mask=mask.flip(1))


def test_a_decoding_step_is_exported() -> None:
    model = small(pattern=["mamba", "s4d"]).eval()
    ids, batch, saved = torch.randint(0, 13, (3, 7)), Dim("batch"), io.BytesIO()
    with torch.no_grad(), only_reference():
        state = model.init_state(2)
        sizes = {
            "inputs": {0: batch},
            "state": [[{0: batch} for _ in one.tensors()] for one in state],
            "return_state": None,
        }
        program = export(model, (ids[:2, :1],), {"state": state, "return_state": True}, dynamic_shapes=sizes)
    assert not operators(program)
    program.example_inputs = None  # which are pickled beside the graph, and a loader refuses classes in a pickle
    torch.export.save(program, saved)
    saved.seek(0)
    step = torch.export.load(saved).module()
    with torch.no_grad():
        full, given = model(ids).logits, model(ids[:, :5], return_state=True).state
        state = given
        for position in (5, 6):
            output = step(ids[:, position : position + 1], state=state, return_state=True)
            torch.testing.assert_close(output.logits[:, 0], full[:, position])
            state = output.state
    assert [type(one) for one in state] == [type(one) for one in given]


def test_exported_programs_name_outputs_as_they_always_did() -> None:
    """Those that were exported before the class moved are read on."""
    _, form = tree.tree_flatten(ModelOutput(logits=torch.zeros(1)))
    assert '"mambaseq.models.ModelOutput"' in tree.treespec_dumps(form)


def test_the_reference_is_what_every_op_runs() -> None:
    x, weight = torch.zeros(1, 8), torch.zeros(8, 8)
    with torch.no_grad(), only_reference():
        for op in OPS.values():
            arguments = next(a for _, a in op.samples(torch.device("cpu")) if op.backends[-1].why_not(a) is None)
            for found, expected in zip(
                dispatch.run(op, arguments, op.backends[0].name), op.backends[-1].run(arguments), strict=True
            ):
                assert torch.equal(found, expected), op.name
        assert not can_read_few_rows(x, weight)
    with torch.no_grad():
        assert can_read_few_rows(x, weight)


@pytest.mark.parametrize(("name", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_logger_whose_package_is_missing_is_told_in_a_line(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = f"lightning.pytorch.loggers.{package}"
    monkeypatch.setattr(f"{module}._{package.upper()}_AVAILABLE", RequirementCache(f"{package}>=9999"))
    options = ["--config", "synthetic/induction_heads", "--out", str(tmp_path / "run")]
    assert main(["fit", *options, f"--trainer.logger=[{name}]"]) == 2
    told = f"trainer.logger[0]: {name} needs the package {package}, which is not installed or is too old. "
    assert capsys.readouterr().err.splitlines() == [f"mambaseq fit: {told}Install it: pip install -U {package}."]
    assert not (tmp_path / "run").exists()


PACKAGES = {"from transformers": "accelerate", "torch.onnx": "onnxscript"}


def test_the_page_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names, ran = {"__name__": "__main__"}, 0
    for language, text, line in blocks(PAGE):
        needed = [package for part, package in PACKAGES.items() if part in text]
        if language == "python" and all(importlib.util.find_spec(package) for package in needed):
            run_cell(text, PAGE, line, names)
            ran += 1
    assert ran >= 6
