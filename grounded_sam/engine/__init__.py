"""Where a run is computed: in this process, or on the workers of a cluster; one class per file."""
