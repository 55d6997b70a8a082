"""An evaluation as data and as work: suites, protocols, blocks, studies, their records and what is measured from them."""
