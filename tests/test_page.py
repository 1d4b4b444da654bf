"""The HTML page: what is on it, told from the values that its script draws; the browser's part is tested apart."""

import base64
import json
import math
import re
import shutil
import zlib

import pytest
from plotly.offline import get_plotlyjs

from heterolora import analysis
from heterolora.allocation import Allocation
from heterolora.cli import main
from heterolora.errors import SettingError
from heterolora.history import HISTORY
from heterolora.page import figures
from heterolora.page.collect import collect
from heterolora.page.record import read_record
from heterolora.page.render import json_in_html, render, write_page
from heterolora.report.files import write_json
from heterolora.sites import site_from, split_name
from heterolora.statistics import mean, rank_correlation
from tests.conftest import ROOT
from tests.runs import (
    ADAPTER,
    FAMILY,
    change_json,
    ranks_of,
    scores_of,
    tiny_space,
    write_history,
    write_run,
    write_search,
)
from tests.surroundings import ALONE


@pytest.fixture(scope="module")
def space():
    return tiny_space()


def page_of(*folders):
    return render(collect(folders))


def content_of(page):
    """The overview and the runs of a page, unpacked as its script does it."""
    packed = json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)[1])
    overview, *runs = (
        json.loads(zlib.decompress(base64.b64decode(text))) for text in (packed["overview"], *packed["runs"])
    )
    return overview, runs


def panels(run):
    return {panel["caption"]: panel for block in run["blocks"] for panel in block["panels"]}


def figure(run, caption, choice=0):
    return panels(run)[caption]["choices"][choice]["figure"]


def cells(table, column):
    index = [found["name"] for found in table["columns"]].index(column)
    return [row[index] for row in table["rows"]]


def without_plotly(page):
    library = get_plotlyjs().replace("</script", r"<\/script")
    assert page.count(library) == 1
    return page.replace(library, "")


# -- one run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_page(space, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "a_run"
    ranks = ranks_of(space) | {"0.q": 0, "1.v": 3}
    return write_run(folder, space, ranks=ranks), ranks


def test_the_map_tells_rank_no_rank_and_no_site_apart(run_page, space):
    folder, ranks = run_page
    _, (run,) = content_of(page_of(folder))
    heatmap = figure(run, "Rank of each site")["data"][0]
    at = {(y, x): (row, column) for row, y in enumerate(heatmap["y"]) for column, x in enumerate(heatmap["x"])}
    known = {(site.label, site.layer): site.name for site in space.sites}
    assert at.keys() > known.keys()
    for place, (row, column) in at.items():
        z, text = heatmap["z"][row][column], heatmap["text"][row][column]
        if place not in known:
            assert (z, text, heatmap["hovertext"][row][column]) == (None, "", None)
            continue
        rank = ranks[known[place]]
        assert z == pytest.approx(0 if rank == 0 else 1 + math.log2(rank))
        assert text == (str(rank) if rank else "·")
    scale = heatmap["colorscale"]
    below = [colour for step, colour in scale if step * heatmap["zmax"] < 1]
    assert below[:2] == [figures.NO_RANK] * 2
    assert scale[3][0] * heatmap["zmax"] == pytest.approx(1)  # the first colour of ranks is that of rank 1
    assert len({colour for _, colour in scale}) > 10


def test_the_tooltip_says_site_rank_parameters_share_and_score(run_page, space):
    folder, _ = run_page
    _, (run,) = content_of(page_of(folder))
    heatmap = figure(run, "Rank of each site")["data"][0]
    text = heatmap["hovertext"][heatmap["y"].index("v")][1]
    site, scores = space["1.v"], scores_of(space)
    parameters = 3 * (site.in_features + site.out_features)
    place = sorted(scores.values(), reverse=True).index(scores["1.v"]) + 1
    assert text.split("<br>") == [
        "<b>1.v</b>",
        "rank 3",
        f"{parameters:,} parameters, {100 * parameters / 10_000:.3g} % of the budget",
        f"snip {scores['1.v']:.4g} (place {place} of {len(scores)})",
    ]


