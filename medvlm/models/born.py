"""How large a forward pass is, found on the meta device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Born(TorchDispatchMode):
    """Counts the elements of what operations give: what they keep for a backward pass is not more."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        known = {t.untyped_storage()._cdata for t in given}  # what shares their storage is a view
        self.numbers += sum(t.numel() for t in made if t.untyped_storage()._cdata not in known)
        return out
