"""Dataclasses as containers of tensors for PyTorch (`torch.utils._pytree`): what takes a model apart sees states and
outputs as it sees lists, so that `torch.export` takes and gives them."""

from __future__ import annotations

import dataclasses
from typing import Any

_PLAIN = ("int", "float", "bool", "str", int, float, bool, str)


def register_tree(kind: type, module: str | None = None) -> None:
    """Register a dataclass, or what is about to be made one. Its contents are the fields that are there (not None);
    which these are belongs to its form, and so do numbers and texts, by the fields' annotations.

    module: from which exported programs name it, for a class that has moved; None for where it is.
    """
    from torch.utils import _pytree as tree

    def flatten(value: Any) -> tuple[list[Any], list[Any]]:
        names, form = [], {}
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if field.type in _PLAIN:
                form[field.name] = inner
            elif inner is not None:
                names.append(field.name)
        return [getattr(value, name) for name in names], [names, form]

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
        contents, form = flatten(value)
        return [(tree.GetAttrKey(name), inner) for name, inner in zip(form[0], contents, strict=True)], form

    def unflatten(contents: Any, form: Any) -> Any:
        names, plain = form
        absent = {field.name: None for field in dataclasses.fields(kind)}
        return kind(**absent | plain | dict(zip(names, contents, strict=True)))

    tree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"{module or kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=flatten_with_keys,
    )