def test_sites_and_facts_are_those_of_the_files(run_page, space):
    folder, ranks = run_page
    record = read_record(folder)
    assert [site.rank for site in record.sites] == list(ranks.values())
    assert sum(site.parameters for site in record.sites) == record.spent == FAMILY.cost(space.sites)(ranks)
    assert record.spectra.keys() == {name for name, rank in ranks.items() if rank}
    adapter = FAMILY.probe(space["1.v"], 3, 0.1, 0, ALONE)
    assert record.spectra["1.v"] == analysis.spectrum(adapter.A, adapter.B, 2.0)
    assert record.curves["validation/accuracy"] == [(9, 0.65), (19, pytest.approx(0.7)), (29, pytest.approx(0.75))]
    assert not [name for name in record.curves if name.startswith("test")]
    _, (run,) = content_of(page_of(folder))
    facts = dict(run["facts"])
    amounts = [site.parameters for site in record.sites]
    assert facts["Gini of parameters"] == f"{analysis.gini(amounts):.3f}"
    assert facts["evenness"] == f"{analysis.evenness(amounts):.3f}"
    assert (facts["test accuracy"], facts["training"], facts["budget"]) == ("0.7500", "10.0 s", "10,000")
    assert [cell["value"] for cell in cells(run["sites"], "rank")] == list(ranks.values())
    assert sum(float(cell["text"]) for cell in cells(run["sites"], "share, %")) == pytest.approx(
        100 * record.spent / 10_000, abs=0.2
    )
    assert run["notes"] == []


def test_a_page_of_one_run_has_no_comparison(run_page):
    page = without_plotly(page_of(run_page[0]))
    assert "<table" not in page
    assert "reviews: tiny_bert, snip, seed 0" in page


def test_nothing_comes_from_outside(run_page):
    page = page_of(run_page[0])
    own = without_plotly(page)
    assert re.findall(r"(?:src|href|action)=\"([^\"]*)", own) == ["data:,"]
    assert not re.search(r"@import|url\(|https?://|fetch\(|XMLHttpRequest|WebSocket|import\(", own)
    assert "default-src 'none'" in own  # and if something tried, the browser would refuse


# -- dynamic runs, searches, tournaments ------------------------------------------------------------------------------


def test_the_history_of_a_dynamic_run_is_drawn(space, tmp_path):
    folder = write_run(tmp_path / "run", space)
    decisions = write_history(folder, space)
    _, (run,) = content_of(page_of(folder))
    heatmap = figure(run, "Rank of each site over time")["data"][0]
    assert heatmap["x"] == ["0", "10", "20", "30"]
    assert "0.k" not in heatmap["y"]
    assert heatmap["customdata"][heatmap["y"].index("0.q")][1] == "rank 2<br>every 10 steps &lt;1&gt;"
    often = figure(run, "How often each site was on, %")["data"][0]
    shares = analysis.site_frequency([decision.ranks for decision in decisions])
    assert often["z"][often["y"].index("o")][2] == shares["2.o"]
    areas = figure(run, "Where the parameters were")["data"]
    assert [area["name"] for area in areas] == ["lora", "shortcut"]
    assert areas[0]["x"] == [0, 10, 20, 30, 30]
    assert [a + b for a, b in zip(areas[0]["y"], areas[1]["y"], strict=True)] == pytest.approx([1] * 5)


def test_a_static_run_has_no_decisions(run_page):
    _, (run,) = content_of(page_of(run_page[0]))
    assert [block["title"] for block in run["blocks"]] == ["Where the budget went", "Training", "What was learned"]


@pytest.fixture
def search(space, tmp_path):
    folder = tmp_path / "searched"
    scores = {"snip": scores_of(space), "spectral": scores_of(space, 1), "depth": scores_of(space, 2)}
    write_search(folder, space, ranks_of(space), scores, "spectral", 10_000)
    write_json(folder / "status.json", {"state": "finished"})
    return folder, scores


def test_a_search_without_training_shows_its_proxies(search):
    folder, scores = search
    overview, (run,) = content_of(page_of(folder))
    assert panels(run)["Score of each site"]["choices"][0]["name"] == "spectral"  # the one that decided
    (block,) = overview
    heatmap = block["panels"][0]["choices"][0]["figure"]["data"][0]
    expected = rank_correlation(list(scores["snip"].values()), list(scores["depth"].values()), "spearman").value
    assert heatmap["z"][heatmap["y"].index("snip")][heatmap["x"].index("depth")] == pytest.approx(expected)
    assert [choice["name"] for choice in block["panels"][1]["choices"]] == [
        "snip and spectral", "snip and depth", "spectral and depth",
    ]  # fmt: skip


