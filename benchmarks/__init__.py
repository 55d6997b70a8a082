"""Speed, as ratios measured side by side in one run. Each module is a command: `python -m benchmarks.attack_step`."""
