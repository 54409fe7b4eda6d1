"""Which tensors are found, under which names and roles, and when they are looked for again."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from torch import nn

from trl_sync.audit.findings import Scope
from trl_sync.audit.inventory import Inventory, torch_optimizer, unwrapped


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_scopes_names_and_optimizer_state() -> None:
    net = model()
    net[0].requires_grad_(False)
    trainable = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    inventory = Inventory(net, optimizer)
    assert inventory.trainable.names == ["1.weight", "1.bias", "2.weight", "2.bias"]
    assert inventory.frozen.names == ["0.weight", "0.bias"]
    assert inventory.buffers.names == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert len(inventory.optimizer_state()) == 0
    net(torch.randn(5, 3)).sum().backward()
    assert [g is not None for g in inventory.gradients()] == [True] * 4
    optimizer.step()
    names = inventory.optimizer_state().names
    assert names[:3] == ["1.weight.exp_avg", "1.weight.exp_avg_sq", "1.weight.step"]
    assert len(names) == 12
    inventory.close()


def test_tied_weights_count_once_and_modules_are_prefixed() -> None:
    net, reference = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4)
    net[1].weight = net[0].weight
    reference.requires_grad_(False)
    inventory = Inventory(net, modules={"reference": reference})
    assert inventory.trainable.names == ["0.weight", "0.bias", "1.bias"]
    assert inventory.frozen.names == ["reference.weight", "reference.bias"]
    assert inventory.role_of == {"reference.weight": "reference", "reference.bias": "reference"}
    inventory.close()


def test_quantization_state_is_found() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True)
    inventory = Inventory(nn.Sequential(layer.to("cpu")))
    assert inventory.frozen.names == ["0.weight"]
    assert inventory.quantization.names == [
        "0.weight.absmax",
        "0.weight.nested_absmax",
        "0.weight.nested_offset",
        "0.weight.nested_quant_map",
        "0.weight.quant_map",
    ]
    inventory.close()


@pytest.mark.parametrize("change", ["unfreeze", "freeze", "add", "replace", "remove"])
def test_changes_are_followed(change: str) -> None:
    net = model()
    net[0].requires_grad_(False)
    inventory = Inventory(net)
    version = inventory.version
    assert not inventory.refresh()
    if change == "unfreeze":
        net[0].weight.requires_grad_(True)
    elif change == "freeze":
        net[2].bias.requires_grad_(False)
    elif change == "add":
        net.add_module("late", nn.Linear(2, 2))
    elif change == "replace":
        net[2].weight = nn.Parameter(torch.zeros(2, 4))
    else:
        del net[2]
    # A deletion is announced by nobody: it is seen when everything is looked at again.
    assert inventory.refresh(force=change == "remove")
    assert inventory.version == version + 1
    named = dict(inventory.trainable.items())
    assert ("0.weight" in named) == (change == "unfreeze")
    assert ("late.weight" in named) == (change == "add")
    assert ("2.bias" in named) == (change not in ("freeze", "remove"))
    if change == "replace":
        assert named["2.weight"] is net[2].weight
    inventory.close()


def test_other_modules_and_the_same_object_set_again_cost_nothing() -> None:
    net = model()
    inventory = Inventory(net)
    nn.Linear(2, 2)
    net[0].weight = net[0].weight
    assert not inventory.refresh()
    inventory.close()


def test_nothing_is_heard_after_close() -> None:
    from torch.nn.modules import module as module_hooks

    hooks = (
        module_hooks._global_parameter_registration_hooks,
        module_hooks._global_module_registration_hooks,
        module_hooks._global_buffer_registration_hooks,
    )
    before = [len(registered) for registered in hooks]
    inventory = Inventory(model())
    assert [len(registered) for registered in hooks] == [n + 1 for n in before]
    inventory.close()
    assert [len(registered) for registered in hooks] == before


def test_wrappers_are_looked_through() -> None:
    net = model()
    assert unwrapped(torch.compile(nn.DataParallel(net))) is net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    outer = types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=optimizer))
    assert torch_optimizer(outer) is optimizer


def test_tensors_without_bytes_are_reported() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    inventory = Inventory(net)
    assert set(inventory.unavailable) == {"1.weight", "1.bias"}
    assert "meta" in inventory.unavailable["1.weight"]
    assert inventory.trainable.names == ["0.weight", "0.bias"]
    inventory.close()


class Rate(float):
    """A learning rate that, as a tensor on a GPU would, counts how often it is waited for."""

    waits = 0

    def __float__(self) -> float:
        Rate.waits += 1
        return super().__float__()


def test_learning_rates_are_waited_for_once_a_group() -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = Rate(0.1)
    Rate.waits = 0
    inventory = Inventory(net, optimizer)
    assert set(inventory.learning_rates().values()) == {0.1}
    assert Rate.waits == 1 < len(inventory.learning_rates())
    assert inventory.group_learning_rates() == [0.1]
    inventory.close()


def test_a_sparse_gradient_has_bytes() -> None:
    net = nn.Embedding(6, 2, sparse=True)
    inventory = Inventory(net)
    net(torch.tensor([1, 1, 4])).sum().backward()
    (gradient,) = inventory.gradients()
    assert gradient is not None
    assert gradient.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    inventory.close()


def test_roles_that_a_model_declares(tmp_path: Path) -> None:
    import tiny
    from trl_sync import SharedBackbone

    backbone = SharedBackbone(tiny.llama())
    inventory = Inventory(backbone, modules={"reward": tiny.reward_llama().requires_grad_(False)})
    roles = {role.name: role for role in inventory.roles}
    assert {name: role.trainable for name, role in roles.items()} == {
        "policy": True,
        "value": True,
        "reference": False,
        "reward": False,
    }
    by_role: dict[str, int] = {}
    for name in (*inventory.trainable.names, *inventory.frozen.names):
        role = inventory.role_of[name]
        by_role[role] = by_role.get(role, 0) + 1
        assert ("lora_" in name or "value_head" in name) == (role in ("policy", "value"))
    # 14 linear layers, two factors each; the value head has weight and bias; 21 tensors of the base
    # (7 + 2 norms a layer, embeddings, final norm, LM head); the reward model has a score instead.
    assert by_role == {"policy": 28, "value": 30, "reference": 21, "reward": 21}
    assert inventory.tensors_of(Scope.ROLES) is None
    inventory.close()


def test_a_quantization_state_that_is_set_anew_is_followed() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    inventory = Inventory(nn.Sequential(layer))
    assert not inventory.refresh()
    layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.clone()
    assert inventory.refresh()
    found = dict(inventory.quantization.items())
    assert found["0.weight.absmax"] is layer.weight.quant_state.absmax
    inventory.close()


def test_an_optimizer_that_chooses_its_own_rate_has_none() -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    inventory = Inventory(net, optimizer)
    assert set(inventory.learning_rates().values()) == {0.1}
    optimizer.param_groups[0]["lr"] = None
    assert inventory.learning_rates() == {}
    inventory.close()


def test_packed_weights_in_buffers_are_frozen() -> None:
    layer = nn.Module()
    layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    layer.register_buffer("scales", torch.ones(4))
    inventory = Inventory(nn.ModuleDict({"layer": layer, "norm": nn.BatchNorm1d(2)}))
    assert inventory.frozen.names == ["layer.qweight", "layer.scales"]
    assert "norm.running_mean" in inventory.buffers.names
    inventory.close()


def test_a_model_that_cannot_be_read_leaves_no_hook() -> None:
    from torch.nn.modules import module as module_hooks

    class Broken(nn.Linear):
        def sync_roles(self) -> None:
            raise RuntimeError("no roles today")

    before = len(module_hooks._global_module_registration_hooks)
    with pytest.raises(RuntimeError, match="no roles today"):
        Inventory(Broken(2, 2))
    assert len(module_hooks._global_module_registration_hooks) == before
