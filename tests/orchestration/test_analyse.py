"""`rayndom analyse`: quantities of tiny trained models against direct calls, and what a user meets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import analysis.quantities
from analysis.fingerprints import weights_hash
from analysis.quantities.quantity import ANY_MODEL, NotComputable, Quantity, Subject, quantities, quantity
from analysis.quantities.report import choose, compute, describe_all, list_rows, record_to_markdown, shown_rows, sparkline
from analysis.theory import ctrw_bounds, dcs_bounds, dcs_gradients, ensemble_gradients, ensembles, rna_paths, smoothness, transferability
from analysis.theory.cost import count_macs, count_parameters
from models import build_model
from models.randomness import random_sites, randomness_state
from models.threat_model import ThreatModel
from models.weights import load_pretrained
from orchestration.cli import main
from orchestration.evaluating.analysis_run import AnalysisSettings, subject_of
from orchestration.tracking.tracker import Tracker
from orchestration.trained_models.targets import resolve_target
from tests.orchestration.tiny_home import trained_home
from trainers.attacks import pgd

DEFENCES = ("ctrw", "rna", "dcs", "red")
OWN = {
    "ctrw": {"ctrw_lemma1", "ctrw_probability", "ctrw_cosines", "ctrw_upper_bound", "ctrw_diagnostics"},
    "rna": {"rna_paths", "rna_path_transfer", "rna_type_cosines", "rna_norm_gradients", "rna_smoothness", "rna_theorem"},
    "dcs": {"dcs_points", "dcs_bounds", "dcs_layer_cosines", "dcs_kind_cosines", "dcs_mask_pairs"},
    "red": {"accuracy_matrix", "transfer_matrix", "member_cosines", "lipschitz", "rsi_bounds", "feature_diversity", "member_landscapes"},
}
ALL_RANDOMIZED = {"draw_cosines", "draw_transfer"}
ALL_MODELS = {"weight_noise", "sharpness", "hessian", "smoothness", "cost", "parameters", "weight_landscape", "input_landscape"}
SINGLE_NETWORKS = ALL_MODELS | {"expansion"}


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory, migrated_store):
    """A home with one run of each of the four defences."""
    with trained_home(tmp_path_factory.mktemp("analyse"), migrated_store, [f"{defence}_digits" for defence in DEFENCES]) as located:
        yield located


@pytest.fixture(scope="module")
def fingerprints(shared_home):
    """Fingerprint of each defence's run."""
    found = {}
    for folder in (shared_home.root / "runs").iterdir():
        found[resolve_target(folder.name, shared_home).config["model"]["defence"]] = folder.name
    return found


@pytest.fixture(scope="module")
def subjects(shared_home, fingerprints):
    """What the command analyses, for each defence."""
    settings = AnalysisSettings(num_samples=10, num_draws=2)
    return {name: subject_of(resolve_target(fingerprint, shared_home), settings, None) for name, fingerprint in fingerprints.items()}


def run(capsys, *arguments):
    """Return (exit code, output, errors)."""
    capsys.readouterr()
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows_of(name: str, subject: Subject) -> list[dict]:
    """Return the rows of a quantity as they are stored."""
    record = compute(quantity(name), subject)
    assert "error" not in record
    json.dumps(record, allow_nan=False)
    return record["rows"]


@pytest.mark.parametrize("defence", DEFENCES)
def test_the_default_set_is_computed_shown_and_kept(defence, shared_home, fingerprints, capsys):
    where = ["--home", str(shared_home.root), "--samples", "10", "--draws", "2"]
    code, out, _ = run(capsys, "analyse", fingerprints[defence], "--json", *where)
    assert code == 0
    found = json.loads(out)
    names = {record["name"] for record in found["quantities"]}
    assert names == {name for name in OWN[defence] | ALL_RANDOMIZED | ALL_MODELS if quantity(name).cheap}
    assert all(record["rows"] for record in found["quantities"])

    kept = json.loads(Path(found["records"]).read_text())
    assert kept["defence"] == defence
    assert kept["quantities"].keys() == names
    tracker = Tracker(shared_home, "rayndom")
    run_ = tracker.client.get_run(found["mlflow_run"])
    assert (
        run_.data.metrics["analysis/cost/parameters"]
        == next(r for r in found["quantities"] if r["name"] == "cost")["rows"][0]["parameters"]
    )
    assert "analysis/quantities.json" in [item.path for item in tracker.client.list_artifacts(found["mlflow_run"], "analysis")]

    code, out, _ = run(capsys, "analyse", fingerprints[defence], "--what", "cost", *where)
    assert code == 0
    assert "Parameters, bytes" in out
    assert json.loads(Path(found["records"]).read_text())["quantities"].keys() == names, "what was computed earlier stays"


