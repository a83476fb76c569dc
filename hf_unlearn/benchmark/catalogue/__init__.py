"""The field's benchmarks, one file each; a new file that calls `register_benchmark` adds one."""
