"""DCS's tables and figures.

Reference: Ma, Huang, Dong, You, Xu, "Adversarial Robustness via Deformable Convolution with Stochasticity", ICML 2025.
"""

from __future__ import annotations

from dataclasses import replace

from analysis.reproduction.papers.measures import Accuracy, Clean, Theory, Timing, TransferAccuracy
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

SUITE = "paper_dcs"
PGD_20 = Accuracy(SUITE, "pgd_20")
AUTOATTACK = Accuracy(SUITE, "autoattack_of_torchattacks")

# The recipes of AT and DCN have the schedule of CTRW and RNA; this paper trains its baselines like DCS.
SCHEDULE = ("training.attack.steps=7", "training.schedule.milestones=[60, 120]")
DCS = Run("dcs_cifar10_resnet18")
DCS_WRN = Run("dcs_cifar10_wrn34_10")
CONV = Run("at_cifar10_resnet18", SCHEDULE)
CONV_WRN = Run("at_cifar10_wrn34_10", SCHEDULE)
RANDOM_MASKS = "defence.gsat='off'"  # bare, YAML reads it as false

AMBIGUITIES = {
    "D1": "DCS replaces the second convolution in section 5.1 and appendix B.4, the third in the paragraph on CIFAR; the second, as in the "
    "code.",
    "D2": "p_s is n/k in sections 4.2 and A.3 and n/k^2 in A.1 and A.2; n/k^2, with which the algebra of A.1 holds.",
    "D3": "k is the area in one place and the side everywhere else; the side.",
    "D4": "Definition 1 has a kernel per location, the code one per forward pass; one per forward pass, which Lemma 1 needs.",
    "D5": "A.1 defines m = k^2 mod S^2 and beta = k - m; m = k mod S and beta = S - m, so that the counts add up.",
    "D6": "With S = 1 no n satisfies Eq. 12, the paper's own k = 5 and n = 2 included; n is empirical.",
    "D7": "At S = 1 there are no points in X^u, yet cancelling them changes Table 5. The caption cancels them in the test alone: the "
    "network that was trained with uniform masks and GSAT is evaluated under masks with one tap of each of the first n parity classes, as "
    "the code has them (`sampling: stratified2`; 9, 324 and 1296 masks for n = 1, 3, 4). The code has no such masks for n = 2: classes 1 "
    "and 2, 54 masks, are our reading. Pairs of kind X^u exist from S = 2 on: Fig. 4b takes the sixth convolution.",
    "coded": "The code's stratified blocks have no GSAT exclusion: this row is trained as well as evaluated with such masks, without GSAT.",
    "D8": "Table 4, without GSAT, has 62.93±4.48 for k = 5, which Table 5 has for n = 4 with GSAT, and 90.58±0.10, which Table 3 has for "
    "WRN34 without GSAT; both are run.",
    "D9": "In Table 4 k = 3 has a clean accuracy below the robust one; a collapsed run or swapped cells, not a target.",
    "D10": "AutoAttack leaves more than PGD, which contains less: an artefact of one frozen mask. On ImageNet the official AutoAttack also "
    "feeds images without normalization and does not draw again. Never read alone.",
    "D11": "The authors' later public entries are 5 to 6 points lower: CIFAR-100 WRN 46.54 for 52.36, ResNet-18 43.85 for 49.01.",
    "D12": "EOTPGD runs on a frozen mask, where it equals PGD; with masks drawn again beside it.",
    "D13": "Nothing in DCS lacks a gradient, so BPDA is PGD and BPDA+EOT is EOT-PGD; the official BPDA steps by 0.5, unclipped.",
    "D14": "Algorithms 1 and 2 take the gradient at X without accumulation and draw a Gaussian; PGD without it.",
    "D15": "The schedule (60 and 120 of 200 epochs, PGD-7) differs from that of CTRW and RNA; baselines of this paper have it too.",
    "D16": "The evaluation on ImageNet is not described: radius 4/255, 10 steps of 1/255.",
    "D17": "On ImageNet the text has n = 2 with GSAT, the code n = 4 without; as in the text.",
    "D18": "Minutes and seconds depend on the machine, and the stored logs disagree with Table 8.",
    "D19": "Ten repetitions in the text, one to five in the scripts; ten.",
    "D20": "Whether the stored code evaluates ResNet-18 with independent masks is not said. Its evaluation command does: two masks of n "
    "= 2 share 0, 1 and 2 taps in 0.849, 0.147 and 0.003 of the draws, independent ones in 0.843, 0.153 and 0.003. So they are here.",
    "D21": "Eq. 13 excludes one path, Algorithm 1 and the code all masks that share a tap; disjoint masks.",
    "D22": "Which deformable convolution DCN is, is not said; version 1, 3x3, at the same position.",
    "D23": "Table 3 is said to show that a larger n is less stable, but varies no n; Table 5 does.",
    "D24": "Some methods listed as random noise use more training data.",
    "vit": "The official code runs ViT on images of 224x224 and puts the convolution alone in front of it; here images have 32x32 pixels "
    "and the stem is a convolution with batch normalization and ReLU.",
    "axis": "The text gives no radii for Fig. 3b and no positions for Fig. 7: 2/255 to 20/255, and all 17 convolutions.",
    "initialization": "On ImageNet and for ViT the paper starts from pretrained networks, ViT in two stages; training starts "
    "from scratch, unless given weights.",
    "labels": "The row labels of Table 3 are lost in the text; by Table 1's values they are CIFAR-10 with ResNet-18 and with WRN34.",
    "transfer": "FGSM and FGSM-base of Table 6 are not explained; by their size, examples from a naturally trained network and from the "
    "adversarially trained baseline with an ordinary convolution.",
}


