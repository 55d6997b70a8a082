"""RNA's tables and figures.

Reference: Dong, Chen, Wang, Xu, "Random Normalization Aggregation for Adversarial Defense", NeurIPS 2022.
"""

from __future__ import annotations

from analysis.reproduction.papers.measures import Accuracy, Clean, Theory, TransferAccuracy
from analysis.reproduction.papers.model import (
    Column,
    Figure,
    Gain,
    Item,
    Note,
    Paper,
    Row,
    Run,
    epsilon_axis,
    grid,
    illustration,
    steps_axis,
)

SUITE = "paper_rna"
PGD_20 = Accuracy(SUITE, "pgd_20")
AUTOATTACK = Accuracy(SUITE, "autoattack_of_torchattacks")

RNA = Run("rna_cifar10_resnet18")
NORMALIZATIONS = (("bn", "BN", "[18]"), ("bgn", "BGN32", "[19]"), ("in", "IN", "[17]"), ("gn", "GN32", "[16]"), ("ln", "LN", "[15]"))

AMBIGUITIES = {
    "R1": "Section 5.1 has BN and IN, section 4 BGN and GN of small groups; BN and GN of size 1 (which is IN) on CIFAR, sizes 1 and 2 on "
    "ImageNet. Table 5's last row is the same pair.",
    "R2": "`32` in GN32 is a number of groups, `[a-b]` in Table 5 a range of group sizes; read as the powers of two in it.",
    "R3": "BN is called a special case of BGN, but the official BGN has an inverted momentum; here BGN of size 1 is BN exactly.",
    "R4": "Algorithm 1 takes the gradient at x; at the perturbed image, as in the code.",
    "R5": "The README's training command lacks adversarial training; it is on.",
    "R6": "WideResNet32 is WRN-34-10 in the code; 32 does not fit the depth rule.",
    "R7": "The last normalization of WRN is batch normalization in the code whatever the others are, random or not; here too.",
    "R8": "The baseline IN has no affine parameters, RNA's IN has; kept.",
    "R9": "Table 4 does not give the groups of GN and BGN; 32 groups each, the notation of Table 1.",
    "R10": "SAT is [22] in Table 3 and [44] in the text; [22].",
    "R11": "How often evaluations are repeated is not said.",
    "R12": "The training path may equal the attacked one; never excluded.",
    "R13": "The number of paths is said to matter, but transfer depends on their distance, which is about half the layers; Fig. 5c at 10.",
    "R14": "Eq. 3 applies gamma twice for GN; once.",
    "R15": "The attack's step on ImageNet is not given; 2/255 in training, 1/255 in evaluation.",
    "R16": "ResNet-18 is cited as the CIFAR report; He et al.",
    "groups": "At smoke scale the network has layers of 16 channels: groups of 32 and 64 channels do not fit and are not in the pool.",
    "diverges": "The first row of Table 5 does not train; only its clean accuracy is printed.",
    "initialization": "On ImageNet the paper starts from a pretrained ResNet-50; training starts from scratch, unless given weights.",
    "networks": "The text does not say which networks, natural or adversarially trained, Figures 2 and 3 show, nor all pairs of Figure 3; "
    "adversarially trained ones, and every pair.",
}


def _attacks() -> tuple[Column, ...]:
    return (
        Column("natural", "Natural", Clean()),
        Column("fgsm", "FGSM", Accuracy(SUITE, "fgsm")),
        Column("pgd20", "PGD20", PGD_20),
        Column("cw", "CW", Accuracy(SUITE, "cw")),
        Column("mifgsm", "MIFGSM", Accuracy(SUITE, "mifgsm_5")),
        Column("deepfool", "DeepFool", Accuracy(SUITE, "deepfool")),
        Column("aa", "AutoAttack", AUTOATTACK),
    )


def _normalized(key: str, data: str = "cifar10", backbone: str = "resnet18") -> Run:
    """Return the adversarial training with one normalization everywhere."""
    if key == "bn":
        return Run(f"at_{data}_{backbone}")
    run = Run(f"single_normalization_{data}_{backbone}")
    return run if key == "gn" else run.tuned(f"defence.normalization={key}")


