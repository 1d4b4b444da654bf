"""The table of trained allocations: what is trained, how rows are kept, and how proxies are judged by them."""

import functools
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.allocation_table import agreement, allocations, judge, make, scores
from benchmarks.allocation_table.allocations import ALONE, BUDGETS, PLACEMENTS, Entry, evenly, price, randomly
from heterolora.errors import SettingError
from heterolora.proxies.base import DegenerateScores
from heterolora.sites import Port, Site, Tap
from heterolora.statistics import rank_correlation

pytestmark = pytest.mark.medium


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch):
    monkeypatch.setattr(agreement, "PERMUTATIONS", 999)


def lora(layer, role, wide=384, narrow=384):
    return Site(f"{layer}.{role}", "lora", role, layer, Port(role, "in"), Port(role, "out"), wide, narrow)


def shortcut(layer, role, start, end):
    return Site(f"{layer}.{role}", "shortcut", role, layer, Tap(start), Tap(end), 384, 384)


def minilm():
    """The 59 sites of six layers of width 384 with inner width 1,536."""
    sites = []
    for at in range(6):
        sites += [lora(at, role) for role in ("q", "k", "v", "o")]
        sites += [lora(at, "up", 384, 1536), lora(at, "down", 1536, 384)]
        sites += [
            shortcut(at, "residual_attn", 2 * at, 2 * at + 1),
            shortcut(at, "residual_ffn", 2 * at + 1, 2 * at + 2),
        ]
        sites += [shortcut(at, "shortcut_ffn", 2 * at - 1, 2 * at + 1)] if at else []
        sites += [shortcut(at, "shortcut_attn", 2 * at, 2 * at + 2)]
    return sites


SITES = minilm()
SITE = {site.name: site for site in SITES}
LORA = [site.name for site in SITES if site.kind == "lora"]
SHORTCUTS = [site.name for site in SITES if site.kind == "shortcut"]


@functools.cache
def planned():
    """All entries of the table; drawing the random ones takes a second."""
    return make.entries(SITES)


def cost(ranks):
    return sum(rank * price(SITE[name]) for name, rank in ranks.items())


# -- which allocations ------------------------------------------------------------------------------------------------


@pytest.mark.medium
def test_the_sites_of_these_tests_are_those_of_the_table():
    def sizes(sites):
        return {(site.name, site.kind, site.role, site.layer, site.in_features, site.out_features) for site in sites}

    assert sizes(make.sites_of_the_table()) == sizes(SITES)


def ranks_in(entry):
    """Site -> rank, of an entry with fixed ranks."""
    text = entry.overrides[1].removeprefix("allocator.ranks={").removesuffix("}")
    return {name: int(rank) for name, rank in (item.split(": ") for item in text.split(", "))}


def test_alone_every_site_holds_the_same():
    found = list(allocations.alone(SITES, 3))
    assert [entry.name for entry in found] == [site.name for site in SITES]
    for entry in found:
        ranks = ranks_in(entry)
        assert (list(ranks), cost(ranks), entry.budget, entry.seed) == ([entry.name], ALONE, ALONE, 3)


def test_alone_refuses_what_cannot_hold_exactly_that():
    with pytest.raises(ValueError, match=r"0\.q: 3840 parameters are no whole rank of 800"):
        list(allocations.alone([lora(0, "q", 400, 400)], 0))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(PLACEMENTS.values())), st.integers(768, 400_000))
def test_evenly_spends_all_but_less_than_a_unit_and_is_level(roles, budget):
    ranks = evenly(SITES, roles, budget)
    chosen = [site for site in SITES if site.role in roles]
    left = budget - cost(ranks)
    assert 0 <= left < min(map(price, chosen))
    for same in ({site.name for site in chosen if price(site) == size} for size in set(map(price, chosen))):
        held = [ranks.get(name, 0) for name in same]
        covers_all = budget >= sum(map(price, chosen))
        assert not covers_all or max(held) - min(held) <= 1 + max(map(price, chosen)) // min(map(price, chosen))


