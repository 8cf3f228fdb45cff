"""The trace reads a model without touching it, and attributes each operation to its parameters."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.data import DataLoader, Dataset

from spfde.core.errors import InvalidArgument
from spfde.model.sample import sample_from, unwrap
from spfde.model.trace import trace


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def weights(model: nn.Module, sample: object) -> list[tuple[str, ...]]:
    """Parameters of the operations with FLOPs."""
    return [op.parameters for op in trace(model, sample).ops if op.flops]


def test_operations_come_in_order_with_hand_counted_flops():
    found = trace(Small(), torch.zeros(2, 3, 8, 8))
    assert found.batch_size == 2
    assert [op.module for op in found.ops] == ["conv", "norm", "head"]
    assert [op.position for op in found.ops] == [0, 1, 2]
    # 2 FLOPs x 4 filters x 27 taps x 64 places x 2 samples; 2 x 4 x 3 x 2 samples.
    assert [op.flops for op in found.ops] == [2 * 4 * 27 * 64 * 2, 0, 2 * 4 * 3 * 2]
    assert [op.output_numel for op in found.ops] == [2 * 4 * 64, 2 * 4 * 64, 2 * 3]
    assert found.ops[0].parameters == ("conv.weight",)
    assert set(found.ops[1].parameters) == {"norm.weight", "norm.bias"}
    assert found.uncounted == {"BatchNorm2d": 1, "Dropout": 1}
    assert found.first_run == {"": 0, "conv": 0, "norm": 1, "drop": 2, "head": 2}


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_modules_statistics_modes_gradients_and_generators_alone(training):
    torch.manual_seed(1)
    model = Small().train(training)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model.drop.eval()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    trace(model, torch.zeros(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


def test_a_generator_inside_the_model_is_not_advanced():
    class Noisy(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.generator = torch.Generator().manual_seed(5)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(x.shape, generator=self.generator)

    model = Noisy()
    before = model.generator.get_state()
    assert len(weights(model, torch.zeros(2, 4))) == 1
    assert torch.equal(model.generator.get_state(), before)


def test_the_users_hooks_are_neither_called_nor_copied_nor_removed():
    calls = []

    class NotToBeCopied:
        def __deepcopy__(self, memo: dict[int, object]) -> NotToBeCopied:
            raise AssertionError("hooks must not be copied")

        def pre(self, module, args):
            calls.append("pre")

        def post(self, module, args, out):
            calls.append("post")

        def back(self, module, grads, out):
            calls.append("back")

    model, hooks = Small(), NotToBeCopied()
    model.conv.register_forward_pre_hook(hooks.pre)
    model.conv.register_forward_hook(hooks.post)
    model.conv.register_full_backward_hook(hooks.back)
    model.conv.register_state_dict_pre_hook(hooks.pre)
    trace(model, torch.zeros(2, 3, 8, 8))
    assert calls == []
    model(torch.zeros(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert calls == ["pre", "post", "back"]


def test_attention_is_counted_with_its_projections_and_products():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(3, 5, 8)
    found = trace(model, (x, x, x))
    by_parameter: dict[str, int] = {}
    for op in found.ops:
        key = next((name for name in op.parameters if name.endswith("weight")), "products")
        by_parameter[key] = by_parameter.get(key, 0) + op.flops
    assert by_parameter["in_proj_weight"] == 2 * 3 * 5 * 8 * 24
    assert by_parameter["out_proj.weight"] == 2 * 3 * 5 * 8 * 8
    assert by_parameter["products"] == 2 * (2 * 3 * 2 * 5 * 5 * 4)


def test_encoder_layers_are_counted_though_their_fast_path_would_hide_them():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    read = {name for names in weights(layer, torch.zeros(2, 5, 8)) for name in names if name.endswith("weight")}
    assert read == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_encoders_and_decoders_are_traced_with_a_causal_mask_though_they_look_into_it():
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)
    x, before = torch.zeros(2, 5, 8), torch.nn.modules.transformer._detect_is_causal_mask
    assert len(trace(encoder, {"src": x, "mask": causal}).ops) == len(trace(encoder, x).ops)
    masked = trace(decoder, {"tgt": x, "memory": x, "tgt_mask": causal})
    assert len(masked.ops) == len(trace(decoder, (x, x)).ops)
    assert torch.nn.modules.transformer._detect_is_causal_mask is before


def test_recurrent_layers_are_counted():
    before = torch._C._get_mkldnn_enabled()
    found = trace(nn.LSTM(4, 3, batch_first=True), torch.zeros(2, 5, 4))
    assert sum(op.flops for op in found.ops if "weight_ih_l0" in op.parameters) == 2 * 2 * 5 * 4 * 12
    assert sum(op.flops for op in found.ops if "weight_hh_l0" in op.parameters) == 2 * 2 * 5 * 3 * 12
    assert torch._C._get_mkldnn_enabled() == before


def test_functional_uses_and_tied_weights_are_found():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(7, 4)
            self.bare = nn.Parameter(torch.ones(4, 4))
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.tokens.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.tokens(ids) @ self.bare[:, :])

    found = trace(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert [op.parameters for op in found.ops] == [("tokens.weight",), ("bare",), ("tokens.weight",)]


@pytest.mark.parametrize(
    ("make", "weight"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), "parametrizations.weight.original1"),
        (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), "parametrizations.weight.original"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5), "weight_orig"),
        (lambda: prune.custom_from_mask(nn.Linear(4, 3), "weight", torch.ones(3, 4)), "weight_orig"),
    ],
    ids=["weight norm", "spectral norm", "pruning", "pruning with a mask"],
)
def test_a_weight_that_is_computed_from_parameters_is_attributed_to_them(make, weight):
    (names,) = weights(make(), torch.zeros(2, 4))
    assert weight in names
    assert "bias" in names


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_old_style_weight_norm_is_attributed_too():
    (names,) = weights(weight_norm(nn.Linear(4, 3)), torch.zeros(2, 4))
    assert "weight_v" in names


def test_what_is_computed_from_the_input_is_attributed_to_no_earlier_parameter():
    class Written(nn.Module):
        """The input is written into a buffer that held nothing but constants before."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(4, 4))
            self.out = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            mixed = torch.zeros(4, 4) + self.shift
            mixed[:2] = x
            return self.out(mixed)

    assert weights(Written(), torch.zeros(2, 4)) == [("out.weight",)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_in_other_precisions_and_memory_formats_are_traced_with_a_float_sample(dtype):
    model = Small().to(dtype).to(memory_format=torch.channels_last)
    plain = trace(Small(), torch.zeros(2, 3, 8, 8))
    assert trace(model, torch.zeros(2, 3, 8, 8)).ops == plain.ops


def test_a_model_on_the_meta_device_is_traced():
    with torch.device("meta"):
        model = Small()
    assert trace(model, torch.zeros(2, 3, 8, 8)).ops == trace(Small(), torch.zeros(2, 3, 8, 8)).ops


def test_compiled_models_are_traced_under_their_own_names_without_being_compiled():
    def refuse(module, inputs):
        raise AssertionError("tracing must not compile")

    plain = trace(Small(), torch.zeros(2, 3, 8, 8)).ops
    model = Small()
    wrapped = torch.compile(model, backend=refuse)
    assert unwrap(wrapped) is model
    assert trace(wrapped, torch.zeros(2, 3, 8, 8)).ops == plain
    in_place = Small()
    in_place.compile(backend=refuse)
    assert trace(in_place, torch.zeros(2, 3, 8, 8)).ops == plain
    part = Small()
    part.conv = torch.compile(part.conv, backend=refuse)
    assert trace(part, torch.zeros(2, 3, 8, 8)).ops[0].parameters == ("conv._orig_mod.weight",)


def test_a_data_parallel_wrapper_is_seen_through():
    model = Small()
    assert unwrap(nn.DataParallel(torch.compile(model))) is model


def test_positional_and_keyword_samples_are_passed_as_the_model_is_called():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor, *, y: Tensor | None = None) -> Tensor:
            return self.a(x) if y is None else self.a(x) + self.b(y)

    assert len(weights(Two(), (torch.zeros(1, 2),))) == 1
    assert len(weights(Two(), {"x": torch.zeros(1, 2), "y": torch.zeros(1, 3)})) == 2


