"""Where a step first has a number that is not finite: layer, part, branch, pass and tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from nsa import NSAConfig
from nsa.blocks import num_selection_blocks
from nsa.routes import Row

Batch = tuple[torch.Tensor, torch.Tensor]
"""Tokens ``(B,S+1)`` int64 and mask ``(B,S)`` bool."""

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From a batch to its summed loss."""

FORWARD, BACKWARD = "forward", "backward"

PARTS = (
    *("embedding", "norm", "proj", "compress", "cmp", "score", "sel", "win", "gate", "out", "mlp", "head"),
    "loss",
)
"""The parts of a model that a tensor is made in."""


@dataclass(frozen=True)
class Place:
    """Where a tensor is made. ``layer`` counts from 0, None outside of the layers; ``part`` is one of PARTS;
    ``branch`` cmp, score, sel, win, or empty where it serves them all; ``passes`` forward or backward;
    ``tensor`` its name.
    """

    layer: int | None
    part: str
    branch: str
    passes: str
    tensor: str

    def __str__(self) -> str:
        where = self.part if self.layer is None else f"layer {self.layer}, {self.part}"
        branch = f" of branch {self.branch}" if self.branch not in ("", self.part) else ""
        return f"{where}{branch}, {self.passes}: {self.tensor}"


@dataclass(frozen=True)
class Finding:
    """The first bad tensor. ``bad`` is nan, inf (no NaN among them) or invalid (no block of that number);
    ``count`` of its ``total`` elements are bad, ``index`` is the first of them, ``micro`` the micro-batch.
    """

    place: Place
    bad: str
    count: int
    total: int
    index: tuple[int, ...]
    micro: int = 0

    def __str__(self) -> str:
        index = ", ".join(map(str, self.index))
        return f"{self.place} has {self.count} {self.bad} of {self.total}, the first at [{index}]"

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for `of`."""
        return {**asdict(self), "index": list(self.index)}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Finding:
        """What `to_dict` gave."""
        return cls(**{**fields, "place": Place(**fields["place"]), "index": tuple(fields["index"])})


class _Found(Exception):
    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


def fault_of(tensor: torch.Tensor, place: Place, micro: int = 0) -> Finding | None:
    """What is not finite in a tensor; None where all is."""
    if bool(torch.isfinite(tensor).all()):
        return None
    nan = bool(torch.isnan(tensor).any())
    return _finding(tensor, ~torch.isfinite(tensor), "nan" if nan else "inf", place, micro)


def _finding(tensor: torch.Tensor, wrong: torch.Tensor, bad: str, place: Place, micro: int) -> Finding:
    first = tuple(int(i) for i in wrong.nonzero()[0]) if wrong.dim() else ()
    return Finding(place, bad, int(wrong.sum()), tensor.numel(), first, micro)


def locate(
    model: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    *,
    scale: float = 1.0,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Finding | None:
    """Do the forward and backward of a step again, and look at every tensor in the order they are made.

    The weights stay as they are, and so do their gradients. The generators have to be as they were before
    the step.

    Args:
        model: a `ByteLM`: no DDP around it, not compiled.
        objective: the loss of `model` on a batch, summed over its targets.
        scale: what the loss is multiplied with before the backward, as a GradScaler does.
        autocast: the context of a forward.

    Returns:
        The first tensor with a NaN or an infinity; None where the step is finite.
    """
    weights = list(model.parameters())
    kept = [weight.grad for weight in weights]
    again, model.grad_checkpoint = getattr(model, "grad_checkpoint", False), False  # type: ignore[assignment]
    search = _Search(model)
    try:
        with search.looking(), torch.enable_grad():
            for search.micro, (tokens, mask) in enumerate(batches):
                for weight in weights:
                    weight.grad = None
                with autocast():
                    loss = objective(tokens, mask)
                search.check(loss, Place(None, "loss", "", FORWARD, "the loss"))
                count = sum(int(counted.sum()) for _, counted in batches)
                (loss * (scale / max(1, count))).backward()
    except _Found as found:
        return found.finding
    finally:
        model.grad_checkpoint = again  # type: ignore[assignment]
        for weight, grad in zip(weights, kept, strict=True):
            weight.grad = grad
    return None


def bad_gradient(model: nn.Module) -> Finding | None:
    """The first weight whose present gradient is not finite, in the order of the model's weights."""
    search = _Search(model)
    for name, weight in model.named_parameters():
        layer, part, branch = search.where(name)
        if weight.grad is not None:
            place = Place(layer, part, branch, BACKWARD, f"gradient of {name}")
            if (found := fault_of(weight.grad, place)) is not None:
                return found
    return None