@pytest.mark.parametrize("placement", ["q,v", "v,o", "attention", "shortcuts"])
@pytest.mark.parametrize("budget", [b for b in BUDGETS if b > 9_216])
def test_where_a_unit_costs_the_same_ranks_differ_by_at_most_one(placement, budget):
    chosen = [site.name for site in SITES if site.role in PLACEMENTS[placement]]
    ranks = evenly(SITES, PLACEMENTS[placement], budget)
    held = [ranks.get(name, 0) for name in chosen]
    assert max(held) - min(held) <= 1
    assert sum(held) == budget // 768


def test_a_budget_for_rank_two_everywhere_gives_rank_two_everywhere():
    assert evenly(SITES, PLACEMENTS["all linears"], 82_944) == dict.fromkeys(evenly(SITES, LORA_ROLES, 82_944), 2)
    assert set(evenly(SITES, LORA_ROLES, 82_944)) == set(LORA)


LORA_ROLES = PLACEMENTS["all linears"]


def test_below_a_unit_everywhere_it_is_the_last_layers():
    assert evenly(SITES, ("q", "v"), 3 * 768) == {"5.q": 1, "5.v": 1, "4.q": 1}
    assert evenly(SITES, ("v", "o"), 767) == {}


def test_no_site_gets_more_rank_than_it_can_hold():
    ranks = evenly([lora(0, "q", 8, 8)], ("q",), 10_000)
    assert ranks == {"0.q": 8}


@pytest.mark.parametrize("budget", allocations.RANDOM)
def test_random_ones_spend_everything_and_can_be_drawn_again(budget):
    found = [randomly(SITES, budget, number) for number in range(6)]
    assert {cost(ranks) for ranks in found} == {budget}
    assert found == [randomly(SITES, budget, number) for number in range(6)]
    assert len({tuple(ranks.items()) for ranks in found}) == 6
    assert all(0 < rank <= 384 for ranks in found for rank in ranks.values())


@pytest.mark.medium
def test_a_budget_that_no_draw_can_spend_is_refused():
    with pytest.raises(ValueError, match="no random allocation spends 800"):
        randomly([lora(0, "q"), lora(0, "k"), lora(0, "v")], 800, 0)


def test_every_entry_has_its_own_key_and_keeps_to_its_budget():
    found = planned()
    keys = [entry.key for entry in found]
    assert len(set(keys)) == len(keys)
    fixed = [entry for entry in found if entry.family != "proxy"]
    assert all(cost(ranks_in(entry)) <= entry.budget for entry in fixed)
    assert {entry.family for entry in found} == {"alone", *agreement.MULTI}


# -- rows -------------------------------------------------------------------------------------------------------------


def row(family, name, budget, seed, ranks, loss, accuracy=0.5, commit="abc"):
    return {
        "key": Entry(family, name, budget, (), seed).key,
        "family": family,
        "name": name,
        "budget": budget,
        "held": cost(ranks),
        "seed": seed,
        "validation_loss": loss,
        "validation_accuracy": accuracy,
        "ranks": " ".join(f"{site}:{rank}" for site, rank in ranks.items()),
        "seconds": 1.0,
        "digest": "d",
        "commit": commit,
        "versions": "v",
    }


def frame(rows):
    return pd.DataFrame(rows, columns=list(make.COLUMNS))


def test_rows_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    rows = [row("random", f"{i:03d}", 9_216, i % 2, {"0.q": 12}, float(np.float32(rng.normal()))) for i in range(20)]
    rows += [row("alone", "0.q", ALONE, 0, {"0.q": 5}, 0.1 + 0.2)]
    make.write_shards(rows, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone_3840_s0.csv",
        "random_9216_s0.csv",
        "random_9216_s1.csv",
    ]
    expected = frame(rows).sort_values("key", ignore_index=True)
    pd.testing.assert_frame_equal(make.read_table(tmp_path), expected, check_exact=True)