def _natural(key: str) -> Run:
    """Return the natural training with one normalization everywhere."""
    return Run("natural_cifar10_resnet18") if key == "bn" else _normalized(key).tuned("training.objective.name=natural")


def _main_rows(data: str) -> tuple[Row, ...]:
    rows: list[Row] = []
    for key, label, backbone in (("resnet18", "ResNet-18", "resnet18"), ("wrn", "WideResNet32", "wrn34_10")):
        rows += [Row(f"{key}/{name}", title, label, _normalized(name, data, backbone)) for name, title, _ in NORMALIZATIONS]
        rows.append(Row(f"{key}/rna", "RNA(Ours)", label, Run(f"rna_{data}_{backbone}")))
    return tuple(rows)


WRN_ROWS = tuple(f"wrn/{name}" for name in ("bn", "bgn", "in", "gn", "ln", "rna"))
MAIN_NOTES = (
    Note("R1", rows=("resnet18/rna", "wrn/rna")),
    Note("R6", rows=WRN_ROWS),
    Note("R7", rows=("wrn/bgn", "wrn/in", "wrn/gn", "wrn/ln", "wrn/rna")),
    Note("R8", rows=("resnet18/in", "wrn/in")),
)

TABLE_1 = Item(
    "rna.table1",
    "Adversarially trained networks on CIFAR-10",
    _main_rows("cifar10"),
    _attacks(),
    grid(
        _attacks(),
        """
        resnet18/bn  81.84 56.70 52.16 78.46 54.96 0.35 47.69
        resnet18/bgn 77.28 54.60 50.71 73.57 53.05 0.39 46.12
        resnet18/in  77.07 50.07 42.76 72.51 47.63 2.27 38.30
        resnet18/gn  76.69 52.60 45.66 72.92 50.26 0.72 41.83
        resnet18/ln  79.81 53.88 45.44 75.51 50.72 1.13 41.48
        resnet18/rna 84.29 63.10 60.69 84.45 60.70 76.73 65.61
        wrn/bn       85.27 60.65 55.06 82.24 58.47 0.40 52.24
        wrn/bgn      83.70 59.66 54.96 80.25 57.85 0.37 51.38
        wrn/in       84.11 58.14 50.37 80.13 55.37 1.62 46.81
        wrn/gn       83.45 58.95 51.94 79.55 56.70 1.37 47.99
        wrn/ln       83.24 57.80 49.74 79.39 54.68 0.95 46.44
        wrn/rna      86.46 65.73 63.34 85.68 62.84 78.18 67.88
        """,
    ),
    notes=MAIN_NOTES,
)

TABLE_2 = Item(
    "rna.table2",
    "Adversarially trained networks on CIFAR-100",
    _main_rows("cifar100"),
    _attacks(),
    grid(
        _attacks(),
        """
        resnet18/bn  55.81 31.33 28.71 50.94 30.26 0.79 24.48
        resnet18/bgn 53.16 30.11 27.75 48.74 29.11 0.54 23.29
        resnet18/in  52.92 27.56 23.16 47.70 25.91 2.86 19.33
        resnet18/gn  51.00 28.32 25.10 45.82 27.10 0.79 21.00
        resnet18/ln  48.82 27.05 23.83 44.07 26.93 0.80 19.97
        resnet18/rna 56.79 36.76 35.55 56.86 34.00 51.77 42.12
        wrn/bn       60.11 35.40 31.69 57.11 34.14 0.23 28.36
        wrn/bgn      58.54 34.13 30.97 54.08 33.01 0.46 26.92
        wrn/in       56.71 31.96 28.09 51.98 30.33 1.83 24.25
        wrn/gn       59.08 33.56 29.94 53.89 32.30 1.12 25.78
        wrn/ln       57.09 32.92 29.75 52.19 31.73 0.79 25.71
        wrn/rna      60.57 37.87 36.04 60.21 35.58 55.16 42.43
        """,
    ),
    notes=MAIN_NOTES,
)