def test_what_a_search_says_about_agreement_and_its_other_allocations_are_there(search, space):
    folder, _ = search
    estimate = {"value": 0.5, "low": 0.3, "high": 0.75}
    pair = {"a": "snip", "b": "spectral", "spearman": estimate, "kendall": estimate}
    stability = {"snip": {"spearman": estimate}}
    write_json(folder / "agreement.json", {"pairs": [pair], "stability": stability})
    write_json(folder / "search.json", {"title": "a search", "seconds": {"search": 3.0}})
    other = folder / "allocations" / "qv_r2" / "snip"
    other.mkdir(parents=True)
    ranks = ranks_of(space, 5)
    found = Allocation(ranks, FAMILY.cost(space.sites)(ranks), None, {"adapter": ADAPTER})
    write_json(other / "allocation.json", found.as_dict())
    overview, runs = content_of(page_of(folder))
    assert [block["title"] for block in overview] == ["Proxies against each other"]  # not once more for the second
    assert [run["title"] for run in runs] == ["a search", "a search; qv_r2, snip"]
    block = next(block for block in runs[0]["blocks"] if block["title"] == "Agreement of the proxies")
    assert "snip 0.500 [0.300, 0.750]" in block["text"]
    assert [choice["name"] for choice in block["panels"][0]["choices"]] == ["Spearman", "Kendall"]
    heatmap = block["panels"][0]["choices"][0]["figure"]["data"][0]
    assert heatmap["customdata"][0][1] == heatmap["customdata"][1][0] == "<br>95 % interval [0.300, 0.750]"
    assert [cell["value"] for cell in cells(runs[1]["sites"], "rank")] == list(ranks.values())


@pytest.mark.parametrize("content", [{}, {"pairs": None}, {"pairs": [{"a": "x"}], "stability": {"x": 1}}], ids=str)
def test_every_key_of_an_agreement_may_be_missing(search, content):
    folder, _ = search
    write_json(folder / "agreement.json", content)
    write_json(folder / "search.json", {})
    _, (run,) = content_of(page_of(folder))
    assert "Agreement of the proxies" not in [block["title"] for block in run["blocks"]]


def test_a_tournament_whose_folders_are_gone_is_shown_from_its_rows():
    folder = ROOT / "docs" / "results" / "tournament_small"
    page = page_of(folder)
    _, runs = content_of(page)
    assert len(runs) == 9  # controls and trials are no runs
    assert "its folder is gone" in runs[0]["notes"][0]
    assert "uniform" in page
    assert figure(runs[0], "Rank of each site")["data"][0]["z"][0][0] == 2  # uniform, rank 2
    groups = re.search(r'<table id="groups">.*?</table>', page, re.S)[0]
    assert "difference" in groups  # from the baseline that the tournament declared


# -- many runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(space, tmp_path_factory):
    """Two proxies, three seeds; a run that failed, and one that was broken off before it allocated anything."""
    root = tmp_path_factory.mktemp("sweep")
    for number in range(6):
        proxy, seed = ("snip", "spectral")[number % 2], number // 2
        write_run(root / f"{number}_x", space, proxy=proxy, seed=seed, accuracy=0.7 + 0.01 * number)
    write_run(root / "6_x", space, state="failed", error="the loss is not finite")
    (root / "7_x").mkdir()
    write_json(root / "7_x" / "status.json", {"state": "interrupted"})
    (root / "8_x").mkdir()
    write_json(root / "8_x" / "status.json", {"state": "planned"})
    return root


def test_groups_have_their_mean_and_interval_over_seeds(sweep):
    from heterolora.page.content import group_table

    table = group_table(collect([sweep]))
    assert [cell["text"] for cell in cells(table, "group")] == ["proxy=snip", "proxy=spectral"]
    expected = [mean([0.70, 0.72, 0.74]), mean([0.71, 0.73, 0.75])]
    assert [cell["value"] for cell in cells(table, "mean")] == pytest.approx([one.value for one in expected])
    assert [cell["text"] for cell in cells(table, "95 % interval")] == [
        f"[{one.low:.4f}, {one.high:.4f}]" for one in expected
    ]
    assert [cell["value"] for cell in cells(table, "training, s")] == [11, 11]


