"""The calls of a layer as operators of PyTorch: a layer in a graph is the layer without one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import tttc
from tests.draws.declaration import declaration
from tests.draws.recipe import Recipe
from tests.helpers import LIBRARY, dims_of
from tttc.errors import BackendRefusal
from tttc.library import TTTMLP, GatedDeltaNet, Titans, TTTLinear
from tttc.nn import TTT, Cache
from tttc.runtime.arguments import BoundCall
from tttc.runtime.custom_ops import MOST_TENSORS, as_operators
from tttc.runtime.packing import Arguments
from tttc.runtime.state import State, compact
from tttc.verification.comparison import random_inputs, relative_error

NATIVE = pytest.param("tvm", marks=pytest.mark.skipif(find_spec("tvm") is None, reason="apache-tvm is not installed"))
BACKENDS = ["torch", "triton", NATIVE]
LAYERS = [  # one operator is like another: 16 bits of one variant are enough, and the longest compilation is slow
    pytest.param(TTTLinear, torch.float32, id="TTTLinear-float32"),
    pytest.param(TTTLinear, torch.bfloat16, id="TTTLinear-bfloat16"),
    pytest.param(GatedDeltaNet, torch.float32, id="GatedDeltaNet-float32"),
    pytest.param(TTTMLP, torch.float32, id="TTTMLP-float32", marks=pytest.mark.slow),
]
# A graph runs the same kernels on the same numbers, so most results are equal to the last bit. Checkpoints may lie at
# other chunks, and inductor sums in another order: a hundred roundings of float32, each 6e-8.
CLOSE = 6e-6

pytestmark = [
    pytest.mark.usefixtures("plain_kernels"),  # with and without a graph they are the same ones
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf"),  # torch.compile's look
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # torch.export.load, before torch 2.13
]


@pytest.fixture(autouse=True)
def no_graphs() -> None:
    """Every test makes its own."""
    torch._dynamo.reset()


def layer_of(variant: type[tttc.Variant], backend: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return tttc.compile(variant, dims_of(variant, 4), dtype, backend=backend, **settings)


def arguments(layer: Any, tokens: int, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Everything that a call is given, with gradients, in the dtypes of the layer."""
    found = random_inputs(layer.signature, layer.dims, batch, tokens, 2, seed)
    half, full = (lambda x: x.detach().to(layer.dtype)), (lambda x: x.detach().to(layer.compute_dtype))
    tokens_of = {"q": found.q, "k": found.k, "v": found.v, "tokens": found.tokens}
    weights = {"gates": found.gates, "params": found.params, "state": found.state}
    given = {n: tree_map(half, x) for n, x in tokens_of.items()} | {n: tree_map(full, x) for n, x in weights.items()}
    return tree_map(lambda x: x.requires_grad_(), given)


def gradients(result: Any, of: Any) -> list[torch.Tensor]:
    """Of a random function of every tensor of the result."""
    generator = torch.Generator().manual_seed(0)
    found = [x for x in leaves_of(result) if x.requires_grad]
    loss = sum((x * torch.randn(x.shape, generator=generator).to(x.dtype)).sum() for x in found)
    return list(torch.autograd.grad(loss, [x for x in tree_leaves(of) if x.requires_grad], materialize_grads=True))


def leaves_of(result: Any) -> list[Any]:
    """Every tensor that counts."""
    states = tree_map(
        lambda x: compact(x) if isinstance(x, State) else x, result, is_leaf=lambda x: isinstance(x, State)
    )
    return tree_leaves(states)


def same(found: Any, wanted: Any) -> None:
    for a, b in zip(leaves_of(found), leaves_of(wanted), strict=True):
        if b is None:
            assert a is None
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert relative_error(a, b) <= CLOSE


def graph_of(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend)


# ---- the operators by themselves ----


CALLS = [  # what calls the kernels is the same for every backend: each is tried once with what it adds
    pytest.param("torch", TTTLinear, torch.float32, {}, id="torch-TTTLinear"),
    pytest.param("torch", TTTLinear, torch.float32, {"decode": "rows", "telemetry": True}, id="torch-TTTLinear-rows"),
    pytest.param("torch", GatedDeltaNet, torch.float32, {}, id="torch-GatedDeltaNet"),
    pytest.param("torch", Titans, torch.float32, {}, id="torch-Titans"),
    pytest.param("triton", GatedDeltaNet, torch.bfloat16, {}, id="triton-GatedDeltaNet-bfloat16"),
    pytest.param("tvm", TTTLinear, torch.bfloat16, {}, id="tvm-TTTLinear-bfloat16", marks=NATIVE.marks),
]