TABLE_3_COLUMNS = (
    Column("cifar10_pgd20", "PGD20", PGD_20, "CIFAR-10"),
    Column("cifar10_aa", "AA", AUTOATTACK, "CIFAR-10"),
    Column("imagenet_pgd50", "PGD50", Accuracy(SUITE, "pgd_20", {"steps": 50, "step_size": "1/255"}), "ImageNet"),
)

TABLE_3 = Item(
    "rna.table3",
    "Comparison with defence algorithms, WRN on CIFAR-10 and ResNet-50 on ImageNet",
    (
        Row("robustwrn", "RobustWRN", quoted="[41]"),
        Row("awp", "AWP", quoted="[42]"),
        Row("robnet", "RobNet", quoted="[11]"),
        Row("rpi_rpt", "RPI+RPT", quoted="[43]"),
        Row("sat", "SAT", quoted="[22]"),
        Row("rna", "RNA(Ours)", runs={"CIFAR-10": Run("rna_cifar10_wrn34_10"), "ImageNet": Run("rna_imagenet_resnet50", epochs=60)}),
    ),
    TABLE_3_COLUMNS,
    grid(
        TABLE_3_COLUMNS,
        """
        robustwrn 59.13 52.48 31.14
        awp       58.14 54.04 -
        robnet    52.74 -     37.15
        rpi_rpt   53.96 53.30 42.72
        sat       56.01 51.83 42.30
        rna       63.34 67.88 54.61
        """,
    ),
    notes=(
        Note("R1", rows=("rna",)),
        Note("R10", rows=("sat",)),
        Note("R15", rows=("rna",), columns=("imagenet_pgd50",)),
        Note("initialization", rows=("rna",), columns=("imagenet_pgd50",)),
    ),
)

COMBINATIONS = (
    ("gn_bgn", "GN+BGN", RNA.tuned("defence.pool=[gn_groups_32, bgn_groups_32]")),
    ("gn_ln", "GN+LN", RNA.tuned("defence.pool=[gn_groups_32, ln]")),
    ("ln_bn", "LN+BN", RNA.tuned("defence.pool=[ln, bn]")),
    ("in_bn", "IN+BN", RNA),
)
TABLE_4_COLUMNS = (
    Column("pgd20", "PGD20", PGD_20),
    Column("deepfool", "DeepFool", Accuracy(SUITE, "deepfool")),
    Column("aa", "AutoAttack", AUTOATTACK),
)

TABLE_4 = Item(
    "rna.table4",
    "Random spaces from different combinations of normalizations, ResNet-18 on CIFAR-10",
    (Row("bn", "BN", run=_normalized("bn")), *(Row(key, label, run=run) for key, label, run in COMBINATIONS)),
    TABLE_4_COLUMNS,
    grid(
        TABLE_4_COLUMNS,
        """
        bn     52.16 0.35  47.69
        gn_bgn 55.40 70.26 58.90
        gn_ln  46.67 62.85 47.96
        ln_bn  55.67 68.14 58.73
        in_bn  60.69 76.73 65.61
        """,
    ),
    notes=(Note("R9", rows=("gn_bgn", "gn_ln")), Note("R1", rows=("in_bn",))),
)


def _sizes(largest: int, *kinds: str) -> str:
    """Return the pool of all group sizes that are powers of two up to `largest`, of each kind."""
    sizes = [2**power for power in range(largest.bit_length())]
    return f"defence.pool=[{', '.join(f'{kind}_size_{size}' for kind in kinds for size in sizes)}]"


WHITE_BOX = "training.redraw=each_batch"
LAYER_BASED = "defence.choice=per_network"
BOTH = ("bgn", "gn")