def _attacks() -> tuple[Column, ...]:
    return (
        Column("natural", "Natural", Clean()),
        Column("pgd20", "PGD20", PGD_20),
        Column("aa", "AA", AUTOATTACK),
        Column("cw", "CW12", Accuracy(SUITE, "cw")),
        Column("mifgsm", "MIFGSM", Accuracy(SUITE, "mifgsm_5")),
        Column("deepfool", "DeepFool", Accuracy(SUITE, "deepfool")),
    )


def _main_rows() -> tuple[Row, ...]:
    rows: list[Row] = []
    for data, name in (("cifar10", "CIFAR 10"), ("cifar100", "CIFAR 100")):
        for key, label, backbone in (("resnet18", "RN 18", "resnet18"), ("wrn34", "WRN 34", "wrn34_10")):
            rows += [
                Row(f"{data}/{key}/conv", "Conv", f"{name}, {label}", Run(f"at_{data}_{backbone}", SCHEDULE)),
                Row(f"{data}/{key}/dcn", "DCN", f"{name}, {label}", Run(f"dcn_{data}_{backbone}", SCHEDULE)),
                Row(f"{data}/{key}/dcs", "DCS(ours)", f"{name}, {label}", Run(f"dcs_{data}_{backbone}")),
            ]
    return tuple(rows)


DCN_ROWS = tuple(f"{data}/{key}/dcn" for data in ("cifar10", "cifar100") for key in ("resnet18", "wrn34"))

