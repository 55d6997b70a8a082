"""The comparison that no paper has: five defences, their baselines and combinations under one schedule and one protocol, with their cost.

`table1`: ResNet-18 on CIFAR-10, every row with PGD-10, 200 epochs with drops at 100 and 150. `table2`: ResNet-8 on Fashion-MNIST, every
row with PGD-10 and the one cycle of 12 epochs of its recipe. Ensembles have three members, checkpoints are selected on the same held-out
images, and every number comes from the suite `standard`. At scale `small` both have the rows of `SMALL`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from analysis.evaluation.protocols import ProtocolName
from analysis.reproduction.papers.measures import Accuracy, Clean, Theory, Timing, WorstCase
from analysis.reproduction.papers.model import Column, Gain, Item, Note, Paper, Row, Run

SUITE = "standard"
BASELINES, RANDOMIZED, ENSEMBLES, WEIGHTS, COMBINED = "baselines", "random layers", "ensembles", "training by weight noise", "combinations"

AMBIGUITIES = {
    "members": "Ensembles have three members, so that the table can be afforded; RED's paper has eight on CIFAR-10.",
    "optimizer": "GAL, ADP and TRS keep the optimizer of their papers.",
    "schedule": "DCS has the schedule of the others here, not that of its paper (PGD-7, drops at 60 and 120).",
    "pretraining": "DVERGE begins with 20 epochs on clean images, where its paper begins with a trained ensemble.",
    "clean": "These ensembles train their cross-entropy on clean images, as in their papers.",
    "control": "Controls of RAT, which is worth what it gains over them.",
    "averaged": "Deterministic networks have no averaged answer; the cell stays empty.",
    "arc": "ARC walks through the members of an ensemble, or through frozen draws; on deterministic networks it is not run.",
}


@dataclass(frozen=True)
class _Setting:
    """Where the comparison runs: end of the recipes' names, their epochs, and what the rows change in them."""

    where: str
    epochs: int
    dcs: tuple[str, ...] = ()
    ensemble: tuple[str, ...] = ()
    dverge: tuple[str, ...] = ()
    dverge_epochs: int | None = None
    dverge_pretraining: int = 0
    red_warmup: float = 5.0
    awp_warmup: float = 9.0
    without_groups: tuple[str, ...] = ()

    def run(self, method: str, *overrides: str, in_epochs: Mapping[str, float] | None = None) -> Run:
        """Return a training of this setting."""
        return Run(f"{method}_{self.where}", overrides, epochs=self.epochs, in_epochs=in_epochs or {})

    def normalization(self, name: str) -> Run:
        """Return adversarial training with one normalization everywhere."""
        groups = self.without_groups if name in ("in", "ln") else ()
        return self.run("single_normalization", f"defence.normalization={name}", *groups)

    def members(self, method: str, *overrides: str) -> Run:
        """Return an ensemble of three members."""
        return self.run(method, *self.ensemble, *overrides)

    def red(self, method: str, *overrides: str) -> Run:
        """Return RED or PS-RED with three members."""
        return self.run(method, *self.ensemble, *overrides, in_epochs={"training.objective.warmup_epochs": self.red_warmup})

    def red_of(self, defence: str) -> Run:
        """Return RED with adversarial training, its members carrying a defence each."""
        run = self.red("red", "training.objective.ce_on=adv")
        return Run(f"red_{self.where}_{defence}_members", run.overrides, epochs=run.epochs, in_epochs=run.in_epochs)

    def distilled(self) -> Run:
        """Return DVERGE with three members."""
        pretraining = {"training.objective.pretraining_epochs": float(self.dverge_pretraining)} if self.dverge_pretraining else {}
        return Run(f"dverge_{self.where}", (*self.ensemble, *self.dverge), epochs=self.dverge_epochs or self.epochs, in_epochs=pretraining)

    def rows(self) -> tuple[Row, ...]:
        """Return all rows."""
        awp = {"training.objective.weight_perturbation.warmup_epochs": self.awp_warmup}
        bounds = ("defence.constraint=project", "defence.lower_bound=1000")
        adversarial = "training.objective.ce_on=adv"
        return (
            Row("natural", "natural training", BASELINES, self.run("natural")),
            Row("at", "adversarial training, BN", BASELINES, self.run("at")),
            Row("in", "adversarial training, IN", BASELINES, self.normalization("in")),
            Row("gn", "adversarial training, GN", BASELINES, self.run("single_normalization")),
            Row("bgn", "adversarial training, BGN", BASELINES, self.normalization("bgn")),
            Row("ln", "adversarial training, LN", BASELINES, self.normalization("ln")),
            Row("dcn", "deformable convolution", BASELINES, self.run("dcn")),
            Row("trades", "TRADES", BASELINES, self.run("trades")),
            Row("awp", "TRADES-AWP", BASELINES, self.run("awp", in_epochs=awp)),
            Row("ctrw", "CTRW", RANDOMIZED, self.run("ctrw")),
            Row("ctrw_project", "CTRW with its paper's bounds", RANDOMIZED, self.run("ctrw", *bounds)),
            Row("rna", "RNA", RANDOMIZED, self.run("rna")),
            Row("dcs", "DCS with GSAT", RANDOMIZED, self.run("dcs", *self.dcs)),
            Row("dcs_without_gsat", "DCS without GSAT", RANDOMIZED, self.run("dcs", *self.dcs, "defence.gsat=off")),
            Row("gal", "GAL", ENSEMBLES, self.members("gal")),
            Row("adp", "ADP", ENSEMBLES, self.members("adp")),
            Row("dverge", "DVERGE", ENSEMBLES, self.distilled()),
            Row("trs", "TRS", ENSEMBLES, self.members("trs")),
            Row("red", "RED", ENSEMBLES, self.red("red", "training.objective.ce_on=clean")),
            Row("red_adversarial", "RED with adversarial training", ENSEMBLES, self.red("red", adversarial)),
            Row("ps_red", "PS-RED with adversarial training", ENSEMBLES, self.red("ps_red", adversarial)),
            Row("rat_taylor", "RAT by its equations", WEIGHTS, self.run("rat_taylor")),
            Row("rat_surrogate", "RAT as its public code", WEIGHTS, self.run("rat_surrogate")),
            Row("rat_direct", "one sample of weight noise", WEIGHTS, self.run("rat_direct")),
            Row("label_smoothing", "label smoothing", WEIGHTS, self.run("label_smoothing")),
            Row("red_ctrw", "RED of CTRW members", COMBINED, self.red_of("ctrw")),
            Row("red_rna", "RED of RNA members", COMBINED, self.red_of("rna")),
            Row("red_dcs", "RED of DCS members", COMBINED, self.red_of("dcs")),
            Row("rna_ctrw", "RNA and CTRW in one network", COMBINED, self.run("rna_ctrw")),
            Row("rna_dcs", "RNA and DCS in one network", COMBINED, self.run("rna_dcs")),
        )