TABLE_5 = Item(
    "rna.table5",
    "Ablation of the random space, the adversarial training and the layer-based constraint, ResNet-18 on CIFAR-10",
    (
        Row(
            "all_white",
            "BN+IN+GN+LN",
            "WhiteBox, layer-based",
            RNA.tuned("defence.pool=[bn, in, gn_groups_32, ln]", LAYER_BASED, WHITE_BOX),
        ),
        Row("gn64_white", "GN[1-64]", "WhiteBox, layer-based", RNA.tuned(_sizes(64, "gn"), LAYER_BASED, WHITE_BOX)),
        Row("gn64_black", "GN[1-64]", "BlackBox, layer-based", RNA.tuned(_sizes(64, "gn"), LAYER_BASED)),
        Row("both64_black", "BGN+GN[1-64]", "BlackBox, layer-based", RNA.tuned(_sizes(64, *BOTH), LAYER_BASED)),
        Row("both64_free", "BGN+GN[1-64]", "BlackBox, layer-free", RNA.tuned(_sizes(64, *BOTH))),
        Row("both16_free", "BGN+GN[1-16]", "BlackBox, layer-free", RNA.tuned(_sizes(16, *BOTH))),
        Row("both4_free", "BGN+GN[1-4]", "BlackBox, layer-free", RNA.tuned(_sizes(4, *BOTH))),
        Row("both1_free", "BGN+GN[1-1]", "BlackBox, layer-free", RNA),
    ),
    _attacks(),
    grid(
        _attacks(),
        """
        all_white    10.45 - - - - - -
        gn64_white   75.50 53.62 49.57 74.63 51.81 47.20 50.57
        gn64_black   77.54 55.06 51.32 76.55 52.44 58.72 52.59
        both64_black 73.81 53.98 52.98 73.19 53.07 63.78 56.86
        both64_free  61.72 46.73 46.42 61.89 45.69 56.82 51.26
        both16_free  70.99 51.66 49.74 70.48 51.58 63.63 55.98
        both4_free   78.26 58.91 56.29 77.74 56.31 70.83 61.08
        both1_free   84.29 63.10 60.69 84.45 60.70 76.73 65.61
        """,
    ),
    notes=(
        Note("R2"),
        Note("R1", rows=("both1_free",)),
        Note("R9", rows=("all_white",)),
        Note("diverges", rows=("all_white",)),
        Note("groups", rows=("gn64_white", "gn64_black", "both64_black", "both64_free")),
    ),
)

PGD_7 = Accuracy(SUITE, "pgd_20", {"steps": 7})
SHORT_LABELS = {"bn": "BN", "bgn": "BGN", "in": "IN", "gn": "GN", "ln": "LN"}
TARGETS = tuple(Column(key, label, TransferAccuracy(PGD_7, other=key, made_on="row")) for key, label in SHORT_LABELS.items())
HEATMAP = Figure("heatmap", x_label="target", y_label="source of the adversarial examples")


def _sources(natural: bool) -> tuple[Row, ...]:
    return tuple(Row(key, label, run=_natural(key) if natural else _normalized(key)) for key, label in SHORT_LABELS.items())


FIGURE_1C = Item(
    "rna.fig1c",
    "Transfer of PGD-7 examples between normalizations, naturally trained ResNet-18 on CIFAR-10",
    _sources(natural=True),
    TARGETS,
    figure=HEATMAP,
    notes=(Note("R2", rows=("bgn", "gn")),),
)

FIGURE_1D = Item(
    "rna.fig1d",
    "Transfer of PGD-7 examples between normalizations, adversarially trained ResNet-18 on CIFAR-10",
    _sources(natural=False),
    TARGETS,
    grid(
        TARGETS,
        """
        bn - - - - 71.29
        in - - - - 74.34
        """,
    ),
    figure=HEATMAP,
    notes=(Note("R2", rows=("bgn", "gn")),),
)


def _landscape(panel: str, title: str, *keys: str) -> Item:
    measure = Theory("input_landscape", {"radius": "8/255", "num_positions": 25, "num_images": 8})
    return Item(
        f"rna.fig2{panel}",
        title,
        tuple(Row(key, SHORT_LABELS[key], run=_normalized(key)) for key in keys),
        (Column("loss", "loss", measure, unit="", judged=False),),
        figure=Figure("landscape", x_label="along the sign of the gradient", y_label="along random signs", caption="IN is the smoothest"),
        notes=(Note("networks"),),
    )