TABLE_1 = Item(
    "dcs.table1",
    "Robust accuracy of adversarial defences on CIFAR-10 and CIFAR-100",
    _main_rows(),
    _attacks(),
    grid(
        _attacks(),
        """
        cifar10/resnet18/conv  81.17 51.16 47.34 77.69 54.07 5.63
        cifar10/resnet18/dcn   80.33 52.23 48.04 77.07 54.91 8.01
        cifar10/resnet18/dcs   89.11±0.10 72.10±2.49 73.41±2.04 88.56±0.29 69.75±2.05 88.24±0.58
        cifar10/wrn34/conv     86.18 54.00 50.84 82.50 57.99 4.48
        cifar10/wrn34/dcn      82.25 52.54 49.11 78.36 55.29 0.90
        cifar10/wrn34/dcs      90.58±0.08 75.84±2.00 75.46±1.62 90.28±0.01 76.86±1.79 90.20±0.12
        cifar100/resnet18/conv 55.14 28.31 24.57 50.61 29.55 5.07
        cifar100/resnet18/dcn  54.06 23.23 19.82 48.88 25.41 1.05
        cifar100/resnet18/dcs  64.71±0.05 46.57±1.96 49.01±1.10 64.33±0.07 49.38±1.27 64.43±0.26
        cifar100/wrn34/conv    60.10 31.98 28.15 55.35 33.87 3.47
        cifar100/wrn34/dcn     58.90 27.02 24.47 53.88 29.65 4.79
        cifar100/wrn34/dcs     66.69±0.07 48.05±1.81 52.36±1.14 66.55±0.06 51.24±1.03 66.59±0.30
        """,
    ),
    notes=(
        Note("D1"),
        Note("D15"),
        Note("D19"),
        Note("D10", columns=("aa",)),
        Note("D11", rows=("cifar10/wrn34/dcs", "cifar100/resnet18/dcs", "cifar100/wrn34/dcs"), columns=("aa",)),
        Note("D20", rows=("cifar10/resnet18/dcs", "cifar100/resnet18/dcs")),
        Note("D22", rows=DCN_ROWS),
    ),
)

TABLE_2_COLUMNS = (
    Column("cifar10_pgd", "PGD", PGD_20, "CIFAR 10"),
    Column("cifar10_aa", "AA", AUTOATTACK, "CIFAR 10"),
    Column("imagenet_pgd", "PGD", Accuracy(SUITE, "pgd_20", {"steps": 10, "step_size": "1/255"}), "Imagenet"),
    Column("imagenet_aa", "AA", AUTOATTACK, "Imagenet"),
)

TABLE_2 = Item(
    "dcs.table2",
    "Comparison with the state of the art, WRN34 on CIFAR-10 and ResNet-50 on ImageNet",
    (
        Row("overfit", "Overfit", "AT", quoted="Rice et al., 2020"),
        Row("dwq", "DWQ", "AT", quoted="Fu et al., 2021"),
        Row("robustwrn", "RobustWRN", "AT", quoted="Huang et al., 2021"),
        Row(
            "dcn",
            "WRN+DCN+AT",
            "AT",
            runs={"CIFAR 10": Run("dcn_cifar10_wrn34_10", SCHEDULE), "Imagenet": Run("dcn_imagenet_resnet50", epochs=90)},
        ),
        Row("diffat", "DiffAT", "AT", quoted="Wang et al., 2023"),
        Row("additive_noise", "Additive Noise", "Random Noise", quoted="Li et al., 2019"),
        Row("advwrn", "AdvWRN", "Random Noise", quoted="Bartoldson et al., 2024"),
        Row("df", "DF", "Random Noise", quoted="Chen & Lee, 2024"),
        Row("meansparse", "MeanSparse", "Random Noise", quoted="Amini et al., 2024"),
        Row("cert_ra", "Cert-RA", "Certified", quoted="Chiang et al., 2020"),
        Row("lwta", "LWTA", "Random Structure", quoted="Panousis et al., 2021"),
        Row("saf", "SAF", "Random Structure", quoted="Wang et al., 2018"),
        Row("dcs", "DCS(ours)", "Random Structure", runs={"CIFAR 10": DCS_WRN, "Imagenet": Run("dcs_imagenet_resnet50", epochs=90)}),
    ),
    TABLE_2_COLUMNS,
    grid(
        TABLE_2_COLUMNS,
        """
        overfit        55.06 52.24 39.85 -
        dwq            52.18 49.70 42.88 -
        robustwrn      59.13 52.48 31.14 -
        dcn            52.54 49.11 40.66 -
        diffat         -     70.69 -     31.30
        additive_noise 62.36 58.47 -     -
        advwrn         -     73.71 -     -
        df             -     58.22 -     40.60
        meansparse     -     75.28 -     59.64
        cert_ra        68.60 -     -     -
        lwta           81.87 74.71 -     -
        saf            67.40 -     -     -
        dcs            75.84 75.46 52.38 66.79
        """,
    ),
    notes=(
        Note("D10", rows=("dcs",), columns=("cifar10_aa", "imagenet_aa")),
        Note("D16", columns=("imagenet_pgd", "imagenet_aa")),
        Note("D17", rows=("dcs",), columns=("imagenet_pgd", "imagenet_aa")),
        Note("D22", rows=("dcn",)),
        Note("D24", rows=("advwrn", "df", "meansparse")),
        Note("initialization", rows=("dcn", "dcs"), columns=("imagenet_pgd", "imagenet_aa")),
    ),
)

