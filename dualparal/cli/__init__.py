"""The command line: flags to a job, a job to an engine."""
