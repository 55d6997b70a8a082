"""What Rayndom asks of every defence."""

from rayndom.testing import contract_of

TestRandomResizing = contract_of("random_resizing", growth=1.5)