TABLE_3_COLUMNS = (Column("natural", "Natural Acc", Clean()), Column("robust", "Robust Acc", AUTOATTACK))

TABLE_3 = Item(
    "dcs.table3",
    "Gradient-selective adversarial training against ordinary one, on CIFAR-10, under AutoAttack",
    (
        Row("resnet18/at", "Normal AT", "RN 18", DCS.tuned(RANDOM_MASKS)),
        Row("resnet18/gsat", "GSAT", "RN 18", DCS),
        Row("wrn34/at", "Normal AT", "WRN 34", DCS_WRN.tuned(RANDOM_MASKS)),
        Row("wrn34/gsat", "GSAT", "WRN 34", DCS_WRN),
    ),
    TABLE_3_COLUMNS,
    grid(
        TABLE_3_COLUMNS,
        """
        resnet18/at   83.53±0.35 60.64±0.02
        resnet18/gsat 89.11±0.10 73.41±2.04
        wrn34/at      90.58±0.10 54.45±0.00
        wrn34/gsat    90.58±0.08 75.46±1.62
        """,
    ),
    notes=(Note("labels"), Note("D10", columns=("robust",)), Note("D23"), Note("D8", rows=("wrn34/at",), columns=("natural",))),
)

TABLE_4_COLUMNS = (Column("natural", "Natural Acc", Clean()), Column("robust", "Robust Acc", PGD_20))

TABLE_4 = Item(
    "dcs.table4",
    "Kernel size k without GSAT, n = 4, ResNet-18 on CIFAR-10, under PGD-20",
    tuple(Row(f"k{k}", f"{k}*{k}", run=DCS.tuned(f"defence.kernel_size={k}", "defence.num_taps=4", RANDOM_MASKS)) for k in (9, 7, 5, 3)),
    TABLE_4_COLUMNS,
    grid(
        TABLE_4_COLUMNS,
        """
        k9 87.12±0.12 68.64±1.14
        k7 90.63±0.10 66.39±3.20
        k5 90.58±0.10 62.93±4.48
        k3 15.44±0.27 37.52±5.29
        """,
    ),
    notes=(Note("D3"), Note("D8", rows=("k5",)), Note("D9", rows=("k3",), exempt=True)),
)


def _taps(n: int) -> Run:
    return DCS if n == 2 else DCS.tuned(f"defence.num_taps={n}")


CANCELLED = {"sampling": "stratified2"}
AS_CODED = ("defence.sampling=stratified2", RANDOM_MASKS)
TABLE_5_COLUMNS = (Column("pgd20", "PGD20", PGD_20), Column("aa", "AA", AUTOATTACK))

