"""docs/architecture.md says what is there: its tree is that of the code, and every file and function that its paths name exists."""

import re

from tests.architecture.documented_tree import BEGIN, PAGE, ROOT, page_with_tree


def test_the_tree_is_that_of_the_code():
    assert PAGE.read_text() == page_with_tree(), "`python -m tests.architecture.documented_tree` renews it"


def test_named_files_and_functions_exist():
    prose = PAGE.read_text().partition(BEGIN)[0]
    named = re.findall(r"`((?:models|trainers|analysis|orchestration)/[\w/]+\.py)(?::([\w.]+))?`", prose)
    assert len(named) > 30
    for file, function in named:
        path = ROOT / file
        assert path.is_file(), file
        for part in filter(None, function.split(".")):
            assert re.search(rf"^\s*(?:def|class) {part}\b|^\s*{part}\b.*=", path.read_text(), re.M), f"{file}:{function}"
