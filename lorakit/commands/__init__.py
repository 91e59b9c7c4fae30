"""One file per subcommand: its options, its help, and one call into the library."""
