"""What `rayndom reproduce common.table1 common.table2 --scale small` found: records, the page made of them, and its picture."""
