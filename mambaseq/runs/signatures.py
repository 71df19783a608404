"""The arguments of classes as their source has them: nothing is imported, so that a misspelt key is told at once."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

SECTIONS = {
    "loader": "mambaseq.runs.config:LoaderConfig",
    "optimizer": "mambaseq.tasks.optimizer:OptimizerConfig",
    "finetune": "mambaseq.tasks.finetuning:FinetuneConfig",
    "lora": "mambaseq.tasks.lora:LoraConfig",
    "ema": "mambaseq.tasks.averaging:EmaConfig",
    "length_warmup": "mambaseq.tasks.task:LengthWarmup",
    "checkpoint": "mambaseq.runs.config:CheckpointConfig",
    "generation": "mambaseq.runs.config:GenerationConfig",
    "trainer": "lightning.pytorch.trainer.trainer:Trainer",
}
"""The class behind each section of a configuration whose class has no name in it."""


@functools.lru_cache(maxsize=256)
def arguments_in(target: str) -> frozenset[str] | None:
    """The names that a class can be made with, those that `**options` hands on to the class that it stands on included.

    target: `package.module:Class`. None where sources do not say all of them.
    """
    module, _, name = target.partition(":")
    if (tree := _tree(module)) is None:
        return None
    node = next((one for one in tree.body if isinstance(one, ast.ClassDef) and one.name == name), None)
    if node is None:
        return None
    own = next((one.args for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    found = {one.arg for one in (*own.posonlyargs, *own.args, *own.kwonlyargs)[1:]} if own else set()
    if own is None and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
        fields = (one.target for one in node.body if isinstance(one, ast.AnnAssign))
        return None if node.bases else frozenset(one.id for one in fields if isinstance(one, ast.Name))
    if own and not own.kwarg:
        return frozenset(found)
    bases = [_defined(one, module, tree) for one in node.bases]
    further = [None if base is None else arguments_in(base) for base in bases]
    return None if None in further or not further else frozenset(found.union(*(one for one in further if one)))


@functools.lru_cache(maxsize=64)
def _tree(module: str) -> ast.Module | None:
    """What a module's file says; None if it is not found."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)  # the name of a whole package: nothing of it is run
    except (ImportError, ValueError):
        return None
    for place in (spec and spec.submodule_search_locations) or ():
        whole = Path(place, *inner)
        for path in (whole.with_suffix(".py"), whole / "__init__.py"):
            if inner and path.is_file():
                try:
                    return ast.parse(path.read_bytes())
                except (OSError, SyntaxError, ValueError):
                    return None
    return None


def _defined(base: ast.expr, module: str, tree: ast.Module) -> str | None:
    """Where a class that another one stands on is defined, as `package.module:Class`."""
    if not isinstance(base, ast.Name):
        return None
    if any(isinstance(one, ast.ClassDef) and one.name == base.id for one in tree.body):
        return f"{module}:{base.id}"
    for one in tree.body:
        if isinstance(one, ast.ImportFrom) and one.module and not one.level:
            for name in one.names:
                if (name.asname or name.name) == base.id:
                    return f"{one.module}:{name.name}"
    return None
