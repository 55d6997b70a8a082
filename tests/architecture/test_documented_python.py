"""The Python of the documentation runs as it is written: each block after what its page assumes, with smaller numbers at most."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

import pytest

from tests.architecture.source import ROOT
from tests.architecture.test_documentation import DOCS

PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """How a block is run.

    Attributes:
        page, starts: which block it is. before: code that makes what the page assumes. smaller: what is replaced so that it takes no time.
        after: code that looks at what came out. elsewhere: the test that runs it instead. slow: it trains.
    """

    page: str
    starts: str
    before: str = ""
    smaller: tuple[tuple[str, str], ...] = ()
    after: str = ""
    elsewhere: str = ""
    slow: bool = False


EXPORTED = """
import torch
from models import build_model
from models.weights import save_pretrained
save_pretrained(build_model("ctrw", backbone="resnet8", num_classes=10, image_shape=(1, 8, 8)), "{folder}", card="a card")
images = torch.rand(2, 1, 8, 8)
"""
TINY = '"data.image_size": 8, "data.limit_train": 64, "data.limit_test": 40, "data.validation_size": 32, "training.batch_size": 32'
SIXTH = "tests/contracts/test_sixth_defence.py"
BROWSER = "tests/orchestration/test_browser.py"
BLOCKS = [
    Block(
        "README.md",
        "from models.weights import load_pretrained",
        EXPORTED.format(folder="rayndom_home/exports/ctrw_bounds_digits"),
        after="assert logits.shape == (2, 10) and not torch.equal(logits, model(images))",
    ),
    Block(
        "README.md",
        "from models import build_model",
        "import torch\nx, y = torch.rand(1, 3, 32, 32), torch.tensor([3])",
        (("resnet18", "resnet8"), ("num_draws=20", "num_draws=2")),
        "assert 0 < (x_adv - x).abs().max() <= 8 / 255 + 1e-6",
    ),
    Block(
        "README.md",
        "from rayndom import evaluate",
        smaller=(('"training.epochs": 2', f'"training.epochs": 1, {TINY}'), ("num_samples=100", "num_samples=8, num_draws=4")),
        after="assert len(found.frame) and len(found.checks) == 21 and found.figures and not model.training",
        slow=True,
    ),
    Block("README.md", "# models/defences/feature_noise.py", elsewhere=SIXTH),
    Block("README.md", "# orchestration/defences/feature_noise.py", elsewhere=SIXTH),
    Block(
        "docs/evaluation.md",
        "evaluate(model, x, y, backward=smooth)",
        """
        import torch
        from torch import nn
        from analysis.evaluate import evaluate
        x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
        smooth = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        model = nn.Sequential(nn.Hardtanh(), smooth)
        """,
        (("evaluate(model, x, y,", "found = evaluate(model, x, y, suite='quick',"),),
        "assert found.finished",
    ),
    Block("docs/evaluation.md", "from analysis.evaluate import evaluate", elsewhere="tests/orchestration/test_external_models.py"),
    Block(
        "docs/evaluation.md",
        "from models.forward_randomness import as_random_model",
        """
        import torch
        class Net(torch.nn.Module):
            def forward(self, x):
                return x.flatten(1)[:, :10] + torch.randn(len(x), 10)
        """,
        after="from models.randomness import is_randomized\nassert is_randomized(build())",
    ),
    Block("docs/mlflow.md", "import mlflow", elsewhere=BROWSER),
    Block("docs/mlflow.md", "logits = model.predict(images)", elsewhere=BROWSER),
    Block(
        "docs/plugins.md", "from rayndom.testing import contract_of", smaller=(('"my_noise"', '"ctrw"'),), after="assert dir(TestMyNoise)"
    ),
    Block(
        "docs/training.md",
        "from pathlib import Path",
        """
        import torch
        from models import build_model
        torch.save({"state_dict": build_model("at", backbone="wrn28_10", num_classes=10, image_shape=(3, 32, 32)).state_dict()},
                   "Wang2023Better_WRN-28-10.pt")
        """,
        after="assert Path('wang2023/model.safetensors').is_file()",
        slow=True,
    ),
    Block("docs/tutorial.md", "from models.weights import load_pretrained", EXPORTED.format(folder="exported/ctrw"), after="model(images)"),
]


def written() -> list[tuple[str, str]]:
    """Every block of Python of the documentation, with its page."""
    pages = [*DOCS, *(ROOT / "examples").rglob("*.md")]
    return [(str(page.relative_to(ROOT)), text) for page in pages for text in PYTHON.findall(page.read_text(encoding="utf-8"))]


def test_each_block_is_one_of_these():
    known = [(block.page, block.starts) for block in BLOCKS]
    assert sorted(known) == sorted(
        (page, next(start for of, start in known if of == page and text.startswith(start))) for page, text in written()
    )
    assert all((ROOT / block.elsewhere).is_file() for block in BLOCKS if block.elsewhere)


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, id=f"{block.page}: {block.starts[:40]}", marks=[pytest.mark.slow] if block.slow else [])
        for block in BLOCKS
        if not block.elsewhere
    ],
)
def test_it_runs(block, tmp_path, monkeypatch):
    (text,) = [text for page, text in written() if page == block.page and text.startswith(block.starts)]
    for long, short in block.smaller:
        assert long in text
        text = text.replace(long, short)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAYNDOM_HOME", raising=False)
    exec(compile("\n".join([textwrap.dedent(block.before), text, block.after]), block.page, "exec"), {"__name__": "documented"})