@pytest.mark.parametrize(("backend", "variant", "dtype", "settings"), CALLS)
def test_an_operator_is_what_it_says(backend, variant, dtype, settings):
    """No input is changed or returned, sizes and strides are foretold, gradients are registered: torch's own check, of
    a call that begins a sequence and of one that goes on inside a mini-batch.
    """
    layer = layer_of(variant, backend, dtype, **settings)
    given = arguments(layer, 21, batch=1)
    _, state = layer(**tree_map(torch.Tensor.detach, given))
    for begun in (given["state"], state):
        made, inputs, position = operator_of(layer, given | {"state": begun})
        torch.library.opcheck(made.forward, (*inputs, position, 2, False), test_utils=CHECKS)
        leaves = [x.clone().requires_grad_() for x in inputs]
        torch.library.opcheck(made.forward, (*leaves, position, 2, True))
        found = made.forward(*inputs, position, 2, True)
        kept, cotangents = found[made.call.results :], map(torch.ones_like, found[: made.call.differentiated])
        torch.library.opcheck(made.backward, (*inputs, [*kept], [*cotangents], position, 2), test_utils=CHECKS)


CHECKS = ("test_schema", "test_faketensor")  # of what has no gradient of its own


def operator_of(layer: Any, given: dict[str, Any]) -> tuple[Any, list[torch.Tensor], int]:
    """The operator of a layer, and the tensors and the position of a call, which lie as those of a user do."""
    tokens = {n: given[n] for n in "qkv"} | given["tokens"]
    call = BoundCall(layer, Arguments(tokens, given["gates"], given["params"], given["state"]))
    layer._prepare()
    inputs, position = layer._operator.call.flat(call)
    return layer._operator, [x.detach().clone() if x.is_contiguous() else x.detach() for x in inputs], position


def test_a_batch_of_batches():
    layer = layer_of(TTTLinear, "torch")
    made, inputs, position = operator_of(layer, arguments(layer, 21))
    many = [torch.stack([x, x.flip(0)], 1) for x in inputs]
    found = torch.vmap(lambda *xs: made.forward(*xs, position, 0, False), 1)(*many)
    for i in range(2):
        same([x[i] for x in found], made.forward(*(x[:, i] for x in many), position, 0, False))


def test_equal_layers_share_their_operators():
    names = []
    for variant in (TTTLinear, TTTLinear, TTTLinear.replace(mini_batch=8)):
        layer = layer_of(variant, "torch")
        layer._prepare()
        names.append(layer._operator.name)
    assert names[0] == names[1]
    assert names[0] != names[2]


def test_a_graph_holds_one_operator_for_a_call():
    """Whatever comes of its tokens: what is left of a mini-batch, whole ones, and the beginning of another."""
    layer = layer_of(TTTLinear, "torch")
    given = arguments(layer, 37)
    _, state = layer(**tree_map(torch.Tensor.detach, given))
    seen: list[str] = []

    def look(graph: Any, example: Any) -> Any:
        seen.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "getitem" not in str(n))
        return graph

    graph_of(layer, look)(**given | {"state": state})
    assert [name for name in seen if name.startswith("tttc.")] == [f"tttc.{layer._operator.name}.default"]


# ---- layers in a graph ----