TABLE_5 = Item(
    "dcs.table5",
    "Receptive field n with and without the points of X^u, ResNet-18 on CIFAR-10",
    (
        *(Row(f"n{n}", str(n), "include X^u", _taps(n)) for n in (4, 3, 2, 1)),
        *(Row(f"n{n}/cancelled", str(n), "cancel X^u", replace(_taps(n), evaluated_with=CANCELLED)) for n in (4, 3, 2, 1)),
        *(Row(f"n{n}/as_coded", str(n), "cancel X^u, as coded", _taps(n).tuned(*AS_CODED), extra=True) for n in (4, 3, 1)),
    ),
    TABLE_5_COLUMNS,
    grid(
        TABLE_5_COLUMNS,
        """
        n4           62.93±4.48 64.18±0.91
        n3           70.75±2.55 72.88±1.47
        n2           72.10±2.49 73.41±2.04
        n1           61.83±1.25 64.40±1.89
        n4/cancelled 63.50±3.80 56.40±1.53
        n3/cancelled 65.15±3.26 65.83±0.88
        n2/cancelled 64.64±2.04 66.14±1.60
        n1/cancelled 56.82±1.84 58.88±1.67
        """,
    ),
    notes=(
        Note("D6"),
        Note("D10", columns=("aa",)),
        Note("D7", rows=("n4/cancelled", "n3/cancelled", "n2/cancelled", "n1/cancelled")),
        Note("coded", rows=("n4/as_coded", "n3/as_coded", "n1/as_coded")),
        Note("D8", rows=("n4",), columns=("pgd20",)),
    ),
)

TABLE_6_COLUMNS = (
    Column("natural", "Natural", Clean()),
    Column("square", "SQUARE", Accuracy(SUITE, "square"), "Query-based"),
    Column("pixel", "Pixel", Accuracy(SUITE, "one_pixel"), "Query-based"),
    Column("fgsm", "FGSM", TransferAccuracy(Accuracy(SUITE, "fgsm"), other="{row}/natural"), "Transfer-based"),
    Column("fgsm_base", "FGSM-base", TransferAccuracy(Accuracy(SUITE, "fgsm"), other="{row}/conv"), "Transfer-based"),
    Column("bpda", "BPDA", PGD_20, "Adaptive"),
    Column("bpda_eot", "BPDA+EOT", Accuracy(SUITE, "eot_pgd_20x10"), "Adaptive"),
)

TABLE_6 = Item(
    "dcs.table6",
    "DCS under black-box and adaptive attacks, on CIFAR-10",
    (
        Row("resnet18", "RN18", run=DCS),
        Row("wrn34", "WRN34", run=DCS_WRN),
        Row("resnet18/natural", "RN18 naturally trained, source of FGSM", run=Run("natural_cifar10_resnet18"), extra=True),
        Row("wrn34/natural", "WRN34 naturally trained, source of FGSM", run=Run("natural_cifar10_wrn34_10"), extra=True),
        Row("resnet18/conv", "RN18 Conv, source of FGSM-base", run=CONV, extra=True),
        Row("wrn34/conv", "WRN34 Conv, source of FGSM-base", run=CONV_WRN, extra=True),
    ),
    TABLE_6_COLUMNS,
    grid(
        TABLE_6_COLUMNS,
        """
        resnet18 89.11 80.53 86.32 84.95 65.71 78.66 77.78
        wrn34    90.58 82.45 86.31 90.53 68.34 80.03 80.47
        """,
    ),
    notes=(Note("transfer", columns=("fgsm", "fgsm_base")), Note("D13", columns=("bpda", "bpda_eot")), Note("D12", columns=("bpda_eot",))),
)

ONLY_PGD = (Column("pgd", "PGD", PGD_20),)

TABLE_7 = Item(
    "dcs.table7",
    "DCS in a vision transformer's convolutional stem, on CIFAR-10",
    (
        Row("conv", "ViT-t+Conv", run=Run("at_cifar10_vit_tiny")),
        Row("dcs", "ViT-t+DCS", run=Run("dcs_cifar10_vit_tiny")),
    ),
    ONLY_PGD,
    grid(ONLY_PGD, "conv 32.31\ndcs 55.71"),
    notes=(Note("D1"), Note("initialization"), Note("vit")),
)