def test_unfinished_runs_are_named_and_dry_ones_left_out(sweep):
    collected = collect([sweep])
    assert collected.notes == (
        "6_x is not finished (failed: the loss is not finite)",
        "7_x is not finished (interrupted)",
    )
    page = render(collected)
    assert "6_x is not finished" in without_plotly(page)
    _, runs = content_of(page)
    assert [run["name"] for run in runs] == [f"{number}_x" for number in range(8)]
    assert runs[6]["notes"] == ["failed: the loss is not finite"]
    assert runs[7]["blocks"] == []


def test_proxies_of_different_runs_are_compared_seed_by_seed(sweep, space):
    (agreement,) = collect([sweep]).agreements
    assert agreement.seeds == 3
    assert agreement.spearman == {("snip", "spectral"): pytest.approx(1)}  # the made-up scores depend on the seed alone


def test_unequal_budgets_are_marked_not_refused(space, tmp_path):
    write_run(tmp_path / "a", space, proxy="snip")
    write_run(tmp_path / "b", space, proxy="spectral", ranks=dict.fromkeys(ranks_of(space), 1))
    page = without_plotly(page_of(tmp_path))
    assert "unequal: held parameters differ by more than 1 %" in page
    assert "proxy=spectral (unequal)" in page


def test_what_cannot_be_compared_is_said_and_the_rest_is_shown(space, tmp_path):
    for name, accuracy in (("a", 0.7), ("b", 0.8)):  # twice the same group and seed, with other results
        write_run(tmp_path / name, space, accuracy=accuracy)
    page = page_of(tmp_path)
    assert "no comparison: table=" in without_plotly(page)
    assert len(content_of(page)[1]) == 2


def test_several_folders_are_one_page_and_none_counts_twice(sweep, run_page):
    collected = collect([sweep, sweep / "0_x", run_page[0]])
    assert len(collected.runs) == 9
    assert len({run.name for run in collected.runs}) == 9


@pytest.mark.medium
def test_fifty_runs_stay_small_and_draw_one_run_at_a_time(space, tmp_path):
    write_run(tmp_path / "0", space)
    for number in range(1, 50):
        shutil.copytree(tmp_path / "0", tmp_path / str(number))
        change_json(tmp_path / str(number) / "summary.json", seed=number)
    page = page_of(tmp_path)
    assert len(without_plotly(page)) < 1_500_000
    assert len(content_of(page)[1]) == 50


# -- hostile and damaged input -----------------------------------------------------------------------------------------

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028"


def test_no_text_of_a_run_becomes_markup(space, tmp_path):
    root = tmp_path / "<b>&"
    for seed, name in enumerate(("<img src=x>", "b")):
        folder = write_run(root / name, space, seed=seed, title=HOSTILE)
        scores = {HOSTILE: scores_of(space), "snip": scores_of(space, 1)}
        write_search(folder, space, ranks_of(space), scores, HOSTILE, 10_000)
        sites = json.loads((folder / "sites.json").read_text())
        sites[0] |= {"role": HOSTILE}
        write_json(folder / "sites.json", sites)
        change_json(folder / "summary.json", choices={"task": HOSTILE, "model": "<i>"})
    write_run(root / "c", space, state="failed", error=HOSTILE)
    page = page_of(root)
    own = without_plotly(page)
    assert "<img" not in own
    assert own.count("</script>") == 3
    _, runs = content_of(page)
    drawn = json.dumps([run["blocks"] for run in runs])
    in_figures = json.dumps([choice["figure"] for panel in panels(runs[0]).values() for choice in panel["choices"]])
    assert "&lt;img src=x" in drawn
    assert "<img" not in in_figures


def test_json_cannot_end_the_script_that_it_stands_in():
    text = json_in_html({"a": "</script><!--&\u2028\u2029"})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"a": "</script><!--&\u2028\u2029"}
    with pytest.raises(ValueError, match="JSON compliant"):
        json_in_html(math.nan)


@pytest.mark.parametrize("name", ["sites.json", "scores.json", "allocation.json", "metrics.csv", "adapter.safetensors",
                                  "status.json", "summary.json", HISTORY, "agreement.json"])  # fmt: skip