@pytest.mark.parametrize(("variant", "dtype"), LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_in_a_graph(backend, variant, dtype):
    """Outputs, states and every gradient; a call that leaves a mini-batch open."""
    layer = layer_of(variant, backend, dtype)
    given = arguments(layer, 21)
    wanted = layer(**given)
    found = graph_of(layer)(**given)
    assert type(found[1]) is type(wanted[1])
    assert found[1].position == wanted[1].position
    same(found, wanted)
    same(gradients(found, given), gradients(wanted, given))


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
def test_every_ready_declaration_in_a_graph(name):
    layer = layer_of(LIBRARY[name], "torch", torch.float64, telemetry=True)
    tokens = 16 if layer.signature.read == "end" and isinstance(layer.signature.mini_batch, int) else 21
    given = arguments(layer, tokens)
    wanted, found = layer(**given), graph_of(layer)(**given)
    same(found, wanted)
    same(gradients(found, given), gradients(wanted, given))


def test_without_params_and_state():
    """They start at their `init`, which a graph takes as constants."""
    layer = layer_of(TTTLinear, "torch")
    given = {n: x for n, x in arguments(layer, 21).items() if n not in ("params", "state")}
    same(graph_of(layer)(**given), layer(**given))


def test_continuing_inside_a_graph():
    layer = layer_of(TTTLinear, "torch")
    given = arguments(layer, 40)

    def part(values: Any, cut: slice) -> Any:
        sequences = {n: values[n][:, cut] for n in "qkv"}
        return sequences | {"gates": {n: x[:, cut] for n, x in values["gates"].items()}, "params": values["params"]}

    def both(values: Any) -> Any:
        first, state = layer(**part(values, slice(0, 21)), state=values["state"])
        second, state = layer(**part(values, slice(21, 40)), state=state)
        return torch.cat([first, second], 1), state

    wanted, found = both(given), graph_of(both)(given)
    assert found[1].position == 8
    same(found, wanted)
    same(gradients(found, given), gradients(wanted, given))


@pytest.mark.parametrize("begin", [5, 16])
@pytest.mark.parametrize("decode", ["sums", "rows"])
def test_decoding_token_by_token(decode, begin):
    """After a prompt, a state goes into a graph and comes out of it: the graph of a place, and one for all places."""
    layer = layer_of(TTTLinear, "torch", decode=decode)
    given = tree_map(torch.Tensor.detach, arguments(layer, 48))
    wanted, last = layer(**given)
    counted = CompileCounterWithBackend("aot_eager")
    step = graph_of(layer, counted)
    prompt = {n: given[n][:, :begin] for n in "qkv"} | {"gates": {n: x[:, :begin] for n, x in given["gates"].items()}}
    z, state = layer(**prompt, params=given["params"], state=given["state"])
    outputs = [z]
    for t in range(begin, 48):
        token = {n: given[n][:, t : t + 1] for n in "qkv"}
        gates = {n: x[:, t : t + 1] for n, x in given["gates"].items()}
        z, state = step(**token, gates=gates, params=given["params"], state=state)
        outputs.append(z)
    same((torch.cat(outputs, 1), dict(state)), (wanted, dict(last)))
    assert state.position == last.position
    assert counted.frame_count <= 2


def test_other_lengths_and_batches():
    """A graph is for a range of lengths, never for the wrong ones."""
    layer = layer_of(TTTLinear, "torch")
    counted = CompileCounterWithBackend("aot_eager")
    graph = graph_of(layer, counted)
    for tokens, batch in [(48, 2), (64, 2), (32, 2), (64, 3), (48, 5), (80, 3)]:
        given = arguments(layer, tokens, batch)
        wanted, found = layer(**given), graph(**given)
        same(found, wanted)
        same(gradients(found, given), gradients(wanted, given))
    assert counted.frame_count <= 5
    for tokens in (37, 5):
        given = arguments(layer, tokens)
        same(graph_of(layer)(**given), layer(**given))


def test_packed_sequences():
    """Boundaries as ints are part of the graph; those in a tensor are not known to it."""
    layer = layer_of(TTTLinear, "torch")
    given = arguments(layer, 30, batch=1)
    wanted = layer(**given, cu_seqlens=[0, 5, 10, 30])
    found = graph_of(lambda values: layer(**values, cu_seqlens=[0, 5, 10, 30]))(given)
    assert len(found[1].sequences) == 3
    same(found, wanted)
    same(gradients(found, given), gradients(wanted, given))
    ends = torch.tensor([0, 5, 10, 30])
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cu_seqlens is a tensor, .* pass a list of ints"):
        graph_of(layer)(**given, cu_seqlens=ends)
    same(torch.compile(layer, backend="aot_eager")(**given, cu_seqlens=ends), wanted)


def test_more_heads_of_q():
    """They read the weights of k and v, which are given as a dict."""
    layer = layer_of(TTTLinear, "torch")
    given = arguments(layer, 21)
    given["q"] = torch.cat([given["q"], -given["q"]], 2).detach().requires_grad_()
    wanted, found = layer(**given), graph_of(layer)(**given)
    same(found, wanted)
    same(gradients(found, given), gradients(wanted, given))


def test_no_tokens():
    """The cotangents of the state are handed on as they are, in memory of their own."""
    layer = layer_of(GatedDeltaNet, "torch")
    given = arguments(layer, 0)
    wanted, found = layer(**given), graph_of(layer)(**given)
    same(found, wanted)
    same(gradients(found, given), gradients(wanted, given))


def test_many_states():
    """An operator has 64 arguments at most, and a layer may keep and return more tensors than that."""
    many = Recipe(hidden=("silu", "tanh"), use="sum", bias="plain", branch="state", scaled="number", momentum="number")
    dims = dict.fromkeys("DEFGJKM", 2)
    layer = tttc.compile(declaration(many), dims, torch.float64, backend="torch")
    given = arguments(layer, 5)
    wanted, found = layer(**given), graph_of(layer)(**given)
    call = layer._operator.call
    assert len(call.inputs) + call.kept + call.differentiated > 64
    same(found, wanted)
    same(gradients(found, given), gradients(wanted, given))


def test_more_states_than_an_operator_may_have():
    """Such a layer runs beside the graph; where there must be one graph, it says why there is none."""
    last: dict[str, Any] = {"decay": "number", "average": "number", "norm": "layer_norm", "clip": 0.05, "keep": "token"}
    last |= {"bias": "plain", "branch": "state", "mini_batch": 3}
    many = Recipe(hidden=("silu", "tanh"), use="sum", scaled="number", momentum="number", **last)
    dims = dict.fromkeys("DEFGJKM", 2)
    layer = tttc.compile(declaration(many), dims, torch.float64, backend="torch", decode="sums")
    assert len(layer._flat_call().inputs) > MOST_TENSORS
    given = tree_map(torch.Tensor.detach, arguments(layer, 5))
    same(torch.compile(layer, backend="aot_eager")(**given), layer(**given))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph"):
        graph_of(layer)(**given)
    with as_operators(), pytest.raises(BackendRefusal, match="at most 60"):
        layer(**given)


def test_errors_say_what_they_say_without_a_graph():
    layer = layer_of(TTTLinear, "torch")
    given = arguments(layer, 5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="missing gate tau"):
        graph_of(layer)(**given | {"gates": {"lr": given["gates"]["lr"]}})


# ---- modules ----


def module_and_input(backend: str = "torch", tokens: int = 21, **options: Any) -> tuple[TTT, torch.Tensor]:
    torch.manual_seed(0)
    return TTT(TTTLinear, 16, 2, backend=backend, **options), torch.randn(2, tokens, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_in_a_graph(backend):
    """With its cache, over two calls; the layer is compiled while the graph is made."""
    module, x = module_and_input(backend, 40, conv_kernel=4, output_gate=True, dims={"D": 8})
    graph = graph_of(module)
    y, cache = graph(x[:, :21], return_state=True)
    rest, after = graph(x[:, 21:], state=cache, return_state=True)
    first, state = module(x[:, :21], return_state=True)
    second, last = module(x[:, 21:], state=state, return_state=True)
    assert isinstance(after, Cache)
    assert (cache.position, after.position) == (21, 40)
    same((y, rest, after), (first, second, last))
    same(
        gradients((y, rest), dict(module.named_parameters())),
        gradients((first, second), dict(module.named_parameters())),
    )


def test_blocks_share_their_graphs():
    """Modules of one kind, each compiled by itself, need one graph; a layer of another kind ends none."""
    blocks = [module_and_input()[0] for _ in range(4)]
    counted = CompileCounterWithBackend("aot_eager")
    for block in blocks:
        block.compile(fullgraph=True, backend=counted)
    x = torch.randn(2, 32, 16)
    with torch.no_grad():
        for block in blocks:
            block(x)
        made = counted.frame_count
        TTT(TTTLinear, 16, 4, backend="torch")(x)
        for block in blocks:
            block(x)
    assert counted.frame_count == made == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_under_inductor(backend):
    """It orders the sums of the module in its own way, and may be as far from float64 as the module itself is."""
    module, x = module_and_input(backend)
    double = copy.deepcopy(module).double()
    double.backend = "torch"  # no kernel of Triton is for float64
    graph = graph_of(module, "inductor")
    exact, wanted, found = (
        [y, *gradients(y, dict(m.named_parameters()))]
        for m, y in ((double, double(x.double())), (module, module(x)), (module, graph(x)))
    )
    for a, b, true in zip(found, wanted, exact, strict=True):
        assert relative_error(a.double(), true) <= 2 * relative_error(b.double(), true) + CLOSE


@pytest.mark.parametrize("backend", ["torch", NATIVE, pytest.param("triton", marks=pytest.mark.slow)])
def test_autocast(backend):
    """Inputs as autocast makes them; what is in an operator computes in float32 with and without a graph."""
    module, x = module_and_input(backend)
    parameters = dict(module.named_parameters())

    def mixed(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    wanted, found = mixed(x), graph_of(mixed)(x)
    assert found.dtype == torch.bfloat16
    same(found, wanted)
    same(gradients(found, parameters), gradients(wanted, parameters))


def test_autocast_leaves_the_products_of_a_scan():
    layer = layer_of(TTTLinear, "torch")
    given = arguments(layer, 21)
    wanted = layer(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(**given)
    same(found, wanted)
    same(gradients(found, given), gradients(wanted, given))


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_activation_checkpointing(in_a_graph):
    module, x = module_and_input()
    parameters = dict(module.named_parameters())

    def again(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(module, x, use_reentrant=False)

    found = (graph_of(again) if in_a_graph else again)(x)
    same(gradients(found, parameters), gradients(module(x), parameters))


# ---- torch.export ----


class WithState(torch.nn.Module):
    """A module that takes and gives a cache."""

    def __init__(self, inner: TTT) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, cache: Any = None) -> Any:
        return self.inner(x, state=cache, return_state=True)


@pytest.mark.parametrize("name", LIBRARY)
def test_every_ready_declaration_exported(name):
    """One graph for any number of tokens and sequences, wherever a mini-batch ends."""
    layer = layer_of(LIBRARY[name], "torch", torch.float64)

    class Call(torch.nn.Module):
        def forward(self, given: dict[str, Any]) -> Any:
            return layer(**given)

    given = tree_map(torch.Tensor.detach, arguments(layer, 20))
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=1, max=4096)}
    batched = {
        n: {0: sizes[0]} if x.dim() == 2 + len(layer.signature.states[n].dims) else None
        for n, x in given["state"].items()
    }
    dynamic = {n: tree_map(lambda x: sizes, given[n]) for n in ("q", "k", "v", "tokens", "gates")}
    dynamic |= {"params": dict.fromkeys(given["params"]), "state": batched}
    graph = torch.export.export(Call(), (given,), dynamic_shapes=(dynamic,)).module()
    for tokens, batch in [(1, 2), (15, 1), (16, 3), (17, 2), (300, 1)]:
        given = tree_map(torch.Tensor.detach, arguments(layer, tokens, batch))
        (z, state), (wanted, last) = graph(given), layer(**given)
        same((z, dict(state)), (wanted, dict(last)))
        assert state.position == last.position


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exported_module(backend):
    """Saved, loaded and run; also for lengths that it was not exported with."""
    module, x = module_and_input(backend, 32)
    module(x)
    tokens = {1: torch.export.Dim("tokens", min=1, max=4096)}
    written = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=(tokens,)), written)
    written.seek(0)
    loaded = torch.export.load(written).module()
    parameters = dict(module.named_parameters())
    for length in (1, 16, 17, 64):
        y = torch.randn(2, length, 16)
        same(loaded(y), module(y))
    found = gradients(loaded(x), dict(loaded.named_parameters()))
    same(found, gradients(module(x), {n: parameters[n] for n, _ in loaded.named_parameters()}))


def test_an_exported_module_with_its_state():
    module, x = module_and_input()
    wrapped = WithState(module)
    _, cache = module(x[:, :5], return_state=True)
    cache = cache.detach()
    exported = torch.export.export(wrapped, (x[:, 5:], cache)).module()
    found, wanted = exported(x[:, 5:], cache), wrapped(x[:, 5:], cache)
    assert found[1].position == 21
    same(found, wanted)


def test_boundaries_in_a_tensor_cannot_be_exported():
    layer = layer_of(TTTLinear, "torch")
    given = tree_map(torch.Tensor.detach, arguments(layer, 10, batch=1))

    class Packed(torch.nn.Module):
        def forward(self, values: Any, ends: torch.Tensor) -> Any:
            return layer(**values, cu_seqlens=ends)

    with pytest.raises(tttc.errors.ShapeError, match="Pass a list of ints"):
        torch.export.export(Packed(), (given, torch.tensor([0, 10])), strict=False)
