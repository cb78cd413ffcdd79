"""The command line and what it runs: a module, networks and data for any task, and the report on a trained model."""
