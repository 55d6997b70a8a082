"""The quantities, a file for each subject. A file lists its entries in a tuple `QUANTITIES`."""