CIFAR = _Setting(
    "cifar10_resnet18",
    200,
    dcs=("training.attack.steps=10", "training.schedule.milestones=[100, 150]"),
    ensemble=("defence.num_members=3",),
    dverge=("training.objective.epsilon=0.07",),
    dverge_epochs=220,
    dverge_pretraining=20,
)
FASHION = _Setting("fashion_mnist", 12, red_warmup=3.0, awp_warmup=2.0, without_groups=("defence.num_groups=null",))


SMALL = (
    *("natural", "at", "trades", "awp"),
    *("ctrw", "ctrw_project", "rna", "dcs", "dcs_without_gsat"),
    *("red", "red_adversarial", "ps_red"),
    *("rat_taylor", "rat_surrogate", "rat_direct"),
    *("rna_ctrw", "rna_dcs"),
)
"""What randomness is worth, and what it is held against, at a size that cores can afford."""


def _cost(field: str) -> Theory:
    return Theory("cost", field=field)


def _pgd(protocol: ProtocolName) -> Accuracy:
    return Accuracy(SUITE, "pgd_20", protocol=protocol, num_draws=10)


COLUMNS = (
    Column("clean", "clean", Clean(), "accuracy"),
    Column("paper", "PGD-20, paper protocol (T0)", _pgd("T0"), "accuracy"),
    Column("unknown", "PGD-20, unknown draw (T1)", _pgd("T1"), "accuracy"),
    Column("known", "PGD-20, known draw (T2)", _pgd("T2"), "accuracy"),
    Column("retries", "APGD-CE, worst of k draws (T3)", Accuracy(SUITE, "apgd_ce_50", protocol="T3", num_draws=10), "accuracy"),
    Column("averaged", "APGD-CE on the averaged answer (T4)", Accuracy(SUITE, "apgd_ce_50_averaged", protocol="T4"), "accuracy"),
    Column("arc", "ARC on frozen draws (T1)", Accuracy(SUITE, "arc_20", protocol="T1", num_draws=10), "accuracy"),
    Column("worst", "worst attack per image (T1)", WorstCase(SUITE), "accuracy"),
    Column(
        "cosine",
        "gradient cosine between draws",
        Theory("draw_cosines", {"num_pairs": 10, "num_images": 1000}, field="mean_cosine"),
        "randomness",
        unit="",
    ),
    Column("parameters", "parameters", _cost("parameters"), "cost", unit=""),
    Column("macs", "MACs per image", _cost("macs_per_image"), "cost", unit=""),
    Column("latency", "latency", _cost("latency"), "cost", unit="s"),
    Column("epoch", "training, an epoch", Timing("epoch_seconds"), "cost", unit="s"),
    Column("memory", "training, peak memory", Timing("peak_memory_megabytes"), "cost", unit="MB"),
)