FIGURE_3 = Item(
    "rna.fig3",
    "Histograms of the cosine of input gradients between networks with different normalizations",
    tuple(Row(key, label, run=_normalized(key)) for key, label in SHORT_LABELS.items()),
    tuple(Column(key, f"with {label}", Theory("network_cosines", other=key), unit="", judged=False) for key, label in SHORT_LABELS.items()),
    figure=Figure("histogram", x_label="cosine", y_label="images", caption="BN and BGN are far more alike than BN and IN"),
    notes=(Note("networks"),),
)

SIX_METHODS = (
    *(Row(key, label, run=_normalized(key)) for key, label in SHORT_LABELS.items()),
    Row("rna", "RNA", run=RNA),
)
STEPS = steps_axis(SUITE, "pgd_20", range(10, 101, 10))
RADII = epsilon_axis(SUITE, "pgd_20", range(2, 21, 2))

FIGURE_5A = Item(
    "rna.fig5a",
    "Accuracy over the number of PGD steps, ResNet-18 on CIFAR-10",
    SIX_METHODS,
    STEPS,
    grid(STEPS, "rna 60.70 - - - - - - - - 59.94"),
    figure=Figure("line", x_label="PGD steps", y_label="accuracy"),
    notes=(Note("R1", rows=("rna",)),),
)

FIGURE_5B = Item(
    "rna.fig5b",
    "Accuracy over the radius of PGD-20, ResNet-18 on CIFAR-10",
    SIX_METHODS,
    RADII,
    grid(RADII, "rna 80.06 - - - - - - - - 24.90"),
    figure=Figure(
        "line",
        x_label="epsilon in 255ths",
        y_label="accuracy",
        caption="from 2 to 20 RNA loses 55.16 points, BN 64.68, GN 58.40",
    ),
    notes=(Note("R1", rows=("rna",)),),
)


def _at_difference(field: str, difference: int) -> Theory:
    return Theory("rna_path_transfer", {"difference": difference, "num_pairs": 10}, field=field)


DIFFERENCES = tuple(
    Column(f"{field}_{difference}", f"{field} at {difference}", _at_difference(field, difference), field, x=difference)
    for field in ("mean", "minimum", "maximum")
    for difference in range(21)
)

FIGURE_5C = Item(
    "rna.fig5c",
    "Accuracy of one path under PGD on another, over the number of layers in which they differ; 10 pairs each, ResNet-18 on CIFAR-10",
    tuple(Row(key, label, run=run) for key, label, run in COMBINATIONS),
    DIFFERENCES,
    grid(tuple(column for column in DIFFERENCES if column.key == "mean_10"), "in_bn 61.09"),
    figure=Figure(
        "band", x_label="path difference", y_label="PGD accuracy", caption="two random paths differ in about 10 of the 20 layers"
    ),
    notes=(Note("R13"), Note("R9", rows=("gn_bgn", "gn_ln")), Note("R1", rows=("in_bn",))),
)

PAPERS = (
    Paper(
        "rna",
        "Random Normalization Aggregation for Adversarial Defense",
        "Dong, Chen, Wang, Xu",
        "NeurIPS 2022",
        (
            illustration("rna.fig1a", "Dimensions that LN, GN and IN normalize"),
            illustration("rna.fig1b", "Dimensions that BGN and BN normalize"),
            FIGURE_1C,
            FIGURE_1D,
            _landscape("a", "Smoothness of the loss with BN", "bn"),
            _landscape("b", "Smoothness of the loss with IN", "in"),
            _landscape("c", "Smoothness of the loss with all five normalizations", *SHORT_LABELS),
            FIGURE_3,
            illustration("rna.fig4", "RNA and black-box adversarial training"),
            TABLE_1,
            TABLE_2,
            TABLE_3,
            TABLE_4,
            TABLE_5,
            FIGURE_5A,
            FIGURE_5B,
            FIGURE_5C,
        ),
        AMBIGUITIES,
        protocol="one path is frozen and attacked, another one scores once (T0)",
        gains=tuple(
            Gain(table, f"{network}/rna", f"{network}/bn") for table in ("rna.table1", "rna.table2") for network in ("resnet18", "wrn")
        ),
    ),
)
