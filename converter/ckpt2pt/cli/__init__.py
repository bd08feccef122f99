"""The command line: options in, results out, exit codes."""