TABLE_8_COLUMNS = (
    Column("training", "Training Overhead/min", Timing("training_minutes"), unit="min", judged=False),
    Column("inference", "Reasoning Overhead/sec", Timing("test_set_seconds"), unit="s", judged=False),
)

TABLE_8 = Item(
    "dcs.table8",
    "Time of training and of inference, ResNet-18 on CIFAR-10",
    (Row("baseline", "baseline", run=CONV), Row("dcs", "DCS", run=DCS)),
    TABLE_8_COLUMNS,
    grid(TABLE_8_COLUMNS, "baseline 213.47 5.94\ndcs 379.96 6.67"),
    notes=(Note("D18"),),
)

TABLE_9_COLUMNS = (Column("pgd", "PGD", PGD_20), Column("aa", "AA", AUTOATTACK))

TABLE_9 = Item(
    "dcs.table9",
    "DCS in the downsampling layer 6 and its neighbours, ResNet-18 on CIFAR-10",
    tuple(Row(str(layer), str(layer), run=DCS.tuned(f"defence.positions=[{layer}]")) for layer in (5, 6, 7)),
    TABLE_9_COLUMNS,
    grid(TABLE_9_COLUMNS, "5 68.12 70.72\n6 72.03 75.74\n7 69.36 72.11"),
    notes=(Note("D10", columns=("aa",)),),
)

BOTH_NETWORKS = (Row("resnet18", "ResNet 18", run=DCS), Row("wrn34", "WRN 34", run=DCS_WRN))

FIGURE_3A = Item(
    "dcs.fig3a",
    "Accuracy over the number of PGD steps, on CIFAR-10",
    BOTH_NETWORKS,
    steps_axis(SUITE, "pgd_20", range(0, 101, 10)),
    figure=Figure("line", x_label="PGD steps", y_label="accuracy", caption="robust throughout, with some fluctuation"),
)

FIGURE_3B = Item(
    "dcs.fig3b",
    "Accuracy over the radius of PGD-20, on CIFAR-10",
    BOTH_NETWORKS,
    epsilon_axis(SUITE, "pgd_20", range(0, 21, 2)),
    figure=Figure("line", x_label="epsilon in 255ths", y_label="accuracy", caption="robustness falls gradually"),
    notes=(Note("axis"),),
)

FIGURE_3C = Item(
    "dcs.fig3c",
    "Accuracy over the EOT iterations of EOTPGD, on CIFAR-10",
    BOTH_NETWORKS,
    tuple(Column(f"eot_{count}", str(count), Accuracy(SUITE, "eot_pgd_20x10", {"eot_iter": count}), x=count) for count in range(1, 11)),
    figure=Figure("line", x_label="EOT iterations", y_label="accuracy", caption="stays robust"),
    notes=(Note("D12"),),
)

RANDOM_PAIRS = {"num_pairs": 10, "num_images": 1000}

FIGURE_4A = Item(
    "dcs.fig4a",
    "Gradient cosine between masks, and accuracy, of three ways of training ResNet-18 with DCS on CIFAR-10",
    (
        Row("natural", "normal training", run=DCS.tuned(RANDOM_MASKS, "training.objective.name=natural")),
        Row("at", "AT", run=DCS.tuned(RANDOM_MASKS)),
        Row("gsat", "GSAT", run=DCS),
    ),
    (
        Column("cosine", "cosine", Theory("draw_cosines", RANDOM_PAIRS, field="mean_cosine"), unit=""),
        Column("natural", "natural accuracy", Clean()),
        Column("pgd20", "PGD20 accuracy", PGD_20),
    ),
    figure=Figure("bars", curves="columns", y_label="cosine; accuracy", caption="GSAT has smaller cosines and more clean accuracy than AT"),
)