SHARED_NOTES = (
    Note("optimizer", rows=("gal", "adp", "trs")),
    Note("clean", rows=("gal", "adp", "dverge", "trs", "red")),
    Note("control", rows=("rat_direct", "label_smoothing")),
    Note("averaged", columns=("averaged",)),
    Note("arc", columns=("arc",)),
)

PAPERS = (
    Paper(
        "common",
        "Randomized defences side by side",
        "Rayndom",
        "",
        (
            Item(
                "common.table1",
                "All defences, their baselines and combinations under one schedule and one protocol, ResNet-18 on CIFAR-10",
                CIFAR.rows(),
                COLUMNS,
                notes=(
                    Note(
                        "members",
                        rows=("gal", "adp", "dverge", "trs", "red", "red_adversarial", "ps_red", "red_ctrw", "red_rna", "red_dcs"),
                    ),
                    Note("schedule", rows=("dcs",)),
                    Note("pretraining", rows=("dverge",)),
                    *SHARED_NOTES,
                ),
                small=SMALL,
            ),
            Item(
                "common.table2",
                "All defences, their baselines and combinations under one schedule and one protocol, ResNet-8 on Fashion-MNIST",
                FASHION.rows(),
                COLUMNS,
                notes=SHARED_NOTES,
                small=SMALL,
            ),
        ),
        AMBIGUITIES,
        protocol="every model under every protocol, the unknown draw (T1) in front",
        gains=tuple(
            Gain(table, row, baseline, claimed_by)
            for table in ("common.table1", "common.table2")
            for row, baseline, claimed_by in (
                ("ctrw", "at", "ctrw"),
                ("ctrw_project", "at", "ctrw"),
                ("rna", "at", "rna"),
                ("dcs", "at", "dcs"),
                ("dcs_without_gsat", "at", "dcs"),
                ("red", "dverge", "red"),
                ("red_adversarial", "at", "red"),
                ("ps_red", "at", "red"),
                ("rat_taylor", "trades", "rat"),
                ("rat_surrogate", "trades", "rat"),
                *((row, "at", "") for row in ("trades", "awp", "rat_taylor", "rat_surrogate", "rat_direct", "rna_ctrw", "rna_dcs")),
            )
        ),
    ),
)
