"""The comparison that no paper has: five defences, their baselines and combinations under one schedule and one protocol, with their cost.

Every row has the `common` settings: PGD-10, 200 epochs with drops at 100 and 150, selection on the same held-out images, ResNet-18 on
CIFAR-10; ensembles have three members. Every number is measured by the suite `standard`.
"""

from __future__ import annotations

from analysis.papers.model import Accuracy, Clean, Column, Item, Note, Paper, Row, Run, Theory, Timing, WorstCase

SUITE = "standard"
WHERE = "cifar10_resnet18"

AMBIGUITIES = {
    "members": "Ensembles have three members, so that the table can be afforded; RED's paper has eight on CIFAR-10.",
    "optimizer": "GAL, ADP and TRS keep the optimizer of their papers.",
    "schedule": "DCS has the schedule of the others here, not that of its paper (PGD-7, drops at 60 and 120).",
    "clean": "Ensembles other than `RED with adversarial training` see adversarial images in their regularizers at most.",
    "control": "Deterministic controls of RAT: what the Taylor terms are worth shows against them.",
}

THREE = "defence.num_members=3"
COMMON_DCS = ("training.attack.steps=10", "training.schedule.milestones=[100, 150]")
AWP_EPOCHS = {"training.objective.weight_perturbation.warmup_epochs": 10.0}
RED_EPOCHS = {"training.objective.warmup_epochs": 5.0}


def _run(method: str, *overrides: str) -> Run:
    return Run(f"{method}_{WHERE}", overrides)


def _ensemble(method: str, *overrides: str) -> Run:
    warmup = {"training.objective.pretraining_epochs": 20.0} if method == "dverge" else {}
    return Run(f"{method}_{WHERE}", (THREE, *overrides), in_epochs=warmup)


def _red(method: str, *overrides: str) -> Run:
    return Run(f"{method}_{WHERE}", (THREE, *overrides), in_epochs=RED_EPOCHS)


def _members(defence: str) -> Run:
    """Return RED with adversarial training, its members carrying a defence each."""
    return Run(f"red_{WHERE}_{defence}_members", (THREE, "training.objective.ce_on=adv"), in_epochs=RED_EPOCHS)


def _norm(name: str) -> Run:
    return _run("single_normalization", f"defence.normalization={name}")


BASELINES, RANDOMIZED, ENSEMBLES, WEIGHTS, COMBINED = "baselines", "random layers", "ensembles", "training by weight noise", "combinations"

ROWS = (
    Row("natural", "natural training", BASELINES, _run("natural")),
    Row("at", "adversarial training, BN", BASELINES, _run("at")),
    Row("in", "adversarial training, IN", BASELINES, _norm("in")),
    Row("gn", "adversarial training, GN32", BASELINES, _run("single_normalization")),
    Row("bgn", "adversarial training, BGN32", BASELINES, _norm("bgn")),
    Row("ln", "adversarial training, LN", BASELINES, _norm("ln")),
    Row("dcn", "deformable convolution", BASELINES, _run("dcn")),
    Row("trades", "TRADES", BASELINES, _run("trades")),
    Row("awp", "TRADES-AWP", BASELINES, Run(f"awp_{WHERE}", in_epochs=AWP_EPOCHS)),
    Row("ctrw", "CTRW", RANDOMIZED, _run("ctrw")),
    Row("ctrw_project", "CTRW with the paper's bounds", RANDOMIZED, _run("ctrw", "defence.constraint=project", "defence.lower_bound=1000")),
    Row("rna", "RNA", RANDOMIZED, _run("rna")),
    Row("dcs", "DCS with GSAT", RANDOMIZED, _run("dcs", *COMMON_DCS)),
    Row("gal", "GAL", ENSEMBLES, _ensemble("gal")),
    Row("adp", "ADP", ENSEMBLES, _ensemble("adp")),
    Row("dverge", "DVERGE", ENSEMBLES, _ensemble("dverge", "training.objective.epsilon=0.07")),
    Row("trs", "TRS", ENSEMBLES, _ensemble("trs")),
    Row("red", "RED", ENSEMBLES, _red("red")),
    Row("red_adversarial", "RED with adversarial training", ENSEMBLES, _red("red", "training.objective.ce_on=adv")),
    Row("ps_red", "PS-RED", ENSEMBLES, _red("ps_red")),
    Row("rat_taylor", "RAT by its equations", WEIGHTS, _run("rat_taylor")),
    Row("rat_surrogate", "RAT as its public code", WEIGHTS, _run("rat_surrogate")),
    Row("rat_direct", "one sample of weight noise", WEIGHTS, _run("rat_direct")),
    Row("label_smoothing", "label smoothing", WEIGHTS, _run("label_smoothing")),
    Row("red_ctrw", "RED of CTRW members", COMBINED, _members("ctrw")),
    Row("red_rna", "RED of RNA members", COMBINED, _members("rna")),
    Row("red_dcs", "RED of DCS members", COMBINED, _members("dcs")),
)


def _cost(field: str) -> Theory:
    return Theory("cost.measure_costs", field=field)


COLUMNS = (
    Column("clean", "clean", Clean(), "accuracy"),
    Column("paper", "PGD-20, paper protocol (T0)", Accuracy(SUITE, "pgd_20"), "accuracy"),
    Column("unknown", "PGD-20, unknown draw (T1)", Accuracy(SUITE, "pgd_20", protocol="T1", num_draws=10), "accuracy"),
    Column("known", "PGD-20, known draw (T2)", Accuracy(SUITE, "pgd_20", protocol="T2", num_draws=10), "accuracy"),
    Column("retries", "APGD-CE, worst of k draws (T3)", Accuracy(SUITE, "apgd_ce_50", protocol="T3", num_draws=10), "accuracy"),
    Column("averaged", "APGD-CE on the averaged answer (T4)", Accuracy(SUITE, "apgd_ce_50_averaged", protocol="T4"), "accuracy"),
    Column("worst", "worst attack per image (T1)", WorstCase(SUITE), "accuracy"),
    Column(
        "cosine",
        "gradient cosine between draws",
        Theory("transferability.gradient_cosines", field="mean", pairs=("transferability.random_pairs", {"num_pairs": 10})),
        "randomness",
        unit="",
    ),
    Column("parameters", "parameters", _cost("num_parameters"), "cost", unit=""),
    Column("macs", "MACs per image", _cost("macs_per_image"), "cost", unit=""),
    Column("latency", "latency", _cost("latency"), "cost", unit="s"),
    Column("epoch", "training, an epoch", Timing("epoch_seconds"), "cost", unit="s"),
    Column("memory", "training, peak memory", Timing("peak_memory_megabytes"), "cost", unit="MB"),
)

TABLE_1 = Item(
    "common.table1",
    "All defences, their baselines and combinations under one schedule and one protocol, ResNet-18 on CIFAR-10",
    ROWS,
    COLUMNS,
    notes=(
        Note("members", rows=tuple(row.key for row in ROWS if row.group == ENSEMBLES or row.key.startswith("red_"))),
        Note("optimizer", rows=("gal", "adp", "trs")),
        Note("schedule", rows=("dcs",)),
        Note("clean", rows=("gal", "adp", "dverge", "trs", "red", "ps_red")),
        Note("control", rows=("rat_direct", "label_smoothing")),
    ),
)

PAPERS = (
    Paper(
        "common",
        "Randomized defences side by side",
        "Rayndom",
        "",
        (TABLE_1,),
        AMBIGUITIES,
        protocol="every model under every protocol, the unknown draw (T1) in front",
    ),
)