def test_a_row_that_is_there_is_never_replaced(tmp_path):
    first = row("alone", "0.q", ALONE, 0, {"0.q": 5}, 0.6)
    make.write_shards([first], tmp_path)
    before = (tmp_path / "alone_3840_s0.csv").read_text()
    make.write_shards([first | {"validation_loss": 0.5}], tmp_path)
    assert (tmp_path / "alone_3840_s0.csv").read_text() == before
    make.write_shards([row("alone", "0.k", ALONE, 0, {"0.k": 5}, 0.7)], tmp_path)
    assert dict(make.read_table(tmp_path)[["name", "validation_loss"]].to_numpy()) == {"0.k": 0.7, "0.q": 0.6}


def test_an_empty_folder_is_an_empty_table(tmp_path):
    assert list(make.read_table(tmp_path).columns) == list(make.COLUMNS)


COMMITTED = make.read_table()


@pytest.mark.skipif(COMMITTED.empty, reason="no rows are committed")
def test_committed_rows_hold_what_they_say():
    assert not COMMITTED["key"].duplicated().any()
    assert not COMMITTED.isna().any(axis=None)
    numbers = COMMITTED[["validation_loss", "validation_accuracy", "seconds"]].to_numpy()
    assert np.isfinite(numbers).all()
    for line in COMMITTED.to_dict("records"):
        ranks = agreement.ranks_of(line["ranks"])
        assert cost(ranks) == line["held"] <= line["budget"], line["key"]
        assert line["key"] == Entry(line["family"], line["name"], line["budget"], (), line["seed"]).key


@pytest.mark.skipif(COMMITTED.empty, reason="no rows are committed")
def test_committed_rows_have_the_ranks_of_their_entries():
    entry_of = {entry.key: entry for entry in planned()}
    found = COMMITTED[COMMITTED["family"] != "proxy"]
    for key, text in zip(found["key"], found["ranks"], strict=True):
        assert agreement.ranks_of(text) == ranks_in(entry_of[key]), key


@pytest.mark.parametrize("text", ["", "0.q", "0.q:", "0.q:x", "0.q:0", ":3", "0.q:1 0.q:2"])
def test_ranks_that_cannot_be_read_are_refused(text):
    with pytest.raises(SettingError, match="ranks="):
        agreement.ranks_of(text)


# -- scores -----------------------------------------------------------------------------------------------------------


class Fake:
    """Stands for the scoring: notes what is asked for, and gives a long list at each of two sites."""

    def __init__(self, monkeypatch):
        self.asked = []
        monkeypatch.setattr(scores, "_score", self)

    def __call__(self, config, guards):
        self.asked.append((config["seed"], sorted(guards)))
        values = [1 / (3 + k) for k in range(40)]
        return {name: {"0.q": values, "0.k": 2 / 3} for name in guards}


def test_scores_are_computed_once_for_all_proxies_of_a_seed(tmp_path, monkeypatch):
    fake = Fake(monkeypatch)
    found = scores.complete(["snip", "depth"], (0, 1), tmp_path)
    assert fake.asked == [(0, ["depth", "snip"]), (1, ["depth", "snip"])]
    assert found["snip"][1].scores["0.k"] == 0.66666667
    assert found["snip"][1].scores["0.q"] == [float(f"{1 / (3 + k):.8g}") for k in range(16)]
    assert found["snip"][1].reason is None
    assert scores.complete(["snip", "depth"], (0, 1), tmp_path) == found
    assert len(fake.asked) == 2