class _Search:
    """Hooks that look at what the modules of a model, and the backends of its branches, take and give.

    A module gets its input as a view of its own: the gradient of that view is what this module alone made,
    where the input itself gets the sum of all that used it.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layer: int | None = None
        self.micro = 0

    def where(self, name: str) -> tuple[int | None, str, str]:
        """Layer, part and branch of a module or weight by its dotted name."""
        pieces = name.split(".")
        if pieces[0] != "layers":
            return None, pieces[0], ""
        rest = ".".join(pieces[2:])
        part = next(part for start, part in _PART_OF.items() if rest.startswith(start))
        return int(pieces[1]), part, "cmp" if part == "compress" else ""

    @contextmanager
    def looking(self) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if name.endswith(".attention"):
                    layer = self.where(f"{name}.proj")[0]
                    hook = module.register_forward_pre_hook(partial(self._enter, layer))
                    stack.callback(hook.remove)
                elif name and not isinstance(module, nn.ModuleList) and _is_looked_at(name):
                    for one in self._hooks(name, module):
                        stack.callback(one.remove)
            stack.enter_context(self._backends())
            yield

    def check(self, tensor: torch.Tensor, place: Place) -> None:
        """Ends the search where the tensor is not finite."""
        if (found := fault_of(tensor.detach(), place, self.micro)) is not None:
            raise _Found(found)

    def _enter(self, layer: int | None, module: nn.Module, inputs: Any) -> None:
        self._layer = layer

    def _place(self, name: str, passes: str, tensor: str, branch: str = "") -> Place:
        layer, part, own = self.where(name)
        return Place(layer, part, branch or own, passes, tensor)

    def _hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        for own, weight in module.named_parameters():
            look = partial(self._weight, f"{name}.{own}", weight)
            yield module.register_forward_pre_hook(look)
            if weight.requires_grad:
                yield weight.register_hook(partial(self._by_rows, f"{name}.{own}", BACKWARD))
        yield module.register_forward_pre_hook(partial(self._input, name))
        yield module.register_forward_hook(partial(self._output, name))

    def _weight(self, name: str, weight: torch.Tensor, module: nn.Module, inputs: Any) -> None:
        self._by_rows(name, FORWARD, weight)

    def _by_rows(self, name: str, passes: str, weight: torch.Tensor) -> None:
        """Check a weight or its gradient: of a projection, the rows of each thing that it makes."""
        said = name if passes == FORWARD else f"gradient of {name}"
        if not name.endswith(".attention.proj.weight"):
            return self.check(weight, self._place(name, passes, said))
        for what, branch, part in self._slices(name.removesuffix(".weight"), weight, 0):
            self.check(part, self._place(name, passes, f"{said}, rows of {what}", branch))
        return None

    def _slices(self, name: str, tensor: torch.Tensor, dim: int) -> Iterator[tuple[str, str, torch.Tensor]]:
        sizes = projected(self._model.get_submodule(name.removesuffix(".proj")))
        parts = tensor.detach().split(list(sizes.values()), dim)
        for (what, branch), part in zip(sizes, parts, strict=True):
            yield what, branch, part

    def _input(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        x, *rest = inputs
        if name.endswith(".attention.out"):
            layer = self.where(name)[0]
            self.check(x, Place(layer, "gate", "", FORWARD, "gated sum of the branches"))
        if not x.is_floating_point():
            return None
        return (self._alias(x, self._place(name, BACKWARD, f"gradient of the input of {name}")), *rest)

    def _output(self, name: str, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if name.endswith(".attention.proj"):
            for what, branch, part in self._slices(name, output, -1):
                self.check(part, self._place(name, FORWARD, what, branch))
        else:
            self.check(output, self._place(name, FORWARD, f"output of {name}"))
        if output.requires_grad:
            made = self._place(name, BACKWARD, f"gradient of the output of {name}")
            if name == "head":
                made = Place(None, "loss", "", BACKWARD, "gradient of the logits")
            output.register_hook(partial(self._arrived, made))

    def _alias(self, tensor: torch.Tensor, place: Place) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        tensor = tensor.view_as(tensor)
        tensor.register_hook(partial(self._arrived, place))
        return tensor

    def _arrived(self, place: Place, grad: torch.Tensor) -> None:
        self.check(grad, place)

    @contextmanager
    def _backends(self) -> Iterator[None]:
        """Look at what every row of the route table takes and gives."""
        load = Row.load

        def looked_at(row: Row) -> Callable[..., Any]:
            return partial(self._scored if row.branch == "score" else self._attended, row.branch, load(row))

        Row.load = looked_at  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Row.load = load  # type: ignore[method-assign]

    def _taken(self, branch: str, tensor: torch.Tensor, name: str) -> None:
        part = "compress" if name.endswith("_cmp") else "proj"
        self.check(tensor, Place(self._layer, part, branch, FORWARD, f"{name} as attended"))

    def _attended(
        self,
        branch: str,
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *rest: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mine = partial(Place, self._layer, branch, branch)
        given = {"q": q, f"k_{branch}": k, f"v_{branch}": v}
        for name, tensor in given.items():
            self._taken(branch, tensor, name)
        taken = [self._alias(one, mine(BACKWARD, f"gradient of {name}")) for name, one in given.items()]
        o, lse = attend(*taken, *rest, **named)
        self.check(o, mine(FORWARD, "output"))
        gated = Place(self._layer, "gate", branch, BACKWARD, f"gradient of the output of {branch}")
        return self._alias(o, gated), lse

    def _scored(
        self,
        branch: str,
        select: Callable[..., torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        config: NSAConfig,
        *,
        kv_len: int,
        **named: Any,
    ) -> torch.Tensor:
        for name, tensor in {"q": q, "k_cmp": k}.items():
            self._taken(branch, tensor, name)
        blocks = select(q, k, config, kv_len=kv_len, **named)
        wrong = (blocks < -1) | (blocks >= num_selection_blocks(kv_len, config))
        if bool(wrong.any()):
            place = Place(self._layer, "score", "score", FORWARD, "blocks")
            raise _Found(_finding(blocks, wrong, "invalid", place, self.micro))
        return blocks


_PART_OF = {
    "attention_norm": "norm",
    "feed_forward_norm": "norm",
    "feed_forward": "mlp",
    "attention.proj": "proj",
    "attention.gate_out": "gate",
    "attention.out": "out",
    "attention.compress_": "compress",
}
"""Part by the beginning of a name in a layer."""


def _is_looked_at(name: str) -> bool:
    """Whether a module is looked at as one: what is inside of a compression is its own affair."""
    inside = name.partition(".attention.")[2]
    container = name.endswith(".feed_forward") or (name.count(".") == 1 and name.startswith("layers."))
    return not container and not (inside.startswith("compress_") and "." in inside)


def projected(attention: Any) -> dict[tuple[str, str], int]:
    """What a layer's projection makes, in the order of its rows: name and branch, and number of rows."""
    config: NSAConfig = attention.config
    q = config.num_heads * config.head_dim
    key, value = config.num_kv_heads * config.head_dim, config.num_kv_heads * config.v_dim
    hidden = ("the gates' hidden layer", "")
    if attention.shared_kv:
        sizes = {("q", ""): q, ("k", ""): key, ("v", ""): value}
    else:
        keys = ("sel", "win", "cmp")
        sizes = {("q", ""): q, **{(f"k_{one}", one): key for one in keys}}
        sizes |= {(f"v_{one}", one): value for one in ("cmp", "sel", "win")}
    return {**sizes, hidden: attention.proj.out_features - sum(sizes.values())}