FIGURE_4B = Item(
    "dcs.fig4b",
    "Histograms of the gradient cosine for designed pairs of kernels, n = 4, 1,000 images, ResNet-18 on CIFAR-10",
    (Row("dcs", "DCS, n = 4", run=DCS.tuned("defence.num_taps=4", "defence.positions=[6]")),),
    tuple(
        Column(
            key,
            label,
            Theory("dcs_kind_cosines", {"kind": kind, **RANDOM_PAIRS}),
            unit="",
            judged=False,
        )
        for key, label, kind in (("same", "C_s", "same"), ("gap", "C_g", "gap"), ("unhit", "C_u", "unhit"))
    ),
    figure=Figure("histogram", curves="columns", x_label="cosine", y_label="images", caption="C_g is low too"),
    notes=(Note("D7"),),
)

KERNELS, TAPS = (3, 5, 7, 9, 11), (1, 2, 3, 4, 5, 6)


def _heatmap(panel: str, attack: str, column: Column) -> Item:
    return Item(
        f"dcs.fig6{panel}",
        f"Accuracy over kernel size k and taps n under {attack}, ResNet-18 on CIFAR-10",
        # GSAT needs two disjoint masks: 2n <= k^2.
        tuple(
            Row(
                f"k{k}/n{n}",
                f"k = {k}, n = {n}",
                run=DCS.tuned(*((f"defence.kernel_size={k}",) if k != 5 else ()), *((f"defence.num_taps={n}",) if n != 2 else ())),
                x=n,
                y=k,
            )
            for k in KERNELS
            for n in TAPS
            if 2 * n <= k * k
        ),
        (column,),
        figure=Figure("heatmap", curves="columns", x_label="n", y_label="k", caption="best at k = 5 and n = 2"),
        notes=(Note("D3"), Note("D6")),
    )


FIGURE_7 = Item(
    "dcs.fig7",
    "Accuracy over the convolution that DCS replaces, ResNet-18 on CIFAR-10",
    tuple(
        Row(str(position), str(position), run=DCS if position == 2 else DCS.tuned(f"defence.positions=[{position}]"), x=position)
        for position in range(1, 18)
    ),
    (Column("pgd20", "PGD20", PGD_20),),
    figure=Figure(
        "line",
        curves="columns",
        x_label="number of the convolution",
        y_label="accuracy",
        caption="close to its peak in the first six, low at the eighth",
    ),
    notes=(Note("axis"), Note("D1")),
)

PAPERS = (
    Paper(
        "dcs",
        "Adversarial Robustness via Deformable Convolution with Stochasticity",
        "Ma, Huang, Dong, You, Xu",
        "ICML 2025",
        (
            illustration("dcs.fig1", "How DCS defends a network"),
            illustration("dcs.fig2", "Points that two kernels share, miss and never reach"),
            TABLE_1,
            FIGURE_3A,
            FIGURE_3B,
            FIGURE_3C,
            TABLE_2,
            TABLE_3,
            FIGURE_4A,
            FIGURE_4B,
            TABLE_4,
            TABLE_5,
            TABLE_6,
            TABLE_7,
            illustration("dcs.fig5", "Designed pairs of kernels"),
            _heatmap("a", "PGD-20", Column("pgd20", "PGD20", PGD_20)),
            _heatmap("b", "AutoAttack", Column("aa", "AA", AUTOATTACK)),
            FIGURE_7,
            TABLE_8,
            TABLE_9,
        ),
        AMBIGUITIES,
        protocol="one mask is frozen and attacked, another one scores (T0), mean of ten repetitions",
        gains=tuple(
            Gain("dcs.table1", f"{data}/{network}/dcs", f"{data}/{network}/conv")
            for data in ("cifar10", "cifar100")
            for network in ("resnet18", "wrn34")
        ),
    ),
)