@pytest.mark.parametrize("defence", DEFENCES)
def test_every_quantity_leaves_the_model_as_it_was(defence, subjects):
    subject = subjects[defence]
    model = subject.model
    before = weights_hash(model), {name: module.training for name, module in model.named_modules()}
    draws = randomness_state(model)
    for entry in choose(model, ["all"]):
        if entry.name == "hessian" and defence != "dcs":
            continue  # slow, and the same for every model
        record = compute(entry, subject)
        assert record["rows"] or "error" in record
        json.dumps(record, allow_nan=False)
        assert record["title"] in record_to_markdown(record)
    assert (weights_hash(model), {name: module.training for name, module in model.named_modules()}) == before
    for name, state in randomness_state(model).items():
        assert (state["seed"], state["position"]) == (draws[name]["seed"], draws[name]["position"])
        for buffer, value in state["draw"]["buffers"].items():
            assert torch.equal(value, draws[name]["draw"]["buffers"][buffer])
    any_model = ALL_MODELS if defence == "red" else SINGLE_NETWORKS
    assert {entry.name for entry in choose(model, ["all"])} == OWN[defence] | ALL_RANDOMIZED | any_model


def test_ctrw_against_direct_calls(subjects):
    subject = subjects["ctrw"]
    (site,) = ctrw_bounds.random_weights(subject.model)
    (lemma,) = rows_of("ctrw_lemma1", subject)
    assert lemma["sum sigma"] == pytest.approx(site.sigma.double().sum().item())
    assert lemma["P exact"] == ctrw_bounds.unconditional_probability(site.mu, site.sigma)
    assert lemma["lowest A"] <= lemma["A of Lemma 1"] <= lemma["highest A"]
    assert lemma["sum sigma >= A"] is (lemma["sum sigma"] >= lemma["A of Lemma 1"])
    expected = site.mu.double().sum().item() / 1e-3  # A = sum mu / (|alpha| sum |W1|)
    total = expected / lemma["highest A"]
    assert 0.2 * site.mu.numel() < total < 5 * site.mu.numel(), "sum |W1| of one draw"

    probabilities = rows_of("ctrw_probability", subject)
    assert [row["epsilon_r"] for row in probabilities] == [0.0, 0.01, 0.05]
    for row in probabilities:
        assert row["P unconditional"] == ctrw_bounds.unconditional_probability(site.mu, site.sigma, row["epsilon_r"])
        assert row["P normal approximation"] == ctrw_bounds.normal_probability(site.mu, site.sigma, row["epsilon_r"])
        assert row["lowest"] <= row["P given W1, mean"] <= row["highest"]

    (cosines,) = rows_of("ctrw_cosines", subject)
    direct = ctrw_bounds.cosine_statistic(site.mu, site.sigma, num_pairs=10_000, seed=0)
    assert (cosines["pairs"], cosines["positive"], cosines["smallest cosine"]) == (10_000, direct.num_positive, direct.minimum)

    (bound,) = rows_of("ctrw_upper_bound", subject)
    x, y = subject.images(10)
    estimate = ctrw_bounds.estimate_upper_bound(subject.model, x, y, num_draws=2, seed=0)
    assert bound["B, estimate"] == estimate.value
    assert "not the paper's B" in compute(quantity("ctrw_upper_bound"), subject)["notes"][0]

    (assumed,) = rows_of("ctrw_diagnostics", subject)
    assert assumed["sum mu^2 / R"] == ctrw_bounds.expected_cosine(site.mu, site.sigma)
    assert assumed["mean |mu|"] == pytest.approx(site.mu.double().abs().mean().item())


