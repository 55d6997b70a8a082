"""Is this machine ready, and how to mend what is not: findings as data, for the command line, for JSON and for tests."""
