"""What a finished model is worth: attacks, protocols, statistics, verdicts, tables. Knows nothing of the cluster."""

import models as models  # first of all: it sets what PyTorch reads when it is loaded