def test_a_new_proxy_costs_only_itself_and_those_of_weights_score_lora_sites(tmp_path, monkeypatch):
    fake = Fake(monkeypatch)
    scores.complete(["snip"], (0,), tmp_path)
    scores.complete(["snip", "gora", "depth"], (0,), tmp_path)
    assert fake.asked == [(0, ["snip"]), (0, ["depth"]), (0, ["gora"])]
    scores.complete(["snip"], (0,), tmp_path, force=True)
    assert fake.asked[3:] == [(0, ["snip"])]


def test_scores_of_other_settings_are_computed_again(tmp_path, monkeypatch):
    fake = Fake(monkeypatch)
    scores.complete(["snip"], (0,), tmp_path)
    monkeypatch.setattr(scores, "SETTINGS", (*scores.SETTINGS, "probe.batches=2"))
    scores.complete(["snip"], (0,), tmp_path)
    assert len(fake.asked) == 2
    assert json.loads((tmp_path / "snip_s0.json").read_text())["probe"]["batches"] == 2


class Refusing:
    control = False
    remedy = "nothing helps"
    statistics = ()

    def __init__(self, found):
        self.found = found

    def score(self, evidence):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Seen:
    sites = (SITE["0.q"], SITE["0.k"])


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({"0.q": 0.0, "0.k": 0.0}, "proxy=x: every score is 0, so it ranks nothing; nothing helps"),
        (SettingError("model", "x", "has no norm"), "model=x: has no norm"),
        (DegenerateScores("no"), "no"),
        ({"0.q": 2.0, "0.k": 1.0}, None),
    ],
)
def test_a_refusal_is_recorded_and_ends_no_pass(found, reason):
    guard = scores._Guard("x", Refusing(found))
    assert set(guard.score(Seen)) == {"0.q", "0.k"}
    assert guard.reason == reason


def test_refused_scores_are_kept_with_the_reason_alone(tmp_path, monkeypatch):
    def refuse(config, guards):
        for guard in guards.values():
            guard.reason = "says nothing"
        return {name: {"0.q": 0.0} for name in guards}

    monkeypatch.setattr(scores, "_score", refuse)
    assert scores.complete(["snip"], (0,), tmp_path) == {"snip": {0: scores.Scored({}, "says nothing")}}


def test_an_unknown_proxy_is_refused():
    with pytest.raises(SettingError, match="--only"):
        scores.main(["--only", "nonsense"])


def test_committed_scores_are_finite_and_at_sites_of_the_table():
    for path in sorted(scores.FOLDER.glob("*.json")):
        found = scores.read(path)
        content = json.loads(path.read_text())
        assert path == scores.place(scores.FOLDER, content["proxy"], content["seed"])
        assert bool(found.scores) == (found.reason is None)
        assert set(found.scores) in (set(), set(LORA), set(SITE)), path.name
        for value in found.scores.values():
            units = value if isinstance(value, list) else [value]
            assert len(units) <= scores.UNITS
            assert all(map(math.isfinite, units))
            assert units == sorted(units, reverse=True)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_p_is_exact_for_few_items_and_small_for_many():
    assert agreement.permutation_p([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]) == pytest.approx(2 / math.factorial(5))
    assert agreement.permutation_p(range(20), range(20)) == pytest.approx(2 / 1_000)


def test_seeds_are_averaged_by_ranks():
    assert agreement.averaged([[1e9, 1, 2], [0.1, 0.3, 0.2]]).tolist() == [2.0, 2.0, 2.0]


def test_a_seed_that_shifts_everything_changes_no_order():
    lines = [row("uniform", "a", 9_216, seed, {"0.q": 12}, 0.5 + seed) for seed in (0, 1, 2)]
    lines += [row("uniform", "b", 9_216, seed, {"0.k": 12}, 0.7 + seed) for seed in (0, 1, 2)]
    lines += [row("random", "000", 9_216, 0, {"0.v": 12}, 0.6)]
    found = agreement.levelled(agreement.prepared(frame(lines), "validation_loss"))
    assert found == pytest.approx({"0.q:12": 0.5, "0.k:12": 0.7, "0.v:12": 0.6})


