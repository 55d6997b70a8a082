"""Networks that Rayndom did not build: named by a callable, a file or timm's name, read without executing more than is said."""