@pytest.mark.parametrize(
    ("model", "sample", "message"),
    [
        (Small(), torch.zeros(2, 5, 8, 8), r"sample=.*\(2, 5, 8, 8\).*cannot be traced.*Pass sample="),
        (Small(), torch.tensor(1.0), "batch dimension"),
        (Small(), ("text",), "batch dimension"),
        (Small(), torch.zeros(0, 3, 8, 8), "one sample"),
        (nn.LazyLinear(3), torch.zeros(2, 4), "Run the model once"),
    ],
    ids=["wrong shape", "no batch", "no tensor", "no sample", "lazy"],
)
def test_a_sample_or_model_that_cannot_be_traced_is_refused_with_the_remedy(model, sample, message):
    with pytest.raises(InvalidArgument, match=message):
        trace(model, sample)


def test_a_forward_pass_that_branches_on_values_is_refused_and_settings_are_put_back():
    class Branching(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    with pytest.raises(InvalidArgument, match="branches on values"):
        trace(Branching(2, 2), torch.zeros(1, 2))
    assert (torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()) == before


class Items(Dataset):
    def __init__(self, item) -> None:
        self.item = item

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return self.item()


def test_the_sample_is_one_item_of_the_data_set_and_no_generator_advances():
    loader = DataLoader(Items(lambda: (torch.rand(3, 8, 8), 1)), batch_size=2, shuffle=True)
    model = Small()
    before = torch.get_rng_state()
    (x,) = sample_from(loader, model)
    assert x.shape == (1, 3, 8, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_of_a_mapping_the_entries_that_the_model_takes_are_the_sample():
    loader = DataLoader(Items(lambda: {"x": torch.zeros(3, 8, 8), "label": 1}))
    sample = sample_from(loader, Small())
    assert list(sample) == ["x"]


def test_a_batch_without_inputs_is_refused():
    with pytest.raises(InvalidArgument, match="Pass sample= to attach"):
        sample_from(DataLoader(Items(lambda: {"other": 1.0})), Small())