def test_dcs_against_direct_calls(subjects):
    subject = subjects["dcs"]
    first, disjoint = rows_of("dcs_points", subject)
    exact = dcs_bounds.point_probabilities(5, 2, 1)
    assert (first["k"], first["n"], first["S"]) == (5, 2, 1)
    assert (first["p_s"], first["p_g"], first["p_u"]) == (exact.same, exact.gap, exact.unhit)
    assert disjoint["p_s"] == 0

    rows = rows_of("dcs_bounds", subject)
    size = (8 + 2 * 2) ** 2  # 8x8 images, padded by half the kernel
    for row in rows:
        direct = dcs_bounds.feasibility(5, 2, 1, row["epsilon_c"], row["epsilon_l"], size)
        assert row["n_min (Eq. 11)"] == direct.lower
        assert row["n_max (Eq. 20)"] == direct.upper
        assert row["feasible"] is direct.feasible is False, "the paper's own setting satisfies its bounds nowhere"
    assert "epsilon_c >= 2" in compute(quantity("dcs_bounds"), subject)["notes"][0]

    x, y = subject.images(10)
    (layer,) = rows_of("dcs_layer_cosines", subject)
    with subject.one_draw():
        direct = dcs_gradients.input_gradient_cosines(subject.model, x, y, 0, seed=0)
    assert layer["E cos, exact"] == direct.expected
    assert layer["E cos, Eq. 7"] == direct.predicted
    assert layer["C_u"] is None, "stride 1 leaves no point unhit"
    assert layer["2 shared"] == pytest.approx(1.0)

    pairs = {row["masks"]: row for row in rows_of("dcs_mask_pairs", subject)}
    same, gap = pairs["same (C_s)"], pairs["gap (C_g): disjoint, same classes"]
    assert same["cosine"] == pytest.approx(1.0)
    assert same["accuracy after transfer"] == same["on the attacked masks"]
    designed = dcs_gradients.designed_pairs(subject.model, "gap", 2, seed=0)
    assert gap["cosine"] == transferability.gradient_cosines(subject.model, x, y, designed).mean


def test_rna_against_direct_calls(subjects):
    subject = subjects["rna"]
    x, y = subject.images(10)
    (paths,) = rows_of("rna_paths", subject)
    layers = len(rna_paths.random_normalizations(subject.model))
    assert (paths["layers L"], paths["paths"]) == (layers, 2**layers)
    assert paths["mean difference"] == pytest.approx(layers / 2)

    points = rows_of("rna_path_transfer", subject)
    assert [point["difference"] for point in points] == list(range(layers + 1))
    assert sum(point["P(difference)"] for point in points) == pytest.approx(1.0)
    pairs = rna_paths.pairs_at_difference(subject.model, 0, 2, seed=0)
    (direct,) = transferability.transfer_by_distance(transferability.transfer(subject.model, x, y, subject.attack(), pairs))
    assert points[0]["mean accuracy"] == direct.mean

    (cosines,) = rows_of("rna_type_cosines", subject)
    expected = rna_paths.cosines_between_types(subject.model, x, y)["bn", "in"]
    assert cosines["mean cosine"] == expected.mean
    assert sum(cosines["histogram -1 to 1"]) == 10
    (shown,) = [row["value"] for row in shown_rows(compute(quantity("rna_type_cosines"), subject)) if row["what"].startswith("histogram")]
    assert len(shown) == 22

    gradients = rows_of("rna_norm_gradients", subject)
    assert len(gradients) == layers
    assert all(row["largest relative error"] < 1e-9 for row in gradients), "Eq. 5 holds in float64"

    smooth = rows_of("rna_smoothness", subject)
    assert len(smooth) == 2 * (layers + 1)
    with transferability.undisturbed(subject.model):
        rna_paths.set_path(subject.model, (1,) * layers)
        curvature = smoothness.effective_smoothness(subject.model, x, y)
    at_image = next(row for row in smooth if row["path"] == "in" and row["at the input of"] == "the image")
    assert at_image["mean"] == pytest.approx(curvature.mean().item(), rel=1e-5)

    (bound,) = rows_of("rna_theorem", subject)
    assert (bound["bound of T"] is None) == (bound["denominator"] <= 0)


def test_ensembles_against_direct_calls(subjects):
    subject = subjects["red"]
    x, y = subject.images(10)
    record = compute(quantity("accuracy_matrix"), subject)
    matrix = torch.tensor([[row[f"member {j}"] for j in range(3)] for row in record["rows"]])
    metrics = record["metrics"]
    assert metrics["rsi_accuracy"] == pytest.approx(matrix.mean().item())
    assert metrics["rsi_accuracy"] == pytest.approx(metrics["same_member_accuracy"] / 3 + 2 * metrics["other_member_accuracy"] / 3)
    attack = ensembles.MemberAttack(epsilon=0.1, num_steps=20, step_size=0.025, num_restarts=1)
    direct = ensembles.accuracy_matrix(subject.model, x, y, attack)
    torch.testing.assert_close(matrix.double(), direct.accuracy, atol=1e-6, rtol=0)

    cosines = rows_of("member_cosines", subject)
    similarity = ensemble_gradients.gradient_similarity(subject.model, x, y)
    assert [(row["first"], row["second"]) for row in cosines] == [(0, 1), (0, 2), (1, 2)]
    assert cosines[1]["mean |cosine|"] == similarity.absolute_NN[0, 2].item()

    slopes = rows_of("lipschitz", subject)
    estimates = ensemble_gradients.lipschitz_estimates(subject.model, x, y, epsilon=0.1)
    assert [row["risk"] for row in slopes] == estimates.risk.tolist()
    assert [row["largest Lipschitz"] for row in slopes] == estimates.local_lipschitz.tolist()

    (bounds,) = rows_of("rsi_bounds", subject)
    assert bounds["lower"] <= bounds["RSI, attacked"] <= bounds["upper"]