def test_a_damaged_file_is_noted_and_the_rest_is_shown(space, tmp_path, name):
    folder = write_run(tmp_path / "run", space)
    (folder / name).write_text('{"torn": \n"')
    page = page_of(folder)
    _, (run,) = content_of(page)
    assert run["notes"]
    assert run["blocks"] or name == "allocation.json"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((name, key, value) for value in (3, "text", [1]) for name, key in (("summary.json", "metrics"),)),
        ("summary.json", "choices", "text"),
        ("summary.json", "seconds", []),
        ("summary.json", "seed", {}),
        ("allocation.json", "provenance", [1]),
        ("allocation.json", "spent", "many"),
        ("allocation.json", "budget", []),
        ("status.json", "overrides", [3]),
        ("status.json", "state", 7),
        ("sites.json", None, [{"name": 3}]),
    ],
)
def test_json_of_another_kind_is_noted_and_no_traceback(space, tmp_path, name, key, value):
    write_run(tmp_path / "good", space, seed=0)
    write_run(tmp_path / "bad", space, seed=1)
    path = tmp_path / "bad" / name
    content = value if key is None else json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps(content))
    write_page([tmp_path], tmp_path / "report.html")
    collected = collect([tmp_path])
    assert any("good" in run.name for run in collected.runs)
    said = " ".join([*collected.notes, *(note for run in collected.runs for note in run.record.notes)])
    assert name in said or "damaged" in said or "bad is not finished" in said


@pytest.mark.parametrize("name", ["sites.json", "scores.json", "metrics.csv", "adapter.safetensors", "config.yaml"])
def test_a_missing_file_is_no_error(space, tmp_path, name):
    folder = write_run(tmp_path / "run", space)
    (folder / name).unlink()
    _, (run,) = content_of(page_of(folder))
    assert run["notes"] == []
    assert panels(run)["Rank of each site"]


@pytest.mark.parametrize("ranks", [0, 1], ids=["no rank at all", "rank 1 everywhere"])
def test_allocations_at_the_edge_are_drawn(space, tmp_path, ranks):
    folder = write_run(tmp_path / "run", space, ranks=dict.fromkeys(ranks_of(space), ranks))
    _, (run,) = content_of(page_of(folder))
    assert ("evenness" in dict(run["facts"])) == bool(ranks)


@pytest.mark.parametrize(
    "scores", [{"a": 0.0, "b": 0.0}, {"a": -1.0, "b": 1e9}, {"a": 1.0, "b": 1.0}, {"a": 1e-300, "b": 1e300}], ids=str
)
def test_scores_of_every_size_are_drawn(scores):
    sites = [figures.Place(name, 0, name, "lora", 1, 4, 4) for name in scores]
    tooltips = figures.tips(sites, None, {"p": scores})
    for made in (figures.score_map(sites, scores, tooltips), figures.score_and_rank(sites, scores, tooltips)):
        json.dumps(made, allow_nan=False)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_where(run_page, capsys):
    folder, _ = run_page
    assert main(["report", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{folder / 'report.html'}\n", "")
    assert (folder / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_unfinished_runs_are_also_said_on_stderr(sweep, tmp_path, capsys):
    assert main(["report", str(sweep), "--output", str(tmp_path / "page.html")]) == 0
    assert "6_x is not finished (failed: the loss is not finite)" in capsys.readouterr().err
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["."], "DIR=.: holds no run"),
        (["missing"], "DIR=missing: no such folder"),
        ([".", "."], "--output=None: several folders need the name of a file"),
        ([".", "--output", "no/page.html"], "--output=no/page.html: needs the name of a file, in a folder that exists"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 1
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


# -- sites, read back --------------------------------------------------------------------------------------------------


def test_sites_come_back_from_their_json(space):
    for site in space.sites:
        assert site_from(json.loads(json.dumps(site.as_dict()))) == site
        assert split_name(site.name) == (site.layer, site.label)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("3.q", (3, "q")),
        ("encoder.3.q", (3, "encoder.q")),
        ("0.attention.0.dense", (0, "attention.0.dense")),
        ("11.shortcut_attn_s4", (11, "shortcut_attn_s4")),
    ],
)
def test_names_are_split_into_layer_and_label(name, expected):
    assert split_name(name) == expected


def test_what_is_no_site_is_refused(space):
    values = space.sites[0].as_dict()
    for change in ({"kind": "other"}, {"layer": "0"}, {"source": "nowhere"}, {"sink": None}):
        with pytest.raises(ValueError, match=r"no site|no point"):
            site_from(values | change)
    with pytest.raises(ValueError, match="no name of a site"):
        split_name("q")


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(SettingError, match="no such folder"):
        collect([tmp_path / "missing"])
