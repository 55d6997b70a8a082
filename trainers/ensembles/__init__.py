"""What the objectives of ensembles share: examples, input gradients, where members live, distilled features."""
