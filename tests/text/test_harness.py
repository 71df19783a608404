"""Runs as models of lm-eval: they agree with its own transformers adapter on equal weights, and stop where asked."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mambaseq_text.evaluating import Reader, last_words
from mambaseq_text.tokenization import HFTokenizer
from pages import blocks, run_cell

from mambaseq.checkpoints import ModelCard, save_model
from mambaseq.checkpoints.upstream import from_upstream, options_from_config
from mambaseq.cli.main import main
from mambaseq.errors import ConfigError
from mambaseq.generation import generate_all
from mambaseq.models import causal_lm

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=300, hidden_size=24, num_hidden_layers=2, state_size=16, eos_token_id=0)
    ).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # otherwise all tokens are alike
    return model


@pytest.fixture(scope="module")
def run(theirs: Any, tmp_path_factory: pytest.TempPathFactory, tokenizer_json: Path) -> Path:
    folder = tmp_path_factory.mktemp("run")
    ours = causal_lm(**options_from_config(theirs.config.to_dict()))
    ours.load_state_dict(from_upstream(theirs.state_dict()))
    card = ModelCard(spec=ours.spec, tokenizer={"name": "text/hf", "options": {}}, task="next_token")
    save_model(folder / "model", ours, card, HFTokenizer(str(tokenizer_json), eos=END))
    (folder / "config.yaml").write_text("")
    return folder


@pytest.fixture
def instance() -> Any:
    api = pytest.importorskip("lm_eval.api.instance")
    return lambda kind, *arguments: api.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture
def harness(run: Path) -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra harness)")
    from mambaseq.runs.harness import Harness

    return Harness(run, "cpu")


def test_it_agrees_with_lm_evals_transformers_adapter(
    harness: Any, theirs: Any, tokenizer_json: Path, instance: Any
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json), eos_token=END, pad_token=END)
    other = HFLM(pretrained=theirs, tokenizer=tokenizer, backend="causal", batch_size=3, device="cpu")
    asked = [
        instance("loglikelihood", context, answer)
        for context in ("the beginning of", "the end of the café ", "", "the")
        for answer in (" the end", " café", " of the end of the beginning")
    ]
    expected = other.loglikelihood(asked, disable_tqdm=True)
    found = harness.loglikelihood(asked, disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert max(nats for nats, _ in found) - min(nats for nats, _ in found) > 1  # answers are told apart
    texts = [instance("loglikelihood_rolling", text) for text in ("the end of the café", "a b", "the\n\nend " * 9)]
    expected = other.loglikelihood_rolling(texts, disable_tqdm=True)
    assert harness.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)
    free = [instance("generate_until", text, {"until": [], "max_gen_toks": 12}) for text in ("the end", "of the café")]
    (whole, more) = harness.generate_until(free, disable_tqdm=True)
    assert [whole, more] == other.generate_until(free, disable_tqdm=True)
    stops = {"until": [whole[3:5], "never"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}
    stopped = [instance("generate_until", text, stops) for text in ("the end", "of the café")]
    assert harness.generate_until(stopped, disable_tqdm=True)[0] == whole[: whole.index(whole[3:5])]
    assert harness.generate_until(stopped, disable_tqdm=True) == other.generate_until(stopped, disable_tqdm=True)


def test_generation_ends_with_the_stop(harness: Any, instance: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def watched(*given: Any, **settings: Any) -> list[torch.Tensor]:
        made = generate_all(*given, **settings)
        lengths.append(len(made[0]))
        return made

    monkeypatch.setattr("mambaseq.runs.harness.generate_all", watched)
    free = instance("generate_until", "the end", {"until": "\0", "max_gen_toks": 9})
    (whole,) = harness.generate_until([free], disable_tqdm=True)
    asked = instance("generate_until", "the end", {"until": [whole[2]], "max_gen_toks": 5000})
    assert harness.generate_until([asked], disable_tqdm=True) == [whole[: whole.index(whole[2])]]
    assert lengths[1] < 200  # a stop is looked for every few tokens


TASKS = {
    "made_up_choices": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: [' end', ' café']\n"
    "doc_to_target: '{{right}}'\nmetric_list: [{metric: acc}]",
    "made_up_texts": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list: [{metric: byte_perplexity}]",
    "made_up_lambada": "output_type: loglikelihood\ndoc_to_text: \"{{question.split(' ')[:-1]|join(' ')}}\"\n"
    "doc_to_target: \"{{' '+question.split(' ')[-1]}}\"\nmetric_list: [{metric: perplexity}, {metric: acc}]",
    "made_up_answers": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{right}}'\n"
    "generation_kwargs: {until: ['e'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]",
}


def test_tasks_of_ones_own_on_the_command_line(
    run: Path,
    theirs: Any,
    tokenizer_json: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra harness)")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"the {word}", "right": n % 2}) + "\n" for n, word in enumerate("abc"))
    )
    for name, text in TASKS.items():
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\ntest_split: test\n"
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{where}{text}\n")
    words = ["test", "--checkpoint", str(run), "--device", "cpu", "--task-folder", str(tmp_path), "--tasks"]
    assert main([*words, ",".join(TASKS)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert 0 <= results["tasks/made_up_choices/acc"] <= 1
    assert results["tasks/made_up_texts/byte_perplexity"] > 1
    assert results["tasks/made_up_answers/exact_match"] == 0
    expected = by_transformers(theirs, tokenizer_json, tmp_path)
    for task, metric in (
        *(("made_up_choices", "acc"), ("made_up_texts", "byte_perplexity"), ("made_up_lambada", "perplexity")),
        *(("made_up_lambada", "acc"), ("made_up_answers", "exact_match")),
    ):
        assert results[f"tasks/{task}/{metric}"] == pytest.approx(expected[task][f"{metric},none"], rel=1e-5)
    own = last_words(Reader(run, "cpu"), str(data), field="question")  # without lm-eval
    assert results["tasks/made_up_lambada/perplexity"] == pytest.approx(own.perplexity, rel=1e-6)
    assert results["tasks/made_up_lambada/acc"] == own.accuracy
    assert f"made_up_texts/byte_perplexity  {results['tasks/made_up_texts/byte_perplexity']:.4f}" in (
        " ".join(capsys.readouterr().out.split()).replace("perplexity ", "perplexity  ")
    )


def by_transformers(theirs: Any, tokenizer_json: Path, tasks: Path) -> dict[str, dict[str, float]]:
    """The same tasks by lm-eval's own adapter of the model that the run's weights are those of."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_json), eos_token=END, pad_token=END)
    other = HFLM(pretrained=theirs, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: Any = simple_evaluate(other, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    return found["results"]


def test_the_page_on_evaluation_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra harness)")
    page = Path(__file__).parents[2] / "docs" / "text" / "evaluation.md"
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/mine").symlink_to(run)
    Path("lambada_test.jsonl").write_text('{"text": "the end of the book"}\n')
    Path("book.txt").write_text("the end of the book\n")
    cells = [(text, line) for language, text, line in blocks(page) if language == "python"]
    assert len(cells) == 2
    names: dict[str, Any] = {"__name__": "__main__"}
    for text, line in cells:
        run_cell(text, page, line, names)
    assert len(names["scores"]) == 2


def unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("no such host")


def test_what_cannot_be_asked_of_tasks_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["test", "--checkpoint", str(run)]
    for more, message in {
        ("--limit", "3"): "--trainer.limit_test_batches 3 takes so many batches",
        ("--shots", "3"): "--shots is for tasks of lm-eval",
        ("--tasks", "a", "--data.length", "3"): "--data.length is for the run's own test set",
        ("--tasks", "a", "--limit", "0"): "--limit must be at least 1",
        ("--tasks", ","): "--tasks names none" if _installed() else "harness",
        ("--tasks", "a", "--task-folder", "/nowhere"): "no folder '/nowhere'" if _installed() else "harness",
    }.items():
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    if _installed():
        monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: SimpleNamespace(all_tasks=["lambada_openai"]))
        assert main([*words, "--device", "cpu", "--tasks", "lambada_opena"]) == 2
        assert "no task 'lambada_opena'. Did you mean 'lambada_openai'?" in capsys.readouterr().err
        monkeypatch.setattr("lm_eval.evaluator.simple_evaluate", unreachable)
        assert main([*words, "--device", "cpu", "--tasks", "lambada_openai"]) == 2
        assert "lambada_openai cannot be run: no such host. Their data are downloaded" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    assert main([*words, "--tasks", "lambada_openai"]) == 2
    assert "pip install 'mambaseq[harness]'" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = causal_lm(16, 8, 1)
    save_model(tmp_path / "bare", model, ModelCard(spec=model.spec, task="next_token"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n')
    commands = {
        "generate": ["--out", str(tmp_path / "o")],
        "serve": ["--port", "0"],  # whatever else listens on this machine
        "text/lambada": [str(tmp_path / "rows.jsonl")],
        "text/perplexity": [str(tmp_path / "rows.jsonl")],
        "text/recall": [],
    }
    for command, more in commands.items():
        assert main([command, "--checkpoint", str(tmp_path / "bare"), *more, "--device", "cpu"]) == 2, command
        told = capsys.readouterr().err
        assert str(tmp_path / "bare") in told, command
        assert "has no tokenizer" in told, command
        assert re.search(r"--tokenizer FILE|Give a run of text", told), command  # what to do
    if _installed():
        from mambaseq.runs.harness import Harness

        with pytest.raises(ConfigError, match=r"has no tokenizer of text.* Give a run of text"):
            Harness(tmp_path / "bare", "cpu")


def _installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def test_settings_of_tasks() -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra harness)")
    from mambaseq.runs.harness import _settings

    assert _settings({}) == (256, [], {"temperature": 0.0})
    assert _settings({"max_new_tokens": 3, "until": "a", "do_sample": True}) == (3, ["a"], {"temperature": 1.0})
    assert _settings({"temperature": 0.7, "until": ["", "b"]})[1:] == (["b"], {"temperature": 0.7})
    with pytest.raises(ConfigError, match="num_beams"):
        _settings({"num_beams": 4})