# -- the judgement ----------------------------------------------------------------------------------------------------


def alone_rows(loss, seeds=(0,)):
    rank = {site.name: ALONE // price(site) for site in SITES}
    return [
        row("alone", name, ALONE, seed, {name: rank[name]}, value + seed)
        for seed in seeds
        for name, value in loss.items()
    ]


def losses(names=tuple(SITE), seed=0):
    rng = np.random.default_rng(seed)
    return {name: float(value) for name, value in zip(names, rng.permutation(len(names)) / 100, strict=True)}


def findings(table, given, **conditions):
    found = agreement.judge(frame(table), given, SITES)
    for column, value in conditions.items():
        found = found[found[column] == value]
    return found


def one(table, given, **conditions):
    found = findings(table, given, **conditions)
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize(("sign", "expected"), [(-1, 1.0), (1, -1.0)])
@pytest.mark.parametrize("where", ["lora", "shortcut", "all"])
def test_a_score_that_orders_sites_as_training_does(sign, expected, where):
    loss = losses()
    given = {"p": {seed: {name: sign * 10**seed * value for name, value in loss.items()} for seed in (0, 1)}}
    for kind in agreement.KINDS:
        found = one(alone_rows(loss), given, part="sites", where=where, measure=kind)
        assert found["value"] == pytest.approx(expected)
        assert found["n"] == {"lora": 36, "shortcut": 23, "all": 59}[where]
    found = one(alone_rows(loss), given, part="sites", where=where, measure="spearman")
    assert found["p"] == found["p_holm"] == pytest.approx(2 / 1_000)


def test_accuracy_counts_upwards():
    loss = losses()
    table = [line | {"validation_accuracy": 1 - line["validation_loss"]} for line in alone_rows(loss)]
    given = {"p": {0: {name: -value for name, value in loss.items()}}}
    found = agreement.judge(frame(table), given, SITES, "validation_accuracy")
    assert found[(found["part"] == "sites") & (found["measure"] == "spearman")]["value"].tolist() == [1.0] * 3


def test_p_is_corrected_over_the_proxies_of_a_column():
    loss = losses()
    given = {str(i): {0: losses(seed=i)} for i in range(1, 5)} | {"good": {0: {n: -v for n, v in loss.items()}}}
    found = findings(alone_rows(loss), given, part="sites", where="lora", measure="spearman")
    assert found["p_holm"].tolist() == pytest.approx(agreement.holm(found["p"].tolist()))
    good = found[found["proxy"] == "good"].iloc[0]
    assert good["p_holm"] == pytest.approx(5 * good["p"])


def test_of_a_list_as_many_units_count_as_were_trained():
    loss = losses()
    rank = {site.name: ALONE // price(site) for site in SITES}
    lists = {name: [1.0] * (rank[name] - 1) + [1 - value] + [-9.0 * (1 - value)] for name, value in loss.items()}
    sums = {name: rank[name] - value for name, value in loss.items()}
    numbers = [
        findings(alone_rows(loss), {"p": {0: given}}, part="sites")["value"].to_list() for given in (lists, sums)
    ]
    assert numbers[0] == numbers[1]


def test_equal_scores_are_no_agreement():
    found = findings(alone_rows(losses()), {"p": {0: dict.fromkeys(SITE, 1.0)}}, part="sites")
    assert found["value"].isna().all()
    assert set(found["note"]) == {"equal scores"}


def test_a_proxy_with_scores_for_lora_sites_only():
    loss = losses()
    table = alone_rows(loss) + singles(loss)
    given = {"p": {0: {name: -loss[name] for name in LORA}}}
    found = findings(table, given, part="sites", measure="spearman").set_index("where")
    assert found["value"].isna().to_dict() == {"lora": False, "shortcut": True, "all": True}
    assert found["left_out"].to_dict() == {"lora": 0, "shortcut": 23, "all": 23}
    assert found.loc["all", "note"] == "no score at 23 of 59 sites"
    predicted = one(table, given, part="allocations", measure="spearman")
    assert (predicted["value"], predicted["n"], predicted["left_out"]) == (1.0, 36, 23)


def singles(loss, family="random", seeds=(0,)):
    """Allocations of one unit of rank at one site each, so that the predicted value is the score."""
    return [
        row(family, f"{i:03d}", 9_216, seed, {name: 1}, value)
        for seed in seeds
        for i, (name, value) in enumerate(loss.items())
    ]


@pytest.mark.parametrize(("sign", "expected"), [(-1, 1.0), (1, -1.0)])
def test_a_score_that_orders_allocations_as_training_does(sign, expected):
    loss = losses()
    given = {"p": {0: {name: sign * value for name, value in loss.items()}}}
    for kind in agreement.KINDS:
        found = one(singles(loss), given, part="allocations", measure=kind)
        assert (found["value"], found["n"], found["where"]) == (pytest.approx(expected), 59, "9216")
    regret = one(singles(loss), given, part="regret", proxy="p")
    assert regret["value"] == pytest.approx(0.0 if sign < 0 else max(loss.values()))
    blind = findings(singles(loss), given, part="regret")
    assert blind[blind["proxy"].isna()]["value"].item() == pytest.approx(np.mean(list(loss.values())))


def test_a_value_is_harmonic_in_the_rank_and_lists_end():
    sites, ranks = SITES[:2], [{"0.q": 3}, {"0.k": 2}, {"0.q": 1, "0.k": 3}]
    texts = [" ".join(f"{name}:{rank}" for name, rank in chosen.items()) for chosen in ranks]
    number, units = {0: {"0.q": 6.0, "0.k": 8.0}}, {0: {"0.q": [9.0, 1.0], "0.k": [4.0]}}
    for scored, values in ((number, [11.0, 12.0, 20.666]), (units, [10.0, 4.0, 13.0])):
        chosen, predicted = agreement._predicted(texts, scored, sites)
        assert chosen == texts
        assert predicted.tolist() == (np.argsort(np.argsort(values)) + 1.0).tolist()


def test_entries_with_the_same_ranks_are_one_allocation():
    loss = losses(tuple(SITE)[:12])
    table = singles(loss) + singles(loss, "uniform")
    found = one(table, {"p": {0: dict.fromkeys(SITE, 1.0) | loss}}, part="allocations", measure="spearman")
    assert found["n"] == 12


def test_where_several_are_predicted_best_regret_is_their_mean():
    loss = dict(zip(SITE, np.arange(12) / 10, strict=False))
    given = {"p": {0: dict.fromkeys(SITE, 0.0) | {"0.q": 1.0, "0.v": 1.0}}}
    assert one(singles(loss), given, part="regret", proxy="p")["value"] == pytest.approx((0.0 + 0.2) / 2)


def test_nine_allocations_are_too_few():
    loss = losses(tuple(SITE)[:9])
    assert findings(singles(loss), {"p": {0: loss}}, part="allocations").empty


def test_what_proxies_made_is_compared_at_its_budget_and_seed():
    table = [
        row("uniform", "all linears", 9_216, 0, {"0.q": 12}, 0.6),
        row("uniform", "all linears", 9_216, 1, {"0.q": 12}, 0.9),
        row("uniform", "q,v", 9_216, 0, {"0.v": 12}, 0.4),
        row("proxy", "spectral_inputs_greedy", 9_216, 0, {"0.k": 12}, 0.5),
        row("proxy", "spectral_inputs_greedy", 9_216, 1, {"0.k": 12}, 0.7),
        row("proxy", "spectral_greedy", 82_944, 0, {"0.k": 108}, 0.5),
    ]
    given = {"spectral": {}, "spectral_inputs": {}}
    found = findings(table, given, part="made", proxy="spectral_inputs").set_index("measure")
    assert found["value"].to_dict() == pytest.approx({"result": 0.6, "minus_uniform": -0.15, "regret": 0.05})
    assert set(found["n"]) == {2}
    assert set(found["allocator"]) == {"greedy"}
    lonely = findings(table, given, part="made", proxy="spectral").set_index("measure")
    assert math.isnan(lonely.loc["minus_uniform", "value"])
    assert lonely.loc["minus_uniform", "note"] == "no uniform all linears of its budget and seed"


def test_ceiling_is_the_agreement_of_two_training_seeds():
    loss = losses()
    found = findings(alone_rows(loss, (0, 1)), {}, part="ceiling", measure="spearman")
    assert found["value"].tolist() == [1.0] * 3
    assert set(found["note"]) == {"seed 0 against seed 1"}
    other = dict(zip(loss, losses(seed=1).values(), strict=True))
    table = alone_rows(loss) + [line | {"seed": 1, "key": line["key"] + "b"} for line in alone_rows(other)]
    found = findings(table, {}, part="ceiling", where="all").set_index("measure")["value"]
    expected = rank_correlation(list(loss.values()), list(other.values()), "spearman").value
    assert found["spearman"] == pytest.approx(expected)
    assert ("attainable" in found) == (expected > 0)


def test_a_perfectly_repeatable_truth_can_be_reached():
    found = findings(alone_rows(losses(), (0, 1)), {}, part="ceiling", measure="attainable")
    assert found["value"].tolist() == pytest.approx([1.0] * 3)


def test_stability_is_the_agreement_of_score_seeds():
    up = {name: float(i) for i, name in enumerate(SITE)}
    given = {"same": {0: up, 1: up}, "turned": {0: up, 1: {name: -value for name, value in up.items()}}, "one": {0: up}}
    found = findings([], given, part="stability").pivot(index="proxy", columns="measure", values="value")
    assert found.loc["same"].to_dict() == {"spearman": 1.0, "top_overlap": 1.0, "sites": 59.0}
    assert found.loc["turned"].to_dict() == pytest.approx({"spearman": -1.0, "top_overlap": 0.0, "sites": 59.0})
    assert found.loc["one"].isna().to_dict() == {"spearman": True, "top_overlap": True, "sites": False}


def test_a_result_that_is_no_number_is_refused():
    table = alone_rows(losses())
    table[3]["validation_loss"] = math.nan
    with pytest.raises(SettingError, match=r"validation_loss=\['alone-0.o-3840-s0'\]: a finite number in every row"):
        findings(table, {})


def test_proxies_are_sorted_by_their_agreement_at_lora_sites():
    loss = losses()
    good = {name: -value for name, value in loss.items()}
    given = {"a_flat": {0: dict.fromkeys(SITE, 1.0)}, "bad": {0: loss}, "good": {0: good}, "none": {}}
    found = agreement.judge(frame(alone_rows(loss)), given, SITES)
    assert agreement.order_of_proxies(found, list(given)) == ["good", "bad", "a_flat", "none"]


# -- what is read -----------------------------------------------------------------------------------------------------

LOSS = losses()
PARTS = {
    "alone": alone_rows(LOSS, (0, 1)),
    "uniform": singles(losses(tuple(SITE)[:6], 2), "uniform", (0, 1)),
    "random": singles(losses(tuple(SITE)[6:40], 3)),
    "proxy": [
        row("proxy", "good_greedy", 9_216, 0, {"0.q": 12}, 0.5),
        row("proxy", "lost_top", 9_216, 0, {"5.q": 2}, 0.6),
    ],
}
SCORED = {
    "good": {seed: scores.Scored({name: -value - seed for name, value in LOSS.items()}, None) for seed in (0, 1)},
    "units": {0: scores.Scored({name: [2 - value, 0.5] for name, value in LOSS.items()}, None)},
    "lora_only": {0: scores.Scored({name: LOSS[name] for name in LORA}, None)},
    "flat": {0: scores.Scored(dict.fromkeys(SITE, 1.0), None)},
    "lost": {0: scores.Scored({}, "proxy=lost: every score is 0")},
}


def read_by_people(table, metric="validation_loss", given=SCORED):
    found = agreement.judge(frame(table), judge.usable(given), SITES, metric)
    return judge.views(found, frame(table), given, SITES, planned(), metric)


@pytest.mark.parametrize("families", [f for size in range(5) for f in itertools.combinations(PARTS, size)])
@pytest.mark.parametrize("metric", ["validation_loss", "validation_accuracy"])
def test_half_a_table_is_judged_and_shows_no_nan(families, metric, capsys):
    found = read_by_people([line for family in families for line in PARTS[family]], metric)
    judge.show(found)
    for text in (capsys.readouterr().out, judge.as_markdown(found)):
        assert "nan" not in text.lower()
        assert "None" not in text
        assert "inf" not in text.replace("information", "")
        assert ("not trained yet" in text) == (len(families) < 4)
    assert all(len(line) == len(view.header) for view in found for line in view.rows)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8])