def test_an_ensemble_that_is_wrong_everywhere_has_no_transfer_matrix(subjects):
    subject = subjects["red"]
    x, _ = subject.images(10)
    with torch.no_grad():
        logits = subject.model.members[0](x)
    wrong = Subject(subject.model, lambda: (x, logits.argmin(dim=1)), subject.threat_model)
    record = compute(quantity("transfer_matrix"), wrong)
    assert "rightly" in record["error"]
    assert "Not computed" in record_to_markdown(record)
    with pytest.raises(NotComputable):
        quantity("transfer_matrix").compute(wrong)


@pytest.mark.parametrize("defence", DEFENCES)
def test_transfer_over_distance(defence, subjects):
    subject = subjects[defence]
    rows = rows_of("draw_transfer", subject)
    distances = [row["distance"] for row in rows]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(0.0, abs=1e-9)
    assert rows[0]["gradient cosine"] == pytest.approx(1.0)
    assert rows[0]["accuracy after transfer"] == rows[0]["on the attacked draw"], "distance 0: the draw is known"
    assert rows[-1]["gradient cosine"] < 1
    expected = {"ctrw": 1.0, "rna": len(list(random_sites(subject.model))), "dcs": 2.0, "red": 1.0}
    assert distances[-1] == pytest.approx(expected[defence])


def test_cost_and_cosines_between_draws(subjects):
    subject = subjects["ctrw"]
    (cost,) = rows_of("cost", subject)
    assert cost["parameters"] == count_parameters(subject.model)
    assert cost["MACs per image"] == count_macs(subject.model, (1, 8, 8))
    x, y = subject.images(10)
    (row,) = rows_of("draw_cosines", subject)
    direct = transferability.gradient_cosines(subject.model, x, y, transferability.random_pairs(subject.model, 2, 0))
    assert row["mean cosine"] == direct.mean
    assert sum(row["histogram -1 to 1"]) == 20


def test_landscapes_meet_the_loss_at_rest(subjects):
    subject = subjects["ctrw"]
    at_rest = {row["images"]: row["loss"] for row in rows_of("weight_noise", subject)}
    rows = rows_of("weight_landscape", subject)
    assert len(rows) == 2 * 11
    for row in rows:
        assert row["lowest"] <= row["mean loss"] <= row["highest"]
        if row["position"] == 0:
            assert row["lowest"] == pytest.approx(row["highest"]) == pytest.approx(at_rest[row["images"]], rel=1e-5)
    landscapes = rows_of("input_landscape", subject)
    x, y = subject.images(4)
    with subject.one_draw(), torch.no_grad():
        losses = torch.nn.functional.cross_entropy(subject.model(x), y, reduction="none")
    assert [row["loss"] for row in landscapes] == pytest.approx(losses[: len(landscapes)].tolist(), rel=1e-4)
    assert all(row["rise"] >= max(0.0, row["rise along the gradient"]) for row in landscapes)


def test_expansion_errors_grow_with_the_noise_and_need_rules():
    model = build_model("at", backbone="resnet8", num_classes=10, image_shape=(1, 8, 8)).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((8, 1, 8, 8), generator=generator), torch.arange(8)
    subject = Subject(model, lambda: images)
    errors = {(row["noise"], row["sigma"]): row["first order"] for row in rows_of("expansion", subject)}
    assert errors["absolute", 1e-4] < errors["absolute", 1e-3] < errors["absolute", 1e-2]
    other = build_model("single_normalization", backbone="resnet8", num_classes=10, image_shape=(1, 8, 8), normalization="ln").eval()
    assert "no rule" in compute(quantity("expansion"), Subject(other, lambda: images))["error"]


