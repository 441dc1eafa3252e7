"""A checkpoint's weights under the names of the model without adapters."""

from torch import Tensor, nn

from medvlm.config.model import parse_model
from medvlm.models.lora import is_adapter, lora_of, scale
from medvlm.training.checkpoint.pieces import ByPart, Weights


def stock_name(name: str) -> str:
    """Of a weight that an adapter was put on: the one it had before. Others keep theirs."""
    return name.replace(".base_layer.", ".")


class StockWeights(ByPart):
    """Adapters are merged (W + factor B A, in fp32), or left out. Everything is read when it is asked for.

    ``built`` gives, as its parameters, those that the checkpoint leaves to a pretrained folder; without it they are
    absent.
    """

    def __init__(self, weights: Weights, *, merge: bool, built: nn.Module | None = None):
        self.weights, self.path, self.origin = weights, weights.path, weights.origin
        self.names = {stock_name(name): name for name in weights.shapes if not is_adapter(name)}
        self.shapes = {name: weights.shapes[old] for name, old in self.names.items()}
        absent = {stock_name(name) for name in weights.absent}
        self.absent = absent if built is None else set()
        parameters = {} if built is None else {stock_name(name): p for name, p in built.named_parameters()}
        self.built = {name: p.detach() for name, p in parameters.items() if name in absent}
        self.model = parse_model(weights.config["model"])
        adapted = {name.partition(".lora_A.")[0] for name in weights.shapes if ".lora_A." in name}
        self.adapted = {f"{layer}.weight": layer for layer in adapted} if merge else {}

    def added(self, name: str, start: int, stop: int) -> Tensor | None:
        """What an adapter adds to elements ``start`` to ``stop`` of a flat weight, if it has one."""
        if name not in self.adapted:
            return None
        layer, lora = self.adapted[name], lora_of(self.model, name.partition(".")[0])
        assert lora is not None
        a, b = (self.weights[f"{layer}.lora_{side}.default.weight"] for side in "AB")
        width = a.shape[1]
        first, last = start // width, -(-stop // width)
        rows = scale(lora) * (b[first:last] @ a)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of a flat weight."""
        built = name in self.built
        values = self.built[name].reshape(-1)[start:stop] if built else self.weights.part(self.names[name], start, stop)
        more = self.added(name, start, stop)
        return values if more is None else values.float() + more