def test_a_few_sites_are_judged(count):
    table = alone_rows({name: LOSS[name] for name in list(LOSS)[:count]})
    found = read_by_people(table)
    text = judge.as_markdown(found)
    assert "nan" not in text.lower()
    assert "fewer than 5 to judge by" in text  # of shortcuts there are two at most
    assert (cells(found[1], "good")[1] == "-") == (count < 5)


def cells(view, first):
    return next(line for line in view.rows if line[0] == first)


def test_the_tables_say_what_was_found():
    table = [line for lines in PARTS.values() for line in lines]
    rows, sites, chosen, made, found = read_by_people(table)
    assert cells(rows, "alone") == ("alone", "118 of 118", "3,840: 59 of 59 with seed 0, 59 of 59 with seed 1")
    assert cells(sites, "good")[1:3] == ("1.00 [1.00, 1.00]*", "1.00")
    assert cells(sites, "flat")[1:] == ("-",) * 6
    assert cells(sites, "lora_only")[3:] == ("-",) * 4
    assert sites.rows[0][0] == "good"
    assert any(note == "-: equal scores (flat)" for note in sites.notes)
    assert any("seed 0 against seed 1 1.00" in note for note in sites.notes)
    assert chosen.header[1].startswith("9,216 (42)")
    assert cells(chosen, "lost")[1:] == ("-",) * 3
    assert cells(made, "lost")[2] == "-"  # no uniform allocation to all linears in this table
    assert cells(found, "lost")[1:] == ("0 of 59", "0", "-", "-")
    assert "proxy=lost: every score is 0" in found.notes


def test_rows_of_unknown_settings_or_without_learning_are_named():
    table = [*alone_rows({"0.k": 0.6}), row("alone", "0.q", ALONE, 0, {"0.q": 5}, 0.6931, commit="abc+")]
    rows = read_by_people(table)[0]
    assert any("uncommitted changes (abc+)" in note and "alone-0.q-3840-s0" in note for note in rows.notes)
    assert any(note.endswith("1 at 3,840") and "learned nothing" in note for note in rows.notes)


def test_nothing_is_written_unasked_and_all_of_it_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "read_table", lambda: frame(PARTS["alone"]))
    monkeypatch.setattr(judge, "sites_of_the_table", lambda: SITES)
    monkeypatch.setattr(judge, "complete", lambda names: SCORED)
    assert judge.main(["--csv", str(tmp_path / "all.csv"), "--markdown", str(tmp_path / "all.md")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.csv", "all.md"]
    found = pd.read_csv(tmp_path / "all.csv")
    assert list(found.columns) == list(agreement.COLUMNS)
    assert "### Sites alone" in (tmp_path / "all.md").read_text()
    assert "good" in capsys.readouterr().out
