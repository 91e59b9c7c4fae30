"""What lorakit costs, against its peers and against the machine: `python -m tests.benchmarks`."""
