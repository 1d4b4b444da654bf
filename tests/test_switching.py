"""Sites that are switched on and off in the middle of training, against a bookkeeping of single units."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from heterolora.allocators.base import favoured
from heterolora.switching import Switch, changes, trained_parameters
from tests.architectures import make_backbone, make_batch
from tests.conftest import adapt
from tests.surroundings import ALONE
from tests.test_model import logits

RANK = 3


def optimizer_of(model):
    groups = [{"params": trained_parameters(model), "name": "adapters"}]
    return torch.optim.AdamW(groups, lr=0.05, weight_decay=0.1, fused=True)


def train(model, optimizer, batch, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def units(adapter, optimizer):
    """One record for each unit of rank: its row of A, its column of B, and their moments; and the step counts."""
    found = []
    for unit in range(adapter.rank):
        record = {"A": adapter.A[unit].detach().clone(), "B": adapter.B[:, unit].detach().clone()}
        for moment in ("exp_avg", "exp_avg_sq"):
            a, b = (optimizer.state.get(p, {}).get(moment) for p in (adapter.A, adapter.B))
            record[f"A.{moment}"] = torch.zeros_like(record["A"]) if a is None else a[unit].clone()
            record[f"B.{moment}"] = torch.zeros_like(record["B"]) if b is None else b[:, unit].clone()
        found.append(record)
    return found


def steps_of(adapter, optimizer):
    found = [optimizer.state[p]["step"].item() for p in (adapter.A, adapter.B) if optimizer.state.get(p)]
    return set(found)


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


class Machine(RuleBasedStateMachine):
    """Random switches and training steps; a list of units for each site says what must be there."""

    off = "reset"
    all_held = False

    @initialize(seed=st.integers(0, 3))
    def start(self, seed):
        self.model = adapt(make_backbone("bert"), spans=(1, 2))
        self.names = [site.name for site in self.model.space.sites][::7]
        self.batch = make_batch(self.model.backbone)
        self.seed = seed
        self.switch = Switch(self.model, seed, self.off)
        if self.all_held:
            self.switch.hold_all(RANK)
        first = {self.names[0]: RANK, self.names[1]: 1 if self.off != "freeze" else RANK}
        self.model.enable(first, seed)
        self.switch.take_on(first)
        self.optimizer = optimizer_of(self.model)
        self.on = dict(first)
        self.expected = {name: units(self.model.adapter(name), self.optimizer) for name in first}
        self.steps = {name: set() for name in first}

    def fresh(self, name, rank):
        adapter = self.model.family.build(self.model.site(name), rank, self.seed, ALONE).double()
        return units(adapter, self.optimizer)

    @rule(data=st.data())
    def switch_sites(self, data):
        sizes = [0, RANK] if self.off == "freeze" else list(range(RANK + 1))
        ranks = {name: data.draw(st.sampled_from(sizes), label=name) for name in self.names}
        if not any(ranks.values()):
            ranks[self.names[0]] = RANK
        tensors = {name: (self.model.adapter(name).A, self.model.adapter(name).B) for name in self.model.held}
        before = logits(self.model, self.batch)
        self.switch.to(ranks, self.optimizer)
        for name in self.names:
            old, new = self.on.get(name, 0), ranks[name]
            if old == new:
                if name in tensors:
                    assert self.model.adapter(name).A is tensors[name][0]
                    assert self.model.adapter(name).B is tensors[name][1]
                continue
            known = self.expected.get(name, [])
            if self.off == "reset":
                known = known[: min(old, new)]
            self.expected[name] = known + self.fresh(name, new)[len(known) :]
            if self.off == "reset" and not old:
                self.steps[name] = set()
            if new == 0 and self.off == "reset":
                self.expected[name], self.steps[name] = [], set()
        self.on = {name: rank for name, rank in ranks.items() if rank}
        if self.off == "freeze":  # what is off stays in the function
            assert torch.equal(logits(self.model, self.batch), before)

    @precondition(lambda self: self.on)
    @rule(count=st.integers(1, 2))
    def step(self, count):
        train(self.model, self.optimizer, self.batch, count)
        for name, rank in self.on.items():
            self.expected[name][:rank] = units(self.model.adapter(name), self.optimizer)
            self.steps[name] = steps_of(self.model.adapter(name), self.optimizer)

    @rule()
    def crash_and_resume(self):
        """Everything goes through a checkpoint."""
        trained = copy.deepcopy(self.model.trained_state_dict())
        ranks, frozen = {n: r for n, r in self.model.ranks.items() if r}, self.model.frozen
        state = copy.deepcopy((self.switch.state_dict(), self.optimizer.state_dict()))
        self.model = adapt(make_backbone("bert"), spans=(1, 2))
        self.model.enable(ranks, self.seed)
        self.model.freeze(frozen)
        self.model.load_trained_state_dict(trained)
        self.switch = Switch(self.model, self.seed, self.off)
        self.switch.load_state_dict(state[0])
        self.optimizer = optimizer_of(self.model)
        self.optimizer.load_state_dict(state[1])

    @invariant()
    def units_are_as_expected(self):
        if not hasattr(self, "model"):
            return
        assert {name: rank for name, rank in self.switch.live.items() if rank} == self.on
        for name, rank in self.on.items():
            adapter = self.model.adapter(name)
            found = units(adapter, self.optimizer)
            assert len(found) == rank
            for one, other in zip(found, self.expected[name], strict=False):
                assert same(one, other)
            assert steps_of(adapter, self.optimizer) == self.steps.get(name, set())
            assert adapter.A.requires_grad
            assert adapter.B.requires_grad

    @invariant()
    def the_optimizer_knows_what_is_trained_and_nothing_else(self):
        if not hasattr(self, "model"):
            return
        group = self.optimizer.param_groups[0]["params"]
        order = [p for name in self.model.held if name in self.on for p in self.model.adapter(name).parameters()]
        assert [id(p) for p in group] == [id(p) for p in order]
        assert set(self.optimizer.state) <= set(group)

    @invariant()
    def all_are_held_where_that_was_asked_for(self):
        if not hasattr(self, "model") or self.off == "freeze":
            return
        cost = self.model.family.cost(self.model.space.sites)
        held = self.model.held_parameters + self.switch.kept_parameters
        if not self.all_held and self.off == "reset":
            assert held == cost(self.on)
        elif self.all_held and all(rank == RANK for rank in self.on.values()):
            assert held == cost(dict.fromkeys(self.model.ranks, RANK))


@pytest.mark.medium
@pytest.mark.parametrize(("off", "all_held"), [("reset", False), ("reset", True), ("keep", True), ("freeze", True)])
def test_any_sequence_of_switches_steps_and_crashes_keeps_every_unit_where_it_belongs(off, all_held):
    machine = type("Machine", (Machine,), {"off": off, "all_held": all_held})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=12, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def switched(off="reset", scale=2.0):
    model = adapt(make_backbone("bert"), spans=(1, 2), scale=scale)
    names = [site.name for site in model.space.sites]
    switch = Switch(model, 0, off)
    model.enable({names[0]: 2, names[5]: 2}, 0)
    optimizer = optimizer_of(model)
    batch = make_batch(model.backbone)
    train(model, optimizer, batch, 3)
    return model, names, switch, optimizer, batch


def test_switching_on_never_changes_the_function():
    model, names, switch, optimizer, batch = switched()
    before = logits(model, batch)
    switch.to({names[0]: 2, names[5]: 2, names[3]: 4, names[-1]: 1}, optimizer)
    assert torch.equal(logits(model, batch), before)
    switch.to({names[0]: 5, names[5]: 2, names[3]: 4, names[-1]: 1}, optimizer)  # sums of more terms round otherwise
    assert torch.allclose(logits(model, batch), before, atol=1e-13)


def test_switching_off_takes_away_what_the_site_gave():
    model, names, switch, optimizer, batch = switched()
    model.switch_off([names[5]])
    without = logits(model, batch)
    model.switch_off([])
    assert not torch.equal(logits(model, batch), without)
    switch.to({names[0]: 2}, optimizer)
    assert torch.equal(logits(model, batch), without)


def test_what_is_kept_comes_back_as_it_was():
    model, names, switch, optimizer, batch = switched("keep")
    before = logits(model, batch)
    switch.to({names[0]: 2}, optimizer)
    switch.to({names[0]: 2, names[5]: 2}, optimizer)
    assert torch.equal(logits(model, batch), before)
    assert steps_of(model.adapter(names[5]), optimizer) == {3.0}


def test_sites_that_stay_train_as_if_nothing_had_been_switched():
    """With gradients given, so that what other sites do cannot matter."""
    runs = []
    for switching in (False, True):
        model, names, switch, optimizer, _ = switched()
        for step in range(3):
            if switching:
                switch.to({names[0]: 2, names[3 + step]: 1}, optimizer)
            optimizer.zero_grad()
            for number, parameter in enumerate(model.adapter(names[0]).parameters()):
                parameter.grad = torch.full_like(parameter, 0.1 * step + number - 0.3)
            optimizer.step()
        runs.append([p.detach().clone() for p in model.adapter(names[0]).parameters()])
    assert all(map(torch.equal, *runs))


def test_a_held_unit_gives_way_only_to_one_that_is_clearly_better():
    gains = {"a": [1.0, 0.5], "b": [1.05, 0.2], "c": [-1.0, -2.0]}
    found = favoured(gains, {"a": 1, "c": 1}, 0.1)
    assert found["a"] == [pytest.approx(1.1), 0.5]
    assert found["b"] == gains["b"]
    assert found["c"] == [pytest.approx(-1 / 1.1), -2.0]
    assert favoured(gains, {"a": 2}, 0.0) == gains


def test_changes_tells_who_gained_and_who_lost():
    assert changes({"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 2, "d": 1}) == (["a", "d"], ["c"])