def test_the_attack_is_pgd_within_the_threat_model_of_the_recipe(subjects):
    subject = subjects["ctrw"]
    x, y = subject.images(10)
    assert subject.attack_name == "PGD-20, linf 0.1"
    with subject.one_draw():
        found = subject.attack()(subject.model, x, y)
        generator = subject.generator("attack")
        expected = pgd(subject.model, x, y, epsilon=0.1, step_size=0.025, steps=20, generator=generator)
    assert torch.equal(found, expected)
    assert y.bincount(minlength=10).tolist() == [1] * 10


def test_a_deterministic_model_has_no_quantities_of_draws():
    model = build_model("at", backbone="resnet8", image_shape=(1, 8, 8))
    assert {entry.name for entry in choose(model, ["all"])} == SINGLE_NETWORKS
    assert {row["quantity"] for row in list_rows(model) if row["applies"]} == SINGLE_NETWORKS


def test_an_ensemble_of_defences_has_the_quantities_of_both():
    model = build_model("red", backbone="resnet8", image_shape=(1, 8, 8), num_members=2, member={"name": "ctrw"})
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    subject = Subject(model, lambda: (x, y), ThreatModel(epsilon=0.1), num_draws=1)
    names = {entry.name for entry in choose(model, ["all"])}
    assert names >= {"ctrw_lemma1", "member_cosines", "draw_transfer"}
    assert "ctrw_upper_bound" not in names, "the estimate is for one random weight"
    assert len(rows_of("ctrw_lemma1", subject)) == 2
    assert rows_of("draw_transfer", subject)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["analyse"], ["needs a model", "--what list"]),
        (["analyse", "CTRW", "--what", "ctrw_lema1"], ["'ctrw_lema1'", "'ctrw_lemma1'"]),
        (["analyse", "CTRW", "--what", "rna_paths"], ["rna_paths needs random normalizations (rna)", "'ctrw'", "ctrw_lemma1"]),
        (["analyse", "CTRW", "--samples", "0"], ["--samples", "'0'", "from 1"]),
        (["analyse", "nothing-there"], ["nothing-there"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments, parts, shared_home, fingerprints, capsys):
    arguments = [fingerprints["ctrw"] if argument == "CTRW" else argument for argument in arguments]
    code, _, err = run(capsys, *arguments, "--home", str(shared_home.root))
    assert code == 2
    assert err.startswith("error: ")
    for part in parts:
        assert part in err


def test_list_and_formats(shared_home, fingerprints, capsys):
    where = ["--home", str(shared_home.root)]
    code, out, _ = run(capsys, "analyse", "--what", "list", "--json")
    assert code == 0
    assert [row["quantity"] for row in json.loads(out)] == list(quantities())
    code, out, _ = run(capsys, "analyse", fingerprints["dcs"], "--what", "list", "--format", "csv", *where)
    assert code == 0
    assert "applies" in out.splitlines()[1]
    code, out, _ = run(capsys, "analyse", fingerprints["dcs"], "--what", "dcs_points", "--format", "markdown", *where)
    assert code == 0
    assert out.startswith("### Points that")


def test_one_more_quantity_is_one_more_file(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(
        "from analysis.quantities.quantity import ANY_MODEL, Finding, Quantity\n"
        "QUANTITIES = (Quantity('toy', 'A toy', 'nothing', 'none', ANY_MODEL, lambda subject: Finding([{'answer': 42}])),)\n"
    )
    monkeypatch.setattr(analysis.quantities, "__path__", [*analysis.quantities.__path__, str(tmp_path)])
    quantities.cache_clear()
    try:
        model = build_model("natural", backbone="resnet8", image_shape=(1, 8, 8))
        (entry,) = choose(model, ["toy"])
        assert isinstance(entry, Quantity)
        assert entry.requirement is ANY_MODEL
        assert compute(entry, Subject(model, lambda: (torch.zeros(0), torch.zeros(0))))["rows"] == [{"answer": 42}]
    finally:
        quantities.cache_clear()


def test_the_page_on_quantities_is_up_to_date():
    page = Path(__file__).resolve().parents[2] / "docs" / "quantities.md"
    assert page.read_text() == describe_all(), "rayndom analyse --what list --format markdown > docs/quantities.md"


def test_sparkline():
    assert sparkline([0, 1, 8, 4]) == " ▁█▄"
    assert sparkline([0, 0]) == "  "


def test_a_model_without_images_still_has_what_needs_none(shared_home, fingerprints):
    folder = resolve_target(fingerprints["ctrw"], shared_home).folder
    model = load_pretrained(folder, resample_on_forward=False)

    def missing():
        raise AssertionError("no image is needed")

    assert compute(quantity("ctrw_diagnostics"), Subject(model, missing))["rows"]
